"""Kills a process at every step of a save, one after the other; run by tests/test_checkpoint.py.

    python tests/checkpoint_killer.py FOLDER

Each child inherits a run with two checkpoints, saves a third, saves it again (which replaces it)
and prunes; just before its n-th change to the disk, or in the middle of a file, it is gone. The
parent then does what a restarted training does. Prints the number of points, and raises if one of
them lost anything.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lw_fast import checkpoint  # noqa: E402


def save(run: Path, step: int, name: str = "", keep_last: int = 2, spare: list[str] = ()) -> None:
    """A checkpoint all of whose content says which step it is from."""
    weights = torch.full((64,), float(step))
    checkpoint.save(
        run,
        name or f"epoch{step}",
        encoder={"weight": weights},
        adapters={"llama": {"weight": weights}, "qwen": {"weight": weights}},
        optimizer={"step": step, "moments": {"encoder.weight": {"exp_avg": weights}}},
        progress={"epoch": step, "global_step": step},
        config={"lr": 1.0},
        keep_last=keep_last,
        spare=spare,
    )


def step_of(path: Path) -> int:
    """The step a checkpoint is from, after checking that all of it is from the same one."""
    loaded = checkpoint.load(path)
    tensors = [loaded.encoder, *loaded.adapters.values()]
    steps = {float(state["weight"].mean()) for state in tensors}
    steps |= {float(loaded.optimizer["step"]), float(loaded.progress["global_step"])}
    assert len(steps) == 1 and len(loaded.adapters) == 2, (path, steps)
    return int(steps.pop())


def die_at(point: int) -> None:
    """Arranges SIGKILL just before the point-th change to the disk, or half way through it."""
    count = 0

    def due() -> bool:
        nonlocal count
        count += 1
        return count > point

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function):
        def wrapper(*args, **kwargs):
            if due():
                kill()
            return function(*args, **kwargs)

        return wrapper

    def write_synced(path: Path, data: bytes) -> None:
        if due():
            path.write_bytes(data[: len(data) // 2])
            kill()
        write(path, data)

    write = checkpoint._write_synced
    checkpoint._write_synced = write_synced
    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def child(run: Path, point: int) -> None:
    die_at(point)
    save(run, 3)
    save(run, 4, name="epoch3")
    os._exit(0)


def survives(run: Path, point: int) -> bool:
    """One child; whether it was killed."""
    shutil.rmtree(run, ignore_errors=True)
    save(run, 1)
    save(run, 2)
    pid = os.fork()
    if pid == 0:
        child(run, point)
    _, status = os.waitpid(pid, 0)
    found = step_of(checkpoint.latest(run))
    assert found >= 2, f"point {point}: step {found} is older than the last complete checkpoint"
    save(run, found + 1)
    assert step_of(checkpoint.latest(run)) == found + 1, point
    hidden = [p.name for p in run.iterdir() if p.name.startswith((".partial", ".old"))]
    assert not hidden, (point, hidden)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0 and found == 4
    return os.WIFSIGNALED(status)


def main() -> None:
    run = Path(sys.argv[1]) / "run"
    point = 0
    while survives(run, point):
        point += 1
    print(f"killed at {point} points")


if __name__ == "__main__":
    main()
