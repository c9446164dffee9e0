"""The processes that train together, and deepspeed's first import."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lw_fast.errors import UserError


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

    def all_gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        """One small picklable value per rank, in rank order. Collective; `patient` as below."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.patient_group if patient else None)
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
        import_deepspeed(where).init_distributed(dist_backend=backend, timeout=timeout)
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
    # cuDNN's attention builds a plan for every new shape; ours keep changing (docs/throughput.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def _require_rendezvous() -> None:
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set but {' and '.join(missing)} not: start through deepspeed or torchrun, "
            "or unset RANK and WORLD_SIZE"
        )


def import_deepspeed(device: torch.device) -> Any:
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
