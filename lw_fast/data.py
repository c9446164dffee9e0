"""Question-answer sets -> a list of examples.

Four names are known (`nano` is bundled; `squad`, `squad_v2` and `hotpot` come through Hugging Face
`datasets`); anything else is a local file in the SQuAD v1.1 or v2 layout. Every source is first
read as `Row`s, so that one function decides what a usable example is, whatever the source.
Positions count code points throughout; `source.py` turns them into bytes or tokens.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
import sys
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lw_fast.errors import UserError

Split = Literal["train", "eval"]

HUB: dict[str, tuple[str, str | None]] = {
    "squad": ("rajpurkar/squad", None),
    "squad_v2": ("rajpurkar/squad_v2", None),
    # Not fullwiki: its validation contexts are retrieved and often lack the supporting facts.
    "hotpot": ("hotpotqa/hotpot_qa", "distractor"),
}
"""Name -> (repository or local folder, configuration) for `datasets.load_dataset`."""

NAMES = ("nano", *HUB)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context.

    Attributes:
        id: the data set's own id.
        context: the text to compress.
        question: empty for channel examples ("repeat this").
        answers: gold answers, the first one being the training target; empty if unanswerable.
        answer_start: code point where answers[0] starts in the context; -1 if there is none
            (unanswerable, or an answer that is not a span, such as "yes").
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_start: int


@dataclass(frozen=True)
class Loaded:
    """Examples and what happened to the others.

    `counts` always holds: read (questions in the source), usable (before the subset was taken),
    unanswerable, not_in_context and too_long (questions left out, by reason; unanswerable ones
    are kept, not counted, in evaluation), dropped_answers (further golds of kept questions that do
    not occur in their context) and repaired (kept questions whose answer_start was wrong).
    """

    examples: list[Example]
    counts: Mapping[str, int]

    def summary(self) -> str:
        """One line for the log, such as `200 of 1777 questions (3 not_in_context)`."""
        notes = [f"{n} {k}" for k, n in self.counts.items() if n and k not in ("read", "usable")]
        line = f"{len(self.examples)} of {self.counts['read']} questions"
        return f"{line} ({', '.join(notes)})" if notes else line


class Row(NamedTuple):
    """A question as its source states it: not yet stripped, placed or judged."""

    id: str
    context: str
    question: str
    answers: list[tuple[str, int]]  # (text, claimed start)
    extractive: bool = True  # False: an answer need not occur in the context


def load_examples(
    spec: str, split: Split, *, samples: int, seed: int, max_answer_chars: int = 0
) -> Loaded:
    """Reads a data set, leaves out what cannot be used, and takes a seeded subset.

    Args:
        spec: names of `NAMES` and paths of SQuAD-layout .json or .json.gz files, by commas.
        split: which part of a named set; also, unanswerable questions are kept only in `eval`.
        samples: size of the subset, 0 for all. Either way the order is the seeded one:
            `random.Random(seed).shuffle(range(usable))`, cut after `samples`.
        seed: seed of that shuffle.
        max_answer_chars: leave out questions whose first answer is longer; 0 keeps all.

    Raises:
        UserError: a source is missing, damaged or not SQuAD layout, more than half of its answers
            are not in their contexts, or no usable question is left.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be train or eval, got {split!r}")
    counts: Counter[str] = Counter()
    usable = list(_usable(_read(spec, split), split, max_answer_chars, counts))
    counts["usable"] = len(usable)
    _check(spec, split, counts)
    return Loaded(_subset(usable, samples, seed, spec), {key: counts[key] for key in _COUNTS})


def eval_spec(dataset: str, eval_dataset: str) -> str:
    """The data set to evaluate on: `eval_dataset`, or else the evaluation part of `dataset`.

    Raises:
        UserError: `dataset` is a local file, which has no evaluation part of its own.
    """
    if eval_dataset:
        return eval_dataset
    for part in _parts(dataset):
        if part not in NAMES:
            raise UserError(
                f"eval_dataset is needed: {part} is a file without an evaluation part; give another"
                " file (or the same one, to score the training questions)"
            )
    return dataset


def channel_examples(examples: Sequence[Example], per_context: int, seed: int) -> list[Example]:
    """Random spans of 1 to 6 words to repeat: they train the path from latents to text.

    Spans begin and end with whole words without their outer punctuation, and stay on one line
    (generated answers end at a line break). Contexts without a word give none.
    """
    rng = random.Random(seed)
    made = []
    for index, context in enumerate(dict.fromkeys(example.context for example in examples)):
        words = [match.span() for match in _word_pattern().finditer(context)]
        for draw in range(per_context if words else 0):
            start, end = _random_span(context, words, rng)
            answers = (context[start:end],)
            made.append(Example(f"channel-{index}-{draw}", context, "", answers, start))
    return made


