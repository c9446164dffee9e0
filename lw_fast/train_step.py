"""One optimiser step: draws, batches, losses, gradients, update."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from lw_fast.batches import length_groups, micro_slices
from lw_fast.bridge import StepCounts, step_loss
from lw_fast.config import Config
from lw_fast.encoder import join_sources
from lw_fast.losses import first_token_weight
from lw_fast.optim import lr_factor
from lw_fast.profiling import part
from lw_fast.train_log import accumulate, counts_row
from lw_fast.training_run import Run


def train_step(run: Run) -> Tensor:
    """One optimiser step; returns the gradient norm (0-d, not waited for)."""
    config, step = run.config, run.global_step
    index = run.order.step(step)
    gold = gold_span_draws(config, step, run.total_steps, len(index))
    here = run.model.lms_here
    answers = {name: run.tables.answers[name] for name in lms_of_step(config, step)}
    lms = {name: here[name] for name in answers if name in here}
    weight = first_token_weight(config.loss, step, run.total_steps)
    loss_config = dataclasses.replace(config.loss, first_token_ce_weight=weight)
    counts = StepCounts(
        examples=len(index),
        spans=run.tables.sources.num_spans(index),
        rows={name: table.num_targets(index) for name, table in answers.items()},
        ranks_per_share=run.placement.ranks_per_share,
    )
    share, shares = run.placement.share, run.placement.shares
    slices = micro_slices(len(index), share, shares, config.micro_batch)
    run.engine.module.train()
    for number, piece in enumerate(slices):
        torch.manual_seed(_dropout_seed(config, step, share, number))
        with part("data"):
            length = run.tables.sources.length_N[index[piece]]
            order = np.argsort(length, kind="stable")
            chosen, use_gold = index[piece][order], gold[piece][order]
            batches = {name: run.tables.answer_batch(name, chosen) for name in lms}
            groups = [
                run.model.batch(run.tables.sources, chosen[group], use_gold[group])
                for group in length_groups(length[order])
            ]
        output = run.engine(*groups)
        loss, sums = step_loss(
            output, join_sources(groups), batches, lms, run.model.bridge, counts,
            loss_config, config.encoder.span_weight,
        )  # fmt: skip
        with part("bridge backward"):
            run.engine.backward(loss, last=number == len(slices) - 1)
        accumulate(run, sums, output.raw_rms)
    run.meter.step(
        samples=len(index),
        source_bytes=int(run.tables.sources.num_bytes_N[index].sum()),
        positions={name: table.num_positions(index) for name, table in answers.items()},
        supervised_tokens=dict(counts.rows),
    )
    accumulate(run, {"counts": counts_row(counts, list(run.model.lms))}, {})
    factor = lr_factor(step, run.total_steps, config.optim)
    with part("optimizer"):
        return run.engine.step(factor, with_parts=run.is_logged(step + 1))


def lms_of_step(config: Config, step: int) -> list[str]:
    """The LMs that a step trains through: all, or a drawn one. The same on every rank."""
    names = list(config.lm)
    if config.loss.lms_per_step == "all":
        return names
    return [str(np.random.default_rng((config.optim.seed, step, _LM_DRAWS)).choice(names))]


_LM_DRAWS = 1
"""Tells these draws from those of gold_span_draws."""


def gold_span_draws(config: Config, step: int, total_steps: int, num: int) -> np.ndarray:
    """Which examples of a step get the gold span in their copy slots: a share that falls linearly
    from all to none over the first `gold_span_until` of the run. The same for any world size."""
    until = config.encoder.gold_span_until * total_steps
    share = max(0.0, 1.0 - step / until) if until else 0.0
    return np.random.default_rng((config.optim.seed, step)).random(num) < share


def _dropout_seed(config: Config, step: int, share: int, micro: int) -> int:
    """Dropout depends on where in the run we are, not on how we got there: resuming is exact."""
    return int(np.random.SeedSequence((config.optim.seed, step, share, micro)).generate_state(1)[0])
