"""linear_masked_ce: the loss of a frozen vocabulary head without ever holding all logits.

    x = h W^T + bias,   then as in masked_cross_entropy,   dh_n = g_n * w_n * (softmax - onehot) W

Rows are taken in chunks. While a chunk's logits are at hand, one kernel reads off the loss and
overwrites them with softmax - onehot, and a second matmul turns that into the unscaled gradient of
the chunk's hidden rows. Scaling a row commutes with the matmul, so the backward pass only scales
those [N, D] rows: each product is computed once (4NDV FLOP, nothing is recomputed), only the
chunk's logits and an [N, D] gradient are ever held, and the frozen head gets no gradient.

Both matmuls are cuBLAS: at these sizes it is hard to beat and most of the time is spent there. A
chunk holds at most CHUNK_BYTES of logits. Up to about a thousand rows that is a single chunk,
which reads the head once per matmul; beyond, chunks have enough rows to hide the re-reading.

Shapes: N rows, D LM width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_kernels.dispatch import autograd_function, choose, is_plain, run_backward
from lw_kernels.masked_cross_entropy import (
    CrossEntropyRows,
    RowTensors,
    check_labels,
    masked_cross_entropy_ref,
    new_rows,
)

CHUNK_BYTES = 320 << 20
"""Logits held at a time: 1,024 bf16 rows of a 150 k vocabulary."""
ROW_MULTIPLE = 128
"""Rows of a matmul tile; chunks are whole tiles."""


def linear_masked_ce(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> CrossEntropyRows:
    """Cross-entropy of hidden rows under a frozen head; the gradient goes to the rows alone.

    Args:
        hidden_ND: fp32, bf16 or fp16; the rows that are supervised.
        weight_VD: the head (tied to the embedding or not), of the same dtype, frozen.
        labels_N: int64.
        bias_V: bias of the head, frozen.
        weights_N: factor of each row's loss, a constant for autograd; None is 1.
        ignore_index: label of rows that do not count.
        chunk_rows: rows whose logits are held at a time; None chooses by size.
        impl: "auto", "torch" (all logits at once) or "triton".
    """
    _check(hidden_ND, weight_VD, labels_N, bias_V, weights_N)
    device = hidden_ND.device.type
    if choose("linear_masked_ce", impl, device, (hidden_ND.dtype,)) == "torch":
        return linear_masked_ce_ref(
            hidden_ND,
            weight_VD,
            labels_N,
            bias_V=bias_V,
            weights_N=weights_N,
            ignore_index=ignore_index,
        )
    if chunk_rows is None:
        num_rows, num_vocab = hidden_ND.shape[0], weight_VD.shape[0]
        chunk_rows = rows_per_chunk(num_rows, num_vocab, hidden_ND.dtype.itemsize)
    need_grad = hidden_ND.requires_grad and torch.is_grad_enabled()
    op = _Plain.apply if is_plain(hidden_ND, weight_VD) else _linear_masked_ce
    *rows, _ = op(
        hidden_ND, weight_VD, bias_V, labels_N, weights_N, ignore_index, chunk_rows, need_grad
    )
    return CrossEntropyRows(*rows)


def linear_masked_ce_ref(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    ignore_index: int = -100,
    upcast: bool = False,
) -> CrossEntropyRows:
    """`linear_masked_ce` in plain PyTorch, with all logits.

    `upcast` computes the matmul in fp32 (a copy of the head); the softmax is fp32 in both.
    """
    if upcast and hidden_ND.dtype.itemsize < 4:
        hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
        bias_V = None if bias_V is None else bias_V.float()
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    return masked_cross_entropy_ref(
        logits_NV, labels_N, weights_N=weights_N, ignore_index=ignore_index
    )


def rows_per_chunk(num_rows: int, num_vocab: int, itemsize: int) -> int:
    """Rows of logits to hold at a time: within CHUNK_BYTES, and chunks of about equal size."""
    most = max(CHUNK_BYTES // (num_vocab * itemsize), 1)
    # A power of two fills the GPU evenly: 1,024 rows x 4,096 columns are 128 tiles for 132 SMs.
    most = 1 << (most.bit_length() - 1)
    if num_rows <= most:
        return max(num_rows, 1)
    num_chunks = -(-num_rows // most)
    even = -(-num_rows // num_chunks)
    return min(most, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None
) -> None:
    op = "linear_masked_ce"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden [N, D] and weight [V, D] do not fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or weight.shape[0] == 0:
        raise ValueError(f"{op}: needs labels [N] and at least one vocabulary row")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError(f"{op}: hidden, weight and bias must share one dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [V]")
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if torch.is_grad_enabled() and not frozen:
        raise ValueError(f"{op}: the head must be frozen (requires_grad=False)")
    check_labels(op, labels, weights)


def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor | None,
    ignore_index: int,
    chunk_rows: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lw_kernels import cross_entropy_triton as kernels

    num_rows, num_vocab = hidden_ND.shape[0], weight_VD.shape[0]
    rows, grad_ND = _new_outputs(hidden_ND, need_grad)
    logits_CV = hidden_ND.new_empty(min(chunk_rows, num_rows), num_vocab)
    for start in range(0, num_rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, num_rows))
        hidden_CD, logits = hidden_ND[part], logits_CV[: part.stop - start]
        # out= keeps autocast from casting and the allocator from holding two chunks.
        if bias_V is None:
            torch.mm(hidden_CD, weight_VD.t(), out=logits)
        else:
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=logits)
        kernels.forward(
            logits,
            labels_N[part],
            None if weights_N is None else weights_N[part],
            tuple(field[part] for field in rows),
            ignore_index,
            write_grad=need_grad,
        )
        if need_grad:
            torch.mm(logits, weight_VD, out=grad_ND[part])
    return *rows, grad_ND


_linear_masked_ce = torch.library.custom_op(
    "lw_kernels::linear_masked_ce", _forward, mutates_args=()
)


@_linear_masked_ce.register_fake
def _(hidden_ND, weight_VD, bias_V, labels_N, weights_N, ignore_index, chunk_rows, need_grad):
    rows, grad_ND = _new_outputs(hidden_ND, need_grad)
    return *rows, grad_ND


def _new_outputs(hidden_ND: Tensor, need_grad: bool) -> tuple[RowTensors, Tensor]:
    shape = hidden_ND.shape if need_grad else (0, 0)
    return new_rows(hidden_ND, hidden_ND.shape[0]), hidden_ND.new_empty(shape)


def _scale_grad(grad_loss_N: Tensor, grad_ND: Tensor, weights_N: Tensor | None) -> Tensor:
    from lw_kernels import cross_entropy_triton as kernels

    scaled_ND = torch.empty_like(grad_ND)
    kernels.scale_rows(grad_ND, grad_loss_N, weights_N, scaled_ND)
    return scaled_ND


_backward_op = torch.library.custom_op(
    "lw_kernels::linear_masked_ce_backward", _scale_grad, mutates_args=()
)


@_backward_op.register_fake
def _(grad_loss_N, grad_ND, weights_N):
    return torch.empty_like(grad_ND)


def _setup_context(ctx, inputs, output):
    _, _, _, _, weights_N, _, _, _ = inputs
    _, nll_N, lse_N, top1_N, top5_N, grad_ND = output
    ctx.mark_non_differentiable(nll_N, lse_N, top1_N, top5_N, grad_ND)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights_N, grad_ND)


def _backward(ctx, grad_loss_N, *_):
    weights_N, grad_ND = ctx.saved_tensors
    if grad_loss_N is None:
        return (None,) * 8
    grad = run_backward(_backward_op, _scale_grad, grad_loss_N, grad_ND, weights_N)
    return grad, *(None,) * 7


_linear_masked_ce.register_autograd(_backward, setup_context=_setup_context)
_Plain = autograd_function("LinearMaskedCE", _forward, _setup_context, _backward)
