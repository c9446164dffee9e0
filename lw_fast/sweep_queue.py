"""Runs the points of a sweep: one worker per device, each run resumable, failures tried again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lw_fast.run_results import RunResults, mean_over_lms
from lw_fast.sweep_folder import Sweep
from lw_fast.sweep_worker import COMMAND, Worker

TRIES = 2
POLL_SECONDS = 0.2
CHECK_SECONDS = 2.0
"""Between looks at the logs of running points."""

WAITING, RUNNING, FINISHED, FAILED, STOPPED, INTERRUPTED = (
    "waiting", "running", "finished", "failed", "stopped", "interrupted"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a run is hopeless: at `at` of its steps, its share of right first tokens (in training,
    mean over the LMs) is below `ratio` times the best that another run had at that point."""

    ratio: float = 0.0
    """0: no run is stopped."""
    at: float = 0.3

    def hopeless(self, own: RunResults, others: Sequence[RunResults]) -> str:
        """Why a run should stop; empty if it should not."""
        mine = self._score(own)
        best = max((s for s in map(self._score, others) if s is not None), default=None)
        if mine is None or best is None or mine >= self.ratio * best:
            return ""
        return f"hopeless at {self.at:.0%}: first token {mine:.3f}, the best run had {best:.3f}"

    def _score(self, run: RunResults) -> float | None:
        """Of the first logged row at or after the point of decision."""
        for row in run.rows:
            if row["epoch"] >= self.at * run.config["epochs"]:
                return mean_over_lms(row, run.lms, "first_token_top1")
        return None


@dataclass
class Job:
    """One point on its way through the queue."""

    name: str
    state: str = WAITING
    tries: int = 0
    error: str = ""
    device: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in (FINISHED, FAILED, STOPPED, INTERRUPTED)


class Queue:
    """Runs jobs until all are over. `on_change` is called after every change and every check."""

    def __init__(
        self,
        sweep: Sweep,
        jobs: Sequence[Job],
        devices: Sequence[str],
        *,
        rule: StopRule | None = None,
        on_change: Callable[[Sequence[Job]], None] = lambda _jobs: None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`devices` as Worker takes them; `command` starts a worker."""
        self.sweep, self.jobs, self.devices = sweep, jobs, devices
        self.rule, self.on_change, self.command = rule or StopRule(), on_change, command
        self.workers: dict[str, Worker] = {}
        """By device: those that train, and those that have LMs in memory for the next point."""

    def run(self) -> None:
        """Works until nothing is left.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the running points have saved themselves.
        """
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._work()
            self._close_all()
        except BaseException:
            self._stop_all()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _work(self) -> None:
        checked = 0.0
        while not all(job.over for job in self.jobs):
            changed = self._start_some()
            for job in self._running():
                changed |= self._poll(job)
            if time.monotonic() - checked > CHECK_SECONDS:
                checked, changed = time.monotonic(), True
                self._stop_hopeless()
            if changed:
                self.on_change(self.jobs)
            time.sleep(POLL_SECONDS)

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == RUNNING]

    def _start_some(self) -> bool:
        taken = {job.device for job in self._running()}
        free = [device for device in self.devices if device not in taken]
        waiting = [job for job in self.jobs if job.state == WAITING]
        for job, device in zip(waiting, free, strict=False):
            self._start(job, device)
        return bool(free and waiting)

    def _start(self, job: Job, device: str) -> None:
        run_dir = self.sweep.run_dir(job.name)
        flags = ["--preset", str(self.sweep.preset(job.name)), "--run_dir", str(run_dir)]
        flags += ["--device", "cpu" if device == "cpu" else "cuda"]
        if (run_dir / "latest").exists():
            flags.append("--resume")
        elif run_dir.exists():
            flags.append("--overwrite")  # a start that came to no checkpoint
        job.state, job.device, job.error, job.tries = RUNNING, device, "", job.tries + 1
        log = self.sweep.log(job.name)
        worker = self.workers.get(device)
        if worker is None or not worker.alive:
            worker = self.workers[device] = Worker(device, log, self.command)
        worker.start(log, flags)

    def _poll(self, job: Job) -> bool:
        code = self.workers[job.device].poll()
        if code is None:
            return False
        if code:
            self.workers.pop(job.device).close()
        results = self.sweep.results(job.name)
        if code == 0 and results is not None and results.finished:
            job.state, job.error = FINISHED, ""
        elif job.error:  # it was told to stop, and why
            job.state = STOPPED
        else:
            job.error = self._last_words(job, code)
            job.state = WAITING if job.tries < TRIES else FAILED
        return True

    def _last_words(self, job: Job, code: int) -> str:
        text = self.sweep.log(job.name).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"{ended}: {lines[-1][:300]}" if lines else ended

    def _stop_hopeless(self) -> None:
        if not self.rule.ratio:
            return
        all_runs = {name: self.sweep.results(name) for name in self.sweep.points}
        known = {name: run for name, run in all_runs.items() if run is not None}
        for job in self._running():
            if job.error or job.name not in known:
                continue
            others = [run for name, run in known.items() if name != job.name]
            job.error = self.rule.hopeless(known[job.name], others)
            if job.error:
                self.workers[job.device].interrupt()

    def _stop_all(self) -> None:
        """Asks all running points to save and stop; a second Ctrl-C kills them."""
        for job in self._running():
            self.workers[job.device].interrupt()
        try:
            self._close_all()
        except KeyboardInterrupt:
            self._close_all(kill=True)
        for job in self._running():
            job.state = INTERRUPTED
        self.on_change(self.jobs)

    def _close_all(self, *, kill: bool = False) -> None:
        for worker in self.workers.values():
            worker.close(kill=kill)
        self.workers.clear()


def visible_devices(choice: str) -> list[str]:
    """GPUs that this process may use, one run each; one CPU where there is none."""
    if choice == "cpu":
        return ["cpu"]
    import torch

    count = torch.cuda.device_count()
    if not count:
        return ["cpu"] if choice == "auto" else []
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if any(named) else [str(i) for i in range(count)]


def new_jobs(sweep: Sweep, states: Mapping[str, Mapping[str, Any]], *, again: bool) -> list[Job]:
    """A job per point; finished ones are over already, stopped ones too unless `again`."""
    jobs = []
    for name in sweep.points:
        results, state = sweep.results(name), states.get(name, {})
        if results is not None and results.finished:
            jobs.append(Job(name=name, state=FINISHED))
        elif state.get("state") == STOPPED and not again:
            jobs.append(Job(name=name, state=STOPPED, error=state.get("error", "")))
        else:
            jobs.append(Job(name=name))
    return jobs
