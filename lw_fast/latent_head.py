"""Source features -> Z: an answer-span head, copy slots and global slots.

A frozen LM can repeat what stands in its prefix long before an encoder can learn, from a few
answer tokens, to find it. So the span head points at the answer (trained on its own loss), copy
slot k carries the k-th unit of that span, and global slots read the rest by cross-attention.
With 0 copy slots all M latents are global: the free-query bottleneck of the original.

The first latent is a global slot. LMs without BOS (SmolLM2, Qwen) make position 0 their attention
sink, whatever stands there: a copy slot in that place is lost, and with it the first answer token
(docs/accuracy.md has the measurement).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lw_fast.blocks import Block


def best_span(logits_BU2: Tensor, mask_BU: Tensor, max_len: int) -> Tensor:
    """The span i <= j < i + max_len with the highest start_i + end_j; int64 [B, 2], inclusive.

    Only units where mask_BU is True may start or end it.
    """
    scores_BU2 = logits_BU2.float().masked_fill(~mask_BU[..., None], -1e9)
    start_BU, end_BU = scores_BU2.unbind(-1)
    max_len = min(max_len, start_BU.shape[1])
    padded = torch.nn.functional.pad(end_BU, (0, max_len - 1), value=-1e9)
    end_BUK = padded.unfold(1, max_len, 1)
    best_end_BU, offset_BU = end_BUK.max(-1)
    first_B = (start_BU + best_end_BU).argmax(1)
    last_B = first_B + offset_BU.gather(1, first_B[:, None])[:, 0]
    return torch.stack([first_B, last_B], dim=1)


class LatentHead(nn.Module):
    """Reads features [B, U, D] and the units of a span, writes Z [B, M, d_z]."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dropout: float,
        unit_dim: int,
        latent_len: int,
        copy_slots: int,
        d_z: int,
    ) -> None:
        super().__init__()
        self.num_copy, self.num_global = copy_slots, latent_len - copy_slots
        self.first_copy = min(1, self.num_global)
        self.position = nn.Parameter(0.02 * torch.randn(latent_len, dim))
        if self.num_copy:
            self.unit = nn.Linear(unit_dim, dim)
            self.empty = nn.Parameter(0.02 * torch.randn(dim))
        if self.num_global:
            self.read = Block(dim, heads, dropout, cross=True)
        self.mix = Block(dim, heads, dropout, rotary=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, d_z))

    def forward(
        self,
        features_BUD: Tensor,
        mask_BU: Tensor,
        units_BKF: Tensor | None,
        valid_BK: Tensor | None,
    ) -> Tensor:
        """Z [B, M, d_z]: a global slot, the copy slots, the other global slots.

        Args:
            features_BUD: encoder output over the source.
            mask_BU: real units.
            units_BKF: the span's units, one per copy slot (None without copy slots).
            valid_BK: slots that the span fills.
        """
        dtype, first = features_BUD.dtype, self.first_copy
        slots_BMD = self.position.to(dtype).expand(len(mask_BU), -1, -1)
        sink_BD, copy_BKD, rest_BD = slots_BMD.split(
            [first, self.num_copy, self.num_global - first], dim=1
        )
        if self.num_copy:
            copied = torch.where(valid_BK[..., None], self.unit(units_BKF), self.empty)
            copy_BKD = copy_BKD + copied.to(dtype)
        if self.num_global:
            queries = torch.cat([sink_BD, rest_BD], dim=1)
            read = self.read(queries, mask_BU, features_BUD).to(dtype)
            sink_BD, rest_BD = read[:, :first], read[:, first:]
        return self.out(self.mix(torch.cat([sink_BD, copy_BKD, rest_BD], dim=1)))

    def carried(self, tokens_BK: Tensor) -> Tensor:
        """Per latent [B, M]: the unit that a copy slot carries, -1 in all other slots."""
        others = (self.first_copy, self.num_global - self.first_copy)
        return torch.nn.functional.pad(tokens_BK, others, value=-1)
