"""Training throughput of one pair of LMs: ours rung by rung, and the rivals, in the same run.

    python benchmarks/throughput.py --preset 8b --dataset train.json \
        --lm.llama random:llama-3.1-8b --lm.qwen random:qwen2.5-7b
    python benchmarks/throughput.py --device cpu --steps 2 --warm_up 1 --batch_size 8

Writes benchmarks/results/throughput_PAIR.csv after every case. A case that runs out of memory gets
a row that says so, and the next one starts. Counts are of real work: `positions/s` and `mfu` leave
out padding and second passes, so they compare across implementations.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import torch

from benchmarks import rivals
from benchmarks.rows import case_words, measured, write_rows
from benchmarks.steps import (
    ProductStep,
    Step,
    Timing,
    lm_costs,
    one_after_the_other,
    time_steps,
    timing_rows,
)
from lw_fast.batches import AnswerTable, Order
from lw_fast.cli import add_settings, find_ds_config, split_lm_flags
from lw_fast.config import FIELDS, Config, build_config
from lw_fast.data import NAMES
from lw_fast.engine import World, close_world, init_world, load_ds_config
from lw_fast.frozen_lm import compute_dtype, load_frozen_lm
from lw_fast.meters import free_memory, matmul_ceiling
from lw_fast.model import training_examples
from lw_fast.shared import Shared
from lw_fast.train import setup_run

BASE = {"encoder_type": "byte_seed", "batch_size": 64, "samples": 1024, "kinds": "latent"}
"""Settings of every case unless a flag or the case says otherwise. The encoder is the original's,
so that the LMs are what differs. Nothing is evaluated; other kinds may want more than is there."""

LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("padded_eager_torch", {"layout": "padded", "compile": "no", "kernels": "torch"}),
    ("triton_kernels", {"kernels": "auto"}),
    ("packed", {"layout": "packed"}),
    ("compiled", {"compile": "auto"}),
)
"""Rungs from a naive step to the full one: a name, and the settings that it adds to those before.
One more line is one more rung; the last one is what the other groups of cases stand on."""

ENCODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("byte", {"encoder_type": "byte"}),
    ("lm_cached", {"encoder_type": "lm", "reader_cache": "on"}),
    ("lm_uncached", {"encoder_type": "lm", "reader_cache": "off"}),
)
_PADDED = {"layout": "padded", "compile": "no"}
ATTENTION: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eager", {**_PADDED, "attn_implementation": "eager"}),
    ("sdpa", {**_PADDED, "attn_implementation": "sdpa"}),
    ("packed", {"attn_implementation": "sdpa"}),
    ("flash_attention_2", {"attn_implementation": "flash_attention_2"}),
)
"""Eager attention cannot read packed rows, so both padded cases stand beside it, uncompiled."""
NAIVE = {"layout": "padded", "compile": "no", "attn_implementation": "sdpa"}
"""How the rivals run their LMs."""
GROUPS = ("ladder", "batches", "fp8", "encoders", "attention", "engines", "original", "peft")


@dataclass(frozen=True)
class Case:
    """One thing to measure: its words, and the settings that differ from BASE."""

    words: Mapping[str, Any]
    overrides: Mapping[str, Any]
    plain: bool = False
    """Without DeepSpeed, although the run has it."""


@dataclass
class Bench:
    """What all cases share."""

    pair: str
    preset: str
    overrides: Mapping[str, Any]
    lms: Mapping[str, str]
    world: World
    ds_config: dict[str, Any] | None
    warm_up: int
    steps: int
    out: Path
    ceiling: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = Shared()

    def config(self, overrides: Mapping[str, Any]) -> Config:
        """The settings of a case."""
        return build_config(self.preset, {**BASE, **self.overrides, **overrides}, self.lms)

    def measure(self, case: Case, time_it: Callable[[Config], Timing]) -> float:
        """Adds the rows of one case; returns its samples/s, 0 if it did not come through."""
        config = self.config(case.overrides)
        words = self._words(case, config)
        about = {"command": shlex.join(sys.argv), "settings": dict(case.overrides)}
        rows, problem = [], None
        try:
            timing = time_it(config)
            ceiling = self.ceiling if _dtype(config, self.world.device) == "bf16" else None
            rows = timing_rows("throughput", words, timing, self.costs, ceiling, about)
        except torch.OutOfMemoryError:
            rows = [measured("throughput", words, "out_of_memory", 1, "1", config=about)]
        except Exception:
            problem = traceback.format_exc()  # a string: it holds no tensors
        torch.compiler.reset()
        free_memory(self.world.device)  # here, where no traceback holds on to the step's tensors
        if problem is not None:
            self.failed.append(words)
            print(f"FAILED {words}\n{problem}", file=sys.stderr, flush=True)
        self.add(rows)
        return next((row["value"] for row in rows if row["metric"] == "samples/s"), 0.0)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Stores and prints rows."""
        if rows:
            write_rows(self.out, rows, append=bool(self.rows))
            self.rows += rows
            found = {row["metric"]: f"{row['value']:.4g}" for row in rows}
            print(rows[0]["case"], *(f"{k}={v}" for k, v in found.items()), sep="  ", flush=True)

    def ours(self, case: Case) -> float:
        """Measures the product."""

        def time_it(config: Config) -> Timing:
            run = self._run(config, None if case.plain else self.ds_config)
            return self._time(ProductStep(run))

        return self.measure(case, time_it)

    def original(self, case: Case) -> float:
        """Measures the original's step, on the LMs that are in memory."""

        def time_it(config: Config) -> Timing:
            return self._time(rivals.OriginalStep(self._run(config, None)))

        return self.measure(case, time_it)

    def peft(self, case: Case, *, liger: bool) -> float:
        """Measures PEFT on each LM, alone on the card, one after the other."""

        def time_it(config: Config) -> Timing:
            self.shared = Shared()  # PEFT has the card to itself
            free_memory(self.world.device)
            return one_after_the_other([self._peft(name, config, liger) for name in config.lm])

        return self.measure(case, time_it)

    def _peft(self, name: str, config: Config, liger: bool) -> Timing:
        examples, _ = training_examples(config)
        lm = load_frozen_lm(name, config.lm[name], config.backbone, self.world.device)
        table = AnswerTable(lm, [example.answers[0] for example in examples], config)
        order = Order(len(examples), config.optim.batch_size, config.optim.seed)
        timing = self._time(rivals.PeftStep(lm, table, order, liger=liger))
        del lm, table
        free_memory(self.world.device)
        return timing

    def _run(self, config: Config, ds_config: dict[str, Any] | None):
        lms = self.shared.lms(config, self.world.device)
        run = setup_run(config, self.world, Path(tempfile.gettempdir()), ds_config, lms)
        self.costs = lm_costs(run.model.lms)
        return run

    def _time(self, step: Step) -> Timing:
        return time_steps(step, warm_up=self.warm_up, steps=self.steps, device=self.world.device)

    def _words(self, case: Case, config: Config) -> str:
        zero = None if case.plain or not self.ds_config else self.ds_config["zero_optimization"]
        words = {
            "pair": self.pair,
            "impl": None,
            "engine": f"zero{zero['stage']}" if zero else "plain",
            "gpus": self.world.size if self.world.device.type == "cuda" else 0,
            "batch": config.optim.batch_size,
            "dtype": _dtype(config, self.world.device),
            "attn": config.backbone.attn_implementation,
            "encoder": config.encoder.encoder_type,
        }
        return case_words(**{**words, **case.words})


