"""masked_cross_entropy: per-row NLL, log-sum-exp and top-1/top-5 flags in one pass over V.

For row n with logits x, label y and weight w (label == ignore_index: everything is 0 or False):

    lse_n  = log sum_v exp(x_v)
    nll_n  = lse_n - x_y,      loss_n = w_n * nll_n
    top-k  = [#{v: x_v > x_y} < k]                    (a count, no sort; a tie is a hit)
    dx_v   = g_n * w_n * (exp(x_v - lse_n) - [v = y])

The loss is per row and never averaged: the caller divides once by a global count. NaN and +inf
make the row's loss NaN; a label outside 0..V-1 does too on the Triton path and raises on the other.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_kernels.dispatch import autograd_function, choose, is_plain, run_backward, unit_stride


class CrossEntropyRows(NamedTuple):
    """One value per row; only `loss` carries a gradient."""

    loss: Tensor
    """float32 [N], weight times NLL; 0 on ignored rows, as all other fields."""
    nll: Tensor
    """float32 [N], without the weight."""
    lse: Tensor
    """float32 [N], log-sum-exp of the logits."""
    top1: Tensor
    """bool [N]: no logit is above the label's."""
    top5: Tensor
    """bool [N]: fewer than five are."""


RowTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of CrossEntropyRows in order; a custom op returns plain tuples."""


def masked_cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    weights_N: Tensor | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> CrossEntropyRows:
    """Cross-entropy of rows of logits.

    Args:
        logits_NV: fp32, bf16 or fp16. Accumulation is in fp32.
        labels_N: int64.
        weights_N: factor of each row's loss, a constant for autograd; None is 1.
        ignore_index: label of rows that do not count.
        inplace_backward: let the backward pass overwrite `logits_NV` with its gradient. For
            callers that own the logits and do not read them again: a second backward pass
            raises. Not under torch.compile, which reuses buffers by itself.
        impl: "auto", "torch" or "triton".
    """
    _check(logits_NV, labels_N, weights_N)
    obstacle = "" if not inplace_backward or logits_NV.stride(-1) == 1 else "logits are strided"
    device, dtypes = logits_NV.device.type, (logits_NV.dtype,)
    if choose("masked_cross_entropy", impl, device, dtypes, obstacle) == "torch":
        if inplace_backward:
            raise ValueError("masked_cross_entropy: inplace_backward needs the Triton kernel")
        return masked_cross_entropy_ref(
            logits_NV, labels_N, weights_N=weights_N, ignore_index=ignore_index
        )
    if inplace_backward and torch.compiler.is_compiling():
        raise ValueError("masked_cross_entropy: no inplace_backward under torch.compile")
    op = _Plain.apply if is_plain(logits_NV) else _masked_cross_entropy
    return CrossEntropyRows(*op(logits_NV, labels_N, weights_N, ignore_index, inplace_backward))


def masked_cross_entropy_ref(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    weights_N: Tensor | None = None,
    ignore_index: int = -100,
    upcast: bool = True,
) -> CrossEntropyRows:
    """`masked_cross_entropy` in plain PyTorch; `upcast` computes in fp32 (fp64 stays fp64)."""
    if upcast and logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=ignore_index)
    loss_N = nll_N if weights_N is None else nll_N * weights_N
    with torch.no_grad():
        keep_N = labels_N != ignore_index
        gold_N1 = logits_NV.gather(1, labels_N.masked_fill(~keep_N, 0)[:, None])
        lse_N = torch.where(keep_N, nll_N + gold_N1.squeeze(1), 0)
        above_N = (logits_NV > gold_N1).sum(1)
        keep_N = keep_N & ~nll_N.isnan()
    wide = nll_N.dtype if nll_N.dtype.itemsize > 4 else torch.float32
    return CrossEntropyRows(
        loss_N.to(wide),
        nll_N.detach().to(wide),
        lse_N.to(wide),
        keep_N & (above_N < 1),
        keep_N & (above_N < 5),
    )


def _check(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] == 0:
        raise ValueError(
            f"masked_cross_entropy: needs logits [N, V > 0] and labels [N], got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    check_labels("masked_cross_entropy", labels, weights)


def check_labels(op: str, labels: Tensor, weights: Tensor | None) -> None:
    """Raise ValueError unless labels are int64 and weights are constants of the same shape."""
    if labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels must be int64, not {labels.dtype}")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"{op}: weights {tuple(weights.shape)} do not fit the labels")
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{op}: weights get no gradient; detach them")


def new_rows(like: Tensor, num_rows: int) -> RowTensors:
    """Empty fields of CrossEntropyRows (a custom op must not return views of one buffer)."""
    loss, nll, lse = (like.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    top1, top5 = (like.new_empty(num_rows, dtype=torch.bool) for _ in range(2))
    return loss, nll, lse, top1, top5


def _forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from lw_kernels import cross_entropy_triton as kernels

    rows = new_rows(logits_NV, logits_NV.shape[0])
    kernels.forward(unit_stride(logits_NV), labels_N, weights_N, rows, ignore_index)
    return rows


_masked_cross_entropy = torch.library.custom_op(
    "lw_kernels::masked_cross_entropy", _forward, mutates_args=()
)


@_masked_cross_entropy.register_fake
def _(logits_NV, labels_N, weights_N, ignore_index, inplace_backward):
    return new_rows(logits_NV, logits_NV.shape[0])


def _grad_logits(
    grad_loss_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    lse_N: Tensor,
    ignore_index: int,
) -> Tensor:
    from lw_kernels import cross_entropy_triton as kernels

    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    kernels.backward(
        grad_loss_N, unit_stride(logits_NV), labels_N, weights_N, lse_N, ignore_index, grad_NV
    )
    return grad_NV


_backward_op = torch.library.custom_op(
    "lw_kernels::masked_cross_entropy_backward", _grad_logits, mutates_args=()
)


@_backward_op.register_fake
def _(grad_loss_N, logits_NV, labels_N, weights_N, lse_N, ignore_index):
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


# Writing through an op that declares the mutation raises the version of the logits, so autograd
# itself refuses a second backward pass and any other op that had saved them.
@torch.library.custom_op("lw_kernels::masked_cross_entropy_backward_", mutates_args=("logits_NV",))
def _backward_op_(
    grad_loss_N: Tensor,
    logits_NV: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    lse_N: Tensor,
    ignore_index: int,
) -> None:
    from lw_kernels import cross_entropy_triton as kernels

    kernels.backward(grad_loss_N, logits_NV, labels_N, weights_N, lse_N, ignore_index, logits_NV)


def _setup_context(ctx, inputs, output):
    logits_NV, labels_N, weights_N, ctx.ignore_index, ctx.inplace = inputs
    _, nll_N, lse_N, top1_N, top5_N = output
    ctx.mark_non_differentiable(nll_N, lse_N, top1_N, top5_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_NV, labels_N, weights_N, lse_N)


def _backward(ctx, grad_loss_N, *_):
    if grad_loss_N is None:
        return None, None, None, None, None
    logits_NV, labels_N, weights_N, lse_N = ctx.saved_tensors
    args = (grad_loss_N, logits_NV, labels_N, weights_N, lse_N, ctx.ignore_index)
    if not ctx.inplace:
        return run_backward(_backward_op, _grad_logits, *args), None, None, None, None
    logits_NV = logits_NV.detach()
    _backward_op_(grad_loss_N, logits_NV, *args[2:])
    return logits_NV, None, None, None, None


_masked_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
_Plain = autograd_function("MaskedCrossEntropy", _forward, _setup_context, _backward)
