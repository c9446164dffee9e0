"""Z -> prefix embeddings of one LM, and the calibration that gives them the LM's loudness."""

from __future__ import annotations

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


def calibrate(raw_BMD: Tensor, mode: str, target_rms: float, gain: float = 1.0) -> Tensor:
    """Scales a raw prefix so that its RMS is `target_rms`; returns fp32 [B, M, D].

    `per_slot` normalises each latent by itself, `embed_rms`, `fixed` and `train_stats` use one
    factor per example (they differ in where the target comes from), `none` leaves the prefix
    alone.
    """
    if mode == "none":
        return raw_BMD.float() * gain
    dims = (-1,) if mode == "per_slot" else (-2, -1)
    return raw_BMD.float() * (target_rms * gain / rms(raw_BMD, dims, keepdim=True))
