"""The interface of every engine, and what they share: AdamW, its state, and checks of states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lw_fast.config import OptimConfig
from lw_fast.engine.world import World
from lw_fast.errors import UserError
from lw_fast.optim import param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running averages of the gradient and of its square."""


class Engine(Protocol):
    """Forward, backward and update of the trainable module; see the head of this file.

    Methods marked collective must be called by all ranks. Full states are plain CPU tensors under
    the names of `module.named_parameters()`: what one engine saves, any other can load.
    """

    module: nn.Module
    world: World
    part_norms: Mapping[str, Tensor]
    """Gradient norm before clipping of the encoder and of each LM's adapter, 0-d, by name, in the
    newest step that was asked for it. A collapse shows here first: an encoder that gets next to no
    gradient learns nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a micro-batch. `last` ends the accumulation. Collective.

        Args:
            loss: Scalar; this rank's and micro-batch's share of the step's loss, that is, already
                divided by the global count.
        """

    def step(self, lr_factor: float, *, with_parts: bool = False) -> Tensor:
        """Clips, updates the weights and zeroes the gradients. Collective.

        A gradient that is not finite changes neither weights nor moments.

        Args:
            lr_factor: This step's share of each group's peak learning rate.
            with_parts: Also measure `part_norms`, which takes some time.

        Returns:
            Global gradient norm before clipping, 0-d; inf or nan if it was not finite.
        """

    def module_state(self) -> dict[str, Tensor]:
        """Full `module.state_dict()` on the CPU. Collective."""

    def load_module_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse; every rank passes the full state. Collective.

        Raises:
            UserError: Names or shapes do not fit the module.
        """

    def optimizer_state(self) -> dict[str, Any]:
        """{"step": int, "moments": {name: {"exp_avg": Tensor, "exp_avg_sq": Tensor}}}, fp32 on the
        CPU; no moments before the first step. Collective."""

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """The inverse; every rank passes the full state. Collective.

        Raises:
            UserError: Names or shapes do not fit the trainable parameters.
        """


def adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    # fused: one kernel per group, on CPUs too, and it can skip a bad step without a host sync.
    return torch.optim.AdamW(
        param_groups(module, optim), betas=(optim.beta1, optim.beta2), fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, peaks: list[float], factor: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


def new_moments(param: Tensor, step: int) -> dict[str, Tensor]:
    """AdamW's state of one parameter after `step` steps, with moments still zero."""
    return {
        "step": torch.tensor(float(step), device=param.device),  # where fused AdamW wants it
        **{key: torch.zeros_like(param) for key in MOMENTS},
    }


@torch.no_grad()
def norms_by_part(grads: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Norms of gradients that come by parameter name, per part: `adapters.NAME` or the first word
    of the name."""
    squares: dict[str, Tensor] = {}
    for name, grad in grads:
        part = name.removeprefix("adapters.").partition(".")[0]
        # In fp32 a CPU sums a million squares to four digits only.
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        squares[part] = squares.get(part, 0.0) + norm.square()
    return {part: square.sqrt().float() for part, square in squares.items()}


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has left an empty shard in its place."""
    return tuple(getattr(param, "ds_shape", param.shape))


def check_fits(
    what: str, expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Tensor]
) -> None:
    """Raises UserError unless names and shapes agree, naming the first of each kind of misfit."""
    problems = [f"no {name}" for name in list(expected.keys() - got.keys())[:1]]
    problems += [f"unknown {name}" for name in list(got.keys() - expected.keys())[:1]]
    problems += [
        f"{name} is {list(got[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in got and tuple(got[name].shape) != shape
    ][:1]
    if problems:
        raise UserError(f"{what} does not fit this model: {'; '.join(problems)}")


def check_moments(module: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    expected = {name: full_shape(p) for name, p in trainable(module).items()}
    for key in MOMENTS:
        check_fits("optimizer state", expected, {name: m[key] for name, m in moments.items()})


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no storage with the originals (a view would be saved with its base)."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
