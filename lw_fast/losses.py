"""Sums and counts, never means of means.

Every loss is a sum over the rows at hand times a weight that already holds the count over the
whole optimiser step (all micro-batches, all devices). Adding the pieces up therefore gives the
same value however the batch is split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_fast.config import LossConfig


def first_token_weight(loss: LossConfig, step: int, total_steps: int) -> float:
    """Extra weight of the first answer token at a step, counted from 0."""
    if loss.first_token_ce_schedule == "constant":
        return loss.first_token_ce_weight
    return loss.first_token_ce_weight * (1.0 - step / total_steps)


def span_loss_sum(span_logits_BU2: Tensor, span_B2: Tensor, mask_BU: Tensor) -> Tensor:
    """Sum over examples with a known span of (start CE + end CE) / 2.

    Args:
        span_logits_BU2: start and end scores of every unit.
        span_B2: gold first and last unit; negative where unknown (contributes nothing).
        mask_BU: units that may start or end an answer.
    """
    logits_B2U = span_logits_BU2.float().masked_fill(~mask_BU[..., None], -1e9).transpose(1, 2)
    return 0.5 * F.cross_entropy(
        logits_B2U.reshape(-1, logits_B2U.shape[-1]),
        torch.where(span_B2 < 0, -100, span_B2).reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )


def scale_penalty(scales: list[Tensor]) -> Tensor:
    """sum over adapters of (scale - 1)^2."""
    return torch.stack([(scale - 1).square().sum() for scale in scales]).sum()


def rms_penalty(raw_rms_B: Tensor, target_rms: float) -> Tensor:
    """Sum over examples of (raw prefix RMS - target)^2."""
    return (raw_rms_B - target_rms).square().sum()
