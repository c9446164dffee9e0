"""kl_topk: KL divergence from a teacher's top-k distribution to the student's rows of logits.

For row n with student logits x, teacher logits t_1..t_K at the ids i_1..i_K and weight w:

    p = softmax(t) over the K entries,   q = softmax(x) over the vocabulary
    loss_n = w_n * sum_k p_k * (log p_k - log q_{i_k})
    dx_v   = g_n * w_n * (q_v - sum_k p_k [i_k = v])

The teacher's K logits are all that is kept of its prompt, so its rows are computed once and cached.
The student costs one pass forward and one backward, as in masked_cross_entropy, whose kernels do
the work; log-probabilities of the whole vocabulary are never written. The ids of a row differ.

Shapes: N rows, V vocabulary, K teacher entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lw_kernels.dispatch import autograd_function, choose, is_plain, run_backward, unit_stride
from lw_kernels.masked_cross_entropy import new_rows

NO_LABEL, NO_IGNORED = -1, -2
"""A label that no token has, and an ignore_index that no label has."""


def kl_topk(
    logits_NV: Tensor,
    teacher_NK: Tensor,
    teacher_ids_NK: Tensor,
    *,
    weights_N: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """KL divergence per row, float32 [N]; the gradient goes to `logits_NV` alone.

    Args:
        logits_NV: student, fp32, bf16 or fp16.
        teacher_NK: the teacher's highest logits, any floating dtype, a constant for autograd.
        teacher_ids_NK: int64, their token ids in 0..V-1.
        weights_N: factor of each row; 0 for rows that do not count; None is 1.
        impl: "auto", "torch" or "triton".
    """
    _check(logits_NV, teacher_NK, teacher_ids_NK, weights_N)
    if choose("kl_topk", impl, logits_NV.device.type, (logits_NV.dtype,)) == "torch":
        return kl_topk_ref(logits_NV, teacher_NK, teacher_ids_NK, weights_N=weights_N)
    op = _Plain.apply if is_plain(logits_NV) else _kl_topk
    loss_N, _ = op(logits_NV, teacher_NK, teacher_ids_NK, weights_N)
    return loss_N


def kl_topk_ref(
    logits_NV: Tensor,
    teacher_NK: Tensor,
    teacher_ids_NK: Tensor,
    *,
    weights_N: Tensor | None = None,
    upcast: bool = True,
) -> Tensor:
    """`kl_topk` in plain PyTorch; `upcast` computes in fp32 (fp64 stays fp64)."""
    if upcast and logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    log_q_NK = logits_NV.log_softmax(-1).gather(1, teacher_ids_NK)
    loss_N = _divergence(teacher_NK.to(logits_NV.dtype), log_q_NK)
    loss_N = loss_N if weights_N is None else loss_N * weights_N
    return loss_N if loss_N.dtype == torch.float64 else loss_N.float()


def _divergence(teacher_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    p_NK = teacher_NK.softmax(-1)
    return (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(-1)


def _check(logits: Tensor, teacher: Tensor, ids: Tensor, weights: Tensor | None) -> None:
    if logits.dim() != 2 or teacher.shape != ids.shape or ids.shape[:-1] != logits.shape[:1]:
        raise ValueError(
            f"kl_topk: needs logits [N, V], teacher and ids [N, K], got {tuple(logits.shape)}, "
            f"{tuple(teacher.shape)}, {tuple(ids.shape)}"
        )
    if ids.dtype != torch.int64 or ids.shape[1] == 0:
        raise ValueError("kl_topk: ids must be int64 and K at least 1")
    if weights is not None and weights.shape != logits.shape[:1]:
        raise ValueError("kl_topk: weights must be [N]")
    if teacher.requires_grad or (weights is not None and weights.requires_grad):
        raise ValueError("kl_topk: teacher and weights get no gradient; detach them")


def _forward(
    logits_NV: Tensor, teacher_NK: Tensor, teacher_ids_NK: Tensor, weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lw_kernels import cross_entropy_triton as kernels

    rows = new_rows(logits_NV, logits_NV.shape[0])
    kernels.forward(unit_stride(logits_NV), teacher_ids_NK[:, 0], None, rows, NO_IGNORED)
    lse_N = rows[2]
    log_q_NK = logits_NV.gather(1, teacher_ids_NK).float() - lse_N[:, None]
    loss_N = _divergence(teacher_NK.float(), log_q_NK)
    return loss_N if weights_N is None else loss_N * weights_N.float(), lse_N


_kl_topk = torch.library.custom_op("lw_kernels::kl_topk", _forward, mutates_args=())


@_kl_topk.register_fake
def _(logits_NV, teacher_NK, teacher_ids_NK, weights_N):
    num_rows = logits_NV.shape[0]
    return tuple(logits_NV.new_empty(num_rows, dtype=torch.float32) for _ in range(2))


def _grad_logits(
    grad_loss_N: Tensor,
    logits_NV: Tensor,
    teacher_NK: Tensor,
    teacher_ids_NK: Tensor,
    weights_N: Tensor | None,
    lse_N: Tensor,
) -> Tensor:
    from lw_kernels import cross_entropy_triton as kernels

    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    labels_N = torch.full_like(teacher_ids_NK[:, 0], NO_LABEL)
    kernels.backward(
        grad_loss_N, unit_stride(logits_NV), labels_N, weights_N, lse_N, NO_IGNORED, grad_NV
    )
    factor_N = grad_loss_N.float() if weights_N is None else grad_loss_N * weights_N.float()
    p_NK = teacher_NK.float().softmax(-1)
    return grad_NV.scatter_add_(1, teacher_ids_NK, (-factor_N[:, None] * p_NK).to(grad_NV.dtype))


_backward_op = torch.library.custom_op(
    "lw_kernels::kl_topk_backward", _grad_logits, mutates_args=()
)


@_backward_op.register_fake
def _(grad_loss_N, logits_NV, teacher_NK, teacher_ids_NK, weights_N, lse_N):
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, lse_N = output
    ctx.mark_non_differentiable(lse_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, lse_N)


def _backward(ctx, grad_loss_N, _):
    if grad_loss_N is None:
        return None, None, None, None
    grad = run_backward(_backward_op, _grad_logits, grad_loss_N, *ctx.saved_tensors)
    return grad, None, None, None


_kl_topk.register_autograd(_backward, setup_context=_setup_context)
_Plain = autograd_function("KLTopK", _forward, _setup_context, _backward)
