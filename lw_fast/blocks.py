"""Pre-norm transformer block with rotary positions and a padding mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x_BHSK: Tensor) -> Tensor:
    """Rotary position embedding over dimension S (Su et al. 2021, arXiv 2104.09864)."""
    half = x_BHSK.shape[-1] // 2
    device = x_BHSK.device
    frequency_K = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle_SK = torch.arange(x_BHSK.shape[-2], device=device)[:, None] * frequency_K
    cos, sin = angle_SK.cos().to(x_BHSK.dtype), angle_SK.sin().to(x_BHSK.dtype)
    a, b = x_BHSK[..., :half], x_BHSK[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of queries over a source; SDPA picks the kernel."""

    def __init__(self, dim: int, heads: int, *, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BQD: Tensor, source_BUD: Tensor, mask_BU: Tensor | None) -> Tensor:
        """x_BQD [B, Q, D] attends to source_BUD [B, U, D] where mask_BU is True."""
        batch, num_queries, dim = x_BQD.shape
        q = self.q(x_BQD).view(batch, num_queries, self.heads, -1).transpose(1, 2)
        k, v = self.kv(source_BUD).view(batch, -1, 2, self.heads, dim // self.heads).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mask = None if mask_BU is None else mask_BU[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, num_queries, dim))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); self-attention, or cross with a source."""

    def __init__(
        self, dim: int, heads: int, dropout: float, *, rotary: bool = True, cross: bool = False
    ) -> None:
        super().__init__()
        self.norm_x = nn.LayerNorm(dim)
        self.norm_source = nn.LayerNorm(dim) if cross else None
        self.attention = Attention(dim, heads, rotary=rotary and not cross)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BQD: Tensor, mask_BU: Tensor | None = None, source_BUD: Tensor | None = None
    ) -> Tensor:
        """Shapes as in Attention; without a source, x attends to itself under mask_BU."""
        normed = self.norm_x(x_BQD)
        source = normed if source_BUD is None else self.norm_source(source_BUD)
        x_BQD = x_BQD + self.dropout(self.attention(normed, source, mask_BU))
        return x_BQD + self.dropout(self.mlp(x_BQD))
