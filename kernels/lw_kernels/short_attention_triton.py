"""Triton kernels of short_attention; formulas, shapes and letters are in short_attention.py.

A sequence of up to 64 rows is one tile. Forward: one program per sequence and query head; the heads
of a group run side by side and find their keys and values in L2. Backward: one program per sequence
and key-value head, which goes over the heads of its group with the gradients of k and v in
registers: no atomics, so the same sum in the same order every time. One tile gives all three
gradients at once; a longer sequence is walked a second time for dq.

Lengths are read on the device, so programs do only the work that a sequence has. One more program
per head clears the rows behind the last sequence.

Tiles of the backward pass are [keys, queries]: two of the three products that follow want them so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lw_kernels.dispatch import interpreting, on_device_of

# These change from batch to batch; compiling anew for 1 and for multiples of 16 would not pay.
VARYING = ["num_sequences", "num_rows"]
WIDEN = tl.constexpr(interpreting())
"""Triton's interpreter holds bf16 as raw bits and would compute on those."""


@triton.jit
def _cast(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, rounded also in the interpreter, which would cut bits off."""
    if WIDEN and DTYPE == tl.bfloat16:
        x = (x.to(tl.int32, bitcast=True) + 0x8000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _operand(x, DTYPE: tl.constexpr):
    """fp32 as the tensor cores take it: rounded to the dtype of the inputs."""
    x = _cast(x, DTYPE)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _dot(a, b):
    # TF32 would cost fp32 inputs half of their digits; 16-bit ones are not concerned.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(ptr, rows, stride, cols, inside):
    """A tile as an operand, zeros where it is not `inside`."""
    x = tl.load(ptr + (rows.to(tl.int64) * stride)[:, None] + cols, mask=inside, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _store(ptr, rows, stride, cols, inside, x):
    """fp32 into rows of the dtype of `ptr`."""
    x = _cast(x, ptr.dtype.element_ty)
    tl.store(ptr + (rows.to(tl.int64) * stride)[:, None] + cols, x, mask=inside)


@triton.jit
def _clear(ptr, first, last, stride, cols, real, BLOCK: tl.constexpr):
    """Zeros in rows first..last - 1."""
    for row in range(first, last, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        inside = (rows < last)[:, None] & real
        _store(ptr, rows, stride, cols, inside, tl.zeros(inside.shape, tl.float32))


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    # inputs
    q_ptr,
    k_ptr,
    v_ptr,
    cu_ptr,
    # outputs, contiguous
    out_ptr,
    lse_ptr,
    # strides in elements; the last dimension is contiguous everywhere
    stride_q_r,
    stride_q_h,
    stride_k_r,
    stride_k_h,
    stride_v_r,
    stride_v_h,
    # sizes
    num_sequences,
    num_rows,
    num_heads,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out and lse of one head of one sequence."""
    pid = tl.program_id(0)
    b = pid // num_heads
    head = (pid % num_heads).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_K)[None, :]
    real = cols < HEAD_DIM
    start = tl.load(cu_ptr + b).to(tl.int64)
    stride_out = num_heads * HEAD_DIM
    out_ptr += head * HEAD_DIM
    if b == num_sequences:
        _clear(out_ptr, start, num_rows, stride_out, cols, real, BLOCK)
    else:
        length = (tl.load(cu_ptr + b + 1) - start).to(tl.int32)
        q_ptr += start * stride_q_r + head * stride_q_h
        k_ptr += start * stride_k_r + head // GROUP * stride_k_h
        v_ptr += start * stride_v_r + head // GROUP * stride_v_h
        out_ptr += start * stride_out
        lse_ptr += head * num_rows + start
        for first in range(0, length, BLOCK):
            query = first + lanes
            inside = (query < length)[:, None] & real
            q = _load(q_ptr, query, stride_q_r, cols, inside)
            peak = tl.full([BLOCK], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            out = tl.zeros([BLOCK, BLOCK_K], tl.float32)
            for first_key in range(0, first + BLOCK, BLOCK):
                key = first_key + lanes
                inside_key = (key < length)[:, None] & real
                k = _load(k_ptr, key, stride_k_r, cols, inside_key)
                v = _load(v_ptr, key, stride_v_r, cols, inside_key)
                # Keys beyond the end are seen only by queries beyond it, which are not stored.
                seen = key[None, :] <= query[:, None]
                scores = tl.where(seen, _dot(q, tl.trans(k)) * scale, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, 1))
                p = tl.exp(scores - new_peak[:, None])
                shrink = tl.exp(peak - new_peak)
                total = total * shrink + tl.sum(p, 1)
                out = out * shrink[:, None] + _dot(_operand(p, v_ptr.dtype.element_ty), v)
                peak = new_peak
            _store(out_ptr, query, stride_out, cols, inside, out / total[:, None])
            tl.store(lse_ptr + query, peak + tl.log(total), mask=query < length)


