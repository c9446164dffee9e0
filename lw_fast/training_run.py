"""A run while it trains: what the loop holds, and how it is saved and taken up again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lw_fast import checkpoint, run_folder
from lw_fast.batches import Order, Tables
from lw_fast.config import Config, to_dict
from lw_fast.data import Example
from lw_fast.engine import Engine, World
from lw_fast.errors import UserError
from lw_fast.eval_files import METRICS_FILE
from lw_fast.meters import Meter
from lw_fast.model import LatentModel, join_state, split_state
from lw_fast.placement import Placement

logger = logging.getLogger(__name__)

AfterEvaluation = Callable[["Run", Mapping[str, Any]], None]
"""Sees the metrics of an epoch on every rank, and may change the run before the next one."""


@dataclass
class Run:
    """Everything the loop holds."""

    config: Config
    run_dir: Path
    world: World
    placement: Placement
    model: LatentModel
    tables: Tables
    eval_examples: list[Example]
    engine: Engine
    order: Order
    meter: Meter
    saver: checkpoint.Saver = field(default_factory=checkpoint.Saver)
    global_step: int = 0
    stop_requested: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    """What was logged since the last row, on the device."""
    rms: dict[str, Tensor] = field(default_factory=dict)
    """Per LM: [sum of raw prefix RMS, examples], over the epoch."""
    writer: Any = None
    """TensorBoard's, from the first row on."""
    after_evaluation: AfterEvaluation | None = None
    finished: bool = False
    """Set by it to end the run after this epoch."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.order.steps_per_epoch * self.config.optim.epochs

    @property
    def eval_dir(self) -> Path:
        """Where the evaluation after the newest epoch goes."""
        return self.run_dir / f"eval_epoch{self.epoch}"

    def is_logged(self, step: int) -> bool:
        """Whether a row is written after `step` steps."""
        return step % self.config.run.log_every == 0 or step == self.total_steps

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.global_step // self.order.steps_per_epoch


def save(run: Run, name: str) -> None:
    """Writes a checkpoint of that name into the run folder, in the background. Collective.

    All of it is copied to the CPU before this returns. A save that failed raises at the end of the
    next step on the rank that writes (rank 0).
    """
    state, optimizer = run.engine.module_state(), run.engine.optimizer_state()
    rms, sums = _totals(run, run.rms), _totals(run, run.sums)
    if run.world.is_main:
        encoder, adapters = split_state(state)
        best = run_folder.best_checkpoint(run.run_dir) if run.config.run.keep_best else None
        run.saver.save(
            run.run_dir,
            name,
            encoder=encoder,
            adapters=adapters,
            optimizer=optimizer,
            progress={
                "epoch": run.epoch,
                "global_step": run.global_step,
                "rms": rms,
                "sums": sums,
            },
            config=to_dict(run.config),
            stats=_training_stats(run, rms),
            keep_last=run.config.run.keep_last,
            spare=[best] if best else [],
        )


def _totals(run: Run, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks, on the CPU; `counts` are those of all ranks already. Collective."""
    return {
        name: (sums[name] if name == "counts" else run.world.all_reduce(sums[name].clone())).cpu()
        for name in sorted(sums)  # the same order on all ranks
    }


def _training_stats(run: Run, rms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Per LM: mean RMS of the raw prefix over the epoch, its calibrated value, the LM's own."""
    stats = {}
    for name, lm in run.model.lms.items():
        total, count = rms[name].tolist()
        raw = total / count
        mode = run.config.adapter.calibration
        fixed = run.config.adapter.prefix_target_rms
        calibrated = {"none": raw, "fixed": fixed}.get(mode, lm.embed_rms)
        stats[name] = {
            "rms_mean_raw": raw,
            "rms_mean_cal": calibrated,
            "embed_rms": lm.embed_rms,
            "count": int(count),
        }
    return stats


def start_from(run: Run, loaded: checkpoint.Checkpoint) -> None:
    """Starts from another run's weights; adapters of LMs that it did not have stay fresh."""
    known = {name: state for name, state in loaded.adapters.items() if name in run.model.lms}
    _, own = split_state(run.engine.module_state())
    run.engine.load_module_state(join_state(loaded.encoder, {**own, **known}))
    logger.info("started from the weights of %s", loaded.path)


def resume_run(run: Run, loaded: checkpoint.Checkpoint) -> None:
    """Continues where a checkpoint of the same run ended.

    Raises:
        UserError: the run was at its end.
    """
    run.engine.load_module_state(join_state(loaded.encoder, loaded.adapters))
    run.engine.load_optimizer_state(loaded.optimizer)
    run.global_step = loaded.progress["global_step"]
    if run.world.is_main:  # the saved sums are those of all ranks
        device, saved = run.world.device, loaded.progress
        run.sums = {k: v if k == "counts" else v.to(device) for k, v in saved["sums"].items()}
        if run.global_step % run.order.steps_per_epoch:
            run.rms = {k: v.to(device) for k, v in saved["rms"].items()}
    if run.world.is_main:
        run_folder.drop_rows_after(run.run_dir, run.global_step)
    logger.info("resumed %s at step %d", loaded.path, run.global_step)
    evaluated = (run.eval_dir / METRICS_FILE).exists()
    if any(run.world.all_gather(run.global_step >= run.total_steps and evaluated)):
        raise UserError(f"nothing to resume: {loaded.path} is the end; raise --epochs to go on")
