"""Triton kernels of prefix_concat; formulas, shapes and letters are in prefix_concat.py.

Forward: one program per output row gathers an embedding row or calibrates a prefix row, and writes
mask and position beside it. Backward: one program per prefix row.

"per_example" needs a sum over all M slots before any of them can be written. Two schedules:

- GROUP: the M programs of an example hold their rows in registers, store their part of the sum and
  wait for each other (`_meet`). Nothing is read twice and there is one launch. It relies on GPUs
  starting programs in order: only the newest example can be incomplete, and its programs start as
  older ones, which wait for nobody else, end. M programs must fit on the GPU at once.
- otherwise a launch of its own makes the sums (`_slot_dots_kernel`); the writer then walks
  backwards, so that the rows read last are met first, while they are still in L2. Triton's
  interpreter, which runs programs one after another, needs this one.

bf16 is widened to fp32 straight after each load: Triton's interpreter holds bf16 as raw bits and
would compute on those.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lw_kernels.dispatch import interpreting, on_device_of

NONE, PER_SLOT, PER_EXAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# These change from batch to batch; compiling anew for 1 and for multiples of 16 would not pay.
VARYING = ["num_examples", "num_tail", "num_rows", "seq_len", "stride_tail"]
MODES = {"none": 0, "per_slot": 1, "per_example": 2}
_GROUP = True
"""Whether "per_example" takes the GROUP schedule where it can: 1.03 to 1.3 times as fast as two
launches (benchmarks/prefix_schedules.py turns it off to compare)."""
MAX_POLLS = tl.constexpr(1 << 22)
"""Seconds of waiting, after which the example becomes NaN instead of hanging the GPU."""


@triton.jit
def _load_slot(raw_ptr, cols, mask, bound, BOUNDED: tl.constexpr):
    """A raw prefix row in fp32, through bound * tanh(x / bound) if asked for."""
    x = tl.load(raw_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if BOUNDED:
        u = x / bound
        u2 = u * u
        # 1 - 2 / (exp(2u) + 1) cancels near zero; the series is exact to fp32 there.
        series = u * (1 + u2 * (-1 / 3 + u2 * (2 / 15 + u2 * (-17 / 315))))
        x = bound * tl.where(u2 < 0.04, series, 1 - 2 / (tl.exp(2 * u) + 1))
    return x


@triton.jit
def _mean_square(sumsq_ptr, b, m, num_slots, dim, MODE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Mean square of the values that share a scale with slot m of example b."""
    if MODE == PER_SLOT:
        return tl.load(sumsq_ptr + b * num_slots + m) / dim
    slots = tl.arange(0, BLOCK_M)
    # .cg: L1 may hold what was there before another program stored its part.
    sums = tl.load(
        sumsq_ptr + b * num_slots + slots, mask=slots < num_slots, other=0.0, cache_modifier=".cg"
    )
    return tl.sum(sums, 0) / (dim * num_slots)


