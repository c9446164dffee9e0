"""What a user has today, for the same questions: the original's step, and PEFT prompt tuning.

The original (a research trainer of 2025-09-15) is re-created from its description: answers padded
to 32 tokens, logits for every position through `labels=`, a second pass for the first token only,
one backward for all of it. Its fault in the labels is not re-created; it costs no time.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps import Work
from lw_fast.batches import AnswerTable, Order, to_device
from lw_fast.frozen_lm import FrozenLM
from lw_fast.training_run import Run

IGNORED = -100
"""The label that a Hugging Face loss leaves out."""


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def no_peft() -> str:
    """Why PEFT cannot be measured here; empty if it can."""
    return "" if installed("peft") else "peft is not installed"


def no_liger() -> str:
    """The same of PEFT with Liger's kernels."""
    if not installed("liger_kernel"):
        return "liger_kernel is not installed"
    return no_peft() or ("" if torch.cuda.is_available() else "Liger needs a GPU")


class OriginalStep:
    """One optimiser step of the original: bridge, two LMs, two passes each."""

    ANSWER_LEN = 32
    FIRST_TOKEN_WEIGHT = 0.5
    RMS_ROWS = 65_536

    def __init__(self, run: Run) -> None:
        self.run, self.number = run, 0
        self.bridge = run.model.bridge.train()
        self.params = [p for p in self.bridge.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=5e-5)

    def __call__(self) -> Work:
        tables = self.run.tables
        index = self.run.order.step(self.number)
        self.number += 1
        output = self.bridge(self.run.model.batch(tables.sources, index))
        loss = 0.0
        for name, lm in self.run.model.lms.items():
            prefix_BMD = self._calibrated(lm, output.raw[name])
            loss = loss + 0.5 * self._losses(lm, tables.answers[name], prefix_BMD, index)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        loss.item()  # it printed every step
        answers = tables.answers
        return Work(
            samples=len(index),
            positions={name: table.num_positions(index) for name, table in answers.items()},
            supervised_tokens={name: table.num_targets(index) for name, table in answers.items()},
            source_bytes=int(tables.sources.num_bytes_N[index].sum()),
        )

    def _calibrated(self, lm: FrozenLM, raw_BMD: Tensor) -> Tensor:
        """Scaled to the RMS of embedding rows, drawn anew at every call."""
        table = lm.model.get_input_embeddings().weight
        rows = torch.randint(len(table), (self.RMS_ROWS,), device=table.device)
        target = table[rows].float().square().mean().sqrt().item()
        rms_B11 = raw_BMD.float().square().mean(dim=(-2, -1), keepdim=True).sqrt()
        return (raw_BMD * (target / rms_B11)).to(table.dtype)

    def _losses(
        self, lm: FrozenLM, table: AnswerTable, prefix_BMD: Tensor, index: np.ndarray
    ) -> Tensor:
        ids_BL = to_device(padded(table.ids_NL[index], self.ANSWER_LEN), lm.device)
        length_B1 = to_device(table.length_N[index], lm.device)[:, None]
        is_answer_BL = torch.arange(self.ANSWER_LEN, device=lm.device) < length_B1
        bos = lm.tokenizer.bos_token_id
        first_tail = [*table.frame.anchor, *([] if bos is None else [bos])]
        return self._answer_loss(
            lm, prefix_BMD, list(table.frame.anchor), ids_BL[:, :-1], is_answer_BL[:, :-1]
        ) + self.FIRST_TOKEN_WEIGHT * self._first_token_loss(
            lm, prefix_BMD, first_tail, ids_BL[:, 0]
        )

    def _answer_loss(
        self, lm: FrozenLM, prefix_BMD: Tensor, anchor: list[int], ids_BL: Tensor, real_BL: Tensor
    ) -> Tensor:
        embeds_BSD = torch.cat([_behind(lm, prefix_BMD, anchor), lm.embed(ids_BL)], dim=1)
        before = embeds_BSD.shape[1] - ids_BL.shape[1]
        mask_BS = F.pad(real_BL, (before, 0), value=True)
        labels_BS = F.pad(ids_BL.masked_fill(~real_BL, IGNORED), (before, 0), value=IGNORED)
        return lm.model(
            inputs_embeds=embeds_BSD, attention_mask=mask_BS.long(), labels=labels_BS,
            use_cache=False,
        ).loss  # fmt: skip

    def _first_token_loss(
        self, lm: FrozenLM, prefix_BMD: Tensor, tail: list[int], first_B: Tensor
    ) -> Tensor:
        embeds_BSD = _behind(lm, prefix_BMD, tail)
        logits_BSV = lm.model(inputs_embeds=embeds_BSD, use_cache=False).logits
        return F.cross_entropy(logits_BSV[:, -1].float(), first_B)


