"""The engine without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lw_fast.config import OptimConfig
from lw_fast.engine.base import (
    MOMENTS,
    adamw,
    check_fits,
    check_moments,
    new_moments,
    norms_by_part,
    set_lr,
    to_cpu,
    trainable,
)
from lw_fast.engine.world import World


class PlainEngine:
    """One device, or data parallel without DeepSpeed.

    All gradients live in one flat buffer, so that zeroing, norm, clipping and the sum over ranks
    are one operation each, and a parameter that took no part has a zero gradient on every rank.
    The sum runs once per step, after the backward pass: behind the frozen LMs' share of it, there
    is next to nothing to overlap with.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World) -> None:
        self.module = module
        self.world = world
        self.part_norms: Mapping[str, Tensor] = {}
        self._max_norm = optim.max_grad_norm
        self._optimizer = adamw(module, optim)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._params = trainable(module)
        self._grad = _flat_gradient(list(self._params.values()))
        if world.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            self.world.all_reduce(self._grad)

    @torch.no_grad()
    def step(self, lr_factor: float, *, with_parts: bool = False) -> Tensor:
        set_lr(self._optimizer, self._peaks, lr_factor)
        if with_parts:
            self.part_norms = norms_by_part((name, p.grad) for name, p in self._params.items())
        # In fp32 a CPU sums a million squares to four digits only.
        norm = torch.linalg.vector_norm(self._grad, dtype=torch.float64).float()
        if self._max_norm:
            self._grad.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        # How torch.amp.GradScaler tells a fused optimizer to skip a step, without a host sync.
        self._optimizer.found_inf = norm.isfinite().logical_not().float()
        self._optimizer.step()
        self._grad.zero_()
        return norm

    def module_state(self) -> dict[str, Tensor]:
        return to_cpu(self.module.state_dict())

    def load_module_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        check_fits("checkpoint", {name: tuple(t.shape) for name, t in own.items()}, state)
        self.module.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Any]:
        states = self._optimizer.state
        if not states:
            return {"step": 0, "moments": {}}
        moments = {
            name: to_cpu({key: states[p][key] for key in MOMENTS})
            for name, p in self._params.items()
        }
        step = next(iter(states.values()))["step"]
        return {"step": int(step), "moments": moments}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self._optimizer.state.clear()
        if not state["step"]:
            return
        check_moments(self.module, state["moments"])
        for name, param in self._params.items():
            self._optimizer.state[param] = new_moments(param, state["step"])
            for key in MOMENTS:
                self._optimizer.state[param][key].copy_(state["moments"][name][key])


def _flat_gradient(params: list[nn.Parameter]) -> Tensor:
    """A zero buffer that holds all gradients; every `param.grad` becomes a view of it."""
    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for param, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = grad.view_as(param)
    return flat
