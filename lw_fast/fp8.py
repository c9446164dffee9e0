"""Frozen linears in 8-bit floating point: e4m3 weights and activations, one scale per row.

    y = x W^T + b,  x [T, K], W [N, K]:    x = diag(s) x8,  W = diag(w) W8,  y = s w (x8 W8^T) + b
    dL/dx = g W = (g diag(w)) W8:          the rows of g diag(w) are cast as those of x are

The weights are cast once. Both passes multiply by the same W8: the gradient belongs to the weights
that the forward pass used. The FP8 matmul of Hopper wants its second operand column-major, so the
backward pass needs a second copy, made when it is first asked for. Casting costs as much as it
saves unless it is fused with its neighbours: compile the layers.

Off the GPU the same numbers are multiplied in fp32: slow, for tests.

Letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

E4M3_MAX = 448.0
"""Largest e4m3 number."""


def cast_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """x -> (e4m3 [T, K], fp32 scale [T, 1]) with x = scale * e4m3; the scale is the row's largest
    magnitude over E4M3_MAX."""
    x_TK = x_TK.float()
    scale_T1 = x_TK.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x_TK / scale_T1).to(torch.float8_e4m3fn), scale_T1


def scaled_matmul(
    a_TK: Tensor, scale_T1: Tensor, b_KN: Tensor, scale_1N: Tensor, dtype: torch.dtype
) -> Tensor:
    """(scale_T1 * a) @ (b * scale_1N) of e4m3 matrices; b column-major."""
    if a_TK.device.type == "cuda":
        return torch._scaled_mm(
            a_TK, b_KN, scale_a=scale_T1, scale_b=scale_1N, out_dtype=dtype, use_fast_accum=True
        )
    return ((a_TK.float() @ b_KN.float()) * scale_T1 * scale_1N).to(dtype)


class _Matmul(torch.autograd.Function):
    """x W^T for frozen e4m3 weights."""

    @staticmethod
    def forward(ctx, x_TK: Tensor, weight_NK: Tensor, weight_KN: Tensor, scale_1N: Tensor):
        ctx.save_for_backward(weight_KN, scale_1N)
        return scaled_matmul(*cast_rows(x_TK), weight_NK.t(), scale_1N, x_TK.dtype)

    @staticmethod
    def backward(ctx, grad_TN: Tensor):
        weight_KN, scale_1N = ctx.saved_tensors
        grad8_TN, scale_T1 = cast_rows(grad_TN * scale_1N)
        ones_1K = torch.ones_like(scale_1N[:, :1]).expand(1, len(weight_KN)).contiguous()
        grad_TK = scaled_matmul(grad8_TN, scale_T1, weight_KN.t(), ones_1K, grad_TN.dtype)
        return grad_TK, None, None, None


class Float8Linear(nn.Module):
    """A frozen nn.Linear whose matmuls run in e4m3; input and output keep their dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight8_NK, scale_N1 = cast_rows(linear.weight.detach())
        self.register_buffer("weight8_NK", weight8_NK)
        self.register_buffer("scale_1N", scale_N1.t().contiguous())
        self.register_buffer("weight8_KN", None)
        self.bias = linear.bias

    def allow_backward(self) -> None:
        """Makes the copy that the gradient of the input needs."""
        if self.weight8_KN is None:
            self.weight8_KN = self.weight8_NK.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        x_TK = x.flatten(0, -2)
        if torch.is_grad_enabled() and x.requires_grad:
            y_TN = _Matmul.apply(x_TK, self.weight8_NK, self.weight8_KN, self.scale_1N)
        else:
            y_TN = scaled_matmul(*cast_rows(x_TK), self.weight8_NK.t(), self.scale_1N, x.dtype)
        y = y_TN.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def to_fp8(layers: nn.Module) -> None:
    """Replaces every nn.Linear below `layers`, one at a time: peak memory hardly grows."""
    for module in list(layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Float8Linear(child))


def allow_backward(layers: nn.Module) -> None:
    """Readies every Float8Linear below `layers` for gradients of its input."""
    for module in layers.modules():
        if isinstance(module, Float8Linear):
            module.allow_backward()
