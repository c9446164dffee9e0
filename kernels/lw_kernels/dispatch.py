"""Which implementation of an op runs: the PyTorch reference or the Triton kernel.

`auto` takes Triton on a GPU and PyTorch elsewhere. An implementation that was asked for by name
and cannot run is an error; nothing falls back silently. Each distinct choice is logged once.

Going through torch.library costs more host time per call than launching the kernel. Its ops are for
whoever must see them (the compiler, dispatch modes, tensor subclasses); a plain call (`is_plain`)
runs the same function without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "torch", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger("lw_kernels")
_logged: set[tuple[str, str, str, str]] = set()


# The result is a constant for the compiler: neither the log nor the error breaks a graph.
@torch.compiler.assume_constant_result
def choose(
    op: str, impl: str, device: str, dtypes: tuple[torch.dtype, ...], obstacle: str = ""
) -> str:
    """Resolve `impl` to "torch" or "triton".

    Args:
        op: name for messages.
        impl: "auto", "torch" or "triton".
        device: type of the device that holds the tensors ("cuda", "cpu").
        dtypes: dtypes of the floating-point tensors.
        obstacle: why this call cannot use the kernel; empty if it can.

    Raises:
        ValueError: `impl` is unknown, or is "triton" where the kernel cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    obstacle = obstacle or _obstacle(device, dtypes)
    if impl == "triton" and obstacle:
        raise ValueError(f"{op}: impl='triton' was asked for, but {obstacle}")
    if impl == "auto":
        chosen = "triton" if device == "cuda" and not obstacle else "torch"
    else:
        chosen = impl
    _log_once(op, impl, chosen, device, obstacle)
    return chosen


def interpreting() -> bool:
    """Whether Triton runs its kernels in the Python interpreter (on the CPU)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing traces, transforms or watches a call on these tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)
    )


def autograd_function(
    name: str, forward: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The autograd formula of a custom op for plain calls."""

    def forward_(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    # Overriding Function.setup_context instead would bind a signature at every call.
    methods = {"forward": staticmethod(forward_), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def run_backward(op: Callable, function: Callable, grad: Tensor, *args: Any) -> Any:
    """`function`, or the op made of it where that must be seen; the op refuses double backward."""
    plain = not torch.is_grad_enabled() and is_plain(grad)
    return (function if plain else op)(grad, *args)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one that holds `x`."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    if not _has_triton():
        return "triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return f"the tensors are on {device!r} (the interpreter needs TRITON_INTERPRET=1)"
    unknown = [str(dtype) for dtype in dtypes if dtype not in KERNEL_DTYPES]
    return f"the kernel does not compute on {', '.join(unknown)}" if unknown else ""


def _log_once(op: str, impl: str, chosen: str, device: str, obstacle: str) -> None:
    key = (op, impl, chosen, device)
    if key not in _logged:
        _logged.add(key)
        why = f" ({obstacle})" if obstacle and device == "cuda" else ""
        logger.info("%s: impl=%s -> %s on %s%s", op, impl, chosen, device, why)
