"""--auto_batch: the micro-batch that trains fastest among those that fit.

Sizes are tried from a device's whole share of the batch downwards, each with one forward and
backward pass over the examples that need the most memory, then some that are timed. The batch
itself, and with it the losses, stays as it is. No engine exists yet and no weight changes, so a
size that does not fit leaves nothing behind, on one process or on many.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from lw_fast.batches import Order, Tables
from lw_fast.bridge import StepCounts, step_loss
from lw_fast.config import Config
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.meters import free_memory, peak_memory, reset_peak_memory
from lw_fast.model import LatentModel

logger = logging.getLogger(__name__)

TIMED_PASSES = 3
"""Passes that are timed per size, after the one that must fit and one to warm up."""
WORTH_TRYING = 1.05
"""The search ends at a size this many times slower than the best one."""


@dataclass(frozen=True)
class Trial:
    """One size, as the slowest of all processes saw it."""

    size: int
    seconds_per_sample: float | None
    """None: out of memory."""
    peak_gib: float | None
    """None on a CPU, and where it did not fit."""


def choose(
    config: Config, world: World, model: LatentModel, tables: Tables, shares: int = 1
) -> Config:
    """The settings with `micro_batch_size` set to the fastest size that fits. Collective.

    Args:
        shares: Parts that a batch is cut into; each process works on one.

    Raises:
        UserError: not even one example at a time fits.
    """
    trials = search(config, world, model, tables, shares)
    fitting = [trial for trial in trials if trial.seconds_per_sample is not None]
    if not fitting:
        raise UserError(
            "auto_batch: not even a micro-batch of one example fits; try --backbone_dtype nf4, "
            "--grad_ckpt true or smaller LMs (launch/plan.py says what fills the card)"
        )
    best = min(fitting, key=lambda trial: trial.seconds_per_sample)
    if world.is_main:
        logger.info("%s", table(trials, best))
    optim = dataclasses.replace(config.optim, micro_batch_size=best.size)
    return dataclasses.replace(config, optim=optim)


def search(
    config: Config, world: World, model: LatentModel, tables: Tables, shares: int
) -> list[Trial]:
    """Tries sizes from the largest down until one is clearly slower than the best. Collective."""
    trials: list[Trial] = []
    size, best = config.optim.batch_size // shares, float("inf")
    while size:
        trial = _slowest(size, world.all_gather(_try(size, config, world, model, tables)))
        trials.append(trial)
        if trial.seconds_per_sample is not None:
            if trial.seconds_per_sample > WORTH_TRYING * best:
                break
            best = min(best, trial.seconds_per_sample)
        size //= 2
    return trials


def _slowest(size: int, seen: list[Trial]) -> Trial:
    """What counts for all processes: the slowest time and the highest peak, or that one failed."""
    if any(trial.seconds_per_sample is None for trial in seen):
        return Trial(size, None, None)
    peaks = [trial.peak_gib for trial in seen if trial.peak_gib is not None]
    slowest = max(trial.seconds_per_sample for trial in seen)
    return Trial(size, slowest, max(peaks) if peaks else None)


def _try(size: int, config: Config, world: World, model: LatentModel, tables: Tables) -> Trial:
    try:
        seconds, peak = _measure(size, config, model, tables)
    except torch.OutOfMemoryError:
        seconds = peak = None
    # Outside the handler, whose traceback holds on to the tensors of the pass.
    model.bridge.zero_grad(set_to_none=True)
    free_memory(world.device)
    return Trial(size, None if seconds is None else seconds / size, peak)


def _measure(
    size: int, config: Config, model: LatentModel, tables: Tables
) -> tuple[float, float | None]:
    """(seconds of a pass, peak GiB) with `size` examples."""
    device = model.device
    reset_peak_memory(device)
    # AdamW's two moments and the engine's gradients do not exist yet, but must fit beside it.
    trained = sum(p.numel() for p in model.bridge.parameters() if p.requires_grad)
    moments = torch.empty(2 * trained, device=device)
    order = Order(len(tables), size, config.optim.seed)
    passes = [_largest(tables, size), *(order.step(i) for i in range(1 + TIMED_PASSES))]
    seconds = []
    for index in passes:
        started = time.perf_counter()
        _one_pass(config, model, tables, index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    del moments
    return statistics.median(seconds[2:]), peak_memory(device)["peak_gib"]


def _largest(tables: Tables, size: int) -> np.ndarray:
    """Examples with the longest source and the longest answers, then the longest in sum."""
    lengths = [tables.sources.length_N, *(table.length_N for table in tables.answers.values())]
    extremes = [int(length_N.argmax()) for length_N in lengths]
    by_sum = np.argsort(-sum(length_N / length_N.max() for length_N in lengths), kind="stable")
    return np.array(list(dict.fromkeys([*extremes, *by_sum.tolist()]))[:size])


def _one_pass(config: Config, model: LatentModel, tables: Tables, index: np.ndarray) -> None:
    """Forward and backward of one micro-batch; gradients stay on the bridge."""
    lms = model.lms_here
    counts = StepCounts(
        examples=len(index),
        spans=tables.sources.num_spans(index),
        rows={name: tables.answers[name].num_targets(index) for name in lms},
    )
    model.bridge.train()
    source = model.batch(tables.sources, index)
    batches = {name: tables.answer_batch(name, index) for name in lms}
    loss, _ = step_loss(
        model.bridge(source), source, batches, lms, model.bridge, counts,
        config.loss, config.encoder.span_weight,
    )  # fmt: skip
    loss.backward()


def table(trials: list[Trial], best: Trial) -> str:
    """The search as text."""
    lines = ["auto_batch: questions per device and pass"]
    for trial in trials:
        if trial.seconds_per_sample is None:
            lines.append(f"  {trial.size:6}  out of memory")
            continue
        peak = "" if trial.peak_gib is None else f"  {trial.peak_gib:6.1f} GiB"
        chosen = "  <- micro_batch_size" if trial is best else ""
        lines.append(
            f"  {trial.size:6}  {1 / trial.seconds_per_sample:8.1f} samples/s{peak}{chosen}"
        )
    return "\n".join(lines)
