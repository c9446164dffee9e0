"""Source -> Z. Three encoders in one table: byte_seed, byte and lm.

All take a SourceBatch and return Encoded. `byte` and `lm` share the span head and the slots of
latent_head.py; they differ in what a unit is (a byte, a reader token) and in how units become
features. `byte_seed` is the original's two-layer encoder with one attention read, kept to
compare with (state-dict names as in the original).

Letters: B batch, U units of the source, D encoder width, F reader state width, M latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lw_fast.blocks import Block
from lw_fast.config import Config
from lw_fast.latent_head import LatentHead, best_span

MAX_SPAN_BYTES = 128
"""Longest span the byte span head may select (99 % of SQuAD answers are shorter)."""
MAX_SPAN_TOKENS = 30
"""The same for reader tokens."""


@dataclass(frozen=True)
class SourceBatch:
    """One batch of sources on the device, right-padded."""

    ids_BU: Tensor
    """int64: bytes, or reader token ids."""
    mask_BU: Tensor
    """bool: real units."""
    context_BU: Tensor
    """bool: units of the context, where an answer may stand."""
    span_B2: Tensor
    """int64: gold answer span, inclusive; -1 where unknown."""
    span_loss_B: Tensor
    """bool: whether the span head is supervised (a span to repeat has no question)."""
    use_gold_B: Tensor
    """bool: whether the copy slots carry the gold span (while it is known) or the predicted."""
    states_BUF: Tensor | None = None
    """encoder_type=lm: standardised reader states, layers side by side, the embedding first."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder returns."""

    z_BMZ: Tensor
    span_logits_BU2: Tensor | None
    """Start and end scores over units; None without a span head."""
    predicted_B2: Tensor | None
    """Best span, inclusive unit positions."""
    carried_BM: Tensor | None = None
    """encoder_type=lm: the reader token that each latent carries, -1 where none."""


def join_sources(groups: Sequence[SourceBatch]) -> SourceBatch:
    """Groups of different width as one batch, without reader states; for the losses."""
    if len(groups) == 1:
        return groups[0]
    wide = {name: _stack(groups, name) for name in ("ids_BU", "mask_BU", "context_BU")}
    rest = ("span_B2", "span_loss_B", "use_gold_B")
    return SourceBatch(**wide, **{n: torch.cat([getattr(g, n) for g in groups]) for n in rest})


def join_encoded(groups: Sequence[Encoded]) -> Encoded:
    """What an encoder returned for each group, as if for one batch."""
    if len(groups) == 1:
        return groups[0]

    def joined(name: str, join: Callable[[str], Tensor]) -> Tensor | None:
        return None if getattr(groups[0], name) is None else join(name)

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(group, name) for group in groups])

    return Encoded(
        z_BMZ=cat("z_BMZ"),
        span_logits_BU2=joined("span_logits_BU2", lambda name: _stack(groups, name)),
        predicted_B2=joined("predicted_B2", cat),
        carried_BM=joined("carried_BM", cat),
    )


def _stack(groups: Sequence[object], name: str) -> Tensor:
    """Fields [B, U, ...] of different U, filled up with zeros on the right."""
    tensors = [getattr(group, name) for group in groups]
    width = max(t.shape[1] for t in tensors)
    fill = [(0, 0) * (t.dim() - 2) + (0, width - t.shape[1]) for t in tensors]
    return torch.cat([F.pad(t, f) for t, f in zip(tensors, fill, strict=True)])


class Encoder(Protocol):
    """The interface of every encoder."""

    def __call__(self, source: SourceBatch) -> Encoded: ...


def copied_span(source: SourceBatch, predicted_B2: Tensor) -> Tensor:
    """The span whose units the copy slots carry: gold where asked for and known."""
    gold_B = source.use_gold_B & (source.span_B2[:, 0] >= 0)
    return torch.where(gold_B[:, None], source.span_B2, predicted_B2)


