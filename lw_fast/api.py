"""LatentPrompt: a trained latent prompt for notebooks and programs.

from lw_fast import Latent, LatentPrompt

lp = LatentPrompt.from_checkpoint("runs/first")
z = lp.encode([(context, question)])            # Z [1, M, d_z], once for all LMs
lp.generate("qwen", z)                          # ["Denver"]
z.save("z.safetensors")                         # 2 * M * d_z bytes in fp16, say
lp.check(Latent.load("z.safetensors"))
model.generate(inputs_embeds=lp.prefix("qwen", z), max_new_tokens=16)   # plain transformers
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lw_fast.config import Config, config_hash
from lw_fast.data import Example
from lw_fast.errors import UserError
from lw_fast.evaluate import decode_rules, encode, generate
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import LatentModel, load_model
from lw_fast.prompts import Latents, Prompts, decode_frame, make_prompts
from lw_fast.run_folder import read_config, resolve_checkpoint

logger = logging.getLogger(__name__)

Text = str | tuple[str, str]
"""A context, or a context and the question about it."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Latent prompts, and which checkpoint can read them."""

    values: Tensor
    """Z [N, M, d_z], fp32 on the CPU unless you changed that."""
    config_hash: str
    """Of the settings that the encoder was trained with."""
    weights_hash: str
    """Of the trained weights: another epoch of the same run reads another language."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int | slice) -> Latent:
        """Some of the N prompts; an int keeps N, as 1."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return Latent(
            values=self.values[index],
            config_hash=self.config_hash,
            weights_hash=self.weights_hash,
        )

    @property
    def payload_bytes(self) -> int:
        """What one prompt costs to send, in the dtype of `values`."""
        return self.values[0].numel() * self.values.element_size() if len(self) else 0

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Writes a safetensors file; `dtype=torch.float16` halves it.

        Raises:
            UserError: it cannot be written.
        """
        from safetensors.torch import save

        hashes = {"config_hash": self.config_hash, "weights_hash": self.weights_hash}
        data = save({"z": self.values.to("cpu", dtype).contiguous()}, metadata=hashes)
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Latent:
        """Reads what `save` wrote, as fp32 on the CPU; LatentPrompt checks the hashes in use.

        Raises:
            UserError: no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                hashes, values = file.metadata() or {}, file.get_tensor("z")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a latent prompt file: {error}") from None
        if values.dim() != 3 or not {"config_hash", "weights_hash"} <= hashes.keys():
            raise UserError(f"{path} is not a latent prompt file: lw_fast did not write it")
        return cls(
            values=values.float(),
            config_hash=hashes["config_hash"],
            weights_hash=hashes["weights_hash"],
        )


