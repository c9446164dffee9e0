"""A process that trains one point of a sweep after another, so that it loads the LMs once.

The queue writes one line per point into its stdin: a JSON list of a log file and the flags of
`train`. The worker prints into that file and answers with the exit status as a line on its stdout.
A status other than 0 is its own too: after a failure or a stop the next point gets a new process.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMMAND = (sys.executable, "-c", "from lw_fast.sweep_worker import main; main()")


class Worker:
    """The queue's end of it."""

    def __init__(self, device: str, log: Path, command: Sequence[str] = COMMAND) -> None:
        """`device`: `cpu`, or the number of a GPU as CUDA_VISIBLE_DEVICES takes it; `log`: where
        it prints before its first point."""
        with log.open("ab") as file:
            # Its own session: Ctrl-C reaches it through the queue, once.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=child_env(device),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it can take another point."""
        return self.process.poll() is None

    def start(self, log: Path, flags: Sequence[str]) -> None:
        """Hands it a point; the one before must have ended with status 0."""
        self.process.stdin.write(f"{json.dumps([str(log), *flags])}\n".encode())
        self.process.stdin.flush()

    def poll(self) -> int | None:
        """The point's exit status, negative for a signal that killed it; None while it runs."""
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return None
        answer = self.process.stdout.readline()
        return 0 if answer == b"0\n" else self.process.wait() or 1

    def interrupt(self) -> None:
        """Asks the point to save itself and stop."""
        self.process.send_signal(signal.SIGINT)

    def close(self, *, kill: bool = False) -> None:
        """Waits for its end, which comes by itself where no point runs."""
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def child_env(device: str) -> dict[str, str]:
    """The environment of a run: this process's modules, one GPU or none, no launcher's ranks."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    return env


Train = Callable[[Sequence[str]], int]
"""Flags of `train` -> exit status."""


def serve(load: Callable[[], Train]) -> None:
    """The worker's end: calls `load()`, then what it returned, once per point until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may go there, whatever prints
    train = load()
    for line in sys.stdin:
        log, *flags = json.loads(line)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = train(flags)
        sys.stdout.flush()
        if status:
            sys.exit(status)
        print(0, file=answers, flush=True)


def load() -> Train:
    """`train`, with LMs and sources that stay from point to point."""
    from lw_fast.cli import run, train_main
    from lw_fast.shared import Shared

    return functools.partial(run, functools.partial(train_main, shared=Shared()))


def main() -> None:
    """The process."""
    serve(load)
