"""Examples -> the units (UTF-8 bytes or tokens) that an encoder reads.

The source text puts the question before the context: a reader that looks left only then knows the
question when it reads the context, and cutting a long source at its end never cuts the question.

Shapes: N examples, T units of all of them together. Spans are inclusive at both ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lw_fast.data import Example
from lw_fast.errors import UserError

NO_SPAN = (-1, -1)
_TOKENISER_BATCH = 1024  # sources per call: enough to fill its threads, little memory


@dataclass(frozen=True)
class Sources:
    """Sources of different lengths, end to end.

    Attributes:
        ids: [T] uint8 bytes or int32 tokens; source i is ids[offsets[i]:offsets[i + 1]].
        offsets: [N + 1] int64.
        span: [N, 2] int32, first and last unit of answers[0], counted from the start of the
            source; (-1, -1) where there is none or where it was cut away.
        context_start: [N] int32, the first unit of the context; the length of the source where
            no context is left.
        num_bytes: [N] int64, UTF-8 bytes of the text that the units hold.
        cut: sources that lost the end of their context.
        question_cut: those among them that lost even a part of the question.
        span_lost: sources whose answer span was cut away.
    """

    ids: np.ndarray
    offsets: np.ndarray
    span: np.ndarray
    context_start: np.ndarray
    num_bytes: np.ndarray
    cut: int
    question_cut: int
    span_lost: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The units of one source."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, units per source."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One source before it joins the others. `full` and `head` are lengths before the cut."""

    ids: np.ndarray
    span: tuple[int, int]
    full: int
    head: int
    num_bytes: int


def source_head(question: str) -> str:
    """What stands before the context."""
    return f"Question: {question}\nContext: " if question else "Context: "


def source_text(example: Example) -> str:
    """The text that an encoder reads. Without a question it is the context alone."""
    return source_head(example.question) + example.context


def byte_sources(examples: Sequence[Example], max_bytes: int) -> Sources:
    """Sources as UTF-8 bytes; longer ones are cut at the end, never inside a code point."""
    return _join([_byte_piece(example, max_bytes) for example in examples], np.uint8)


def token_sources(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> Sources:
    """Sources as tokens of a fast Hugging Face tokenizer, without special tokens.

    A span covers every token that overlaps the answer, so its text may reach beyond the answer (a
    token can hold both the answer's first letter and the space before it). Longer sources are cut
    at the end, never between two tokens that share a code point.

    Raises:
        UserError: the tokenizer is not a fast one, so it cannot tell where its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the reader's tokenizer ({type(tokenizer).__name__}) has no fast version")
    backend = tokenizer.backend_tokenizer  # half the time of the wrapper around it
    backend.no_truncation()
    backend.no_padding()
    pieces: list[_Piece] = []
    for first in range(0, len(examples), _TOKENISER_BATCH):
        batch = examples[first : first + _TOKENISER_BATCH]
        texts = [source_text(example) for example in batch]
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        for example, encoding in zip(batch, encodings, strict=True):
            pieces.append(_token_piece(example, encoding.ids, encoding.offsets, max_tokens))
    return _join(pieces, np.int32)


def _byte_piece(example: Example, max_bytes: int) -> _Piece:
    head = source_head(example.question).encode()
    source = head + example.context.encode()
    span = NO_SPAN
    if example.answer_start >= 0:
        start = len(head) + len(example.context[: example.answer_start].encode())
        span = (start, start + len(example.answers[0].encode()) - 1)
    kept = source[: _whole_code_points(source, max_bytes)]
    return _Piece(np.frombuffer(kept, np.uint8), span, len(source), len(head), len(kept))


def _whole_code_points(text: bytes, limit: int) -> int:
    """The most bytes of UTF-8 text, `limit` at most, that end with a whole code point."""
    if limit >= len(text):
        return len(text)
    while limit > 0 and text[limit] & 0xC0 == 0x80:  # a continuation byte would be cut off
        limit -= 1
    return limit


def _token_piece(
    example: Example, ids: list[int], offsets: list[tuple[int, int]], max_tokens: int
) -> _Piece:
    head = len(source_head(example.question))
    span = NO_SPAN
    if example.answer_start >= 0:
        start = head + example.answer_start
        stop = start + len(example.answers[0])
        first, last = _first_after(offsets, start), _last_before(offsets, stop)
        span = (first, last) if first <= last else NO_SPAN
    kept = min(max_tokens, len(ids))
    while 0 < kept < len(ids) and offsets[kept][0] < offsets[kept - 1][1]:
        kept -= 1  # both tokens hold bytes of one code point
    text = source_text(example)
    num_bytes = len((text if kept == len(ids) else text[: offsets[kept][0]]).encode())
    first = _first_after(offsets, head)
    return _Piece(np.array(ids[:kept], np.int32), span, len(ids), first, num_bytes)


def _first_after(offsets: list[tuple[int, int]], point: int) -> int:
    """The first token that ends after a code point begins; the number of tokens if none does."""
    return bisect_right(offsets, point, key=lambda token: token[1])


def _last_before(offsets: list[tuple[int, int]], point: int) -> int:
    """The last token that begins before a code point; -1 if none does."""
    return bisect_left(offsets, point, key=lambda token: token[0]) - 1


def _join(pieces: Iterable[_Piece], dtype: type) -> Sources:
    pieces = list(pieces)
    lengths = np.array([len(piece.ids) for piece in pieces], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    span = np.array([piece.span for piece in pieces], np.int32).reshape(-1, 2)
    lost = span[:, 1] >= lengths
    span[lost] = NO_SPAN
    full = np.array([piece.full for piece in pieces], np.int64)
    head = np.array([piece.head for piece in pieces], np.int64)
    return Sources(
        ids=np.concatenate([np.zeros(0, dtype), *(piece.ids for piece in pieces)]),
        offsets=offsets,
        span=span,
        context_start=np.minimum(head, lengths).astype(np.int32),
        num_bytes=np.array([piece.num_bytes for piece in pieces], np.int64),
        cut=int((full > lengths).sum()),
        question_cut=int((head > lengths).sum()),
        span_lost=int(lost.sum()),
    )