def slot_positions(span_B2: Tensor, num_slots: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Unit positions [B, K, stride] that each copy slot carries, and which lie in the span."""
    offsets = torch.arange(num_slots * stride, device=span_B2.device).view(num_slots, stride)
    position_BKC = span_B2[:, :1, None] + offsets
    return position_BKC, position_BKC <= span_B2[:, 1:, None]


class LMEncoder(nn.Module):
    """Reads the hidden states of a frozen LM; a copy slot carries one reader token.

    The token's layer-0 state (its embedding) says what it is, so a slot is nearly a translation
    table from the reader's vocabulary to the frozen LMs' input space.
    """

    def __init__(self, config: Config, *, reader_dim: int, num_states: int) -> None:
        super().__init__()
        enc = config.encoder
        dim = enc.encoder_dim
        self.reader_dim, self.num_copy = reader_dim, config.num_copy_slots
        self.project = nn.Linear(num_states * reader_dim, dim)
        self.segment = nn.Embedding(2, dim)
        self.blocks = nn.ModuleList(
            Block(dim, enc.encoder_heads, enc.encoder_dropout) for _ in range(enc.encoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        # No bias: the softmax over units would cancel it.
        self.span = nn.Linear(dim, 2, bias=False) if enc.span_head else None
        self.head = LatentHead(
            dim=dim,
            heads=enc.encoder_heads,
            dropout=enc.encoder_dropout,
            unit_dim=reader_dim,
            latent_len=enc.latent_len,
            copy_slots=self.num_copy,
            d_z=enc.d_z,
        )

    def forward(self, source: SourceBatch) -> Encoded:
        """Z from reader states; see the class."""
        states_BUF = source.states_BUF
        if not torch.is_autocast_enabled(states_BUF.device.type):
            states_BUF = states_BUF.to(self.project.weight.dtype)
        x_BUD = self.project(states_BUF) + self.segment(source.context_BU.long())
        for block in self.blocks:
            x_BUD = block(x_BUD, source.mask_BU)
        x_BUD = self.norm(x_BUD)
        if self.span is None:
            return Encoded(self.head(x_BUD, source.mask_BU, None, None), None, None)
        span_logits_BU2 = self.span(x_BUD)
        predicted_B2 = best_span(span_logits_BU2.detach(), source.context_BU, MAX_SPAN_TOKENS)
        if not self.num_copy:
            z_BMZ = self.head(x_BUD, source.mask_BU, None, None)
            return Encoded(z_BMZ, span_logits_BU2, predicted_B2)
        position_BK, valid_BK = self._slots(source, predicted_B2)
        index = position_BK[..., None].expand(-1, -1, self.reader_dim)
        units_BKF = states_BUF[..., : self.reader_dim].gather(1, index)
        z_BMZ = self.head(x_BUD, source.mask_BU, units_BKF, valid_BK)
        copied_BK = torch.where(valid_BK, source.ids_BU.gather(1, position_BK), -1)
        return Encoded(z_BMZ, span_logits_BU2, predicted_B2, self.head.carried(copied_BK))

    def _slots(self, source: SourceBatch, predicted_B2: Tensor) -> tuple[Tensor, Tensor]:
        """The unit in each copy slot [B, K] and whether the span reaches that far."""
        span_B2 = copied_span(source, predicted_B2)
        position_BK, valid_BK = (t[..., 0] for t in slot_positions(span_B2, self.num_copy))
        return position_BK.clamp(max=source.ids_BU.shape[1] - 1), valid_BK


class ByteEncoder(nn.Module):
    """Reads UTF-8 bytes from scratch; a copy slot carries `copy_bytes` bytes of the span.

    Two strided convolutions make patches of four bytes, pre-norm blocks read them, and the span
    head scores bytes from their patch and their neighbourhood. The copy grid starts at the span,
    not at the patch grid, so equal answers give equal slots.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        enc = config.encoder
        dim, local = enc.encoder_dim, enc.encoder_dim // 2
        self.num_copy, self.copy_bytes = config.num_copy_slots, enc.copy_bytes
        self.byte_emb = nn.Embedding(256, local)
        self.segment = nn.Embedding(2, local)
        self.near = nn.Conv1d(local, local, kernel_size=5, padding=2)
        self.down1 = nn.Conv1d(local, dim, kernel_size=4, stride=2, padding=1)
        self.down2 = nn.Conv1d(dim, dim, kernel_size=4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            Block(dim, enc.encoder_heads, enc.encoder_dropout) for _ in range(enc.encoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, local) if enc.span_head else None
        self.span = (
            nn.Sequential(
                nn.LayerNorm(local),
                nn.Linear(local, local),
                nn.GELU(),
                nn.Linear(local, 2, bias=False),
            )
            if enc.span_head
            else None
        )
        self.head = LatentHead(
            dim=dim,
            heads=enc.encoder_heads,
            dropout=enc.encoder_dropout,
            unit_dim=local * enc.copy_bytes,
            latent_len=enc.latent_len,
            copy_slots=self.num_copy,
            d_z=enc.d_z,
        )

    def forward(self, source: SourceBatch) -> Encoded:
        """Z from bytes; see the class."""
        source = _pad_to_multiple(source, 4)
        bytes_BUL = self.byte_emb(source.ids_BU)
        real_BU1 = source.mask_BU[..., None]
        x_BUL = (bytes_BUL + self.segment(source.context_BU.long())) * real_BU1
        near_BUL = x_BUL + F.gelu(self.near(x_BUL.transpose(1, 2))).transpose(1, 2) * real_BU1
        patch_BPD, patch_mask_BP = self._patches(near_BUL, source.mask_BU)
        if self.span is None:
            return Encoded(self.head(patch_BPD, patch_mask_BP, None, None), None, None)
        wide_BUL = near_BUL + self.up(patch_BPD).repeat_interleave(4, dim=1)
        span_logits_BU2 = self.span(wide_BUL)
        predicted_B2 = best_span(span_logits_BU2.detach(), source.context_BU, MAX_SPAN_BYTES)
        units, valid = self._copy(bytes_BUL, copied_span(source, predicted_B2))
        z_BMZ = self.head(patch_BPD, patch_mask_BP, units, valid)
        return Encoded(z_BMZ, span_logits_BU2, predicted_B2)

    def _patches(self, near_BUL: Tensor, mask_BU: Tensor) -> tuple[Tensor, Tensor]:
        """[B, U, L] byte features -> [B, U/4, D] patch features and their mask."""
        half_BHD = F.gelu(self.down1(near_BUL.transpose(1, 2))).transpose(1, 2)
        half_BHD = half_BHD * mask_BU[:, ::2, None]  # a bias must not leak out of the padding
        x_BPD = F.gelu(self.down2(half_BHD.transpose(1, 2))).transpose(1, 2)
        mask_BP = mask_BU[:, ::4].contiguous()  # fused attention wants it so
        for block in self.blocks:
            x_BPD = block(x_BPD, mask_BP)
        return self.norm(x_BPD), mask_BP

    def _copy(self, bytes_BUL: Tensor, span_B2: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.num_copy:
            return None, None
        position_BKC, valid_BKC = slot_positions(span_B2, self.num_copy, self.copy_bytes)
        index = position_BKC.clamp(max=bytes_BUL.shape[1] - 1).flatten(1)[..., None]
        units = bytes_BUL.gather(1, index.expand(-1, -1, bytes_BUL.shape[2]))
        units = units * valid_BKC.flatten(1)[..., None]
        return units.view(*valid_BKC.shape[:2], -1), valid_BKC[..., 0]


def _pad_to_multiple(source: SourceBatch, multiple: int) -> SourceBatch:
    """Pads ids and masks on the right so that patches divide the source evenly."""
    extra = -source.ids_BU.shape[1] % multiple
    if not extra:
        return source
    return SourceBatch(
        ids_BU=F.pad(source.ids_BU, (0, extra)),
        mask_BU=F.pad(source.mask_BU, (0, extra)),
        context_BU=F.pad(source.context_BU, (0, extra)),
        span_B2=source.span_B2,
        span_loss_B=source.span_loss_B,
        use_gold_B=source.use_gold_B,
    )


class SeedByteEncoder(nn.Module):
    """The original's encoder: two post-norm layers over bytes, M free queries, one read.

    Unlike the original it masks padding; sinusoidal positions stand in for its positions.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        enc = config.encoder
        self.backbone = _SeedBackbone(enc.d_z, enc.encoder_dropout)
        self.pooler = _SeedPooler(enc.d_z, enc.latent_len)

    def forward(self, source: SourceBatch) -> Encoded:
        """Z from bytes; no span head."""
        hidden_BUZ = self.backbone(source.ids_BU, source.mask_BU)
        return Encoded(self.pooler(hidden_BUZ, source.mask_BU), None, None)


class _SeedBackbone(nn.Module):
    HEADS, LAYERS = 8, 2

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.byte_emb = nn.Embedding(256, dim)
        layer = nn.TransformerEncoderLayer(
            dim, self.HEADS, 4 * dim, dropout, batch_first=True, norm_first=False
        )
        self.encoder = nn.TransformerEncoder(layer, self.LAYERS, enable_nested_tensor=False)
        self.ln = nn.LayerNorm(dim)

    def forward(self, ids_BU: Tensor, mask_BU: Tensor) -> Tensor:
        x_BUZ = self.byte_emb(ids_BU)
        x_BUZ = x_BUZ + _sinusoids(x_BUZ.shape[1], x_BUZ.shape[2], x_BUZ.device)
        return self.ln(self.encoder(x_BUZ, src_key_padding_mask=~mask_BU))


class _SeedPooler(nn.Module):
    HEADS = 8

    def __init__(self, dim: int, latent_len: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(0.02 * torch.randn(latent_len, dim))
        self.cross_attn = nn.MultiheadAttention(dim, self.HEADS, batch_first=True)
        self.ff = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, hidden_BUZ: Tensor, mask_BU: Tensor) -> Tensor:
        queries = self.latent.expand(len(hidden_BUZ), -1, -1)
        z_BMZ, _ = self.cross_attn(
            queries, hidden_BUZ, hidden_BUZ, key_padding_mask=~mask_BU, need_weights=False
        )
        return z_BMZ + self.ff(z_BMZ)


def _sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [length, dim] (Vaswani et al. 2017, arXiv 1706.03762)."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


def build_encoder(config: Config, *, reader_dim: int = 0, num_states: int = 0) -> nn.Module:
    """The encoder that `encoder_type` names; the reader's width and layer count for `lm`."""
    match config.encoder.encoder_type:
        case "byte_seed":
            return SeedByteEncoder(config)
        case "byte":
            return ByteEncoder(config)
        case "lm":
            return LMEncoder(config, reader_dim=reader_dim, num_states=num_states)
    raise AssertionError(config.encoder.encoder_type)
