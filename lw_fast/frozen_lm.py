"""Loads Hugging Face causal LMs, frozen; the only importer of transformers (besides nano.py).

A source is a hub name, a local folder, a .gguf file, `nano:llama` / `nano:qwen` (shipped with the
package) or `random:NAME[@TOKENIZER]` (random weights of a known shape, the same in every process,
for speed and memory work without downloads; TOKENIZER is a folder or .gguf file, by default the
shipped nano one).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lw_kernels import CrossEntropyRows, linear_masked_ce
from torch import Tensor, nn

from lw_fast import quantised
from lw_fast.config import BackboneConfig
from lw_fast.engine import Sharding
from lw_fast.errors import UserError
from lw_fast.fp8 import allow_backward, to_fp8
from lw_fast.packed_attention import packed_attention
from lw_fast.packing import Packing

logger = logging.getLogger(__name__)

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6,
        max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    ),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6,
        max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Public shapes (the models' config.json on the Hugging Face hub)."""


@dataclass
class FrozenLM:
    """One frozen causal LM and its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: Any
    source: str = ""
    stop_ids: frozenset[int] = field(default=frozenset())
    """Tokens that end a generated answer."""
    kernels: str = "auto"
    """Implementation of the fused operations: auto, torch or triton."""
    grad_ckpt: bool = False
    """Whether `hidden` recomputes the layers in the backward pass."""
    packed: bool = False
    """Whether training batches come without padding (`hidden_packed`)."""
    compiled: bool = False
    """Whether `hidden_packed` runs compiled layers."""
    sharding: Sharding | None = None
    """Set where each process holds a shard of the layers."""
    _ready_for_backward: bool = False

    @contextmanager
    def visit(self, device: torch.device) -> Iterator[None]:
        """Inside, the LM is on `device`; afterwards where it was before."""
        home = self.device
        self.model.to(device)
        try:
            yield
        finally:
            self.model.to(home)

    @property
    def d_model(self) -> int:
        """Width D of the input embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows V of the output layer."""
        return self.model.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the input embeddings, in which the LM computes."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the LM lies."""
        return self.model.get_input_embeddings().weight.device

    @property
    def is_here(self) -> bool:
        """Whether this process holds the weights (see `outline`)."""
        return self.device.type != "meta"

    def everywhere(self, flag: bool | Tensor) -> bool:
        """Whether it is true, on all processes that share this LM's layers."""
        return bool(flag) if self.sharding is None else self.sharding.everywhere(flag)

    @functools.cached_property
    def embed_rms(self) -> float:
        """RMS over ALL rows of the input embedding, computed once."""
        weight = self.model.get_input_embeddings().weight
        total = sum(chunk.float().square().sum().item() for chunk in weight.split(8192))
        return (total / weight.numel()) ** 0.5

    @functools.cached_property
    def num_layer_parameters(self) -> int:
        """Parameters N of the decoder layers (what FLOPs are counted with)."""
        shape = self.model.config
        head_dim = getattr(shape, "head_dim", None) or (
            shape.hidden_size // shape.num_attention_heads
        )
        width = shape.hidden_size
        attention = (
            width * head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
        )
        return shape.num_hidden_layers * (attention + 3 * width * shape.intermediate_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        return self.model.get_input_embeddings()(ids)

    def backbone(self, **inputs: Any) -> Any:
        """The decoder below its head, with transformers' own arguments and output. Shapes are
        free: compiled layers run as they are written."""
        with torch.compiler.set_stance("force_eager"):
            return self.model.base_model(**inputs)

    def hidden(self, embeds_BSD: Tensor) -> Tensor:
        """Right-padded input embeddings -> last hidden states [B, S, D], causal, no cache."""
        self._expect_gradient(embeds_BSD)
        with self._recomputing():
            return self.backbone(inputs_embeds=embeds_BSD, use_cache=False).last_hidden_state

    def hidden_packed(self, embeds_RD: Tensor, position_R: Tensor, packing: Packing) -> Tensor:
        """Packed input embeddings -> last hidden states [R, D], causal within each sequence.

        Compiled layers, if asked for, are used here alone: R is nearly always the same.
        """
        self._expect_gradient(embeds_RD)
        with self._recomputing(), self._packed_attention():
            run = self.model.base_model if self.compiled else self.backbone
            output = run(
                inputs_embeds=embeds_RD[None],
                position_ids=position_R[None],
                use_cache=False,
                cu_seq_lens_q=packing.cu_seqlens,
                cu_seq_lens_k=packing.cu_seqlens,
                max_length_q=packing.max_len,
                max_length_k=packing.max_len,
            )
        return output.last_hidden_state[0]

    def _expect_gradient(self, embeds: Tensor) -> None:
        """FP8 layers are readied for a backward pass when the first one is coming."""
        if embeds.requires_grad and not self._ready_for_backward:
            allow_backward(self.model.base_model)
            self._ready_for_backward = True

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Inside, attention reads cu_seqlens; FlashAttention of transformers does so anyway."""
        config = self.model.config
        usual = config._attn_implementation
        if usual == "flash_attention_2":
            yield
            return
        config._attn_implementation = _register_packed_attention()
        try:
            yield
        finally:
            config._attn_implementation = usual

    def rerun(self, config: BackboneConfig) -> FrozenLM:
        """The same weights, run as `config` says: its kernels, grad_ckpt, attention, layout and
        compilation."""
        self.model.set_attn_implementation(_attention(config, self.device))
        return _as_asked(self, config)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, layers keep their inputs only, if asked for and if a gradient will flow.

        transformers checkpoints a layer only where `layer.training` is set; what is within it
        stays in evaluation mode. Outside it must be off again: it would drop the KV cache.
        """
        layers = self._layers if self.grad_ckpt and torch.is_grad_enabled() else ()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @functools.cached_property
    def _layers(self) -> list[nn.Module]:
        """The layers that can be recomputed, set up for it."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.disable_input_require_grads()  # the prefix brings its own gradient
        layers = [m for m in self.model.modules() if isinstance(m, _checkpointing_layer())]
        if not layers:
            raise UserError(f"lm.{self.name}: this model cannot recompute layers (grad_ckpt)")
        return layers

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Rows of hidden states -> rows of logits [N, V]."""
        return self.model.get_output_embeddings()(hidden_ND)

    def score(
        self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None
    ) -> CrossEntropyRows:
        """Loss, NLL and top-1/top-5 hits of rows of hidden states against their targets."""
        head = self.model.get_output_embeddings()
        return linear_masked_ce(
            hidden_ND,
            head.weight,
            targets_N,
            bias_V=head.bias,
            weights_N=weights_N,
            impl=self.kernels,
        )

    @torch.no_grad()
    def states(self, ids_BU: Tensor, layers: Sequence[int]) -> Tensor:
        """Hidden states of right-padded ids at `layers` (0 = embedding), side by side [B, U, F].

        Each state is standardised (mean 0, variance 1), so that layers are equally loud and what
        is cached needs no norm in the training step.
        """
        states: dict[int, Tensor] = {0: self.embed(ids_BU)}
        with self._watching(layers, states):
            output = self.backbone(inputs_embeds=states[0], use_cache=False)
        states[self.model.config.num_hidden_layers] = output.last_hidden_state
        return torch.cat([F.layer_norm(states[n], states[n].shape[-1:]) for n in layers], dim=-1)

    @contextmanager
    def _watching(self, layers: Sequence[int], states: dict[int, Tensor]) -> Iterator[None]:
        """Inside, what the numbered layers put out goes into `states`.

        output_hidden_states=True would leave hooks behind that compiled layers stumble over.
        """

        def keep(number: int) -> Callable[..., None]:
            def hook(_module, _inputs, output) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        modules = self.model.base_model.layers
        handles = [modules[n - 1].register_forward_hook(keep(n)) for n in layers if n]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def resolve_layers(self, spec: str) -> tuple[int, ...]:
        """`"0,0.6,22"` -> layer numbers: integers count layers, fractions the depth."""
        depth = self.model.config.num_hidden_layers
        try:
            layers = tuple(
                round(float(word) * depth) if "." in word else int(word) for word in spec.split(",")
            )
        except ValueError:
            raise UserError(f"reader_layers: cannot read {spec!r}") from None
        if not all(0 <= layer <= depth for layer in layers):
            raise UserError(f"reader_layers {spec!r} is outside 0..{depth} of {self.name}")
        return layers


@functools.cache
def _register_packed_attention() -> str:
    """Makes it known to transformers once; returns the name that selects it."""
    from transformers import AttentionInterface

    AttentionInterface.register("lw_packed", packed_attention)
    return "lw_packed"


def _checkpointing_layer() -> type[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bf16 on GPUs and fp32 on CPUs (where it is faster and exact), unless told otherwise."""
    if choice == "fp32" or (choice == "auto" and device.type != "cuda"):
        return torch.float32
    return torch.bfloat16


def load_frozen_lm(
    name: str,
    source: str,
    config: BackboneConfig,
    device: torch.device,
    sharding: Sharding | None = None,
) -> FrozenLM:
    """Loads, freezes and checks one LM. What cannot be loaded is a UserError in one line.

    With `sharding` each process ends up with a shard of the layers, and reads no more than one
    weight at a time from a folder; a `random:` LM is whole for a moment. Collective with it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # seconds at most, and ours has its own
    dtype = compute_dtype(config.backbone_dtype, device)
    options = dict(dtype=dtype, attn_implementation=_attention(config, device))
    is_quantised = config.backbone_dtype in quantised.KINDS
    if is_quantised:
        options["quantization_config"] = quantised.quantisation(config.backbone_dtype)
        options["device_map"] = {"": device}
    kind, _, rest = source.partition(":")
    if kind == "random":
        model, tokenizer = _random(rest, options, device)
    else:
        with _in_shards(sharding, dtype):
            model, tokenizer = _pretrained(name, source, options, config.trust_remote_code)
    if sharding is not None:
        sharding.cut(model, dtype)
    if tokenizer.eos_token_id is None:
        raise UserError(f"lm.{name}: the tokenizer of {source} has no EOS token")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id >= rows:
        raise UserError(f"lm.{name}: the tokenizer's EOS is not among the {rows} tokens of the LM")
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if is_quantised:
        quantised.settle(name, model, device)
    else:
        model.to(device)
    if config.backbone_dtype == "fp8":
        to_fp8(model.base_model.layers)
    lm = FrozenLM(name, model, tokenizer, source, _stop_ids(model, tokenizer), sharding=sharding)
    return _as_asked(lm, config)


@contextmanager
def _in_shards(sharding: Sharding | None, dtype: torch.dtype) -> Iterator[None]:
    """Inside, from_pretrained keeps this process's part of each weight only."""
    if sharding is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers knows it through a weak reference: for as long as the name lives.
    known = HfDeepSpeedConfig(sharding.config(dtype))
    yield
    del known


def _as_asked(lm: FrozenLM, config: BackboneConfig) -> FrozenLM:
    # Gathering happens in hooks, which a compiled layer would not run.
    compiled = lm.sharding is None and compiles(config, lm.device)
    if compiled:
        _compile_layers(lm.model)
    return replace(
        lm,
        kernels=config.kernels,
        grad_ckpt=config.grad_ckpt,
        packed=_packs(config, lm.device),
        compiled=compiled,
    )


def _packs(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training batches are packed: by default where attention can skip between rows."""
    if config.layout == "auto":
        return device.type == "cuda" and config.attn_implementation != "eager"
    return config.layout == "packed"


def compiles(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training runs compiled layers."""
    if config.compile != "auto":
        return config.compile == "yes"
    fitting = _packs(config, device) and config.backbone_dtype not in quantised.KINDS
    return fitting and device.type == "cuda"


def _compile_layers(model: nn.Module) -> None:
    """One graph serves all layers of an LM. Compilation happens on the first step."""
    # Dynamo counts the graphs of all LMs and batch sizes together, and gives up beyond.
    torch._dynamo.config.recompile_limit = 64
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)


def outline(name: str, source: str, config: BackboneConfig, device: torch.device) -> FrozenLM:
    """An LM whose weights another process holds: its tokenizer, and its shape on the meta device.

    `embed_rms` is not known here; who has the weights must tell.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, _, rest = source.partition(":")
    trust = config.trust_remote_code
    if kind == "random":
        shape, tokenizer = _random_shape(rest)
    else:
        tokenizer = load_tokenizer(name, source, trust)
        shape = AutoConfig.from_pretrained(_resolve(name, source), trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=compute_dtype(config.backbone_dtype, device), trust_remote_code=trust
        )
    return FrozenLM(name, model, tokenizer, source)


def load_tokenizer(name: str, source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone of an LM source."""
    from transformers import AutoTokenizer

    folder = _resolve(name, source)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # on a damaged file its parsers raise whatever they trip over
        raise UserError(f"lm.{name}: no tokenizer at {source}: {_first_line(error)}") from None


def _pretrained(name: str, source: str, options: dict, trust: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, source, trust)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            _resolve(name, source),
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise UserError(f"lm.{name}: {_first_line(error)}") from None
    except Exception as error:  # as above
        raise UserError(f"lm.{name}: cannot load {source}: {_first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
        raise UserError(f"lm.{name}: {source} lacks {len(missing)} weights, such as {missing[0]}")
    return model, tokenizer


def _resolve(name: str, source: str) -> str:
    """Turns a source into what from_pretrained takes: a folder or a hub name."""
    if source.startswith("nano:"):
        folder = resources.files("lw_fast") / "assets" / "nano" / source.removeprefix("nano:")
        if not Path(str(folder)).is_dir():
            raise UserError(
                f"lm.{name}: there is no shipped LM {source}; try nano:llama, nano:qwen"
            )
        return str(folder)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        return str(_convert_gguf(name, path))
    if path.is_file():
        raise UserError(f"lm.{name}: {source} is a file but not a .gguf model")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not path.is_dir() and "/" in source:
        raise UserError(f"lm.{name}: no such model folder: {source}")
    return str(path) if path.is_dir() else source


def _random(spec: str, options: dict, device: torch.device) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    config, tokenizer = _random_shape(spec)
    with _draws_of(spec.partition("@")[0], device):
        if "quantization_config" in options:
            return quantised.random_lm(config, options, device), tokenizer
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, **options), tokenizer


@contextmanager
def _draws_of(shape_name: str, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of a shape: the same weights in every process. Outside,
    the stream of the run goes on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(shape_name.encode()))
        yield


def _random_shape(spec: str) -> tuple[Any, Any]:
    """NAME[@TOKENIZER] -> transformers' configuration and the tokenizer."""
    from transformers import AutoConfig

    shape_name, _, tokenizer_source = spec.partition("@")
    if shape_name not in RANDOM_SHAPES:
        raise UserError(f"random:{shape_name} is unknown; there are {', '.join(RANDOM_SHAPES)}")
    shape = dict(RANDOM_SHAPES[shape_name])
    family = shape.pop("model_type")
    config = AutoConfig.for_model(family, **shape)
    default = "nano:llama" if family == "llama" else "nano:qwen"
    return config, load_tokenizer(shape_name, tokenizer_source or default)


def _attention(config: BackboneConfig, device: torch.device) -> str:
    if config.attn_implementation != "auto":
        return config.attn_implementation
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def _stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """EOS of tokenizer and generation config, and the usual end-of-turn tokens, as far as the LM
    can say them (a tokenizer may know more tokens than its LM)."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    vocab = tokenizer.get_vocab()
    ends = ("<|eot_id|>", "<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>")
    ids.update(vocab[token] for token in ends if token in vocab)
    return frozenset(token for token in ids if token < model.config.vocab_size)


def cache_dir() -> Path:
    """Where converted models are kept: $LW_FAST_CACHE, else ~/.cache/lw_fast."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("LW_FAST_CACHE", Path(base) / "lw_fast"))


def _convert_gguf(name: str, path: Path) -> Path:
    """GGUF -> a folder with bf16 safetensors and tokenizer, once: GGUF metadata parses slowly."""
    if not path.is_file():
        raise UserError(f"lm.{name}: no such file: {path}")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    folder = cache_dir() / "gguf" / f"{path.stem}-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    logger.info("converting %s to safetensors in %s (once)", path, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        model, tokenizer = _read_gguf(path)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    except Exception as error:  # as above
        shutil.rmtree(work)
        raise UserError(f"lm.{name}: {path} is not a readable GGUF: {_first_line(error)}") from None
    except BaseException:
        shutil.rmtree(work)
        raise
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return folder


def _read_gguf(path: Path) -> tuple[nn.Module, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer transformers keep GGUF weights "quantised" unless told otherwise, which cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.bfloat16, **where, **options)
    # A GGUF file with its own output matrix loads untied; saving must keep both matrices.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.config.tie_word_embeddings = tied
    return model, AutoTokenizer.from_pretrained(**where)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
