"""Pre-tokenised tables on the device, and the batches cut from them.

Everything is tokenised once. Tables live on the device; what decides shapes (lengths) stays on
the host as numpy too, so that cutting a batch never waits for the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.encoder import SourceBatch
from lw_fast.frozen_lm import FrozenLM
from lw_fast.losses import TeacherRows
from lw_fast.packing import PackedSizes, Packing
from lw_fast.sequence import SupervisedRows, make_layout, training_answers
from lw_fast.source import Sources

logger = logging.getLogger(__name__)

IGNORE = -100
"""Target of a row that is not supervised."""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Host array -> device tensor; asynchronous on GPUs."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class AnswerBatch:
    """The answer side of one batch for one LM."""

    head_H: Tensor
    """int64 BOS token, or empty."""
    tail_BT: Tensor
    """int64: anchor and answer ids, right-padded; T = A + L. With compat=original there are two
    sequences per example, [2B, T] (sequence.Layout)."""
    position_N: Tensor
    """int64: supervised rows among all positions, laid end to end."""
    target_N: Tensor
    """int64: the token each row predicts; IGNORE on spare rows of a packed batch."""
    first_N: Tensor
    """bool: rows of the first-token term."""
    answer_N: Tensor
    """bool: rows of the answer term, which are all of them but with compat=original."""
    teacher: TeacherRows | None = None
    """Soft targets of the same rows, where the loss asks for them."""
    packing: Packing | None = None
    """Set where the batch is packed rather than padded."""


class AnswerTable:
    """All answers of a data set, tokenised for one LM."""

    def __init__(self, lm: FrozenLM, answers: Sequence[str], config: Config) -> None:
        self.layout = make_layout(lm.tokenizer, config.sequence, config.encoder.latent_len)
        self.frame = self.layout.frame
        longest, first_k = config.data.max_answer_tokens, config.loss.supervise_first_k
        ids, self.complete_N = training_answers(
            lm.tokenizer,
            config.sequence,
            answers,
            min(longest, first_k) if first_k else longest,
        )
        self.length_N = np.array([len(tokens) for tokens in ids], dtype=np.int64)
        if first_k > self.length_N.max(initial=0):
            logger.warning(
                "supervise_first_k=%d has no effect: %s needs at most %d tokens for an answer",
                first_k, lm.name, self.length_N.max(initial=0),
            )  # fmt: skip
        self.ids_NL = np.zeros((len(ids), max(self.length_N.max(initial=1), 1)), dtype=np.int64)
        for row, tokens in zip(self.ids_NL, ids, strict=True):
            row[: len(tokens)] = tokens
        self.device = lm.device
        # The original's two sequences per example stay padded: they are there to be compared with.
        packed = lm.packed and config.sequence.compat != "original"
        self.sizes = PackedSizes.of(self.length_N, self.layout.prefix_len) if packed else None

    def num_targets(self, index: np.ndarray) -> int:
        """Rows of the answer term that `index` will have."""
        return self.layout.num_targets(self.length_N[index], self.complete_N[index])

    def num_positions(self, index: np.ndarray) -> int:
        """Real (not padded) positions of `index` in the LM's input, for the FLOP count."""
        return self.layout.num_positions(self.length_N[index])

    def batch(self, index: np.ndarray) -> AnswerBatch:
        """The answers of `index`: padded to the longest among them, or packed."""
        length_B, packing = self.length_N[index], None
        width = self.length_N.max() if self.sizes else length_B.max()
        answers_BL = self.ids_NL[index, :width]
        tails_BT, rows = self.layout.rows(answers_BL, length_B, self.complete_N[index])
        if self.sizes:
            rows, packing = self._pack(rows, length_B)
        return AnswerBatch(
            head_H=self._head_H,
            tail_BT=to_device(tails_BT, self.device),
            position_N=to_device(rows.position, self.device),
            target_N=to_device(rows.target, self.device),
            first_N=to_device(rows.first, self.device),
            answer_N=to_device(rows.answer, self.device),
            packing=packing,
        )

    @functools.cached_property
    def _head_H(self) -> Tensor:
        return torch.tensor(self.frame.head, dtype=torch.int64, device=self.device)

    def _pack(self, rows: SupervisedRows, length_B: np.ndarray) -> tuple[SupervisedRows, Packing]:
        """The padded rows at their places in a packed batch, filled up to a number of rows that
        depends on R alone; and how the sequences lie."""
        sizes = self.sizes
        num_rows = sizes.num_rows(length_B)
        cu_seqlens = sizes.cu_seqlens(length_B, num_rows)
        sequence, place = np.divmod(rows.position, sizes.max_len)
        spare = (0, sizes.num_targets(len(length_B), num_rows) - len(rows.target))
        packed = SupervisedRows(
            position=np.pad(cu_seqlens[sequence].astype(np.int64) + place, spare),
            target=np.pad(rows.target, spare, constant_values=IGNORE),
            example=np.pad(rows.example, spare),
            first=np.pad(rows.first, spare),
            answer=np.pad(rows.answer, spare),
        )
        packing = Packing(
            num_rows=num_rows,
            max_len=sizes.max_len,
            tail_length_B=to_device(len(self.frame.anchor) + length_B, self.device),
            cu_seqlens=to_device(cu_seqlens, self.device),
        )
        return packed, packing


GPU_WIDTH_MULTIPLE = 64
"""Source widths on a GPU are multiples of this."""


