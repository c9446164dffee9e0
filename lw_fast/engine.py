"""Who moves the weights: one device, data parallel, or DeepSpeed ZeRO, behind one interface.

    world = init_world(use_deepspeed=bool(ds_config))
    engine = build_engine(module, config, world, ds_config, accumulation=2)
    for micro, batch in enumerate(batches):
        loss = loss_sum(engine(batch)) / global_count
        engine.backward(loss, last=micro == len(batches) - 1)
    norm = engine.step(lr_factor(step, total_steps, config.optim))

Only the trainable module is inside an engine; the frozen LMs stay outside and gradients flow
through them to its outputs. Gradients of micro-batches and ranks are SUMMED: a loss that was
divided by the global count gives the same step however the batch was cut.

This is the only file that imports deepspeed, and it does so where it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lw_fast.config import Config, OptimConfig
from lw_fast.errors import UserError
from lw_fast.optim import param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running averages of the gradient and of its square."""


# --------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    patient_group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """All ranks again, over gloo and without a time-out to speak of; see `barrier`."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Sums (or op=max, min) a tensor over all ranks in place and returns it. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """One small picklable value per rank, in rank order. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self, *, patient: bool = False) -> None:
        """Waits for all ranks.

        Args:
            patient: Wait for hours if need be, as while rank 0 evaluates; a peer that dies still
                raises at once.
        """
        if self.size > 1:
            dist.barrier(self.patient_group if patient else None)


def init_world(
    *, use_deepspeed: bool, device: str = "auto", timeout_seconds: float = 600.0
) -> World:
    """Joins the processes that a launcher (deepspeed, torchrun, srun with RANK set) started.

    Without a launcher there is one process: no process group, or, as DeepSpeed insists on one, a
    group of one that needs neither a port nor MPI.

    Args:
        device: auto (this rank's GPU where there is one), cuda or cpu.
        timeout_seconds: After this long a collective whose peer is gone raises instead of hanging.

    Raises:
        UserError: device=cuda without a GPU, a launcher's environment that is incomplete, or
            processes that never came.
    """
    rank, size, local_rank = (_env_int(n, d) for n, d in _LAUNCHER_ENV.items())
    where = _pick_device(device, local_rank)
    backend = "nccl" if where.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _require_rendezvous()
        _meet(backend, timeout, size)
    elif use_deepspeed:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    patient_group = None
    if size > 1:
        patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if use_deepspeed:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed asserts it is there
        _deepspeed(where).init_distributed(dist_backend=backend, timeout=timeout)
    return World(
        rank=rank, local_rank=local_rank, size=size, device=where, patient_group=patient_group
    )


_LAUNCHER_ENV = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def close_world() -> None:
    """Leaves the process group, if there is one; `init_world` may then be called again."""
    comm = getattr(sys.modules.get("deepspeed"), "comm", None)
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # also drops DeepSpeed's own references to it
    elif dist.is_initialized():
        dist.destroy_process_group()


def _meet(backend: str, timeout: timedelta, size: int) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {size} processes did not meet at {where} within {timeout.total_seconds():g} s: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def watch_peers(world: World) -> Iterator[None]:
    """Inside, a collective that fails because another process is gone is a UserError.

    Raises:
        UserError: A peer died, or was silent for longer than the time-out of `init_world`.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _is_lost_peer(error):
            raise
        raise UserError(
            "lost contact with another process: it died, or hung for longer than "
            f"--timeout_seconds; what it printed says why (rank {world.rank} of {world.size} saw: "
            f"{str(error).splitlines()[0]}); --resume continues from the newest checkpoint"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """NCCL and the rendezvous have exceptions of their own; gloo only says who it is."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _env_int(name: str, default: int) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"environment variable {name} must be a whole number, got {value!r}"
        ) from None


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda; got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine finds {count} GPUs; start at most that many "
            "processes, or pass --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _require_rendezvous() -> None:
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set but {' and '.join(missing)} not: start through deepspeed or torchrun, "
            "or unset RANK and WORLD_SIZE"
        )


def _deepspeed(device: torch.device) -> Any:
    """Imports deepspeed for this device type, quietly and without building any C++."""
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It calls torch collectives by their old names, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Otherwise its gloo backend compiles this op: a minute, and a crash without g++.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# --------------------------------------------------------------------------------- interface


class Engine(Protocol):
    """Forward, backward and update of the trainable module; see the head of this file.

    Methods marked collective must be called by all ranks. Full states are plain CPU tensors under
    the names of `module.named_parameters()`: what one engine saves, any other can load.
    """

    module: nn.Module
    world: World

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a micro-batch. `last` ends the accumulation. Collective.

        Args:
            loss: Scalar; this rank's and micro-batch's share of the step's loss, that is, already
                divided by the global count.
        """

    def step(self, lr_factor: float) -> Tensor:
        """Clips, updates the weights and zeroes the gradients. Collective.

        A gradient that is not finite changes neither weights nor moments.

        Args:
            lr_factor: This step's share of each group's peak learning rate.

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


