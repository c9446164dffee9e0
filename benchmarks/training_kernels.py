"""The training step with the fused kernels and without: same seed, same batches, same run.

    python benchmarks/training_kernels.py [--steps 100] [--preset nano] [--SETTING VALUE ...]

Writes benchmarks/results/training_kernels.csv: seconds per step (median after 10 warm-up steps),
peak memory, and the largest relative difference of the loss over the steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import dataclasses

import torch

from benchmarks.rows import case_words, measured, write_rows
from lw_fast.cli import add_settings, split_lm_flags
from lw_fast.config import FIELDS, build_config
from lw_fast.engine import build_engine, init_world
from lw_fast.meters import peak_memory, reset_peak_memory
from lw_fast.model import build_bridge
from lw_fast.train import setup_run
from lw_fast.train_step import train_step
from lw_fast.training_run import Run

WARM_UP = 10


def measure(run: Run, kernels: str, steps: int) -> tuple[list[float], list[float], float]:
    """Losses, seconds per step and peak GiB of `steps` steps from a fresh bridge."""
    for lm in run.model.lms.values():
        lm.kernels = kernels
    bridge = build_bridge(run.config, run.model.lms, run.model.reader, run.model.device)
    run.model = dataclasses.replace(run.model, bridge=bridge)
    run.engine = build_engine(bridge, run.config, run.world, None, 1)
    reset_peak_memory(run.world.device)
    losses, seconds = [], []
    for step in range(steps):
        run.global_step = step
        run.sums.clear()
        started = time.perf_counter()
        train_step(run)
        losses.append(float(run.sums["loss"]))  # waits for the device
        seconds.append(time.perf_counter() - started)
    return losses, seconds[WARM_UP:], peak_memory(run.world.device)["peak_gib"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_kernels.csv"))
    add_settings(parser)
    argv, lms = split_lm_flags(sys.argv[1:])
    flags = vars(parser.parse_args(argv))
    config = build_config(flags["preset"], {k: v for k, v in flags.items() if k in FIELDS}, lms)
    world = init_world(use_deepspeed=False)
    run = setup_run(config, world, Path(tempfile.mkdtemp()), None)
    impls = ("torch", "triton") if torch.cuda.is_available() else ("torch", "auto")
    measure(run, "torch", WARM_UP)  # cuBLAS, allocator and data are warm for both
    results = {impl: measure(run, impl, flags["steps"]) for impl in impls}
    rows = []
    for impl, (_, seconds, peak) in results.items():
        case = case_words(pair=flags["preset"], impl=impl, batch=config.optim.batch_size)
        ordered = sorted(seconds)
        rows.append(measured(
            "training_kernels", case, "seconds", statistics.median(ordered), "s",
            p20=ordered[len(ordered) // 5], p80=ordered[-1 - len(ordered) // 5], n=len(ordered),
        ))  # fmt: skip
        if peak is not None:  # a CPU does not count it
            rows.append(measured("training_kernels", case, "peak_gib", peak, "GiB"))
    one, two = (results[impl][0] for impl in impls)
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    case = case_words(pair=flags["preset"], impl="/".join(impls), batch=config.optim.batch_size)
    rows.append(measured("training_kernels", case, "loss_relative_difference", worst, "1",
                         n=len(one)))  # fmt: skip
    write_rows(args_out := flags["out"], rows)
    for row in rows:
        print(row["case"], row["metric"], f"{row['value']:.4g}", row["unit"])
    print(f"written to {args_out}")


if __name__ == "__main__":
    main()
