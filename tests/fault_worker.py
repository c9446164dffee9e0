"""Runs launch/train.py as a process of its own, with a fault in it, and waits for it.

Processes are forks of a server that has imported everything once (multiprocessing's forkserver), so
that one costs a second instead of ten. What a fault patches is gone with its process.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from torch.utils import tensorboard  # noqa: F401

from lw_fast import checkpoint, model, run_folder, train, train_step
from lw_fast.model import LatentModel
from lw_fast.training_run import Run

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_context = multiprocessing.get_context("forkserver")


def _ensure_server() -> None:
    """Starts the server; it finds what to import through PYTHONPATH alone."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels"), before or ""]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    _context.set_forkserver_preload(["fault_worker"])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@dataclass
class Worker:
    """One process and what it prints."""

    process: multiprocessing.process.BaseProcess
    output: Path

    def wait(self, seconds: float = 60) -> int:
        """The exit code (minus the signal that killed it); raises if it hangs."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def said(self) -> str:
        """stdout and stderr so far."""
        return self.output.read_text() if self.output.exists() else ""


def start(argv: list[str], output: Path, env: dict[str, str] | None = None, **faults) -> Worker:
    """Starts one training; `faults` are arguments of the functions below, by name."""
    _ensure_server()
    process = _context.Process(target=_main, args=(argv, output, env or {}, faults))
    process.start()
    return Worker(process, output)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(argv: list[str], folder: Path, faults: dict[int, dict], size: int = 2) -> list:
    """One process per rank, as srun would start them: nobody watches over them."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start(
            argv,
            folder / f"rank{rank}.txt",
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **faults.get(rank, {}),
        )
        for rank in range(size)
    ]


def _main(argv: list[str], output: Path, env: dict[str, str], faults: dict) -> None:
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)
    for name, value in faults.items():
        FAULTS[name](value)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


# --------------------------------------------------------------------------------- faults


@dataclass
class _Clock:
    """Where in a run this process is."""

    run: Run | None = None
    step: int = 0
    events: list[tuple[str, int]] = field(default_factory=list)


clock = _Clock()


def _before_step(action: Callable[[], None]) -> None:
    """Runs `action` before every optimiser step, with `clock.step` set."""
    step_once = train.train_step

    def stepping(run):
        clock.run, clock.step = run, run.global_step
        action()
        return step_once(run)

    train.train_step = stepping


def _at_step(step: int, action: Callable[[], None]) -> None:
    """Runs `action` in the middle of a step: forward is done, backward is not, and what was to be
    saved is on the disk."""
    loss_once = train_step.step_loss

    def losing(*args):
        result = loss_once(*args)
        if clock.step == step:
            clock.run.saver.wait()
            action()
        return result

    _before_step(lambda: None)
    train_step.step_loss = losing


def _every_event(action: Callable[[str, Callable[[], None]], None]) -> None:
    """Calls action(kind, half) before each micro-batch and each change to the disk; `half` leaves
    half of that change behind. Saves happen in a thread of their own; one event at a time."""
    one_at_a_time = threading.RLock()

    def watch(owner, name: str, kind: str, half: Callable[..., None] = lambda *_: None) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            with one_at_a_time:
                action(kind, lambda: half(*args))
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def half_row(run_dir: Path, row: dict) -> None:
        with (run_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(row)[:20])

    def half_file(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])

    _before_step(lambda: None)
    watch(train_step, "step_loss", "step")
    watch(run_folder, "append_row", "step", half_row)
    watch(train, "evaluate", "evaluation")
    watch(
        checkpoint, "_write_synced", "save", lambda p, data: p.write_bytes(data[: len(data) // 2])
    )
    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        watch(os, name, "save")


def count(path: Path) -> None:
    """Writes the events of the run to `path`: [kind, step] each."""

    def note(kind: str, _half) -> None:
        clock.events.append((kind, clock.step))
        path.write_text(json.dumps(clock.events))

    _every_event(note)


def kill_at_event(event: tuple[str, int]) -> None:
    """SIGKILL in the middle of the n-th event of a kind; says in which step."""
    wanted, number = event
    seen = iter(range(number))

    def die(kind: str, half: Callable[[], None]) -> None:
        if kind == wanted and next(seen, None) is None:
            half()
            os.write(1, f"killed at step {clock.step}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    _every_event(die)


def kill_in_step(step: int) -> None:
    """SIGKILL between forward and backward."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop_in_step(step: int) -> None:
    """SIGSTOP: the process is there but does nothing more."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def nan_in_step(step: int) -> None:
    """This rank's loss of one step is NaN."""
    loss_once = train_step.step_loss

    def losing(*args):
        loss, sums = loss_once(*args)
        return (loss * math.nan if clock.step == step else loss), sums

    _before_step(lambda: None)
    train_step.step_loss = losing


def full_disk_in_step(step: int) -> None:
    """From this step on no file can grow beyond 8 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))


def linger(seconds: float) -> None:
    """Every step takes this much longer."""
    _before_step(lambda: time.sleep(seconds))


def record(path: Path) -> None:
    """Appends [step, example indices] of every micro-batch of this rank to `path`."""
    batch_once, step_once = LatentModel.batch, train.train_step

    def batching(self, table, index, *args):
        with path.open("a") as file:
            file.write(json.dumps([clock.step, index.tolist()]) + "\n")
        return batch_once(self, table, index, *args)

    def stepping(run):
        clock.step = run.global_step
        LatentModel.batch = batching
        try:
            return step_once(run)
        finally:
            LatentModel.batch = batch_once

    train.train_step = stepping


def note_residents(path: Path) -> None:
    """Writes to `path`, after the first step, the bytes of each LM that this process holds."""

    def bytes_of(lm) -> int:
        kept = [getattr(p, "ds_tensor", p) for p in lm.model.parameters()]
        gathered = [p for p in lm.model.parameters() if hasattr(p, "ds_tensor")]
        return sum(t.numel() * t.element_size() for t in (*kept, *gathered))

    def noting() -> None:
        if clock.run.global_step == 1:
            lms = clock.run.model.lms
            layers = {name: lm.num_layer_parameters for name, lm in lms.items()}
            resident = {name: bytes_of(lm) for name, lm in lms.items()}
            path.write_text(json.dumps({"layers": layers, "resident": resident}))

    _before_step(noting)


def note_loads(path: Path) -> None:
    """Writes the names of the LMs whose weights were loaded to `path`."""
    load_once, names = model.load_frozen_lm, []

    def loading(name, *args):
        names.append(name)
        path.write_text(json.dumps(names))
        return load_once(name, *args)

    model.load_frozen_lm = loading


FAULTS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        count, kill_at_event, kill_in_step, stop_in_step, nan_in_step, full_disk_in_step, linger,
        record, note_loads, note_residents,
    )
}  # fmt: skip
