"""Turns the evaluation of a run into rows: what was scored, what it cost, and the command.

    python benchmarks/accuracy.py runs/small --pair small --set squad_dev --command "..."

Writes benchmarks/results/accuracy_PAIR.csv. `seconds` of kind=latent is training time alone: from
the first to the last logged step, less the time between that evaluations and checkpoints took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
from benchmarks.rows import case_words, measured, write_rows

SCORES = ("f1", "em", "f1_single", "em_single", "nll_token", "first_token_top1", "first_token_top5")
RATES = ("samples/s", "positions/s", "supervised_tokens/s", "source_bytes/s")


def newest_evaluation(run: Path) -> Path:
    """The eval_epochN folder with the highest N."""
    found = sorted(run.glob("eval_epoch*"), key=lambda p: int(p.name.removeprefix("eval_epoch")))
    if not found:
        sys.exit(f"error: {run} holds no evaluation")
    return found[-1]


def score_rows(metrics: dict[str, Any], words: dict[str, str], config: dict) -> Iterator[dict]:
    """One row per score, LM and prompt kind; the encoder's own span beside them."""
    num = metrics["samples"]
    for kind, per_lm in metrics.items():
        if not isinstance(per_lm, dict) or not all(
            isinstance(v, dict) and "f1" in v for v in per_lm.values()
        ):
            continue
        for lm, values in per_lm.items():
            case = case_words(pair=words["pair"], lm=lm, kind=kind, **_rest(words))
            for metric in SCORES:
                unit = "nats" if metric == "nll_token" else "1"
                yield measured("accuracy", case, metric, values[metric], unit, n=num, config=config)
            case = f"{case} phase=evaluate"
            seconds = values["wall_clock_sec"]
            yield measured("accuracy", case, "seconds", seconds, "s", n=num, config=config)
    for metric, value in metrics.get("span", {}).items():
        case = case_words(**words)
        yield measured("accuracy", case, f"span_{metric}", value, "1", n=num, config=config)


def cost_rows(log: list[dict], words: dict[str, str], config: dict) -> Iterator[dict]:
    """Median rates over the logged steps, peak memory, and training time."""
    case = case_words(**words)
    for rate in RATES:
        values = sorted(row[rate] for row in log[1:] or log)
        low, high = values[len(values) // 5], values[-1 - len(values) // 5]
        yield measured(
            "accuracy", case, rate, statistics.median(values), "1/s",
            p20=low, p80=high, n=len(values), config=config,
        )  # fmt: skip
    for key, value in log[-1].items():  # how well it knows its training questions
        lm, _, metric = key.partition("/")
        if metric == "first_token_top1":
            train = case_words(pair=words["pair"], lm=lm, **_rest(words | {"set": "train"}))
            yield measured("accuracy", train, metric, value, "1", config=config)
    if "peak_gib" in log[-1]:
        yield measured("accuracy", case, "peak_gib", log[-1]["peak_gib"], "GiB", config=config)
    seconds = sum(
        row["seconds_per_step"] * steps for row, steps in zip(log, _steps(log), strict=True)
    )
    yield measured("accuracy", case, "seconds", seconds, "s", config=config)


def _steps(log: list[dict]) -> list[int]:
    """Optimiser steps that each row of the log stands for."""
    ends = [0, *(row["step"] for row in log)]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def environment_of(run: Path, trained_on: str, commit: str | None) -> dict[str, str]:
    """Where the run ran, which need not be where its rows are written."""
    found = json.loads((run / "environment.json").read_text())
    return {
        "device": found["device"] if trained_on.startswith("cuda") else f"CPU x{found['cores']}",
        "commit": (commit or found["commit"] or "")[:12],
        "date": found["date"][:10],
        **{name: found[name] or "" for name in ("torch", "triton", "transformers", "deepspeed")},
    }


def _rest(words: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in words.items() if key != "pair"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--pair", required=True, help="name of the pair of LMs: nano, small, 8b")
    parser.add_argument("--set", dest="dataset", required=True, help="name of the evaluation set")
    parser.add_argument("--engine", default="zero2", help="engine that trained it")
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--commit", help="commit that trained it, where the run could not know")
    parser.add_argument("--append", action="store_true", help="add to the file")
    parser.add_argument("--word", action="append", default=[], metavar="KEY=VALUE",
                        help="another word for the case, such as compat=original")  # fmt: skip
    args = parser.parse_args()
    settings = json.loads((args.run / "config.json").read_text())
    metrics = json.loads((newest_evaluation(args.run) / "metrics.json").read_text())
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    words = dict(
        pair=args.pair, encoder=settings["encoder_type"], set=args.dataset, engine=args.engine,
        batch=settings["batch_size"], protocol="clean",
        **dict(word.split("=", 1) for word in args.word),
    )  # fmt: skip
    config = {"command": args.command, "settings": settings}
    out = args.out or Path(f"benchmarks/results/accuracy_{args.pair}.csv")
    rows = [*score_rows(metrics, words, config), *cost_rows(log, words, config)]
    where = environment_of(args.run, metrics["device"], args.commit)
    write_rows(out, [row | where for row in rows], append=args.append)
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