# Sources -----------------------------------------------------------------------------------------


def _parts(spec: str) -> list[str]:
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise UserError(f"dataset is empty: use {', '.join(NAMES)} or SQuAD-layout .json files")
    return parts


def _read(spec: str, split: Split) -> Iterator[Row]:
    for part in _parts(spec):
        if part == "nano":
            yield from _nano_rows(split)
        elif part in HUB:
            yield from _hub_rows(part, split)
        else:
            yield from _file_rows(part)


def _nano_rows(split: Split) -> Iterator[Row]:
    name = {"train": "train.json.gz", "eval": "dev.json.gz"}[split]
    asset = resources.files("lw_fast") / "assets" / "nano" / name
    if not asset.is_file():
        raise UserError(f"the bundled data set nano lacks {name}; install lw_fast again")
    return _squad_rows(_parse(asset.read_bytes(), f"nano/{name}"), f"nano/{name}")


def _hub_rows(name: str, split: Split) -> Iterator[Row]:
    from datasets import load_dataset  # takes seconds to import; local files do not need it

    repository, configuration = HUB[name]
    part = {"train": "train", "eval": "validation"}[split]
    try:
        table = load_dataset(repository, configuration, split=part)
    except (OSError, ValueError) as error:  # unreachable, not cached, or a damaged download
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {name} ({repository}): {reason}; without network, give local "
            "SQuAD-layout .json or .json.gz files instead"
        ) from error
    return map(_hotpot_row if name == "hotpot" else _squad_row, table)


def _squad_row(record: Mapping[str, Any]) -> Row:
    golds = record["answers"]
    answers = list(zip(golds["text"], golds["answer_start"], strict=True))
    return Row(record["id"], record["context"], record["question"], answers)


def _hotpot_row(record: Mapping[str, Any]) -> Row:
    """Keeps the supporting sentences only, in reading order, each paragraph behind its title.

    The title tells who "he" is. Answers may be "yes" or "no", so they need not be spans.
    """
    facts = record["supporting_facts"]
    supporting = set(zip(facts["title"], facts["sent_id"], strict=True))
    context = record["context"]
    paragraphs = []
    for title, sentences in zip(context["title"], context["sentences"], strict=True):
        kept = [s.strip() for n, s in enumerate(sentences) if (title, n) in supporting]
        if kept:
            paragraphs.append(f"{title}: {' '.join(kept)}")
    answers = [(record["answer"], 0)]
    return Row(record["id"], "\n".join(paragraphs), record["question"], answers, extractive=False)


def _file_rows(name: str) -> Iterator[Row]:
    path = Path(name).expanduser()
    if not path.is_file():
        known = "" if "." in path.name else f" and no data set of that name ({', '.join(NAMES)})"
        raise UserError(f"no such data file: {name}{known}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    return _squad_rows(_parse(raw, name), name)


def _parse(raw: bytes, name: str) -> Any:
    """JSON from plain or gzipped bytes; the content decides, not the file name."""
    try:
        text = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: damaged or truncated gzip file ({error})") from None
    if not text.strip():
        raise UserError(f"{name}: the file is empty")
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text, so not JSON") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON, perhaps truncated ({error})") from None


def _squad_rows(document: Any, name: str) -> Iterator[Row]:
    for a, article in enumerate(_get(document, "data", list, name)):
        at = f"{name}: data[{a}]"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, at)):
            here = f"{at}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, here)
            for q, qa in enumerate(_get(paragraph, "qas", list, here)):
                yield _file_row(context, qa, f"{here}.qas[{q}]")


def _file_row(context: str, qa: Any, where: str) -> Row:
    id_ = str(_get(qa, "id", (str, int), where))
    question = _get(qa, "question", str, where)
    answers = [
        (
            _get(gold, "text", str, f"{where}.answers[{n}]"),
            _get(gold, "answer_start", int, f"{where}.answers[{n}]"),
        )
        for n, gold in enumerate(_get(qa, "answers", list, where))
    ]
    return Row(id_, context, question, answers)


