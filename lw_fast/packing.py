"""Rows of a batch laid end to end, without padding: where each sequence starts, how many rows.

Answers differ in length, so a padded batch is longer than what it holds. Packed, it is one
sequence of R rows and attention stays within each example (packed_attention.py). Compiled layers
and CUDA graphs want R to be the same at every step, so a batch is given room for three standard
deviations more than the mean (a few per cent), and the spare rows form sequences of their own
that nothing reads. A batch that needs more takes the next size up.

Letters: B examples, K spare sequences, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

ROW_MULTIPLE = 64
"""Packed batches have a multiple of this many rows."""
GROWTH = 256
"""Rows by which the next size up is larger."""


@dataclass(frozen=True)
class Packing:
    """How the sequences of a packed batch lie."""

    num_rows: int
    """R, spare rows included."""
    max_len: int
    """Rows of the longest sequence that the data set has."""
    tail_length_B: Tensor
    """int64: anchor and answer ids of each example."""
    cu_seqlens: Tensor
    """int32 [B + K + 1]: the rows at which sequences start, then R."""


@dataclass(frozen=True)
class PackedSizes:
    """Sizes of packed batches of one data set."""

    prefix_len: int
    """Rows before the answer, the same for all examples."""
    mean: float
    """Mean answer length in tokens."""
    std: float
    """Its standard deviation."""
    longest: int
    """Longest answer in tokens."""

    @classmethod
    def of(cls, length_N: np.ndarray, prefix_len: int) -> PackedSizes:
        """From the answer lengths of a data set."""
        return cls(prefix_len, float(length_N.mean()), float(length_N.std()), int(length_N.max()))

    @property
    def max_len(self) -> int:
        """Rows of the longest sequence."""
        return self.prefix_len + self.longest

    def num_rows(self, length_B: np.ndarray) -> int:
        """R for a batch with these answer lengths: nearly always the same for the same B."""
        num = len(length_B)
        needed = int(num * self.prefix_len + length_B.sum())
        usual = num * (self.prefix_len + self.mean) + 3 * self.std * math.sqrt(num)
        usual = _round_up(math.ceil(usual), ROW_MULTIPLE)
        rows = usual + _round_up(max(0, needed - usual), GROWTH)
        return min(rows, num * self.max_len)

    def num_targets(self, num_examples: int, num_rows: int) -> int:
        """Room for supervised rows: every answer token and EOS of a batch of R rows."""
        return num_rows - num_examples * (self.prefix_len - 1)

    def cu_seqlens(self, length_B: np.ndarray, num_rows: int) -> np.ndarray:
        """int32 [B + K + 1]; K depends on B and R only."""
        length_B = self.prefix_len + length_B
        most_spare = num_rows - len(length_B) * self.prefix_len
        spare = num_rows - int(length_B.sum())
        full = np.arange(_round_up(most_spare, self.max_len) // self.max_len) * self.max_len
        spare_K = np.clip(spare - full, 0, self.max_len)
        return np.cumsum(np.concatenate([[0], length_B, spare_K])).astype(np.int32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
