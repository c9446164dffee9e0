"""Sums and counts, never means of means.

Every loss is a sum over the rows at hand times a weight that already holds the count over the
whole optimiser step (all micro-batches, all devices). Adding the pieces up therefore gives the
same value however the batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lw_kernels import kl_topk
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


@dataclass(frozen=True)
class TeacherRows:
    """Soft targets of N answer rows: a teacher's K likeliest next tokens."""

    ids_NK: Tensor
    """int64."""
    log_probs_NK: Tensor
    """fp32, at temperature 1; what they lack to a sum of 1 is the rest of the vocabulary."""
    temperature: float = 1.0


def teacher_kl_sum(logits_NV: Tensor, teacher: TeacherRows, impl: str = "auto") -> Tensor:
    """Sum over rows of T^2 KL(teacher || student), both at temperature T, in nats.

    The teacher is cut to its K tokens and normalised over them, the student is not: a student that
    equals the whole teacher still has -log(mass of the K tokens). T^2 keeps the gradient's size.
    """
    temperature = teacher.temperature
    kl_N = kl_topk(
        logits_NV / temperature, teacher.log_probs_NK / temperature, teacher.ids_NK, impl=impl
    )
    return temperature**2 * kl_N.sum()


def scale_penalty(scales: list[Tensor]) -> Tensor:
    """sum over adapters of (scale - 1)^2."""
    return torch.stack([(scale - 1).square().sum() for scale in scales]).sum()


def rms_penalty(raw_rms_B: Tensor, target_rms: float) -> Tensor:
    """Sum over examples of (raw prefix RMS - target)^2."""
    return (raw_rms_B - target_rms).square().sum()