@triton.jit
def _tile(q, k, v, grad, out, lse, query, key, scale, DTYPE: tl.constexpr):
    """p and ds of one tile as operands, [keys, queries]."""
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    # Queries beyond the end have zero rows of q and of the gradient, so they add nothing.
    seen = key[:, None] <= query[None, :]
    p = tl.where(seen, tl.exp(_dot(k, tl.trans(q)) * scale - lse[None, :]), 0.0)
    ds = p * (_dot(v, tl.trans(grad)) - delta[None, :])
    return _operand(p, DTYPE), _operand(ds, DTYPE)


@triton.jit(do_not_specialize=VARYING)
def _backward_kernel(
    # inputs (out and lse are contiguous)
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cu_ptr,
    out_ptr,
    lse_ptr,
    # outputs, contiguous
    dq_ptr,
    dk_ptr,
    dv_ptr,
    # strides in elements; the last dimension is contiguous everywhere
    stride_grad_r,
    stride_grad_h,
    stride_q_r,
    stride_q_h,
    stride_k_r,
    stride_k_h,
    stride_v_r,
    stride_v_h,
    # sizes
    num_sequences,
    num_rows,
    num_groups,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dk and dv of one key-value head of one sequence, and dq of the heads that share it."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b = pid // num_groups
    group = (pid % num_groups).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_K)[None, :]
    real = cols < HEAD_DIM
    start = tl.load(cu_ptr + b).to(tl.int64)
    stride_out = num_groups * GROUP * HEAD_DIM
    stride_dk = num_groups * HEAD_DIM
    dk_ptr += group * HEAD_DIM
    dv_ptr += group * HEAD_DIM
    if b == num_sequences:
        _clear(dk_ptr, start, num_rows, stride_dk, cols, real, BLOCK)
        _clear(dv_ptr, start, num_rows, stride_dk, cols, real, BLOCK)
        for h in range(GROUP):
            dq_head_ptr = dq_ptr + (group * GROUP + h) * HEAD_DIM
            _clear(dq_head_ptr, start, num_rows, stride_out, cols, real, BLOCK)
    else:
        length = (tl.load(cu_ptr + b + 1) - start).to(tl.int32)
        grad_ptr += start * stride_grad_r
        q_ptr += start * stride_q_r
        k_ptr += start * stride_k_r + group * stride_k_h
        v_ptr += start * stride_v_r + group * stride_v_h
        out_ptr += start * stride_out
        lse_ptr += start
        dq_ptr += start * stride_out
        dk_ptr += start * stride_dk
        dv_ptr += start * stride_dk

        for first_key in range(0, length, BLOCK):
            key = first_key + lanes
            inside_key = (key < length)[:, None] & real
            k = _load(k_ptr, key, stride_k_r, cols, inside_key)
            v = _load(v_ptr, key, stride_v_r, cols, inside_key)
            dk = tl.zeros([BLOCK, BLOCK_K], tl.float32)
            dv = tl.zeros([BLOCK, BLOCK_K], tl.float32)
            for h in range(GROUP):
                head = group * GROUP + h
                for first in range(first_key, length, BLOCK):
                    query = first + lanes
                    inside = (query < length)[:, None] & real
                    q = _load(q_ptr + head * stride_q_h, query, stride_q_r, cols, inside)
                    grad = _load(
                        grad_ptr + head * stride_grad_h, query, stride_grad_r, cols, inside
                    )
                    out = _load(out_ptr + head * HEAD_DIM, query, stride_out, cols, inside)
                    lse_head_ptr = lse_ptr + head * num_rows
                    lse = tl.load(lse_head_ptr + query, mask=query < length, other=0.0)
                    p, ds = _tile(q, k, v, grad, out, lse, query, key, scale, DTYPE)
                    dv += _dot(p, grad)
                    dk += _dot(ds, q)
                    if length <= BLOCK:
                        dq = _dot(tl.trans(ds), k) * scale
                        _store(dq_ptr + head * HEAD_DIM, query, stride_out, cols, inside, dq)
            _store(dk_ptr, key, stride_dk, cols, inside_key, dk * scale)
            _store(dv_ptr, key, stride_dk, cols, inside_key, dv)

        if length > BLOCK:
            for h in range(GROUP):
                head = group * GROUP + h
                for first in range(0, length, BLOCK):
                    query = first + lanes
                    inside = (query < length)[:, None] & real
                    q = _load(q_ptr + head * stride_q_h, query, stride_q_r, cols, inside)
                    grad = _load(
                        grad_ptr + head * stride_grad_h, query, stride_grad_r, cols, inside
                    )
                    out = _load(out_ptr + head * HEAD_DIM, query, stride_out, cols, inside)
                    lse_head_ptr = lse_ptr + head * num_rows
                    lse = tl.load(lse_head_ptr + query, mask=query < length, other=0.0)
                    dq = tl.zeros([BLOCK, BLOCK_K], tl.float32)
                    for first_key in range(0, first + BLOCK, BLOCK):
                        key = first_key + lanes
                        inside_key = (key < length)[:, None] & real
                        k = _load(k_ptr, key, stride_k_r, cols, inside_key)
                        v = _load(v_ptr, key, stride_v_r, cols, inside_key)
                        _, ds = _tile(q, k, v, grad, out, lse, query, key, scale, DTYPE)
                        dq += _dot(tl.trans(ds), k)
                    _store(dq_ptr + head * HEAD_DIM, query, stride_out, cols, inside, dq * scale)