def _behind(lm: FrozenLM, prefix_BMD: Tensor, ids: list[int]) -> Tensor:
    """Prefix and constant tokens as input embeddings."""
    tail_TD = lm.embed(torch.tensor(ids, dtype=torch.int64, device=lm.device))
    return torch.cat([prefix_BMD, tail_TD.expand(len(prefix_BMD), -1, -1)], dim=1)


def padded(ids_BL: np.ndarray, width: int) -> np.ndarray:
    """Rows of ids cut or filled with zeros to `width`."""
    out = np.zeros((len(ids_BL), width), dtype=np.int64)
    out[:, : ids_BL.shape[1]] = ids_BL[:, :width]
    return out


class PeftStep:
    """One optimiser step of PEFT prompt tuning on one LM: a static prefix, the HF loss."""

    def __init__(self, lm: FrozenLM, table: AnswerTable, order: Order, *, liger: bool) -> None:
        """Needs peft, and with `liger` liger-kernel, which patches the LM for good."""
        import peft

        self.lm, self.table, self.order, self.number = lm, table, order, 0
        if liger:
            patch_with_liger(lm)
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=table.layout.latent_len
        )
        # In training mode Liger does not make logits; the LMs have no dropout.
        self.model = peft.get_peft_model(lm.model, config).to(lm.device).train()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-3)

    def __call__(self) -> Work:
        index = self.order.step(self.number)
        self.number += 1
        ids_BL, mask_BL, labels_BL = (
            to_device(array, self.lm.device) for array in hf_batch(self.table, index)
        )
        self.optimizer.zero_grad()
        self.model(
            input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL, use_cache=False
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return Work(
            samples=len(index),
            positions={self.lm.name: self.table.num_positions(index)},
            supervised_tokens={self.lm.name: self.table.num_targets(index)},
        )


def hf_batch(table: AnswerTable, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 ids, mask and labels [B, L]: [head] [anchor] [answer] [EOS], padded to the longest."""
    before = [*table.frame.head, *table.frame.anchor]
    length_B = table.length_N[index]
    end_B = len(before) + length_B + table.complete_N[index]
    ids_BL = np.full((len(index), end_B.max()), table.frame.eos, dtype=np.int64)
    labels_BL = np.full_like(ids_BL, IGNORED)
    for row, (i, length, end) in enumerate(zip(index, length_B, end_B, strict=True)):
        ids_BL[row, : len(before) + length] = [*before, *table.ids_NL[i, :length]]
        labels_BL[row, len(before) : end] = ids_BL[row, len(before) : end]
    mask_BL = (np.arange(ids_BL.shape[1]) < end_B[:, None]).astype(np.int64)
    return ids_BL, mask_BL, labels_BL


def patch_with_liger(lm: FrozenLM) -> None:
    """Liger's kernels for norms, MLP, rotary positions and the fused head of this LM."""
    from liger_kernel import transformers as liger

    patch = {
        "llama": liger.apply_liger_kernel_to_llama,
        "qwen2": liger.apply_liger_kernel_to_qwen2,
    }[lm.model.config.model_type]
    patch(model=lm.model)
