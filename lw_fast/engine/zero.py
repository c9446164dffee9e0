"""DeepSpeed ZeRO around the trainable module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
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
from lw_fast.engine.world import World, import_deepspeed


class ZeroEngine:
    """DeepSpeed ZeRO stage 1, 2 or 3 around the trainable module."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        world: World,
        ds_config: dict[str, Any],
        accumulation: int,
    ) -> None:
        self.module = module
        self.world = world
        self.part_norms: Mapping[str, Tensor] = {}
        self._stage = ds_config["zero_optimization"]["stage"]
        self._deepspeed = import_deepspeed(world.device)
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=adamw(module, optim),
            config=_with_trainer_keys(ds_config, optim, world, accumulation),
        )
        self._peaks = [group["lr"] for group in self._zero.param_groups]
        self._new_optimizer_state(step=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages over ranks (and stage 3 knows no other way): undo it.
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_factor: float, *, with_parts: bool = False) -> Tensor:
        set_lr(self._zero, self._peaks, lr_factor)
        with self._measuring_parts() if with_parts else contextlib.nullcontext():
            self._engine.step()
        self._forget_gradients()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.world.device)

    @contextlib.contextmanager
    def _measuring_parts(self) -> Iterator[None]:
        """Measures `part_norms` where gradients are summed and not yet clipped, which is so only
        within DeepSpeed's step, between its reduction and its optimizer's step."""
        read, take_step = self._deepspeed.utils.safe_get_full_grad, self._zero.step

        def measured_step(*args: Any, **kwargs: Any) -> Any:
            params = trainable(self.module).items()
            self.part_norms = norms_by_part((name, read(p)) for name, p in params)  # one by one
            return take_step(*args, **kwargs)

        self._zero.step = measured_step
        try:
            yield
        finally:
            del self._zero.step

    def module_state(self) -> dict[str, Tensor]:
        with self._gathered():
            return to_cpu(self.module.state_dict())

    def load_module_state(self, state: Mapping[str, Tensor]) -> None:
        with self._gathered(write=True):
            own = self.module.state_dict()
            check_fits("checkpoint", {name: tuple(t.shape) for name, t in own.items()}, state)
            self.module.load_state_dict(state)
        self._zero.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        read = self._deepspeed.utils.safe_get_full_optimizer_state
        step = int(self._zero.optimizer.state[self._flat_params()[0]]["step"])
        if not step:
            return {"step": 0, "moments": {}}
        moments = {
            name: to_cpu({key: read(p, key) for key in MOMENTS})
            for name, p in trainable(self.module).items()
        }
        return {"step": step, "moments": moments}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        if state["step"]:
            check_moments(self.module, state["moments"])
        self._new_optimizer_state(state["step"])
        for name, moments in state["moments"].items():
            param = self.module.get_parameter(name)
            for key in MOMENTS:
                self._write_moment(param, key, moments[key].to(self.world.device))

    def _forget_gradients(self) -> None:
        """Stage 3 and offloading only overwrite gradients: a parameter that takes no part in the
        next step, or not from its first micro-batch on, would be updated with this step's."""
        buffers = list(getattr(self._zero, "accumulated_grads_in_cpu", {}).values())
        buffers += [flat.grad for flat in self._flat_params() if flat.grad is not None]
        if self._stage == 3:
            buffers.append(self._zero.grad_partitions_flat_buffer)
            self._zero.reset_cpu_buffers()  # norms of single parameters
        for buffer in buffers:
            buffer.zero_()

    def _gathered(self, write: bool = False) -> contextlib.AbstractContextManager:
        """Inside, all parameters are whole; with write, rank 0's values are kept."""
        if self._stage < 3:
            return contextlib.nullcontext()
        params = list(self.module.parameters())
        return self._deepspeed.zero.GatheredParameters(params, modifier_rank=0 if write else None)

    def _flat_params(self) -> list[Tensor]:
        """This rank's flat fp32 partitions: what AdamW really updates."""
        if self._stage < 3:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    def _new_optimizer_state(self, step: int) -> None:
        """Zero moments after `step` steps.

        Left to itself, DeepSpeed links them to the parameters after the first group's first step,
        when the other groups have none yet: their state could be neither read nor written.
        """
        for flat in self._flat_params():
            self._zero.optimizer.state[flat] = new_moments(flat, step)
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _write_moment(self, param: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage < 3:
            self._deepspeed.utils.safe_set_full_optimizer_state(param, value, key)
            return
        # The full-state setter of stage 3 overruns where a shard is padded; write our shard.
        numel = param.partition_numel()
        padded = nn.functional.pad(value.flatten(), (0, numel * self.world.size - value.numel()))
        shard = padded.narrow(0, numel * self.world.rank, numel)
        self._deepspeed.utils.safe_set_local_optimizer_state(param, shard, key)


def _with_trainer_keys(
    ds_config: dict[str, Any], optim: OptimConfig, world: World, accumulation: int
) -> dict[str, Any]:
    """The keys of a ds_config that the trainer's own settings decide."""
    return {
        **ds_config,
        "train_micro_batch_size_per_gpu": max(1, optim.batch_size // (world.size * accumulation)),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.max_grad_norm,
        "managed_gradient_accumulation": False,  # step() is the boundary
        # Offloaded AdamW is torch's: DeepSpeed's own would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
    }
