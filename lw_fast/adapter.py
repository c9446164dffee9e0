"""Z -> prefix embeddings of one LM, and the calibration that gives them the LM's loudness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lw_fast.config import AdapterConfig


class Adapter(nn.Module):
    """LayerNorm -> linear map (plus a one-hidden-layer MLP), times a scale, optionally bounded.

    Parameter names `net.0`, `net.1` and `scale` are the original's.
    """

    def __init__(self, d_z: int, d_model: int, config: AdapterConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(d_z), nn.Linear(d_z, d_model))
        self.mlp = None
        if config.adapter_type == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(d_z, config.adapter_dim),
                nn.GELU(),
                nn.Linear(config.adapter_dim, d_model),
            )
        self.scale = nn.Parameter(torch.ones(1), requires_grad=not config.adapter_freeze_scale)
        self.bound = config.adapter_bound

    def forward(self, z_BMZ: Tensor) -> Tensor:
        """z_BMZ [B, M, d_z] -> raw prefix [B, M, D]."""
        normed_BMZ = self.net[0](z_BMZ)
        raw_BMD = self.net[1](normed_BMZ)
        if self.mlp is not None:
            raw_BMD = raw_BMD + self.mlp(normed_BMZ)
        raw_BMD = raw_BMD * self.scale
        return torch.tanh(raw_BMD / self.bound) * self.bound if self.bound else raw_BMD


def rms(x: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Root mean square in fp32, at least 1e-8."""
    # Clamped under the root, whose slope at zero is infinite.
    return x.float().square().mean(dim, keepdim=keepdim).clamp_min(1e-16).sqrt()


@dataclass(frozen=True)
class Calibration:
    """How a raw prefix is scaled: `per_slot` normalises each latent by itself, `embed_rms` and
    `fixed` and `train_stats` use one factor per example (they differ in where the target comes
    from), `none` leaves it alone. `gain` comes on top in every mode."""

    mode: str
    target_rms: float = 1.0
    gain: float = 1.0


AS_IT_IS = Calibration("none")

KERNEL_MODE = {
    "none": "none",
    "per_slot": "per_slot",
    "embed_rms": "per_example",
    "fixed": "per_example",
    "train_stats": "per_example",
}
"""Calibration mode -> what lw_kernels.prefix_concat calls it."""


def calibrate(raw_BMD: Tensor, calibration: Calibration) -> Tensor:
    """The prefix with the RMS that `calibration` asks for, fp32 [B, M, D]."""
    if calibration.mode == "none":
        return raw_BMD.float() * calibration.gain
    dims = (-1,) if calibration.mode == "per_slot" else (-2, -1)
    factor = calibration.target_rms * calibration.gain
    return raw_BMD.float() * (factor / rms(raw_BMD, dims, keepdim=True))
