"""The teacher of a latent prompt: the same frozen LM behind the full text.

It reads what evaluation's kind `text` reads (plain text prompt, anchor) and then the answer as the
student has it, and says which token it expects at exactly the rows that the student is scored on:
each answer token, and EOS where the answer was not cut. Its rows never change, so they are read
once before training where they fit: one forward pass over all text prompts per LM, and
8 * kl_top_k bytes per answer row (512 by default; about 2.7 KB for the 5.3 rows of a SQuAD answer,
235 MB per LM for its 87,599 questions).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lw_fast.batches import AnswerTable, to_device
from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.forcing import batches_by_length, forced_rows
from lw_fast.frozen_lm import FrozenLM
from lw_fast.losses import TeacherRows
from lw_fast.prompts import text_prompt, text_prompts
from lw_fast.sequence import text_frame

CACHE_SHARE_GPU = 0.1
"""Share of the free GPU memory that the rows of one LM may take under teacher_cache=auto."""
CACHE_BYTES_CPU = 2**30
"""The same on a CPU, in bytes."""
POSITIONS = 16384
"""Positions per forward pass, padding included."""
BLOCK = 4096
"""Examples that are tokenised together, and sorted by length."""

logger = logging.getLogger(__name__)


class Teacher:
    """Soft targets of one LM for the answer rows of a data set."""

    def __init__(
        self, lm: FrozenLM, examples: Sequence[Example], answers: AnswerTable, config: Config
    ) -> None:
        """`answers` are those of `examples`: the student's table."""
        self.lm, self.answers = lm, answers
        self.frame = text_frame(lm.tokenizer, config.sequence)
        self.texts = [text_prompt(example.context, example.question) for example in examples]
        self.top_k = min(config.loss.kl_top_k, lm.vocab_size)
        self.temperature = config.loss.kl_temperature
        self.num_N = answers.length_N + answers.complete_N
        self.start_N = np.cumsum(self.num_N) - self.num_N
        self.table: tuple[Tensor, Tensor] | None = None
        """Token ids (int32) and log-probabilities (fp32) of all rows [R, K]."""
        if self._is_kept(config.loss.teacher_cache):
            self.table = self._read_all()

    def __call__(self, index: np.ndarray) -> TeacherRows:
        """Soft targets of the examples of `index`, row by row as AnswerTable.batch has them."""
        if self.table is None:
            ids_NK, log_probs_NK = self._read(index)
        else:
            row_N = to_device(_ranges(self.start_N[index], self.num_N[index]), self.lm.device)
            ids_NK, log_probs_NK = (column[row_N] for column in self.table)
        return TeacherRows(ids_NK.long(), log_probs_NK, self.temperature)

    def _is_kept(self, cache: str) -> bool:
        if cache != "auto":
            return cache == "on"
        if self.lm.device.type != "cuda":
            room = CACHE_BYTES_CPU
        else:
            room = CACHE_SHARE_GPU * torch.cuda.mem_get_info(self.lm.device)[0]
        return 8 * self.top_k * int(self.num_N.sum()) <= room

    def _read_all(self) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        table = self._read(np.arange(len(self.texts)))
        mass = float(table[1].exp().sum(1).mean())
        logger.info(
            "teacher %s: read %d text prompts in %.0f s; %d answer rows, whose %d likeliest tokens "
            "hold %.1f %%",
            self.lm.name, len(self.texts), time.perf_counter() - started, len(table[0]),
            self.top_k, 100 * mass,
        )  # fmt: skip
        return table

    @torch.no_grad()
    def _read(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities [N, K] of the rows of `index`, in its order."""
        num_B = self.num_N[index]
        start_B = np.cumsum(num_B) - num_B
        shape, device = (int(num_B.sum()), self.top_k), self.lm.device
        ids_NK = torch.empty(shape, dtype=torch.int32, device=device)
        log_probs_NK = torch.empty(shape, dtype=torch.float32, device=device)
        for first in range(0, len(index), BLOCK):
            block = index[first : first + BLOCK]
            prompts = text_prompts(self.lm, self.frame, [self.texts[i] for i in block])
            lengths = np.array(prompts.lengths) + self.answers.length_N[block]
            for part in batches_by_length(lengths, POSITIONS):
                place_N = _ranges(start_B[first + part], num_B[first + part])
                place_N = to_device(place_N, device)
                ids, log_probs_NK[place_N] = self._rows(block[part], prompts.embeds(part))
                ids_NK[place_N] = ids.int()
        return ids_NK, log_probs_NK

    def _rows(self, index: np.ndarray, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind the text and the answer so far: ids, log-probabilities."""
        table = self.answers
        answers = [table.ids_NL[i, : table.length_N[i]] for i in index]
        complete_B, eos = table.complete_N[index], self.frame.eos
        hidden_ND, _ = forced_rows(self.lm, prompts, answers, complete_B, eos)
        logits_NV = self.lm.logits(hidden_ND).float()
        top = logits_NV.topk(self.top_k)
        return top.indices, top.values - logits_NV.logsumexp(-1, keepdim=True)


def _ranges(start_B: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    """start_1, start_1 + 1, ... (num_1 of them), start_2, ...: int64."""
    before_B = np.cumsum(num_B) - num_B
    return np.repeat(start_B - before_B, num_B) + np.arange(num_B.sum())