class SourceTable:
    """All sources of a data set as units (bytes or reader tokens) on the device.

    Equal sources (several spans of one context to repeat) are stored, and read by a reader, once.
    """

    def __init__(self, sources: Sources, supervise_N: np.ndarray, device: torch.device) -> None:
        """supervise_N: bool, False for spans to repeat, which no question asks for."""
        self.device = device
        self.length_N, self.num_bytes_N = sources.lengths, sources.num_bytes
        self.start_N, self.distinct = _deduplicate(sources)
        flat = np.concatenate([sources[i] for i in self.distinct])
        # One spare batch width of zeros lets every row be read at the batch's full width.
        flat = np.concatenate([flat, np.zeros(self._width(self.length_N), flat.dtype)])
        self.flat_ids = torch.from_numpy(flat).to(device)
        self.span_N2 = sources.span.astype(np.int64)
        self.context_start_N = np.asarray(sources.context_start, dtype=np.int64)
        self.supervise_N = supervise_N
        self.states: Tensor | None = None
        """Reader states of flat_ids, where a reader keeps them (reader.py)."""

    def __len__(self) -> int:
        return len(self.length_N)

    def _width(self, length_B: np.ndarray) -> int:
        """Units to pad to. On a GPU few widths: allocator and kernels then meet them again."""
        longest = int(length_B.max())
        if self.device.type != "cuda":
            return longest
        return -(-longest // GPU_WIDTH_MULTIPLE) * GPU_WIDTH_MULTIPLE

    def num_spans(self, index: np.ndarray) -> int:
        """Examples of `index` whose span is known and supervised."""
        return int(((self.span_N2[index, 0] >= 0) & self.supervise_N[index]).sum())

    def batch(self, index: np.ndarray, use_gold_B: np.ndarray | None = None) -> SourceBatch:
        """The sources of `index`, padded to the longest; `use_gold_B` as in SourceBatch."""
        if use_gold_B is None:
            use_gold_B = np.zeros(len(index), dtype=bool)
        length_B = self.length_N[index]
        columns = [self.start_N[index], length_B, self.context_start_N[index]]
        flags = [self.supervise_N[index], use_gold_B | ~self.supervise_N[index]]
        facts = np.stack([*columns, *self.span_N2[index].T, *flags], axis=1).astype(np.int64)
        facts_BK = to_device(facts, self.device)
        offset_B1, length_B1, start_B1 = facts_BK[:, :3].split(1, dim=1)
        unit_U = torch.arange(self._width(length_B), device=self.device)
        mask_BU = unit_U < length_B1
        ids_BU = self.flat_ids[offset_B1 + unit_U].long() * mask_BU
        return SourceBatch(
            ids_BU=ids_BU,
            mask_BU=mask_BU,
            context_BU=mask_BU & (unit_U >= start_B1),
            span_B2=facts_BK[:, 3:5],
            span_loss_B=facts_BK[:, 5].bool(),
            use_gold_B=facts_BK[:, 6].bool(),
        )


def _deduplicate(sources: Sources) -> tuple[np.ndarray, list[int]]:
    """Where each source starts once equal ones are stored once [N], and the first of each."""
    start_of: dict[bytes, int] = {}
    start_N = np.zeros(len(sources), dtype=np.int64)
    distinct, end = [], 0
    for i in range(len(sources)):
        key = sources[i].tobytes()
        if key not in start_of:
            start_of[key] = end
            distinct.append(i)
            end += len(sources[i])
        start_N[i] = start_of[key]
    return start_N, distinct


@dataclass(frozen=True)
class Tables:
    """One data set, ready for training."""

    sources: SourceTable
    answers: Mapping[str, AnswerTable]
    examples: Sequence[Example]
    teachers: Mapping[str, Callable[[np.ndarray], TeacherRows]] = field(default_factory=dict)
    """Soft targets of the answers per LM (teacher.py), where the loss asks for them."""

    def __len__(self) -> int:
        return len(self.sources)

    def answer_batch(self, name: str, index: np.ndarray) -> AnswerBatch:
        """The answer side of `index` for one LM, with its soft targets."""
        batch = self.answers[name].batch(index)
        if name in self.teachers:
            batch = replace(batch, teacher=self.teachers[name](index))
        return batch


@dataclass(frozen=True)
class Order:
    """Which example is trained on when: a permutation per epoch, the same for any world size."""

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the rest of the permutation is left out of that epoch."""
        return self.num_examples // self.batch_size

    def step(self, global_step: int) -> np.ndarray:
        """Example indices [batch_size] of an optimiser step counted from 0."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        permutation = _permutation(self.num_examples, self.seed, epoch)
        return permutation[step * self.batch_size : (step + 1) * self.batch_size]


@functools.lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def length_groups(length_B: np.ndarray) -> list[slice]:
    """Cuts a batch that is sorted by length into equal groups: as few as bring padding below a
    quarter of what is real, of at least MIN_GROUP examples."""
    groups = [slice(0, len(length_B))]
    while _padded(length_B, groups) > 1.25 * length_B.sum():
        size = -(-len(length_B) // (2 * len(groups)))
        if size < MIN_GROUP:
            break
        starts = range(0, len(length_B), size)
        groups = [slice(start, min(start + size, len(length_B))) for start in starts]
    return groups


MIN_GROUP = 16
"""Smaller groups cost more in launches than they save."""


def _padded(length_B: np.ndarray, groups: Sequence[slice]) -> int:
    return sum(int(length_B[group].max()) * len(length_B[group]) for group in groups)


def micro_slices(batch_size: int, rank: int, world_size: int, micro: int) -> list[slice]:
    """The parts of a global batch that one rank works on, one after the other."""
    per_rank = batch_size // world_size
    start = rank * per_rank
    return [slice(start + i, start + min(i + micro, per_rank)) for i in range(0, per_rank, micro)]