def _dtype(config: Config, device: torch.device) -> str:
    choice = config.backbone.backbone_dtype
    if choice != "auto":
        return choice
    return "bf16" if compute_dtype(choice, device) == torch.bfloat16 else "fp32"


# ------------------------------------------------------------------------------- the cases


def ladder() -> Iterator[Case]:
    """The rungs, each with the settings of those before."""
    settings: dict[str, Any] = {}
    for number, (name, added) in enumerate(LADDER):
        settings = {**settings, **added}
        yield Case({"impl": "ours", "rung": f"{number}_{name}"}, settings)


def full() -> dict[str, Any]:
    """The settings of the last rung."""
    return {key: value for _, added in LADDER for key, value in added.items()}


def run_groups(bench: Bench, groups: list[str], sizes: Mapping[str, list[int]]) -> None:
    """Measures the groups that were asked for, in an order that loads LMs as seldom as it can."""
    best = full()
    if "ladder" in groups:
        for case in ladder():
            bench.ours(case)
    if "batches" in groups:
        rates = {}
        for size in sizes["batches"]:
            case = Case({"impl": "ours", "group": "batches"}, best | {"batch_size": size})
            rates[size] = bench.ours(case)
        fastest = max(rates, key=rates.__getitem__)
        print(f"fastest batch: {fastest} at {rates[fastest]:.4g} samples/s")
        best = best | {"batch_size": fastest}
    if "fp8" in groups:
        for size in sizes["batches"]:
            settings = best | {"backbone_dtype": "fp8", "batch_size": size}
            bench.ours(Case({"impl": "ours", "group": "fp8"}, settings))
    if "encoders" in groups:
        for name, settings in ENCODERS:
            words = {"impl": "ours", "group": "encoders", "encoder": name}
            bench.ours(Case(words, best | settings))
    if "engines" in groups and bench.ds_config:
        bench.ours(Case({"impl": "ours", "group": "engines"}, best, plain=True))
    if "attention" in groups:
        for kind, settings in ATTENTION:
            if kind == "flash_attention_2" and not rivals.installed("flash_attn"):
                print("no row for attn=flash_attention_2: flash_attn is not installed")
                continue
            words = {"impl": "ours", "group": "attention", "attn": kind}
            bench.ours(Case(words, best | settings))
    if "original" in groups:
        for size in sizes["original"]:
            settings = NAIVE | {"kernels": "torch", "batch_size": size}
            bench.original(Case({"impl": "original", "engine": "plain"}, settings))
    if "peft" in groups:
        _peft(bench, sizes["peft"])


