"""Which parameter learns how fast: parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from lw_fast.config import OptimConfig


def param_groups(module: torch.nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups the trainable parameters for AdamW by learning rate and weight decay.

    Parameters below `adapters.` learn at adapter_lr (0: at lr), all others, the encoder's, at lr.
    Weight decay applies to matrices (ndim >= 2) only; biases, norms and scales are spared.

    Returns:
        Non-empty groups with keys params, lr, weight_decay, in order of first appearance.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        lr = optim.lr
        if name.startswith("adapters.") and optim.adapter_lr:
            lr = optim.adapter_lr
        decay = optim.weight_decay if param.ndim >= 2 else 0.0
        groups.setdefault((lr, decay), []).append(param)
    return [
        {"params": params, "lr": lr, "weight_decay": decay}
        for (lr, decay), params in groups.items()
    ]


def lr_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """The learning rate of a step over its peak.

    Rises linearly over warmup_steps (the first step already moves), then follows half a cosine
    from 1 to min_lr_ratio at the last step, or stays at 1 (schedule=constant).

    Args:
        step: Optimiser steps done before this one, from 0; past the last it stays at the end.
        total_steps: Optimiser steps of the whole run.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    decay_steps = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine
