"""What makes the original's training collapse: each of its faults beside its fix, in every mix.

    python benchmarks/collapse.py [--preset nano] [--lm.NAME SOURCE ...] [--SETTING VALUE ...]
        [--targets original,right] [--encoders byte_seed,lm] [--rates seed,ours]

Three factors: the targets (compat=original with its first-token term and its BOS, or right ones),
the encoder (the original's byte_seed against byte or lm with copy slots) and the learning rate (the
original's constant 5e-5, or the preset's). All else, steps and seed included, is the same in every
cell; the frozen LMs are loaded once. Beside FirstTok@1 stands what one token always would score:
the commonest first token of the training answers. Prints a table, as measured, whatever it says,
and writes benchmarks/results/collapse_PAIR.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
from benchmarks.rows import case_words, command_line, measured, without_folders, write_rows
from lw_fast.cli import add_settings, split_lm_flags
from lw_fast.config import FIELDS, Config, build_config, from_dict, load_preset, to_dict
from lw_fast.data import eval_spec
from lw_fast.engine import World, init_world
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import evaluation_examples, training_examples
from lw_fast.sequence import make_frame, tokenize_answers
from lw_fast.shared import Shared
from lw_fast.train import train

_ORIGINAL, _ = load_preset("seed_stage_a")


def _original(*names: str) -> dict[str, Any]:
    return {name: _ORIGINAL[name] for name in names}


TARGETS: dict[str, dict[str, Any]] = {
    "original": {"compat": "original"}
    | _original("first_token_ce_weight", "train_append_bos_after_prefix"),
    "right": {},
}
ENCODERS: dict[str, dict[str, Any]] = {
    name: {"encoder_type": name} for name in ("byte_seed", "byte", "lm")
}
RATES: dict[str, dict[str, Any]] = {
    "seed": _original("lr", "adapter_lr", "schedule", "warmup_steps"),
    "ours": {},
}
SCORES = ("first_token_top1", "f1", "em", "most_frequent_share")


@dataclass(frozen=True)
class Prior:
    """Always the same first token, for one LM."""

    token: str
    """The commonest first token of the training answers."""
    share: float
    """Share of the evaluation answers that begin with it."""


def first_token_prior(
    lm: FrozenLM, config: Config, training: Sequence[str], evaluation: Sequence[str]
) -> Prior:
    """What one token always would score as FirstTok@1, among right targets."""
    frame = make_frame(lm.tokenizer, config.sequence)

    def firsts(answers: Sequence[str]) -> list[int]:
        return [ids[0] for ids in tokenize_answers(lm.tokenizer, frame.anchor_text, answers, 1)[0]]

    (token, _), *_ = Counter(firsts(training)).most_common(1)
    asked = firsts(evaluation)
    return Prior(lm.tokenizer.decode([token]), asked.count(token) / len(asked))


def priors(config: Config, lms: Mapping[str, FrozenLM]) -> dict[str, Prior]:
    """The prior of every LM on the data of a run."""
    training = [example.answers[0] for example in training_examples(config)[0]]
    evaluation = [example.answers[0] for example in evaluation_examples(config)]
    return {name: first_token_prior(lm, config, training, evaluation) for name, lm in lms.items()}


@dataclass(frozen=True)
class Cell:
    """One training."""

    words: Mapping[str, str]
    """Its value of each factor."""
    config: Config
    scores: Mapping[str, Mapping[str, float]]
    """LM -> scores of its latent prompts."""
    steps: int
    seconds: float
    """Data, training and evaluation, without loading the LMs."""


def measure(
    base: Config, world: World, shared: Shared, factors: Mapping[str, Mapping[str, dict]]
) -> Iterator[Cell]:
    """Trains every combination of the factors' values, one after the other."""
    for values in itertools.product(*(factor.items() for factor in factors.values())):
        words = dict(zip(factors, (word for word, _ in values), strict=True))
        changes = {name: value for _, change in values for name, value in change.items()}
        config = from_dict({**to_dict(base), **changes})
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(config, world, Path(folder), shared=shared)
            log = (Path(folder) / "log.jsonl").read_text().splitlines()
        steps = json.loads(log[-1])["step"]
        yield Cell(words, config, metrics["latent"], steps, time.perf_counter() - started)