def build_engine(
    module: nn.Module,
    config: Config,
    world: World,
    ds_config: dict[str, Any] | None,
    accumulation: int,
) -> Engine:
    """Moves the module to the device, makes it equal on all ranks and wraps it.

    Args:
        module: Trainable module with fp32 weights; autocast, if any, happens in its forward.
        ds_config: From `load_ds_config`; None picks the engine without DeepSpeed.
        accumulation: Micro-batches per step and rank.
    """
    module.to(world.device)
    if ds_config is None:
        return PlainEngine(module, config.optim, world)
    return ZeroEngine(module, config.optim, world, ds_config, accumulation)


def _adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    # fused: one kernel per group, on CPUs too, and it can skip a bad step without a host sync.
    return torch.optim.AdamW(
        param_groups(module, optim), betas=(optim.beta1, optim.beta2), fused=True
    )


def _set_lr(optimizer: torch.optim.Optimizer, peaks: list[float], factor: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


def _new_moments(param: Tensor, step: int) -> dict[str, Tensor]:
    """AdamW's state of one parameter after `step` steps, with moments still zero."""
    return {
        "step": torch.tensor(float(step), device=param.device),  # where fused AdamW wants it
        **{key: torch.zeros_like(param) for key in MOMENTS},
    }


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has left an empty shard in its place."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _check_fits(
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


def _check_moments(module: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    expected = {name: _full_shape(p) for name, p in _trainable(module).items()}
    for key in MOMENTS:
        _check_fits("optimizer state", expected, {name: m[key] for name, m in moments.items()})


# --------------------------------------------------------------------------------- plain engine


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
        self._max_norm = optim.max_grad_norm
        self._optimizer = _adamw(module, optim)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._params = _trainable(module)
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
    def step(self, lr_factor: float) -> Tensor:
        _set_lr(self._optimizer, self._peaks, lr_factor)
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
        return _to_cpu(self.module.state_dict())

    def load_module_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        _check_fits("checkpoint", {name: tuple(t.shape) for name, t in own.items()}, state)
        self.module.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Any]:
        states = self._optimizer.state
        if not states:
            return {"step": 0, "moments": {}}
        moments = {
            name: _to_cpu({key: states[p][key] for key in MOMENTS})
            for name, p in self._params.items()
        }
        step = next(iter(states.values()))["step"]
        return {"step": int(step), "moments": moments}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self._optimizer.state.clear()
        if not state["step"]:
            return
        _check_moments(self.module, state["moments"])
        for name, param in self._params.items():
            self._optimizer.state[param] = _new_moments(param, state["step"])
            for key in MOMENTS:
                self._optimizer.state[param][key].copy_(state["moments"][name][key])


def _flat_gradient(params: list[nn.Parameter]) -> Tensor:
    """A zero buffer that holds all gradients; every `param.grad` becomes a view of it."""
    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for param, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = grad.view_as(param)
    return flat


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no storage with the originals (a view would be saved with its base)."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


# --------------------------------------------------------------------------------- DeepSpeed


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
        self._stage = ds_config["zero_optimization"]["stage"]
        self._deepspeed = _deepspeed(world.device)
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=module,
            optimizer=_adamw(module, optim),
            config=_with_trainer_keys(ds_config, optim, world, accumulation),
        )
        self._peaks = [group["lr"] for group in self._zero.param_groups]
        self._new_optimizer_state(step=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages over ranks (and stage 3 knows no other way): undo it.
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> Tensor:
        _set_lr(self._zero, self._peaks, lr_factor)
        self._engine.step()
        self._forget_gradients()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.world.device)

    def module_state(self) -> dict[str, Tensor]:
        with self._gathered():
            return _to_cpu(self.module.state_dict())

    def load_module_state(self, state: Mapping[str, Tensor]) -> None:
        with self._gathered(write=True):
            own = self.module.state_dict()
            _check_fits("checkpoint", {name: tuple(t.shape) for name, t in own.items()}, state)
            self.module.load_state_dict(state)
        self._zero.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        read = self._deepspeed.utils.safe_get_full_optimizer_state
        step = int(self._zero.optimizer.state[self._flat_params()[0]]["step"])
        if not step:
            return {"step": 0, "moments": {}}
        moments = {
            name: _to_cpu({key: read(p, key) for key in MOMENTS})
            for name, p in _trainable(self.module).items()
        }
        return {"step": step, "moments": moments}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        if state["step"]:
            _check_moments(self.module, state["moments"])
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
            self._zero.optimizer.state[flat] = _new_moments(flat, step)
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


