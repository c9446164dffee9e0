"""Triton kernels of masked_cross_entropy and linear_masked_ce; formulas in masked_cross_entropy.py.

`_rows_kernel` runs one program per row. It keeps one running maximum for the row and one partial
sum and count per lane, so that a block of the vocabulary costs one exponential per logit and one
reduction (the maximum). With WRITE_GRAD it goes over the row a second time, while it is still in
L2, and overwrites the logits with softmax - onehot.

Row offsets are int64: rows * V passes 2^31 at 16,744 rows of 128,256.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lw_kernels.dispatch import on_device_of


@triton.jit
def _load_block(row_ptr, cols, num_vocab, KEEP: tl.constexpr):
    """Logits of a row, -inf beyond its end; KEEP asks L2 to hold them for a second pass."""
    return tl.load(
        row_ptr + cols,
        mask=cols < num_vocab,
        other=float("-inf"),
        eviction_policy="evict_last" if KEEP else "evict_first",
    )


@triton.jit
def _rows_kernel(
    # inputs
    logits_ptr,
    labels_ptr,
    weights_ptr,
    # outputs
    loss_ptr,
    nll_ptr,
    lse_ptr,
    top1_ptr,
    top5_ptr,
    stride_logits,
    num_vocab,
    ignore_index,
    WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Loss, NLL, lse and hits of one row; WRITE_GRAD turns its logits into softmax - onehot."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * stride_logits
    lanes = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(nll_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(top1_ptr + row, False)
        tl.store(top5_ptr + row, False)
        if WRITE_GRAD:
            for start in range(0, num_vocab, BLOCK_V):
                cols = start + lanes
                zeros = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + cols, zeros, mask=cols < num_vocab)
    else:
        known = (label >= 0) & (label < num_vocab)
        gold = tl.load(logits_ptr + label, mask=known, other=0.0).to(tl.float32)
        gold = tl.where(known, gold, float("nan"))
        peak = float("-inf")
        sums = tl.zeros([BLOCK_V], tl.float32)
        above = tl.zeros([BLOCK_V], tl.int32)
        # The next block is on its way while this one is reduced; one load alone leaves gaps.
        block = _load_block(logits_ptr, lanes, num_vocab, WRITE_GRAD)
        for start in range(0, num_vocab, BLOCK_V):
            x = block.to(tl.float32)
            block = _load_block(logits_ptr, start + BLOCK_V + lanes, num_vocab, WRITE_GRAD)
            new_peak = tl.maximum(peak, tl.max(x, 0))
            # A row that starts with banned tokens (-inf) must not compute -inf - -inf.
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            sums = sums * tl.exp(peak - shift) + tl.exp(x - shift)
            above += (x > gold).to(tl.int32)
            peak = new_peak
        lse = peak + tl.log(tl.sum(sums, 0))
        nll = lse - gold
        num_above = tl.sum(above, 0)
        weight = 1.0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row).to(tl.float32)
        tl.store(loss_ptr + row, nll * weight)
        tl.store(nll_ptr + row, nll)
        tl.store(lse_ptr + row, lse)
        tl.store(top1_ptr + row, (num_above < 1) & (nll == nll))
        tl.store(top5_ptr + row, (num_above < 5) & (nll == nll))
        if WRITE_GRAD:
            for start in range(0, num_vocab, BLOCK_V):
                cols = start + lanes
                mask = cols < num_vocab
                x = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
                grad = tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0)
                tl.store(logits_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_kernel(
    grad_loss_ptr,
    logits_ptr,
    labels_ptr,
    weights_ptr,
    lse_ptr,
    out_ptr,
    stride_grad_loss,
    stride_logits,
    stride_out,
    num_vocab,
    num_blocks,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """out[n, v] = g_n * w_n * (exp(x_nv - lse_n) - [v == label_n]); out may be the logits."""
    pid = tl.program_id(0)
    row = (pid // num_blocks).to(tl.int64)
    cols = (pid % num_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    label = tl.load(labels_ptr + row)
    keep = label != ignore_index
    factor = tl.load(grad_loss_ptr + row * stride_grad_loss).to(tl.float32)
    if weights_ptr is not None:
        factor *= tl.load(weights_ptr + row).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    inside = cols < num_vocab
    x = tl.load(
        logits_ptr + row * stride_logits + cols,
        mask=inside & keep,
        other=0.0,
        eviction_policy="evict_first",
    ).to(tl.float32)
    grad = factor * (tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0))
    grad = tl.where(keep, grad, 0.0)
    out_ptr += row * stride_out
    tl.store(out_ptr + cols, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_rows_kernel(
    x_ptr, grad_loss_ptr, weights_ptr, out_ptr, stride_grad_loss, dim, BLOCK_D: tl.constexpr
):
    """out[n, d] = g_n * w_n * x[n, d]; x and out are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(grad_loss_ptr + row * stride_grad_loss).to(tl.float32)
    if weights_ptr is not None:
        factor *= tl.load(weights_ptr + row).to(tl.float32)
    for start in range(0, dim, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = cols < dim
        x = tl.load(x_ptr + row * dim + cols, mask=mask, other=0.0).to(tl.float32)
        out = (x * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * dim + cols, out, mask=mask)


def forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    rows: tuple[Tensor, ...],
    ignore_index: int,
    *,
    write_grad: bool = False,
) -> None:
    """Fill the fields of CrossEntropyRows; `write_grad` overwrites the logits as well."""
    num_rows, num_vocab = logits_NV.shape
    if num_rows == 0:
        return
    # Two passes want few rows in flight, so that they stay in L2; one pass wants many.
    widest, num_warps = (16384, 32) if write_grad else (2048, 4)
    block_v = min(triton.next_power_of_2(num_vocab), widest)
    with on_device_of(logits_NV):
        _rows_kernel[(num_rows,)](
            logits_NV,
            labels_N.contiguous(),
            _contiguous(weights_N),
            *rows,
            logits_NV.stride(0),
            num_vocab,
            ignore_index,
            WRITE_GRAD=write_grad,
            BLOCK_V=block_v,
            num_warps=min(num_warps, max(block_v // 256, 1)),
        )


def backward(
    grad_loss_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    lse_N: Tensor,
    ignore_index: int,
    out_NV: Tensor,
) -> None:
    """Fill `out_NV`, which may be `logits_NV`, with the gradient of the logits."""
    num_rows, num_vocab = logits_NV.shape
    if num_rows == 0:
        return
    block_v = min(triton.next_power_of_2(num_vocab), 4096)
    num_blocks = triton.cdiv(num_vocab, block_v)
    with on_device_of(logits_NV):
        _grad_kernel[(num_rows * num_blocks,)](
            grad_loss_N,
            logits_NV,
            labels_N.contiguous(),
            _contiguous(weights_N),
            lse_N,
            out_NV,
            grad_loss_N.stride(0),
            logits_NV.stride(0),
            out_NV.stride(0),
            num_vocab,
            num_blocks,
            ignore_index,
            BLOCK_V=block_v,
            num_warps=min(8, max(block_v // 256, 1)),
        )


def scale_rows(x_ND: Tensor, grad_loss_N: Tensor, weights_N: Tensor | None, out_ND: Tensor) -> None:
    """out = x * (grad_loss * weight) per row, in fp32, rounded once."""
    if x_ND.numel() == 0:
        return
    block_d = min(triton.next_power_of_2(x_ND.shape[1]), 4096)
    with on_device_of(x_ND):
        _scale_rows_kernel[(x_ND.shape[0],)](
            x_ND,
            grad_loss_N,
            _contiguous(weights_N),
            out_ND,
            grad_loss_N.stride(0),
            x_ND.shape[1],
            BLOCK_D=block_d,
            num_warps=min(4, max(block_d // 256, 1)),
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
