"""Peak memory of a training step against batch, latents and answer length, beside the arithmetic.

    python benchmarks/memory.py --preset 8b \
        --lm.llama random:llama-3.1-8b --lm.qwen random:qwen2.5-7b

Writes benchmarks/results/memory_PAIR.csv: per case what lw_fast/plan.py expects (without its
reserve, which the allocator does not see; the terms are in the row's config), what was measured,
and their ratio. Questions are made up, so that every answer is as long as the case says. On a CPU
only the expectation is written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import torch

from benchmarks.rows import case_words, measured, write_rows
from benchmarks.steps import ProductStep, time_steps
from lw_fast.cli import add_settings, split_lm_flags
from lw_fast.config import FIELDS, Config, build_config
from lw_fast.engine import World, close_world, init_world
from lw_fast.meters import GIB, free_memory
from lw_fast.plan import Job, plan
from lw_fast.shared import Shared
from lw_fast.train import setup_run
from lw_fast.training_run import Run

BASE = {
    "layout": "padded", "compile": "no", "batch_size": 64, "max_answer_tokens": 8, "kinds": "latent"
}  # fmt: skip
"""Eager layers and padded rows, whose number is the same in every batch."""
SWEEPS = {
    "batch_size": (16, 32, 64, 128),
    "latent_len": (8, 64, 128),
    "max_answer_tokens": (2, 16, 32),
}
"""Settings that are varied, one at a time."""
QUESTIONS, WORDS = 128, 150
"""Made-up questions, and the words of each context; answers begin with its first word."""


def write_questions(path: Path, num: int = QUESTIONS) -> Path:
    """Questions in the SQuAD layout with equally long sources and answers of 40 words."""
    paragraphs = []
    for i in range(num):
        words = [f"word{(7 * i + j) % 97}" for j in range(WORDS)]
        answer = {"text": " ".join(words[:40]), "answer_start": 0}
        question = {"id": str(i), "question": f"What is {i:04}?", "answers": [answer]}
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def cases() -> list[dict[str, Any]]:
    """The settings of each case beside BASE."""
    return [{name: value} for name, values in SWEEPS.items() for value in values]


def expected(config: Config, run: Run) -> dict[str, float]:
    """GiB by term of the plan, for the batches that the run has."""
    sources = run.tables.sources
    job = Job(
        answer_len=max(int(table.length_N.max()) for table in run.tables.answers.values()),
        source_len=int(sources.length_N.max()),
        cached_tokens=0 if sources.states is None else len(sources.states),
    )
    return {term.name: term.bytes / GIB for term in plan(config, job) if term.name != "reserve"}


def measure(
    pair: str, config: Config, changed: dict[str, Any], world: World, shared: Shared
) -> list[dict[str, Any]]:
    """The rows of one case."""
    words = case_words(
        pair=pair, impl="ours", engine="plain", batch=config.optim.batch_size,
        latents=config.encoder.latent_len, answer=config.data.max_answer_tokens,
        encoder=config.encoder.encoder_type, varied=next(iter(changed)),
    )  # fmt: skip
    folder = Path(tempfile.gettempdir())  # nothing is written
    terms, peak = None, None
    try:
        lms = shared.lms(config, world.device)
        run = setup_run(config, world, folder, None, lms, shared.tables)
        terms = expected(config, run)
        peak = time_steps(ProductStep(run), warm_up=1, steps=1, device=world.device).peak_gib
    except torch.OutOfMemoryError:
        full = True
    else:
        full = False
    run = None  # with its tensors, before the next case
    free_memory(world.device)
    about = {"command": shlex.join(sys.argv), "settings": changed, "terms_gib": terms}
    found = {} if terms is None else {"expected_gib": sum(terms.values())}
    found |= {} if peak is None else {"peak_gib": peak}
    if len(found) == 2:
        found["expected_over_peak"] = found["expected_gib"] / found["peak_gib"]
    found |= {"out_of_memory": 1} if full else {}
    print(words, *(f"{name}={value:.4g}" for name, value in found.items()), sep="  ", flush=True)
    return [
        measured("memory", words, name, value, "GiB" if name.endswith("gib") else "1", config=about)
        for name, value in found.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--pair", help="the word pair= of the rows (default: the preset)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="CSV file to write")
    add_settings(parser, ("data", "encoder", "adapter", "optim", "backbone"))
    argv, lms = split_lm_flags(sys.argv[1:])
    flags = vars(parser.parse_args(argv))
    pair = flags["pair"] or flags["preset"]
    given = {key: value for key, value in flags.items() if key in FIELDS}
    world, shared, rows = init_world(use_deepspeed=False, device=flags["device"]), Shared(), []
    with tempfile.TemporaryDirectory() as folder:
        questions = str(write_questions(Path(folder) / "questions.json"))
        files = {"dataset": questions, "eval_dataset": questions, "max_answer_chars": 0}
        for changed in cases():
            config = build_config(flags["preset"], {**BASE, **given, **files, **changed}, lms)
            rows += measure(pair, config, changed, world, shared)
    close_world()
    out = flags["out"] or Path(f"benchmarks/results/memory_{pair}.csv")
    write_rows(out, rows)
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
