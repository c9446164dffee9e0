"""short_attention: causal attention within each of many short sequences that lie end to end.

Per sequence, query head h and its key-value head g = h // (H / G), with rows i, j of the sequence:

    s_ij = scale * <q_i, k_j>,       p_ij = exp(s_ij - lse_i) for j <= i, else 0
    lse_i = log sum_{j <= i} exp(s_ij),      out_i = sum_j p_ij v_j

Backward, with d the gradient of out (k and v collect from all heads of their group):

    dv_j = sum_i p_ij d_i,      ds_ij = p_ij (<d_i, v_j> - <d_i, out_i>)
    dq_i = scale * sum_j ds_ij k_j,      dk_j = scale * sum_i ds_ij q_i

Shapes: B sequences, R rows of all sequences, S rows of the longest one, H query heads, G key-value
heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_kernels.dispatch import autograd_function, choose, is_plain, run_backward, unit_stride

MAX_HEAD_DIM = 128
"""Tiles hold a head's whole width; wider heads take the PyTorch path."""


def short_attention(
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGK: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention within each packed sequence; returns [R, H, K] in the dtype of q.

    Args:
        q_RHK: fp32, bf16 or fp16. Softmax and sums are in fp32. q, k and v may be views with any
            strides as long as the last dimension is contiguous (otherwise it is copied).
        k_RGK: of the same dtype; H is a multiple of G.
        v_RGK: as k.
        cu_seqlens: int32 [B + 1], the rows at which sequences start, from 0, and the end of the
            last one. Sequences may be empty. Rows behind the last one get zeros and no gradient.
        max_len: no sequence is longer. A longer one raises on the PyTorch path; the Triton path
            only chooses the size of its tiles by it.
        scale: factor of the scores; None is K ** -0.5.
        impl: "auto", "torch" or "triton".

    Raises:
        ValueError: shapes, dtypes or `impl` do not fit.
    """
    _check(q_RHK, k_RGK, v_RGK, cu_seqlens, max_len)
    head_dim = q_RHK.shape[2]
    wide = f"K {head_dim} > {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else ""
    if choose("short_attention", impl, q_RHK.device.type, (q_RHK.dtype,), wide) == "torch":
        return short_attention_ref(q_RHK, k_RGK, v_RGK, cu_seqlens, max_len, scale=scale)
    scale = head_dim**-0.5 if scale is None else scale
    op = _Plain.apply if is_plain(q_RHK, k_RGK, v_RGK) else _short_attention
    return op(q_RHK, k_RGK, v_RGK, cu_seqlens, max_len, scale)[0]


def short_attention_ref(
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGK: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    *,
    scale: float | None = None,
    upcast: bool = True,
) -> Tensor:
    """`short_attention` in plain PyTorch: SDPA on sequences padded to max_len.

    `upcast` computes in fp32 (fp64 stays fp64); without it SDPA sees the dtype of q.
    """
    if q_RHK.shape[0] == 0 or cu_seqlens.shape[0] == 1:
        nothing = q_RHK[:0].sum() + k_RGK[:0].sum() + v_RGK[:0].sum()
        return torch.zeros_like(q_RHK) + nothing
    row_BS, real_BS = _rows_of_sequences(cu_seqlens, max_len, q_RHK.shape[0])

    def padded(x: Tensor) -> Tensor:
        x = x.float() if upcast and x.dtype.itemsize < 4 else x
        # The padding is on the right, where causal attention does not look.
        return x[row_BS].masked_fill(~real_BS[..., None, None], 0).transpose(1, 2)

    out_BHSK = F.scaled_dot_product_attention(
        padded(q_RHK), padded(k_RGK), padded(v_RGK), is_causal=True, scale=scale, enable_gqa=True
    )
    return _unpad(out_BHSK.transpose(1, 2), cu_seqlens, q_RHK.shape[0]).to(q_RHK.dtype)


def _rows_of_sequences(cu_seqlens: Tensor, max_len: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Row of each place of each sequence [B, S], and whether the sequence has that place."""
    torch._assert_async(
        (cu_seqlens.diff() <= max_len).all(), "short_attention: a sequence exceeds max_len"
    )
    row_BS = cu_seqlens[:-1, None] + torch.arange(max_len, device=cu_seqlens.device)
    return row_BS.clamp(max=num_rows - 1), row_BS < cu_seqlens[1:, None]


def _unpad(x_BSHK: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[B, S, H, K] -> [R, H, K], zeros behind the last sequence."""
    row_R = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence_R = torch.searchsorted(cu_seqlens[1:], row_R, right=True)
    spare_R = sequence_R == x_BSHK.shape[0]
    sequence_R = sequence_R.masked_fill(spare_R, 0)
    place_R = (row_R - cu_seqlens[sequence_R]).masked_fill(spare_R, 0)
    return x_BSHK[sequence_R, place_R].masked_fill(spare_R[:, None, None], 0)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> None:
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] == 0:
        raise ValueError(
            "short_attention: q [R, H, K], k and v [R, G, K] with H a multiple of G do not fit: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError("short_attention: q, k and v must share one dtype")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError("short_attention: cu_seqlens must be int32 [B + 1]")
    if max_len < 1:
        raise ValueError(f"short_attention: max_len must be positive, not {max_len}")


# The op: opaque to torch.compile, which needs only the shapes of its results.


def _forward(
    q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor, cu_seqlens: Tensor, max_len: int, scale: float
) -> tuple[Tensor, Tensor]:
    from lw_kernels import short_attention_triton as kernels

    out_RHK, lse_HR = _new_outputs(q_RHK)
    inputs = (unit_stride(x) for x in (q_RHK, k_RGK, v_RGK))
    kernels.forward(*inputs, cu_seqlens.contiguous(), out_RHK, lse_HR, max_len, scale)
    return out_RHK, lse_HR


_short_attention = torch.library.custom_op("lw_kernels::short_attention", _forward, mutates_args=())


@_short_attention.register_fake
def _(q_RHK, k_RGK, v_RGK, cu_seqlens, max_len, scale):
    return _new_outputs(q_RHK)


def _new_outputs(q_RHK: Tensor) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp of each row, which lies by head: a program reads rows of one head."""
    num_rows, num_heads, _ = q_RHK.shape
    return q_RHK.new_empty(q_RHK.shape), q_RHK.new_empty(num_heads, num_rows, dtype=torch.float32)


def _grads(
    grad_RHK: Tensor,
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGK: Tensor,
    cu_seqlens: Tensor,
    out_RHK: Tensor,
    lse_HR: Tensor,
    max_len: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from lw_kernels import short_attention_triton as kernels

    grads = _new_grads(q_RHK, k_RGK, v_RGK)
    inputs = (unit_stride(x) for x in (grad_RHK, q_RHK, k_RGK, v_RGK))
    kernels.backward(*inputs, cu_seqlens.contiguous(), out_RHK, lse_HR, *grads, max_len, scale)
    return grads


_backward_op = torch.library.custom_op(
    "lw_kernels::short_attention_backward", _grads, mutates_args=()
)


@_backward_op.register_fake
def _(grad_RHK, q_RHK, k_RGK, v_RGK, cu_seqlens, out_RHK, lse_HR, max_len, scale):
    return _new_grads(q_RHK, k_RGK, v_RGK)


def _new_grads(q_RHK: Tensor, k_RGK: Tensor, v_RGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_RHK, k_RGK, v_RGK))
    return dq, dk, dv


def _setup_context(ctx, inputs, output):
    q_RHK, k_RGK, v_RGK, cu_seqlens, ctx.max_len, ctx.scale = inputs
    out_RHK, lse_HR = output
    ctx.mark_non_differentiable(lse_HR)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_RHK, k_RGK, v_RGK, cu_seqlens, out_RHK, lse_HR)


def _backward(ctx, grad_RHK, _):
    if grad_RHK is None:
        return (None,) * 6
    args = (*ctx.saved_tensors, ctx.max_len, ctx.scale)
    return *run_backward(_backward_op, _grads, grad_RHK, *args), None, None, None


_short_attention.register_autograd(_backward, setup_context=_setup_context)
_Plain = autograd_function("ShortAttention", _forward, _setup_context, _backward)
