"""How exact a kernel must be: measured against the error that PyTorch makes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def seeded(seed: int) -> dict:
    """Keywords that make torch.randn and its kin repeatable, on the device under test."""
    return {"generator": torch.Generator(device()).manual_seed(seed), "device": device()}


def max_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN anywhere makes it NaN, which no bound accepts."""
    return (x.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_within(
    name: str, ours: Tensor, same_dtype: Tensor, truth: Tensor, dtype: torch.dtype, factor: float
) -> None:
    """max|ours - truth| <= factor * max|torch - truth| + floor, both printed."""
    assert ours.shape == truth.shape, (name, ours.shape, truth.shape)
    error, yardstick = max_error(ours, truth), max_error(same_dtype, truth)
    size = truth.abs().max().item() if truth.numel() else 0.0
    bound = factor * yardstick + FLOOR[dtype] * max(1.0, size)
    print(f"{name}: ours {error:.3g}, torch {yardstick:.3g}, bound {bound:.3g}")
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} (torch {yardstick:.3g})"