def _peft(bench: Bench, sizes: list[int]) -> None:
    for impl, why_not in (("peft", rivals.no_peft()), ("peft_liger", rivals.no_liger())):
        if why_not:
            print(f"no row for impl={impl}: {why_not}")
            continue
        for size in sizes:
            settings = NAIVE | {"batch_size": size}
            words = {"impl": impl, "engine": "plain", "encoder": None}
            bench.peft(Case(words, settings), liger=impl == "peft_liger")


# ------------------------------------------------------------------------------- the command


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--pair", help="the word pair= of the rows (default: the preset)")
    parser.add_argument("--groups", default=",".join(GROUPS), help="what to measure (default: all)")
    parser.add_argument("--ds_config", type=Path, help="run ours under DeepSpeed with this file")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--warm_up", type=int, default=4, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=10, help="measured steps per case")
    parser.add_argument("--batches", type=_sizes, default=[64, 128, 256])
    parser.add_argument("--original_batches", type=_sizes, default=[32, 64])
    parser.add_argument("--peft_batches", type=_sizes, default=[64])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    add_settings(parser, ("data", "encoder", "adapter", "sequence", "loss", "optim", "backbone"))
    return parser


def main() -> None:
    """Command line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    argv, lms = split_lm_flags(sys.argv[1:])
    flags = vars(_parser().parse_args(argv))
    groups = flags["groups"].split(",")
    if unknown := set(groups) - set(GROUPS):
        sys.exit(f"error: unknown group {sorted(unknown)[0]}; there are {', '.join(GROUPS)}")
    if min(flags["warm_up"], flags["steps"]) < 1:
        sys.exit("error: warm_up and steps must be at least 1")
    overrides = {key: value for key, value in flags.items() if key in FIELDS}
    dataset = overrides.get("dataset")
    if dataset is not None and dataset not in NAMES:  # a file has no evaluation part; none is used
        overrides.setdefault("eval_dataset", dataset)
    ds_file = flags["ds_config"]
    world = init_world(use_deepspeed=ds_file is not None, device=flags["device"])
    pair = flags["pair"] or flags["preset"]
    bench = Bench(
        pair=pair,
        preset=flags["preset"],
        overrides=overrides,
        lms=lms,
        world=world,
        ds_config=load_ds_config(find_ds_config(flags["ds_config"]))
        if flags["ds_config"]
        else None,
        warm_up=flags["warm_up"],
        steps=flags["steps"],
        out=flags["out"] or Path(f"benchmarks/results/throughput_{pair}.csv"),
        ceiling=matmul_ceiling(world.device),
    )
    try:
        if bench.ceiling is not None:
            words = case_words(op="matmul", size=8192, dtype="bf16")
            bench.add([measured("throughput", words, "flop/s", bench.ceiling, "FLOP/s")])
        names = ("batches", "original_batches", "peft_batches")
        run_groups(bench, groups, {name.removesuffix("_batches"): flags[name] for name in names})
    finally:
        close_world()
    print(f"{len(bench.rows)} rows in {bench.out}")
    if bench.failed:
        sys.exit(f"error: {len(bench.failed)} cases failed: {'; '.join(bench.failed)}")


if __name__ == "__main__":
    main()