def cell_rows(cell: Cell, prior: Mapping[str, Prior], pair: str) -> Iterator[dict[str, Any]]:
    """One row per LM and score, and one of what the cell cost."""
    data = cell.config.data
    spec = without_folders(eval_spec(data.dataset, data.eval_dataset))
    common = dict(
        set=spec.split(".")[0], batch=cell.config.optim.batch_size, protocol="clean",
        targets=cell.words["targets"], lr=cell.words["lr"], steps=cell.steps,
    )  # fmt: skip
    encoder = cell.words["encoder"]
    config = {"command": command_line(), "settings": without_folders(to_dict(cell.config))}
    num = len(evaluation_examples(cell.config))
    for lm, scores in cell.scores.items():
        case = case_words(pair=pair, lm=lm, kind="latent", encoder=encoder, **common)
        known = config | {"most_frequent_first_token": prior[lm].token}
        values = {name: scores[name] for name in SCORES} | {"first_token_prior": prior[lm].share}
        for metric, value in values.items():
            yield measured("collapse", case, metric, value, "1", n=num, config=known)
    case = case_words(pair=pair, encoder=encoder, **common)
    yield measured("collapse", case, "seconds", cell.seconds, "s", config=config)


def table(cells: Sequence[Cell], prior: Mapping[str, Prior]) -> str:
    """FirstTok@1, F1 and the share of the most frequent answer, LMs side by side."""
    heads = [f"{lm} FirstTok@1 | F1 | one answer" for lm in prior]
    lines = [
        f"| encoder | targets | lr | {' | '.join(heads)} |",
        "|---" * (3 + 3 * len(prior)) + "|",
        "| one token always | | | "
        + " | ".join(f"{p.share:.3f} `{p.token!r}` | | " for p in prior.values())
        + " |",
    ]
    for cell in cells:
        numbers = [
            f"{cell.scores[lm][name]:.3f}"
            for lm in prior
            for name in ("first_token_top1", "f1", "most_frequent_share")
        ]
        lines.append(f"| {' | '.join([*cell.words.values(), *numbers])} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="nano")
    add("--pair", help="name of the pair of LMs in the rows (default: the preset)")
    add("--targets", default=",".join(TARGETS), help="values of this factor, separated by commas")
    add("--encoders", default="byte_seed,lm", help=f"some of {', '.join(ENCODERS)}")
    add("--rates", default=",".join(RATES), help="some of seed, ours")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--out", type=Path, help="(default: benchmarks/results/collapse_PAIR.csv)")
    add_settings(parser)
    return parser


def _chosen(known: Mapping[str, dict], words: str) -> dict[str, dict]:
    unknown = set(words.split(",")) - known.keys()
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return {word: known[word] for word in words.split(",")}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    argv, sources = split_lm_flags(sys.argv[1:] if argv is None else argv)
    flags = vars(_parser().parse_args(argv))
    settings = {"kinds": "latent", "protocol": "clean", "debug_print_first": 0, "eval_samples": 200}
    settings |= {name: value for name, value in flags.items() if name in FIELDS}
    base = build_config(flags["preset"], settings, sources)
    factors = {  # encoders outermost: what is read of the sources serves all of an encoder's cells
        "encoder": _chosen(ENCODERS, flags["encoders"]),
        "targets": _chosen(TARGETS, flags["targets"]),
        "lr": _chosen(RATES, flags["rates"]),
    }
    pair = flags["pair"] or flags["preset"]
    world = init_world(use_deepspeed=False, device=flags["device"])
    shared = Shared()
    lms = shared.lms(base, world.device)
    prior, cells, rows = priors(base, {name: lms[name] for name in base.lm}), [], []
    out = flags["out"] or Path(f"benchmarks/results/collapse_{pair}.csv")
    for cell in measure(base, world, shared, factors):
        cells.append(cell)
        rows += cell_rows(cell, prior, pair)
        write_rows(out, rows)  # a run that is stopped keeps what it measured
        print(f"{case_words(**cell.words)}: {cell.steps} steps, {cell.seconds:.0f} s", flush=True)
    print(table(cells, prior))
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