def forward(
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGK: Tensor,
    cu_seqlens: Tensor,
    out_RHK: Tensor,
    lse_HR: Tensor,
    max_len: int,
    scale: float,
) -> None:
    """Fill `out_RHK` and `lse_HR`."""
    num_rows, num_heads, _ = q_RHK.shape
    if num_rows == 0:
        return
    with on_device_of(q_RHK):
        _forward_kernel[(cu_seqlens.shape[0] * num_heads,)](
            q_RHK,
            k_RGK,
            v_RGK,
            cu_seqlens,
            out_RHK,
            lse_HR,
            *_strides(q_RHK, k_RGK, v_RGK),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_heads,
            scale,
            **_tiles(q_RHK, k_RGK, max_len),
            num_warps=4,
            num_stages=1,
        )


def backward(
    grad_RHK: Tensor,
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGK: Tensor,
    cu_seqlens: Tensor,
    out_RHK: Tensor,
    lse_HR: Tensor,
    dq_RHK: Tensor,
    dk_RGK: Tensor,
    dv_RGK: Tensor,
    max_len: int,
    scale: float,
) -> None:
    """Fill `dq_RHK`, `dk_RGK` and `dv_RGK`."""
    num_rows, num_groups, _ = k_RGK.shape
    if num_rows == 0:
        return
    tiles = _tiles(q_RHK, k_RGK, max_len)
    with on_device_of(q_RHK):
        _backward_kernel[(cu_seqlens.shape[0] * num_groups,)](
            grad_RHK,
            q_RHK,
            k_RGK,
            v_RGK,
            cu_seqlens,
            out_RHK,
            lse_HR,
            dq_RHK,
            dk_RGK,
            dv_RGK,
            *_strides(grad_RHK, q_RHK, k_RGK, v_RGK),
            cu_seqlens.shape[0] - 1,
            num_rows,
            num_groups,
            scale,
            **tiles,
            # Two accumulators of 64 x 128 take half of the registers of four warps.
            num_warps=8 if tiles["BLOCK_K"] > 64 else 4,
            num_stages=1,
        )


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and of heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _tiles(q_RHK: Tensor, k_RGK: Tensor, max_len: int) -> dict[str, int]:
    """Constants of the kernels; tl.dot wants at least 16 rows and columns."""
    num_heads, head_dim = q_RHK.shape[1:]
    # fp32 products run outside the tensor cores, with their operands in registers.
    most = 32 if q_RHK.dtype == torch.float32 else 64
    return {
        "GROUP": num_heads // k_RGK.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK": min(max(triton.next_power_of_2(max_len), 16), most),
        "BLOCK_K": max(triton.next_power_of_2(head_dim), 16),
    }
