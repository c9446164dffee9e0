"""What a run costs: rates, memory, FLOPs and MFU, and the machine it ran on.

Units: rates are per second of wall-clock time and named by what they count. GiB is 2^30 bytes.
A number that cannot be known (MFU without a measured ceiling, GPU memory on a CPU) is None, never
a guess. Nothing here touches a GPU when it is imported.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 2**30


# FLOPs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LMCost:
    """What decides the cost of training through one frozen LM.

    Attributes:
        layer_params: N, parameters of the decoder layers (no embedding, no lm_head).
        hidden_size: D, width of the LM.
        vocab_size: V, rows of lm_head.
    """

    layer_params: int
    hidden_size: int
    vocab_size: int

    def training_flops(self, positions: int, rows: int) -> int:
        """Forward and input gradient: 4N per real (not padded) position, 4DV per supervised row.

        Frozen weights get no gradient, so the usual 6N would overstate the work by half. Attention
        scores and recomputation are left out, as is usual for MFU.
        """
        return 4 * self.layer_params * positions + 4 * self.hidden_size * self.vocab_size * rows


def mfu(flops: float, seconds: float, ceiling: float | None, devices: int = 1) -> float | None:
    """Share of the measured matmul ceiling (FLOP/s per device) that was used; None without one."""
    if ceiling is None or seconds <= 0:
        return None
    return flops / seconds / (ceiling * devices)


def matmul_ceiling(device: torch.device, size: int = 8192, repeats: int = 20) -> float | None:
    """FLOP/s of a size^3 bf16 matmul on this card: the median of some tens of milliseconds.

    None on CPUs and on cards without bf16. Needs 6 * size^2 bytes for the duration.
    """
    import torch

    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    with torch.cuda.device(device):
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        times = [_event_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(repeats + 5)]
    return 2 * size**3 / statistics.median(times[5:])  # the first ones choose and warm the kernel


def _event_seconds(work: Callable[[], Any]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


# Rates -------------------------------------------------------------------------------------------


@dataclass
class _Window:
    """What was counted since `started`."""

    started: float
    steps: int = 0
    samples: int = 0
    positions: int = 0
    supervised_tokens: int = 0
    source_bytes: int = 0
    flops: int = 0

    def add(self, other: _Window) -> None:
        for item in fields(self)[1:]:
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass
class Meter:
    """Rates of a training loop, from counts that the host knows: no step waits for the GPU.

    `step` adds counts; `report` waits for the device, returns the rates since the report before
    and starts anew; `overall` covers the run from its first report on (or from its beginning if
    there was none), so that compilation and warm-up fall into the part left out. Time inside
    `paused` (evaluation, saving) does not count.

    Counts cover all processes; MFU alone is divided by `devices`.
    """

    lms: Mapping[str, LMCost]
    ceiling: float | None = None
    devices: int = 1
    synchronize: Callable[[], Any] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    _recent: _Window = field(init=False)
    _total: _Window = field(init=False)
    _reported: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._recent = _Window(self.clock())
        self._total = _Window(self._recent.started)

    def step(
        self,
        *,
        samples: int,
        source_bytes: int,
        positions: Mapping[str, int],
        supervised_tokens: Mapping[str, int],
    ) -> None:
        """Adds one optimiser step. `positions` are real (not padded) ones, both per LM name."""
        flops = (
            cost.training_flops(positions[name], supervised_tokens[name])
            for name, cost in self.lms.items()
            if name in positions  # an LM that sits this step out does not appear
        )
        self._recent.add(
            _Window(
                started=0.0,
                steps=1,
                samples=samples,
                positions=sum(positions.values()),
                supervised_tokens=sum(supervised_tokens.values()),
                source_bytes=source_bytes,
                flops=sum(flops),
            )
        )

    def report(self) -> dict[str, float | None]:
        """Rates since the last report. The only place that waits for the device."""
        self.synchronize()
        now = self.clock()
        rates = self._rates(self._recent, now)
        if self._reported:
            self._total.add(self._recent)
        else:
            self._reported, self._total = True, _Window(now)
        self._recent = _Window(now)
        return rates

    def overall(self) -> dict[str, float | None]:
        """Rates since the first report; the steps not reported yet are among them."""
        self.synchronize()
        together = _Window(self._total.started)
        together.add(self._total)
        together.add(self._recent)
        return self._rates(together, self.clock())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that passes inside; finishes the queued steps first."""
        self.synchronize()
        before = self.clock()
        try:
            yield
        finally:
            self.synchronize()
            away = self.clock() - before
            self._recent.started += away
            self._total.started += away

    def _rates(self, window: _Window, now: float) -> dict[str, float | None]:
        seconds = now - window.started
        counted = ("samples", "positions", "supervised_tokens", "source_bytes")
        rates: dict[str, float | None] = {
            f"{name}/s": getattr(window, name) / seconds if seconds > 0 else None
            for name in counted
        }
        rates["seconds_per_step"] = seconds / window.steps if window.steps else None
        rates["mfu"] = mfu(window.flops, seconds, self.ceiling, self.devices)
        return rates


# Memory ------------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Peak GPU memory of this process since the last reset, in GiB; None on a CPU."""
    import torch

    if device.type != "cuda":
        return {"peak_gib": None, "peak_reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak; does nothing on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more, cycles of objects too."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def max_over_ranks(
    values: dict[str, float | None], device: torch.device
) -> dict[str, float | None]:
    """The largest of each value over all processes, every one of which must call this.

    A value that is None must be None everywhere; without torch.distributed nothing changes.
    """
    import torch
    import torch.distributed as dist

    known = [name for name, value in values.items() if value is not None]
    if not known or not (dist.is_available() and dist.is_initialized()):
        return values
    largest = torch.tensor([values[name] for name in known], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {**values, **dict(zip(known, largest.tolist(), strict=True))}


# Environment -------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, device, driver, cores, commit and date: what a measured row must carry."""
    import torch

    cuda = torch.cuda.is_available()
    packages = ("lw_fast", "torch", "triton", "transformers", "deepspeed", "datasets")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "torch": torch.__version__,  # with its build, such as +cu130
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "devices": torch.cuda.device_count() if cuda else 0,
        "driver": _driver() if cuda else None,
        "cores": _cores(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cores() -> int | None:
    """Cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    """From the installed metadata: importing a package for its version can take seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    printed = _output(*query)
    return printed.splitlines()[0] if printed else None


def _commit() -> str | None:
    """The commit of a source checkout, with `-dirty` if tracked files differ from it.

    An installed copy has no .git beside it; a repository further up would be another project's.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not installed, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
