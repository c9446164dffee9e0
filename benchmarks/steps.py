"""Times training steps of any kind: what a step did, how long it took, and the rows that say so.

A step is a callable that runs one optimiser step and returns its Work. Steps are timed between
CUDA events, without waiting for the device in between: as a training runs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.rows import measured
from lw_fast.frozen_lm import FrozenLM
from lw_fast.meters import LMCost, mfu, peak_memory, reset_peak_memory
from lw_fast.train_step import train_step
from lw_fast.training_run import Run


@dataclass(frozen=True)
class Work:
    """What one optimiser step did, counted as meters.Meter counts it: real positions only."""

    samples: int
    positions: Mapping[str, int]
    supervised_tokens: Mapping[str, int]
    source_bytes: int = 0

    def counts(self) -> dict[str, int]:
        """Rate name -> count."""
        counts = {
            "samples/s": self.samples,
            "positions/s": sum(self.positions.values()),
            "supervised_tokens/s": sum(self.supervised_tokens.values()),
        }
        return counts | ({"source_bytes/s": self.source_bytes} if self.source_bytes else {})


Step = Callable[[], Work]


@dataclass(frozen=True)
class Timing:
    """Some steps, measured."""

    first_seconds: float
    """The first step of all: compilation, autotuning, allocation."""
    seconds: Sequence[float]
    """Each step after the warm-up."""
    work: Sequence[Work]
    peak_gib: float | None
    """Peak of all steps, the first ones too; None on a CPU."""


def time_steps(step: Step, *, warm_up: int, steps: int, device: torch.device) -> Timing:
    """Runs `warm_up` (at least 1) and then `steps` steps."""
    reset_peak_memory(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        step()
    marks, work = [_mark(device)], []
    for _ in range(steps):
        work.append(step())
        marks.append(_mark(device))
    _synchronize(device)
    seconds = [_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    return Timing(first, seconds, work, peak_memory(device)["peak_gib"])


def one_after_the_other(timings: Sequence[Timing]) -> Timing:
    """The same samples through one LM after the other: times add up, the peak is the larger."""
    peaks = [t.peak_gib for t in timings if t.peak_gib is not None]
    work = []
    for parts in zip(*(t.work for t in timings), strict=True):
        work.append(Work(
            samples=parts[0].samples,
            positions={k: v for part in parts for k, v in part.positions.items()},
            supervised_tokens={k: v for part in parts for k, v in part.supervised_tokens.items()},
        ))  # fmt: skip
    return Timing(
        first_seconds=sum(t.first_seconds for t in timings),
        seconds=[sum(parts) for parts in zip(*(t.seconds for t in timings), strict=True)],
        work=work,
        peak_gib=max(peaks) if peaks else None,
    )


def timing_rows(
    benchmark: str,
    case: str,
    timing: Timing,
    costs: Mapping[str, LMCost],
    ceiling: float | None,
    config: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Rows of one case. `ceiling` None (a CPU, fp8): no mfu."""

    def row(metric: str, values: Sequence[float], unit: str) -> dict[str, Any]:
        low, middle, high = quantiles(values)
        return measured(
            benchmark, case, metric, middle, unit, p20=low, p80=high, n=len(values), config=config
        )

    pairs = list(zip(timing.work, timing.seconds, strict=True))
    rows = [row("seconds", timing.seconds, "s")]
    for name in timing.work[0].counts():
        rows.append(row(name, [work.counts()[name] / s for work, s in pairs], "1/s"))
    if ceiling is not None:
        rows.append(row("mfu", [mfu(flops(work, costs), s, ceiling) for work, s in pairs], "1"))
    if timing.peak_gib is not None:
        rows.append(row("peak_gib", [timing.peak_gib], "GiB"))
    return [*rows, row("first_step_seconds", [timing.first_seconds], "s")]


def flops(work: Work, costs: Mapping[str, LMCost]) -> int:
    """What the frozen LMs have to compute for it: see LMCost."""
    return sum(
        costs[name].training_flops(num, work.supervised_tokens[name])
        for name, num in work.positions.items()
    )


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return low, statistics.median(ordered), high


def lm_costs(lms: Mapping[str, FrozenLM]) -> dict[str, LMCost]:
    """What a position and a supervised row of each LM cost."""
    return {
        name: LMCost(lm.num_layer_parameters, lm.d_model, lm.vocab_size) for name, lm in lms.items()
    }


class ProductStep:
    """One step as lw_fast.train's loop takes it, with its look at the norm of the step before."""

    def __init__(self, run: Run) -> None:
        self.run, self.norm = run, None
        self.meter = run.meter = _Recorder()

    def __call__(self) -> Work:
        previous, self.norm = self.norm, train_step(self.run)
        if previous is not None and not math.isfinite(previous):
            raise RuntimeError("the gradient is not finite")
        self.run.global_step += 1
        return self.meter.last


class _Recorder:
    """Stands in for the run's meter and keeps the counts of the last step."""

    last: Work

    def step(self, **counts: Any) -> None:
        self.last = Work(**counts)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
