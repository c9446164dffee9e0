"""Faults that really happen to launch/train.py: it is killed, stopped, starved and lied to, and
goes on from the newest complete checkpoint to the same result, bit by bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import fault_worker
import pytest

from lw_fast import checkpoint

# The preset nano, made small: 8 steps, a checkpoint after every second one.
SETTINGS = """
--samples 32 --eval_samples 2 --batch_size 8 --micro_batch_size 4 --epochs 2 --log_every 1
--save_every 2 --warmup_steps 2 --latent_len 4 --d_z 16 --encoder_dim 16 --encoder_layers 1
--encoder_heads 2 --adapter_dim 16 --max_new_tokens 2 --kinds latent
""".split()
CPU = ["--device", "cpu"]
STEPS, SAVE_EVERY = 8, 2
GRACE = 20
"""Seconds; launchers wait 30 between SIGTERM and SIGKILL."""


def new(run_dir: Path, *flags: str) -> list[str]:
    return [*SETTINGS, *CPU, "--run_dir", str(run_dir), *flags]


def resume(run_dir: Path) -> list[str]:
    return [*CPU, "--run_dir", str(run_dir), "--resume"]


def train(argv: list[str], output: Path, **faults) -> str:
    """One training that goes well; what it says."""
    worker = fault_worker.start(argv, output, **faults)
    assert worker.wait() == 0, worker.said
    return worker.said


def losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").open()]
    return [(row["step"], row["loss"]) for row in rows]


def result(run_dir: Path) -> tuple:
    """What a run amounts to: its curve, the checksums of its weights, and that it was evaluated."""
    files = json.loads((run_dir / "epoch2" / "manifest.json").read_text())["files"]
    del files["state.pt"]  # equal values, pickled in another order
    return losses(run_dir), files, (run_dir / "eval_epoch2" / "metrics.json").exists()


def has_checkpoint(run_dir: Path) -> bool:
    return any(run_dir.glob("[!.]*/manifest.json"))


def wait_for_rows(run_dir: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "log.jsonl").exists() or len(losses(run_dir)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, list[tuple[str, int]]]:
    """A training that nothing happens to, and its events."""
    here = tmp_path_factory.mktemp("reference")
    train(new(here / "run"), here / "said.txt", count=here / "events.json")
    return here / "run", json.loads((here / "events.json").read_text())


@pytest.fixture
def said(tmp_path) -> Path:
    return tmp_path / "said.txt"


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("points", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_anywhere(reference, tmp_path, points):
    """In the middle of steps, of rows of the log, of saves and of their pruning, by turns."""
    whole, events = reference
    draw, lost = random.Random(points), []
    for point in range(points):
        kind = ("save", "step", "save", "step", "evaluation")[point % 5]
        event = kind, draw.randrange(sum(event[0] == kind for event in events))
        run_dir, output = tmp_path / f"run{point}", tmp_path / f"said{point}.txt"
        worker = fault_worker.start(new(run_dir), output, kill_at_event=event)
        assert worker.wait() == -signal.SIGKILL, worker.said
        reached = int(re.search(r"killed at step (\d+)", worker.said)[1]) + (kind != "step")
        if has_checkpoint(run_dir):
            found = checkpoint.load(checkpoint.latest(run_dir)).progress["global_step"]
            if (run_dir / "eval_epoch2" / "metrics.json").exists():  # all was done by then
                worker = fault_worker.start(resume(run_dir), output)
                assert worker.wait() == 2 and "nothing to resume" in worker.said
                assert (run_dir / "best").read_text() == "epoch2\n"
            else:
                assert f"at step {found}" in train(resume(run_dir), output)
        else:  # nothing was saved yet
            found = 0
            train(new(run_dir, *["--overwrite"] * run_dir.joinpath("log.jsonl").exists()), output)
        assert result(run_dir) == result(whole), event
        assert not list(run_dir.glob(".partial*")) + list(run_dir.glob(".old*"))
        lost.append(max(0, reached - found))
        shutil.rmtree(run_dir)
    print(
        f"killed {points} times, recovered {len(lost)}; steps lost: {sum(lost)}, {max(lost)} most"
    )
    # Saves are in the background: the one before may not have been on the disk yet.
    assert max(lost) <= 2 * SAVE_EVERY


def test_killed_again_while_resuming(reference, tmp_path, said):
    """Before and after the settings of the resumed run are on the disk again."""
    whole, events = reference
    run_dir = tmp_path / "run"
    middle = sum(kind == "step" for kind, _ in events[: events.index(["step", 5])])
    kills = (new(run_dir), ("step", middle)), (resume(run_dir), ("save", 0))
    for argv, event in (*kills, (resume(run_dir), ("save", 3))):
        worker = fault_worker.start(argv, said, kill_at_event=event)
        assert worker.wait() == -signal.SIGKILL, worker.said
    train(resume(run_dir), said)
    assert result(run_dir) == result(whole)


def test_a_corrupted_newest_checkpoint(reference, tmp_path, said):
    """One bit: the one before is taken, and the log says what is wrong."""
    run_dir = Path(shutil.copytree(reference[0], tmp_path / "run"))
    path = run_dir / "epoch2" / "adapter_qwen.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    words = train(resume(run_dir), said)
    assert f"skipping a damaged checkpoint: {path} is damaged" in words
    assert "step6 at step 6" in words
    assert result(run_dir) == result(reference[0])


def test_a_full_disk(reference, tmp_path, said):
    """One line, the checkpoints before it are intact, and the run goes on once there is room."""
    run_dir = tmp_path / "run"
    worker = fault_worker.start(new(run_dir), said, full_disk_in_step=4)
    assert worker.wait() == 2
    assert worker.said.splitlines()[-1].startswith("error: could not save checkpoint")
    assert "Traceback" not in worker.said
    assert checkpoint.latest(run_dir).name == "epoch1"
    train(resume(run_dir), said)
    assert result(run_dir) == result(reference[0])


def test_a_second_process_on_one_run(reference, tmp_path, said):
    """It refuses, whatever it was asked to do, and the first notices nothing."""
    run_dir = tmp_path / "run"
    first = fault_worker.start(new(run_dir), said, linger=0.2)
    wait_for_rows(run_dir, 2)
    for argv in (new(run_dir), new(run_dir, "--overwrite"), resume(run_dir)):
        second = fault_worker.start(argv, tmp_path / "second.txt")
        assert second.wait() == 2
        assert f"is in use by another process (pid {first.process.pid} on " in second.said
    assert first.wait() == 0
    assert result(run_dir) == result(reference[0])


# ------------------------------------------------------------------------------- two processes


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_rank(tmp_path, asked):
    """All ranks stop within the grace period, saved where they are."""
    run_dir = tmp_path / "run"
    ranks = fault_worker.start_ranks(new(run_dir), tmp_path, {0: {"linger": 0.2}})
    wait_for_rows(run_dir, 3)
    ranks[asked].signal(signal.SIGTERM)
    assert [rank.wait(GRACE) for rank in ranks] == [130, 130], ranks[0].said + ranks[1].said
    step = losses(run_dir)[-1][0]
    assert 3 <= step < STEPS
    assert f"stopped after step {step}; --resume continues" in ranks[0].said
    assert checkpoint.load(checkpoint.latest(run_dir)).progress["global_step"] == step


def test_nan_in_one_rank(tmp_path):
    """Both see it one step later and stop, with the weights from before it."""
    run_dir = tmp_path / "run"
    ranks = fault_worker.start_ranks(new(run_dir), tmp_path, {1: {"nan_in_step": 5}})
    assert [rank.wait(30) for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "error: the loss or its gradient is not finite near step 7" in rank.said
        assert "Traceback" not in rank.said
    assert checkpoint.latest(run_dir).name == "epoch1"
    assert [step for step, _ in losses(run_dir)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("gone", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_is_killed(tmp_path, gone):
    """The other one ends at once, in one line (tests/test_elastic.py resumes on one process)."""
    run_dir = tmp_path / "run"
    ranks = fault_worker.start_ranks(new(run_dir), tmp_path, {gone: {"kill_in_step": 5}})
    left = ranks[1 - gone]
    assert ranks[gone].wait() == -signal.SIGKILL
    assert left.wait(30) == 2, left.said
    assert "error: lost contact with another process" in left.said
    assert "Traceback" not in left.said
    assert checkpoint.latest(run_dir).name == "epoch1"


def test_a_rank_hangs(tmp_path):
    """The other one waits as long as it was told to, and no longer."""
    run_dir = tmp_path / "run"
    argv = new(run_dir, "--timeout_seconds", "3")
    ranks = fault_worker.start_ranks(argv, tmp_path, {1: {"stop_in_step": 5}})
    try:
        assert ranks[0].wait(40) == 2, ranks[0].said
    finally:
        ranks[1].process.kill()
    assert "error: lost contact with another process" in ranks[0].said
    assert "Traceback" not in ranks[0].said
    assert checkpoint.latest(run_dir).name == "epoch1"


@pytest.mark.parametrize("came", [0, 1])
def test_a_rank_never_comes(tmp_path, came):
    """Nobody waits for it longer than told to."""
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": fault_worker.free_port(),
    }
    env = {**shared, "RANK": str(came), "LOCAL_RANK": str(came)}
    argv = new(tmp_path / "run", "--timeout_seconds", "2")
    rank = fault_worker.start(argv, tmp_path / "said.txt", env)
    assert rank.wait(30) == 2, rank.said
    assert "error: the 2 processes did not meet at 127.0.0.1:" in rank.said
    assert "Traceback" not in rank.said


def test_a_full_disk_on_two_ranks(tmp_path):
    """Rank 0, which writes, says what is wrong; the other one does not wait for it."""
    run_dir = tmp_path / "run"
    ranks = fault_worker.start_ranks(new(run_dir), tmp_path, {0: {"full_disk_in_step": 4}})
    assert [rank.wait(30) for rank in ranks] == [2, 2]
    assert "error: could not save checkpoint" in ranks[0].said
    assert "error: lost contact with another process" in ranks[1].said
    assert checkpoint.latest(run_dir).name == "epoch1"
