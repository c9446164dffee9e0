"""Where a step's time goes: named parts of the step, a trace, and a table made from it.

`part("head")` names what runs inside it, as a context or as a decorator; it does nothing unless a
profile is being taken. `--profile N` (train.py) takes one of N steps, into RUN_DIR/profile.
"""

from __future__ import annotations

import bisect
import contextlib
import gzip
import json
import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

WARM_UP = 5
"""Steps of this process before the profile begins: compilation and allocation are over."""
PREFIX = "lw_fast/"
"""What the names of parts begin with in the trace."""
OTHER = "other"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""CUDA calls that make the host wait for the device."""
ITEM = "aten::_local_scalar_dense"
"""What `.item()` and `float(tensor)` come down to: what would wait, had the run a GPU."""


class part(contextlib.ContextDecorator):  # noqa: N801  (used like a function)
    """Names a part of the step in a profile; not for functions that call themselves."""

    active = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._range: Any = None

    def __enter__(self) -> None:
        if part.active:
            self._range = torch.profiler.record_function(PREFIX + self.name)
            self._range.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._range is not None:
            self._range.__exit__(*exception)
            self._range = None


@contextlib.contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Profiles `steps` (0: none) steps after WARM_UP others; yields what ends a step.

    Writes `folder`/trace.json.gz (for chrome://tracing or Perfetto) and `folder`/profile.md.
    """
    if not steps:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        part.active = False
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            text = breakdown(json.load(file)["traceEvents"]).table()
        (folder / "profile.md").write_text(text + "\n", encoding="utf-8")
        logger.info("%s\nprofile: %s", text, folder)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1
    )
    part.active = True
    try:
        with torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=write, acc_events=True
        ) as profiler:
            yield profiler.step
    finally:
        if part.active:
            part.active = False
            logger.warning("profile: nothing was written, the run had %d steps or fewer", WARM_UP)


# ------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Breakdown:
    """Mean milliseconds and counts per step, by part."""

    steps: int
    step_ms: float
    """Median wall-clock time of a step on the host."""
    host_ms: dict[str, float]
    """Time the host spent in a part, less what parts inside it took."""
    device_ms: dict[str, float]
    """Time of what a part launched on the GPU; empty on a CPU."""
    idle_ms: float
    """Time in which nothing ran on the GPU: the host was too slow, or waited."""
    waits: dict[str, Counter[str]] = field(default_factory=dict)
    """Per part: how often the host waited for the GPU (WAITS), in all steps; on a CPU: ITEM."""

    def table(self) -> str:
        """As Markdown."""
        on_gpu = bool(self.device_ms)
        heads = ["part", "host ms", "host %"] + ["GPU ms", "GPU %"] * on_gpu + ["waits per step"]
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        host, device = sum(self.host_ms.values()), sum(self.device_ms.values())
        for name in sorted(self.host_ms, key=lambda n: (n == OTHER, -self._weight(n))):
            cells = [name, *_share(self.host_ms[name], host)]
            cells += _share(self.device_ms.get(name, 0.0), device) if on_gpu else []
            cells.append(self._waits(self.waits.get(name, Counter())))
            lines.append(f"| {' | '.join(cells)} |")
        total = sum(self.waits.values(), Counter())
        lines += ["", f"{self.steps} steps, {self.step_ms:.2f} ms each (median)."]
        if on_gpu:
            lines.append(f"GPU idle (host gap): {self.idle_ms:.2f} ms per step.")
        lines.append(f"Host waits per step: {self._waits(total) or 'none'}.")
        return "\n".join(lines)

    def _weight(self, name: str) -> float:
        return self.device_ms.get(name, 0.0) if self.device_ms else self.host_ms[name]

    def _waits(self, counts: Counter[str]) -> str:
        return ", ".join(
            f"{'.item()' if name == ITEM else name} {count / self.steps:g}"
            for name, count in sorted(counts.items())
        )


def _share(value: float, total: float) -> list[str]:
    return [f"{value:.2f}", f"{100 * value / total:.0f}" if total else "0"]


def breakdown(events: Sequence[dict[str, Any]]) -> Breakdown:
    """The events of a Chrome trace (torch.profiler) by part.

    What runs on the GPU belongs to the part in which the host launched it: backward passes launch
    from a thread of their own, so the clock decides, not the call stack.
    """
    spans = [e for e in events if e.get("cat") == "user_annotation"]
    steps = [e for e in spans if e["name"].startswith("ProfilerStep#")]
    begin = min(e["ts"] for e in steps)
    end = max(e["ts"] + e["dur"] for e in steps)
    clock = _Clock(begin, end, [e for e in spans if e["name"].startswith(PREFIX)])
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {e["args"].get("correlation"): e["ts"] for e in calls}
    waits = defaultdict(Counter)
    for event in calls or [e for e in events if e.get("cat") == "cpu_op"]:
        if event["name"] in (WAITS if calls else (ITEM,)) and begin <= event["ts"] <= end:
            waits[clock.part_at(event["ts"])][event["name"]] += 1
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device = defaultdict(float)
    for event in work:
        time = launched.get(event["args"].get("correlation"))
        device[OTHER if time is None else clock.part_at(time)] += event["dur"]
    per_step = 1e-3 / len(steps)  # microseconds of all steps -> milliseconds of one
    return Breakdown(
        steps=len(steps),
        step_ms=statistics.median(e["dur"] for e in steps) * 1e-3,
        host_ms={name: time * per_step for name, time in clock.totals().items()},
        device_ms={name: time * per_step for name, time in device.items()},
        idle_ms=_idle(work) * per_step,
        waits=dict(waits),
    )


class _Clock:
    """Which part the host was in at a time."""

    def __init__(self, begin: float, end: float, spans: Iterable[dict[str, Any]]) -> None:
        self.times, self.names = [begin], [OTHER]
        self.end = end
        inside: list[tuple[float, str]] = []  # (end, name) of the parts around, innermost last
        for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
            self._leave(inside, span["ts"])
            inside.append((span["ts"] + span["dur"], span["name"].removeprefix(PREFIX)))
            self._change(span["ts"], inside[-1][1])
        self._leave(inside, end)

    def _leave(self, inside: list[tuple[float, str]], time: float) -> None:
        """Closes the parts that ended before `time`."""
        while inside and inside[-1][0] <= time:
            ended, _ = inside.pop()
            self._change(ended, inside[-1][1] if inside else OTHER)

    def _change(self, time: float, name: str) -> None:
        self.times.append(time)
        self.names.append(name)

    def part_at(self, time: float) -> str:
        """The innermost part around a time."""
        return self.names[max(0, bisect.bisect_right(self.times, time) - 1)]

    def totals(self) -> dict[str, float]:
        """Part -> time spent in it and in no part inside it."""
        totals: dict[str, float] = defaultdict(float)
        for name, start, stop in zip(
            self.names, self.times, [*self.times[1:], self.end], strict=True
        ):
            totals[name] += stop - start
        return dict(totals)


def _idle(work: Sequence[dict[str, Any]]) -> float:
    """Microseconds between the first and the last piece of work in which none ran."""
    idle, reached = 0.0, None
    for event in sorted(work, key=lambda e: e["ts"]):
        if reached is not None:
            idle += max(0.0, event["ts"] - reached)
        reached = max(reached or 0.0, event["ts"] + event["dur"])
    return idle