class LatentPrompt:
    """A trained encoder, its adapters and the frozen LMs they speak to."""

    def __init__(self, model: LatentModel, trained_with: Config | None = None) -> None:
        """`trained_with`: the settings of the checkpoint, where `model` was loaded with others."""
        self.model = model
        self.model.bridge.eval()
        self.config_hash = config_hash(trained_with or model.config)
        self.weights_hash = _weights_hash(model.bridge.state_dict())

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        lms: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> LatentPrompt:
        """Loads a run's newest checkpoint, or the one in `path`.

        Args:
            path: A run folder or a checkpoint folder in it.
            device: auto (a GPU where there is one), cuda or cpu.
            lms: Another source for some LMs, by name.
            settings: Changed settings, such as backbone_dtype="nf4" or max_new_tokens=8.

        Raises:
            UserError: no checkpoint there, it is damaged, or an LM cannot be loaded.
        """
        folder = resolve_checkpoint(Path(path))
        return cls(load_model(folder, _device(device), settings, lms), read_config(folder))

    @property
    def lms(self) -> Mapping[str, FrozenLM]:
        """The frozen LMs by name; `.model` and `.tokenizer` are those of transformers."""
        return self.model.lms

    @property
    def latent_len(self) -> int:
        """M, the number of positions that replace a text."""
        return self.model.config.encoder.latent_len

    def encode(self, texts: Sequence[Text]) -> Latent:
        """Texts, or (context, question) pairs -> Z [N, M, d_z]. Long contexts are cut, and told.

        Raises:
            UserError: nothing to encode, or one string in place of a list of them.
        """
        examples = _examples(texts)
        cut = self.model.sources(examples).cut
        if cut:
            logger.warning("%d of %d texts were too long and lost their end", cut, len(examples))
        z_NMZ = encode(self.model, examples).z_NMZ
        return Latent(
            values=z_NMZ.cpu(), config_hash=self.config_hash, weights_hash=self.weights_hash
        )

    def prefix(self, lm_name: str, z: Latent) -> Tensor:
        """What the LM reads in place of a text: [BOS] [Z_1 .. Z_M] [anchor], embedded.

        Returns:
            [N, S, D] in the LM's dtype on its device; `lms[lm_name].model.generate(inputs_embeds=
            ...)` of plain transformers takes it as it is (no attention mask: all rows are full).
        """
        prompts = self._latent_prompts(lm_name, z)
        with torch.no_grad():
            return torch.stack(prompts.embeds(range(len(z))))

    def generate(self, lm_name: str, z: Latent, *, max_new_tokens: int | None = None) -> list[str]:
        """Answers of one LM to each latent prompt, decoded and cleaned as in the evaluation."""
        return self._answers("latent", lm_name, self._latent_prompts(lm_name, z), max_new_tokens)

    def generate_from_text(
        self, lm_name: str, texts: Sequence[Text], *, max_new_tokens: int | None = None
    ) -> list[str]:
        """The same LM's answers to the full text, for comparison."""
        return self._answers("text", lm_name, self._text_prompts(lm_name, texts), max_new_tokens)

    def text_tokens(self, lm_name: str, texts: Sequence[Text]) -> list[int]:
        """Tokens of each text that `latent_len` vectors replace in this LM's prompt: BOS and
        anchor, which stand around both, are not among them."""
        frame = decode_frame("text", self._lm(lm_name).tokenizer, self.model.config)
        around = len(frame.head) + len(frame.anchor)
        return [length - around for length in self._text_prompts(lm_name, texts).lengths]

    def check(self, z: Latent) -> None:
        """Raises UserError where `z` comes from other settings or weights than these."""
        if z.config_hash != self.config_hash:
            raise UserError(
                f"this Z was made with other settings (config hash {z.config_hash}, here "
                f"{self.config_hash}): load the checkpoint that made it"
            )
        if z.weights_hash != self.weights_hash:
            raise UserError(
                f"this Z was made by other weights of the same settings (hash {z.weights_hash}, "
                f"here {self.weights_hash}): another epoch, or another run"
            )

    def _lm(self, name: str) -> FrozenLM:
        if name not in self.lms:
            raise UserError(f"no LM is named {name!r}; there are {', '.join(self.lms)}")
        return self.lms[name]

    def _latent_prompts(self, lm_name: str, z: Latent) -> Prompts:
        lm = self._lm(lm_name)
        self.check(z)
        return self._prompts("latent", lm, (), z.values.to(self.model.device))

    def _text_prompts(self, lm_name: str, texts: Sequence[Text]) -> Prompts:
        return self._prompts("text", self._lm(lm_name), _examples(texts), torch.empty(0))

    def _prompts(
        self, kind: str, lm: FrozenLM, examples: Sequence[Example], z_NMZ: Tensor
    ) -> Prompts:
        config = self.model.config
        frame = decode_frame(kind, lm.tokenizer, config)
        return make_prompts(
            kind, lm, frame, examples, Latents(z_NMZ, None), self.model.bridge,
            gain=config.adapter.prefix_gain, token_budget_k=0,
        )  # fmt: skip

    @torch.no_grad()
    def _answers(
        self, kind: str, lm_name: str, prompts: Prompts, max_new_tokens: int | None
    ) -> list[str]:
        config = self.model.config
        rules = decode_rules(config, kind, "clean")
        if max_new_tokens is not None:
            rules = dataclasses.replace(rules, max_new_tokens=max_new_tokens)
        if rules.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be greater than 0, got {max_new_tokens}")
        if not prompts.lengths:
            return []
        return generate(self.lms[lm_name], prompts, rules, config.eval.chunk_size)


def _device(choice: str) -> torch.device:
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UserError("device=cuda: PyTorch sees no GPU here")
    return torch.device("cuda" if choice == "auto" and available else choice.replace("auto", "cpu"))


def _examples(texts: Sequence[Text]) -> list[Example]:
    if isinstance(texts, str) or not texts:
        raise UserError("give a list of texts or of (context, question) pairs")
    return [Example(str(i), *_pair(text), (), -1) for i, text in enumerate(texts)]


def _pair(text: Text) -> tuple[str, str]:
    match text:
        case str():
            return text, ""
        case (str(context), str(question)):
            return context, question
    raise UserError(f"a text is a string or a pair (context, question), got {text!r:.80}")


def _weights_hash(state: Mapping[str, Tensor]) -> str:
    """12 hex digits of names, shapes and bytes, on whatever device they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