def _get(node: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`node[key]` of the wanted type, or a UserError that says where the layout differs."""
    if not isinstance(node, dict):
        raise UserError(f"{where}: not SQuAD layout: expected an object with the key {key!r}")
    if key not in node:
        raise UserError(f"{where}: not SQuAD layout: the key {key!r} is missing")
    if not isinstance(node[key], kind):
        found = type(node[key]).__name__
        raise UserError(f"{where}: not SQuAD layout: {key!r} must not be a {found}")
    return node[key]


# Rows -> examples --------------------------------------------------------------------------------

_COUNTS = "read usable unanswerable not_in_context too_long dropped_answers repaired".split()


def _usable(
    rows: Iterable[Row], split: Split, max_answer_chars: int, counts: Counter[str]
) -> Iterator[Example]:
    for row in rows:
        counts["read"] += 1
        if not row.answers:
            if split == "eval":
                yield Example(row.id, _text(row.context), _text(row.question.strip()), (), -1)
            else:
                # "no answer" has no span and no natural text: nothing to train the channel on.
                counts["unanswerable"] += 1
            continue
        placed = list(_placed_answers(row))
        if not placed:
            counts["not_in_context"] += 1
        elif 0 < max_answer_chars < len(placed[0][0]):
            counts["too_long"] += 1
        else:
            counts["dropped_answers"] += len(row.answers) - len(placed)
            counts["repaired"] += placed[0][2]
            answers = tuple(_text(text) for text, _, _ in placed)
            question = _text(row.question.strip())
            yield Example(row.id, _text(row.context), question, answers, placed[0][1])


def _placed_answers(row: Row) -> Iterator[tuple[str, int, bool]]:
    """Usable golds as (stripped text, start or -1, whether the claimed start was wrong)."""
    for text, claimed in row.answers:
        stripped = text.strip()
        if not stripped:
            continue
        if not row.extractive:
            yield stripped, row.context.find(stripped), False
            continue
        wanted = claimed + len(text) - len(text.lstrip())
        start = _nearest(row.context, stripped, wanted)
        if start >= 0:
            yield stripped, start, start != wanted


def _nearest(context: str, text: str, wanted: int) -> int:
    """Where `text` occurs closest to `wanted` in the context; -1 if nowhere."""
    if wanted >= 0 and context.startswith(text, wanted):
        return wanted
    places = [match.start() for match in re.finditer(re.escape(text), context)]
    return min(places, key=lambda place: abs(place - wanted), default=-1)


def _text(text: str) -> str:
    """The same text, shared between examples, with lone surrogates (a JSON escape can hold them,
    UTF-8 cannot) replaced one for one, so that positions stay."""
    if not text.isascii():
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return sys.intern(text)


def _check(spec: str, split: Split, counts: Counter[str]) -> None:
    lost, asked = counts["not_in_context"], counts["read"] - counts["unanswerable"]
    if lost * 2 > asked:
        raise UserError(
            f"{spec}: the answers of {lost} of {asked} questions do not occur in their contexts; "
            "more than half, so the file is not used (answer texts must be exact spans)"
        )
    if not counts["usable"]:
        reasons = ", ".join(f"{counts[k]} {k}" for k in _COUNTS[2:5] if counts[k]) or "none read"
        raise UserError(f"{spec}: no usable question for {split} ({reasons})")


def _subset(usable: list[Example], samples: int, seed: int, spec: str) -> list[Example]:
    if samples > len(usable):
        warnings.warn(
            f"{spec}: {samples} questions asked for, {len(usable)} usable; taking all", stacklevel=3
        )
    order = list(range(len(usable)))
    random.Random(seed).shuffle(order)
    return [usable[i] for i in (order[:samples] if samples else order)]


# Channel spans -----------------------------------------------------------------------------------


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Runs without white space, less the punctuation at their two ends.

    Punctuation is Unicode's category P. `\\w` would not do: it excludes combining marks, so an
    accent written as one would be cut off the end of its word.
    """
    points = map(chr, range(sys.maxunicode + 1))
    punctuation = "".join(c for c in points if unicodedata.category(c).startswith("P"))
    edge = f"[^\\s{re.escape(punctuation)}]"
    return re.compile(f"{edge}(?:\\S*{edge})?")


def _random_span(
    context: str, words: Sequence[tuple[int, int]], rng: random.Random
) -> tuple[int, int]:
    count = rng.randint(1, min(6, len(words)))
    first = rng.randrange(len(words) - count + 1)
    start, end = words[first][0], words[first + count - 1][1]
    if "\n" in context[start:end]:
        end = words[first][1]
    return start, end