@triton.jit
def _meet(arrived_ptr, num_slots):
    """Wait until all programs of an example are here, each with its part of the sum stored.

    Returns 0.0, or NaN if they did not come.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    polls = 0
    while (arrived < num_slots) & (polls < MAX_POLLS):
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
        polls += 1
    return tl.where(arrived < num_slots, float("nan"), 0.0)


@triton.jit(do_not_specialize=VARYING)
def _cu_seqlens_kernel(
    lengths_ptr, cu_ptr, num_examples, num_fixed, num_tail, BLOCK_B: tl.constexpr
):
    """cu[b] = sum over examples before b of (fixed rows + tail length); one program."""
    tl.store(cu_ptr, 0)
    carry = 0
    for start in range(0, num_examples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        length = tl.load(lengths_ptr + b, mask=b < num_examples, other=0).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), num_tail) + num_fixed
        length = tl.where(b < num_examples, length, 0)
        tl.store(cu_ptr + 1 + b, carry + tl.cumsum(length, 0), mask=b < num_examples)
        carry += tl.sum(length, 0)


@triton.jit(do_not_specialize=VARYING)
def _slot_dots_kernel(
    raw_ptr,
    grad_ptr,
    cu_ptr,
    dots_ptr,
    stride_raw_b,
    stride_raw_m,
    num_slots,
    num_head,
    seq_len,
    dim,
    bound,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dots[b, m] = <u_bm, u_bm> or, WITH_GRAD, <u_bm, g_bm>."""
    pid = tl.program_id(0)
    b = (pid // num_slots).to(tl.int64)
    m = pid % num_slots
    cols = tl.arange(0, BLOCK_D)
    mask = cols < dim
    u = _load_slot(raw_ptr + b * stride_raw_b + m * stride_raw_m, cols, mask, bound, BOUNDED)
    v = u
    if WITH_GRAD:
        start = tl.load(cu_ptr + b).to(tl.int64) if PACKED else b * seq_len
        row = start + num_head + m
        v = tl.load(grad_ptr + row * dim + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(dots_ptr + pid, tl.sum(u * v, 0))


@triton.jit(do_not_specialize=VARYING)
def _write_rows_kernel(
    # inputs (sumsq is an output of PER_SLOT and GROUP; arrived is zero, GROUP counts in it)
    raw_ptr,
    embed_ptr,
    head_ids_ptr,
    tail_ids_ptr,
    lengths_ptr,
    cu_ptr,
    sumsq_ptr,
    arrived_ptr,
    # outputs
    embeds_ptr,
    positions_ptr,
    mask_ptr,
    # strides in elements; the last dimension is contiguous everywhere
    stride_raw_b,
    stride_raw_m,
    stride_embed,
    stride_tail,
    # sizes
    num_examples,
    num_head,
    num_slots,
    num_tail,
    num_rows,
    dim,
    num_vocab,
    scale,
    bound,
    eps,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Row s of example b of the LM's input, with its position and mask."""
    pid = tl.program_id(0)
    if (MODE == PER_EXAMPLE) and (not GROUP):
        pid = tl.num_programs(0) - 1 - pid
    num_fixed = num_head + num_slots
    seq_len = num_fixed + num_tail
    b = (pid // seq_len).to(tl.int64)
    s = pid % seq_len
    tail_length = tl.load(lengths_ptr + b).to(tl.int32)
    length = num_fixed + tl.minimum(tl.maximum(tail_length, 0), num_tail)
    real = s < length

    row = pid.to(tl.int64)
    if PACKED:
        # Rows that padding would fill are handed to the spare rows behind the last sequence.
        start = tl.load(cu_ptr + b)
        total = tl.load(cu_ptr + num_examples)
        row = tl.where(real, start + s, total + (b * seq_len - start) + (s - length)).to(tl.int64)

    write = row < num_rows
    cols = tl.arange(0, BLOCK_D)
    inside = cols < dim
    slot = s - num_head
    if (slot >= 0) & (slot < num_slots):
        raw_row = raw_ptr + b * stride_raw_b + slot * stride_raw_m
        y = _load_slot(raw_row, cols, inside, bound, BOUNDED)
        if (MODE == PER_SLOT) or GROUP:
            sumsq = tl.sum(y * y, 0)
            tl.store(sumsq_ptr + b * num_slots + slot, sumsq)
        if MODE == NONE:
            y = y * scale
        elif MODE == PER_SLOT:
            y = y * (scale / tl.sqrt(sumsq / dim + eps))
        else:
            if GROUP:
                scale += _meet(arrived_ptr + b, num_slots)
            mean = _mean_square(sumsq_ptr, b, slot, num_slots, dim, MODE, BLOCK_M)
            y = y * (scale / tl.sqrt(mean + eps))
    else:
        head = s < num_head
        tail_ptr = tail_ids_ptr + b * stride_tail + (s - num_fixed)
        token = tl.load(tail_ptr, mask=real & (s >= num_fixed), other=0)
        token += tl.load(head_ids_ptr + s, mask=head, other=0)
        known = (token >= 0) & (token < num_vocab)
        embed_row = embed_ptr + token.to(tl.int64) * stride_embed
        y = tl.load(embed_row + cols, mask=inside & real & known, other=0.0).to(tl.float32)
        # An id outside the table must not go unnoticed, nor read foreign memory.
        y = tl.where(known, y, float("nan"))
    if PACKED:
        y = tl.where(total > num_rows, float("nan"), y)
    y = y.to(embeds_ptr.dtype.element_ty)
    tl.store(embeds_ptr + row * dim + cols, y, mask=inside & write)
    if PACKED:
        tl.store(positions_ptr + row, tl.where(real, s, 0), mask=write)
    else:
        tl.store(positions_ptr + row, s)
        tl.store(mask_ptr + row, real)


@triton.jit(do_not_specialize=VARYING)
def _slot_grad_kernel(
    # inputs (dots is an output of GROUP, arrived as in the forward pass)
    grad_ptr,
    raw_ptr,
    cu_ptr,
    sumsq_ptr,
    dots_ptr,
    arrived_ptr,
    # output
    grad_raw_ptr,
    stride_raw_b,
    stride_raw_m,
    num_slots,
    num_head,
    seq_len,
    num_rows,
    dim,
    scale,
    bound,
    eps,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradient of slot m of example b."""
    pid = tl.program_id(0)
    if (MODE == PER_EXAMPLE) and (not GROUP):
        pid = tl.num_programs(0) - 1 - pid
    b = (pid // num_slots).to(tl.int64)
    m = pid % num_slots
    start = tl.load(cu_ptr + b).to(tl.int64) if PACKED else b * seq_len
    row = start + num_head + m
    cols = tl.arange(0, BLOCK_D)
    mask = cols < dim
    grad_mask = mask & (row < num_rows)
    grad = tl.load(grad_ptr + row * dim + cols, mask=grad_mask, other=0.0).to(tl.float32)
    if (MODE == NONE) and (not BOUNDED):
        grad = grad * scale
    else:
        raw_row = raw_ptr + b * stride_raw_b + m * stride_raw_m
        u = _load_slot(raw_row, cols, mask, bound, BOUNDED)
        if MODE == NONE:
            grad = grad * scale
        else:
            mean = _mean_square(sumsq_ptr, b, m, num_slots, dim, MODE, BLOCK_M) + eps
            if MODE == PER_SLOT:
                mean_dot = tl.sum(grad * u, 0) / dim
            else:
                if GROUP:
                    tl.store(dots_ptr + pid, tl.sum(grad * u, 0))
                    scale += _meet(arrived_ptr + b, num_slots)
                # The mean of the dots is laid out as the mean of the squares.
                mean_dot = _mean_square(dots_ptr, b, m, num_slots, dim, MODE, BLOCK_M)
            grad = (scale / tl.sqrt(mean)) * (grad - u * (mean_dot / mean))
        if BOUNDED:
            tanh = u / bound
            grad = grad * (1 - tanh * tanh)
    out_row = grad_raw_ptr + pid.to(tl.int64) * dim
    tl.store(out_row + cols, grad.to(grad_raw_ptr.dtype.element_ty), mask=mask)


def forward(
    raw_BMD: Tensor,
    embed_VD: Tensor,
    head_ids_H: Tensor,
    tail_ids_BT: Tensor,
    tail_lengths_B: Tensor,
    embeds: Tensor,
    positions: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    sumsq_BM: Tensor,
    *,
    calibration: str,
    scale: float,
    bound: float,
    eps: float,
) -> None:
    """Fill embeds, positions, mask or cu_seqlens, and sumsq (not with calibration "none")."""
    num_examples, num_slots, dim = raw_BMD.shape
    num_head, num_tail = head_ids_H.shape[0], tail_ids_BT.shape[1]
    num_fixed = num_head + num_slots
    packed = cu_seqlens.numel() > 0
    blocks = _blocks(num_slots, dim)
    group = calibration == "per_example" and _can_group(raw_BMD)
    with on_device_of(raw_BMD):
        arrived_B = sumsq_BM.new_zeros(num_examples, dtype=torch.int32) if group else sumsq_BM
        if packed:
            _cu_seqlens_kernel[(1,)](
                tail_lengths_B, cu_seqlens, num_examples, num_fixed, num_tail, BLOCK_B=1024
            )
        if calibration == "per_example" and not group and sumsq_BM.numel():
            _slot_dots_kernel[(num_examples * num_slots,)](
                raw_BMD,
                embeds,
                cu_seqlens,
                sumsq_BM,
                *raw_BMD.stride()[:2],
                num_slots,
                num_head,
                num_fixed + num_tail,
                dim,
                bound,
                BOUNDED=bound > 0,
                PACKED=packed,
                WITH_GRAD=False,
                BLOCK_D=blocks["BLOCK_D"],
                num_warps=blocks["num_warps"],
            )
        if embeds.numel():
            _write_rows_kernel[(num_examples * (num_fixed + num_tail),)](
                raw_BMD,
                embed_VD,
                head_ids_H,
                tail_ids_BT,
                tail_lengths_B,
                cu_seqlens,
                sumsq_BM,
                arrived_B,
                embeds,
                positions,
                mask,
                *raw_BMD.stride()[:2],
                embed_VD.stride(0),
                tail_ids_BT.stride(0),
                num_examples,
                num_head,
                num_slots,
                num_tail,
                positions.numel(),
                dim,
                embed_VD.shape[0],
                scale,
                bound,
                eps,
                MODE=MODES[calibration],
                GROUP=group,
                BOUNDED=bound > 0,
                PACKED=packed,
                **blocks,
            )


def backward(
    grad_embeds: Tensor,
    raw_BMD: Tensor,
    cu_seqlens: Tensor,
    sumsq_BM: Tensor,
    grad_raw_BMD: Tensor,
    *,
    num_head: int,
    calibration: str,
    scale: float,
    bound: float,
    eps: float,
) -> None:
    """Fill grad_raw from the contiguous gradient of the embeddings."""
    num_examples, num_slots, dim = raw_BMD.shape
    packed = cu_seqlens.numel() > 0
    seq_len = 0 if packed else grad_embeds.shape[1]
    blocks = _blocks(num_slots, dim)
    grid = (num_examples * num_slots,)
    dots_BM = arrived_B = sumsq_BM
    group = calibration == "per_example" and _can_group(raw_BMD)
    with on_device_of(raw_BMD):
        if calibration == "per_example":
            dots_BM = torch.empty_like(sumsq_BM)
        if group:
            arrived_B = sumsq_BM.new_zeros(num_examples, dtype=torch.int32)
        elif calibration == "per_example":
            _slot_dots_kernel[grid](
                raw_BMD,
                grad_embeds,
                cu_seqlens,
                dots_BM,
                *raw_BMD.stride()[:2],
                num_slots,
                num_head,
                seq_len,
                dim,
                bound,
                BOUNDED=bound > 0,
                PACKED=packed,
                WITH_GRAD=True,
                BLOCK_D=blocks["BLOCK_D"],
                num_warps=blocks["num_warps"],
            )
        _slot_grad_kernel[grid](
            grad_embeds,
            raw_BMD,
            cu_seqlens,
            sumsq_BM,
            dots_BM,
            arrived_B,
            grad_raw_BMD,
            *raw_BMD.stride()[:2],
            num_slots,
            num_head,
            seq_len,
            grad_embeds.numel() // dim,
            dim,
            scale,
            bound,
            eps,
            MODE=MODES[calibration],
            GROUP=group,
            BOUNDED=bound > 0,
            PACKED=packed,
            **blocks,
        )


def _can_group(raw_BMD: Tensor) -> bool:
    """Whether the programs of an example fit on the GPU at once, one to a multiprocessor."""
    if not _GROUP or interpreting() or not raw_BMD.is_cuda:
        return False
    return raw_BMD.shape[1] <= _num_multiprocessors(raw_BMD.device.index)


@functools.cache
def _num_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(num_slots: int, dim: int) -> dict[str, int]:
    """One program holds one row: about 32 values a thread, which keeps loads 16 bytes wide."""
    block_d = triton.next_power_of_2(dim)
    return {
        "BLOCK_D": block_d,
        "BLOCK_M": triton.next_power_of_2(max(num_slots, 1)),
        "num_warps": min(max(block_d // 1024, 1), 16),
    }
