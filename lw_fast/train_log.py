"""Sums that a training step leaves behind, and the rows of log.jsonl and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lw_fast import run_folder
from lw_fast.bridge import STATS, StepCounts
from lw_fast.meters import max_over_ranks, peak_memory
from lw_fast.optim import lr_factor
from lw_fast.training_run import Run


@torch.no_grad()
def accumulate(run: Run, sums: Mapping[str, Tensor], raw_rms: Mapping[str, Tensor]) -> None:
    """Adds a micro-batch's sums, and the RMS of its raw prefixes, to those of the run."""
    for name, value in sums.items():
        _add(run.sums, name, value)
    for name, rms_B in raw_rms.items():
        total = rms_B.sum()
        # full_like, not tensor(): a copy from the host would wait for the device.
        pair = torch.stack([total, torch.full_like(total, len(rms_B))])
        # Of several ranks that work on the same examples, one counts them.
        _add(run.rms, name, pair * run.model.lms[name].is_here)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def counts_row(counts: StepCounts, lms: Sequence[str]) -> Tensor:
    """int64 [2 + 2 * LMs]: examples, spans, then supervised rows and examples of each LM."""
    rows = [counts.rows.get(name, 0) for name in lms]
    examples = [counts.examples * (name in counts.rows) for name in lms]
    return torch.tensor([counts.examples, counts.spans, *rows, *examples])


def log_row(run: Run, norm: float) -> dict[str, Any]:
    """One row for log.jsonl and TensorBoard, from what was summed since the last one."""
    examples, spans, *per_lm = run.sums.pop("counts").tolist()
    num_lms = len(run.model.lms)
    sums = {name: run.world.all_reduce(run.sums[name]).tolist() for name in sorted(run.sums)}
    run.sums.clear()
    rates = run.meter.report()
    memory = max_over_ranks(peak_memory(run.world.device), run.world.device)
    steps = examples / run.config.optim.batch_size
    row: dict[str, Any] = {
        "step": run.global_step,
        "epoch": run.global_step / run.order.steps_per_epoch,
        "loss": sums["loss"] / steps,
        "grad_norm": norm,
        "lr_factor": lr_factor(run.global_step - 1, run.total_steps, run.config.optim),
    }
    row |= {f"grad_norm/{part}": float(value) for part, value in run.engine.part_norms.items()}
    for name, rows, seen in zip(run.model.lms, per_lm[:num_lms], per_lm[num_lms:], strict=True):
        if not seen:  # lms_per_step=one: not drawn since the last row
            continue
        stats = dict(zip(STATS, sums[name], strict=True))
        row[f"{name}/nll_token"] = stats["nll_sum"] / max(rows, 1)
        row[f"{name}/first_nll"] = stats["first_nll_sum"] / seen
        row[f"{name}/first_token_top1"] = stats["first_top1_sum"] / seen
        row[f"{name}/first_token_top5"] = stats["first_top5_sum"] / seen
        if run.config.loss.kl_weight:
            row[f"{name}/kl"] = stats["kl_sum"] / max(rows, 1)
    if "align" in sums:
        row["align_loss"] = sums["align"] / examples
    if "span" in sums:
        row["span_loss"] = sums["span"] / max(spans, 1)
    row |= {key: value for key, value in (rates | memory).items() if value is not None}
    if run.world.is_main:
        run_folder.append_row(run.run_dir, row | {"time": time.time()})
        _tensorboard(run, row)
    return row


def _tensorboard(run: Run, row: Mapping[str, Any]) -> None:
    if run.writer is None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run logs some steps again.
        folder = str(run.run_dir / "tensorboard")
        run.writer = SummaryWriter(folder, purge_step=run.global_step)
    for name, value in row.items():
        if name not in ("step", "time"):
            run.writer.add_scalar(name, value, run.global_step)
