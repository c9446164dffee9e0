"""Questions about made-up facts: the data of the nano pair (nano.py makes its LMs).

A context states facts of distinct relations ("Ada lives in Kobu. The code of Tom is 472."); a
question asks for one of them. The relation in the question singles out the fact: nobody needs to
understand the name. Every relation has its own kind of value, and 1/8 of the values, chosen by
hash, never occurs outside the dev split: neither the LMs nor an encoder trained on the train
split has seen them.

`launch/make_nano.py` writes what is shipped under `assets/nano`; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ASSETS = Path(__file__).parent / "assets" / "nano"
"""llama/ and qwen/ (loadable by transformers), train.json.gz and dev.json.gz (SQuAD v1.1)."""

FACTS_PER_CONTEXT = 4


class Relation(NamedTuple):
    """One kind of fact: its sentence, the ways to ask for it and its values."""

    statement: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


class Fact(NamedTuple):
    """A question that a context answers, with the one answer."""

    question: str
    answer: str


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(" ".join(pair) for pair in product(first.split(), second.split()))


_SYLLABLES = ["".join(pair) for pair in product("bdgklmnrst", "aeiou")]
_PLACES = tuple((a + b).capitalize() for a, b in product(_SYLLABLES, _SYLLABLES))
_CODES = tuple("".join(code) for code in product("0123456789", repeat=3) if len(set(code)) == 3)

NAMES = (
    "Ada Ben Cal Dan Eva Finn Gus Hal Ida Jon Kit Leo Max Ned Oli Pam "
    "Quin Ray Sam Tom Una Vic Wes Zoe Amy Bob Kai Liz Mia Nell Rex Tia"
).split()

RELATIONS = {
    "place": Relation(
        "{name} lives in {value}.",
        ("Where does {name} live?", "In which town does {name} live?"),
        _PLACES,
    ),
    "code": Relation(
        "The code of {name} is {value}.",
        ("What is the code of {name}?", "Which code does {name} have?"),
        _CODES,
    ),
    "thing": Relation(
        "{name} owns a {value}.",
        ("What does {name} own?", "Which thing does {name} own?"),
        _pairs(
            "red blue green black white pink gray brown gold teal",
            "kite boat bike car drum flag hat coat tent van rug sled",
        ),
    ),
    "food": Relation(
        "{name} eats {value}.",
        ("What does {name} eat?", "Which food does {name} eat?"),
        _pairs(
            "sweet sour salty bitter hot cold mild fresh dry rich",
            "bread soup rice fish corn cake pie beans plums figs stew nuts",
        ),
    ),
    "item": Relation(
        "{name} made a {value}.",
        ("What did {name} make?", "Which item did {name} make?"),
        _pairs(
            "wooden glass steel paper stone clay tin wool silk brass",
            "lamp bowl box cup ring chair bell mask key fork vase desk",
        ),
    ),
}


def is_held_out(value: str) -> bool:
    """True for the 1/8 of the values that only the dev split may contain."""
    return zlib.crc32(value.encode()) % 8 == 0


_SEEN = {n: [v for v in r.values if not is_held_out(v)] for n, r in RELATIONS.items()}
_HELD_OUT = {n: [v for v in r.values if is_held_out(v)] for n, r in RELATIONS.items()}


def draw_context(
    rng: random.Random, num_facts: int, held_out_share: float = 0.0
) -> tuple[str, list[Fact]]:
    """One context of `num_facts` (at most 5) facts of distinct relations about distinct people.

    `held_out_share` is the chance of each value to be a held-out one. Every answer occurs in the
    context exactly once.
    """
    names = rng.sample(NAMES, num_facts)
    sentences, facts = [], []
    for relation, name in zip(rng.sample(sorted(RELATIONS), num_facts), names, strict=True):
        values = (_HELD_OUT if rng.random() < held_out_share else _SEEN)[relation]
        value = rng.choice(values)
        sentences.append(RELATIONS[relation].statement.format(name=name, value=value))
        facts.append(Fact(rng.choice(RELATIONS[relation].questions).format(name=name), value))
    return " ".join(sentences), facts


def draw_contexts(
    seed: str, num_facts: int, held_out_share: float = 0.0, exclude: Collection[str] = ()
) -> Iterator[tuple[str, list[Fact]]]:
    """Endless contexts, the same ones for the same seed; none of `exclude`."""
    rng = random.Random(seed)
    while True:
        context, facts = draw_context(rng, num_facts, held_out_share)
        if context not in exclude:
            yield context, facts


def make_squad(
    split: str,
    num_contexts: int,
    *,
    questions_per_context: int = 2,
    held_out_share: float = 0.0,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Questions about `num_contexts` distinct contexts, in SQuAD v1.1 layout."""
    stream = draw_contexts(f"{split}-{seed}", FACTS_PER_CONTEXT, held_out_share, exclude)
    rng = random.Random(f"questions-{split}-{seed}")
    paragraphs, seen = [], set()
    while len(paragraphs) < num_contexts:
        context, facts = next(stream)
        if context in seen:
            continue
        seen.add(context)
        asked = rng.sample(facts, questions_per_context)
        qas = [
            {
                "id": f"nano-{split}-{len(paragraphs)}-{i}",
                "question": fact.question,
                "answers": [{"text": fact.answer, "answer_start": context.index(fact.answer)}],
            }
            for i, fact in enumerate(asked)
        ]
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": f"nano {split}", "paragraphs": paragraphs}]}


def shipped_splits() -> tuple[dict[str, Any], dict[str, Any]]:
    """The train split (4,000 questions) and the dev split (400; half its values held out)."""
    dev = make_squad("dev", 200, held_out_share=0.5)
    return make_squad("train", 2000, exclude=contexts_of(dev)), dev


def contexts_of(squad: Mapping[str, Any]) -> set[str]:
    """All contexts of a SQuAD-layout dict."""
    return {p["context"] for article in squad["data"] for p in article["paragraphs"]}


def questions_of(squad: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(context, question, first answer) of every question, in order."""
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield paragraph["context"], qa["question"], qa["answers"][0]["text"]


def write_gz(squad: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, gzipped without a time stamp, so that equal data make equal files."""
    text = json.dumps(squad, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def read_gz(path: Path) -> dict[str, Any]:
    """The inverse of `write_gz`."""
    return json.loads(gzip.decompress(path.read_bytes()))
