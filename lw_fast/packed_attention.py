"""Attention over packed rows, with the signature that transformers asks of an attention.

On a GPU short sequences take a kernel made for them (lw_kernels.short_attention), longer ones
torch.nn.attention.varlen (FlashAttention); elsewhere it is SDPA under a block-diagonal causal mask:
the same numbers, for tests.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from lw_kernels import short_attention
from lw_kernels.short_attention import MAX_HEAD_DIM
from torch import Tensor, nn

SHORT = 128
"""Rows up to which FlashAttention's tiles would be mostly empty."""


def packed_attention(
    module: nn.Module,
    query_BHRK: Tensor,
    key_BHRK: Tensor,
    value_BHRK: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    kernels: str = "auto",
    **_unused,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; output [1, R, H, K]. B is 1.

    With kernels="torch" the kernel for short sequences is not used.
    """
    rows = [t[0].transpose(0, 1) for t in (query_BHRK, key_BHRK, value_BHRK)]
    attend = _masked
    if query_BHRK.device.type == "cuda":
        fits = max_length_q <= SHORT and query_BHRK.shape[-1] <= MAX_HEAD_DIM
        attend = _short if fits and kernels != "torch" else _varlen
    return attend(*rows, cu_seq_lens_q, max_length_q, scaling)[None], None


def _short(q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor, cu_seqlens, max_len, scaling) -> Tensor:
    return short_attention(q_RHK, k_RHK, v_RHK, cu_seqlens, max_len, scale=scaling)


def _varlen(q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor, cu_seqlens, max_len, scaling) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    causal, grouped = _varlen_options()
    if not grouped:
        k_RHK, v_RHK = _repeat_heads(q_RHK, k_RHK, v_RHK)
    return varlen_attn(
        q_RHK, k_RHK, v_RHK, cu_seqlens, cu_seqlens, max_len, max_len, scale=scaling,
        **causal, **grouped,
    )  # fmt: skip


@functools.cache
def _varlen_options() -> tuple[dict, dict]:
    """How this torch is told of causal attention and of grouped heads (its interface is young)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal, {"enable_gqa": True} if "enable_gqa" in known else {}


def _masked(q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor, cu_seqlens, max_len, scaling) -> Tensor:
    row = torch.arange(len(q_RHK), device=q_RHK.device)
    sequence_R = torch.searchsorted(cu_seqlens, row, right=True)
    same_RR = (sequence_R[:, None] == sequence_R) & (row[:, None] >= row)
    q, k, v = (t.transpose(0, 1) for t in (q_RHK, *_repeat_heads(q_RHK, k_RHK, v_RHK)))
    return F.scaled_dot_product_attention(q, k, v, same_RR, scale=scaling).transpose(0, 1)


def _repeat_heads(q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor) -> tuple[Tensor, Tensor]:
    groups = q_RHK.shape[1] // k_RHK.shape[1]
    return k_RHK.repeat_interleave(groups, dim=1), v_RHK.repeat_interleave(groups, dim=1)