# --------------------------------------------------------------------------------- ds_config

_ALLOWED = frozenset(
    "zero_optimization communication_data_type comms_logger flops_profiler memory_breakdown "
    "steps_per_print wall_clock_breakdown".split()
)

_PRECISION = "the trainer; set it with --precision"
_SUMMED = "the trainer, which sums gradients over micro-batches and ranks; there is no flag"
_CURVES = "the trainer, which writes log.jsonl and tensorboard/ into --run_dir"
_OWNED = {
    "train_batch_size": "the trainer; set it with --batch_size",
    "train_micro_batch_size_per_gpu": "the trainer; set it with --micro_batch_size",
    "gradient_accumulation_steps": (
        "the trainer; it follows from --batch_size and --micro_batch_size"
    ),
    "gradient_clipping": "the trainer; set it with --max_grad_norm",
    "optimizer": (
        "the trainer (AdamW); set it with --lr, --adapter_lr, --weight_decay, --beta1, --beta2"
    ),
    "scheduler": "the trainer; set it with --schedule, --warmup_steps, --min_lr_ratio",
    **dict.fromkeys(
        ("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), _PRECISION
    ),
    **dict.fromkeys(
        "managed_gradient_accumulation gradient_allreduce_op prescale_gradients "
        "gradient_predivide_factor".split(),
        _SUMMED,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _CURVES),
    "checkpoint": "the trainer; set it with --save_every and --keep_last",
    "zero_allow_untested_optimizer": "the trainer, whose AdamW is tested; there is no flag",
    "zero_force_ds_cpu_optimizer": "the trainer, whose AdamW is torch's; there is no flag",
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed config that holds only what DeepSpeed owns (see ds_configs/README.md).

    Call it after `init_world`, which tells deepspeed the device before its first import.

    Raises:
        UserError: Not readable, not JSON, or a key that is unknown, owned by the trainer or in
            contradiction with another; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read ds_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"ds_config {path} must hold a JSON object, got {type(values).__name__}")
    for problem in _problems(values):
        raise UserError(f"ds_config {path}: {problem}")
    return values


def _problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a ds_config, worst first."""
    for key in values:
        if key in _OWNED:
            yield f"{key} belongs to {_OWNED[key]}"
        elif key not in _ALLOWED:
            yield f"unknown key {key}; there are {', '.join(sorted(_ALLOWED))}"
    if auto := _find_auto(values):
        yield f'{auto} is "auto", which only the Hugging Face Trainer fills in; give a value'
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        yield "zero_optimization must be an object with a stage; without it leave --ds_config out"
    elif isinstance(zero.get("stage"), bool) or zero.get("stage") not in (1, 2, 3):
        yield (
            f"zero_optimization.stage must be 1, 2 or 3, got {zero.get('stage')!r}; for no ZeRO "
            "leave --ds_config out"
        )
    else:
        yield from _zero_problems(zero)


def _find_auto(values: Any, name: str = "") -> str:
    """The dotted name of the first value "auto", or an empty string."""
    if isinstance(values, dict):
        found = (_find_auto(v, f"{name}.{k}".lstrip(".")) for k, v in values.items())
        return next(filter(None, found), "")
    return name if values == "auto" else ""


_STAGE_3_ONLY = frozenset(
    "offload_param sub_group_size zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_nontrainable_weights memory_efficient_linear leaf_module".split()
)
_REFUSED = {
    "zenflow": "changes the optimizer, which belongs to the trainer",
    "cpu_offload": "is an old name; write offload_optimizer",
    "cpu_offload_params": "is an old name; write offload_param",
    "legacy_stage1": "is no longer supported by DeepSpeed",
}


def _zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    for key in zero:
        if key in _REFUSED:
            yield f"zero_optimization.{key} {_REFUSED[key]}"
        if zero["stage"] < 3 and (key in _STAGE_3_ONLY or key.startswith("stage3_")):
            yield f"zero_optimization.{key} needs stage 3, but stage is {zero['stage']}"
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm must stay true: the norm is clipped and logged"
    for key in ("offload_optimizer", "offload_param"):
        target = zero.get(key) or {}
        if isinstance(target, dict) and target.get("device") == "nvme":
            yield f"zero_optimization.{key}.device nvme needs a compiled DeepSpeed op; use cpu"
    yield from _deepspeed_problems(zero)


def _deepspeed_problems(zero: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed itself says about the keys and values of zero_optimization."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        yield f"{name}: {reason}"
