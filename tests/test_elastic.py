"""Runs that go on with another number of processes, or on another number of nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fault_worker
import pytest
from test_faults import STEPS, losses, new, resume, train

ROOT = Path(__file__).parents[1]
QUESTIONS, BATCH = 32, 8
KILLED = 5
"""In the middle of the second epoch; the newest checkpoint is that of step 4."""


def indices(folder: Path, pattern: str) -> dict[int, list[int]]:
    """Example indices that each step worked on, over all micro-batches and ranks."""
    steps: dict[int, list[int]] = {}
    for path in sorted(folder.glob(pattern)):
        for line in path.open():
            step, index = json.loads(line)
            steps.setdefault(step, []).extend(index)
    return {step: sorted(index) for step, index in sorted(steps.items())}


def run_on(size: int, argv: list[str], folder: Path, name: str, **faults) -> list[int]:
    """Exit codes of a training on `size` processes; each records to NAME-RANK.jsonl."""
    folder.joinpath(name).mkdir()
    each = {rank: {"record": folder / f"{name}-{rank}.jsonl", **faults} for rank in range(size)}
    if size == 1:
        return [fault_worker.start(argv, folder / name / "said.txt", **each[0]).wait()]
    return [w.wait() for w in fault_worker.start_ranks(argv, folder / name, each, size)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    """A whole training on one process, and the folder of what it recorded."""
    here = tmp_path_factory.mktemp("elastic")
    train(new(here / "run"), here / "said.txt", record=here / "whole-0.jsonl")
    return here / "run", here


def test_the_reference_sees_each_question_once_per_epoch(reference):
    steps = indices(reference[1], "whole-*")
    assert list(steps) == list(range(STEPS))
    for epoch in (range(4), range(4, 8)):
        assert sorted(i for step in epoch for i in steps[step]) == list(range(QUESTIONS))


ZERO2 = ["--ds_config", str(ROOT / "ds_configs" / "zero2.json")]


@pytest.mark.parametrize(
    ("before", "after", "engine"),
    [
        (2, 1, []),
        (1, 2, []),
        pytest.param(1, 1, [], marks=pytest.mark.slow),
        pytest.param(2, 1, ZERO2, marks=pytest.mark.slow, id="2-1-zero2"),
    ],
)
def test_resume_with_another_world_size(reference, tmp_path, before, after, engine):
    """The global batch stays: the same questions in each step, none skipped or repeated, and the
    same curve. Killed in the middle of an epoch; resumed without DeepSpeed."""
    run_dir = tmp_path / "run"
    killed = run_on(before, new(run_dir, *engine), tmp_path, "before", kill_in_step=KILLED)
    assert killed == [-signal.SIGKILL] * before
    assert run_on(after, resume(run_dir), tmp_path, "after") == [0] * after
    first, second = (indices(tmp_path, f"{name}-*") for name in ("before", "after"))
    assert list(second) == list(range(4, STEPS))
    done = {step: index for step, index in first.items() if step < 4} | second
    assert done == indices(reference[1], "whole-*")
    expected = losses(reference[0])
    assert [step for step, _ in losses(run_dir)] == [step for step, _ in expected]
    for (_, mine), (_, theirs) in zip(losses(run_dir), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_the_teacher_is_the_same_on_any_number_of_processes(tmp_path):
    """KL to the text-prompted LM (kl_weight): the same curve on one process and on two."""
    curves = []
    for size in (1, 2):
        argv = new(tmp_path / f"run{size}", "--kl_weight", "1", "--epochs", "1")
        assert run_on(size, argv, tmp_path, f"on{size}") == [0] * size
        rows = [json.loads(line) for line in (tmp_path / f"run{size}" / "log.jsonl").open()]
        curves.append([[row["loss"], row["llama/kl"], row["qwen/kl"]] for row in rows])
    assert len(curves[0]) == len(curves[1]) > 1
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=1e-5) and min(one) > 0


def test_a_world_that_does_not_divide_the_batch(tmp_path):
    """Refused in one line on every rank."""
    argv = new(tmp_path / "run", "--batch_size", "9")
    ranks = fault_worker.start_ranks(argv, tmp_path, {})
    assert [rank.wait() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "error: batch_size 9 cannot be divided among 2 devices" in rank.said


def test_two_nodes(reference, tmp_path):
    """Two machines as torchrun sees them (here both are this one) meet and train one run."""
    env = {k: v for k, v in os.environ.items() if k not in fault_worker.LAUNCHER}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    endpoint = f"127.0.0.1:{fault_worker.free_port()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    launcher += ["--rdzv_id", "lw", str(ROOT / "launch" / "train.py")]
    said = [(tmp_path / f"node{node}.txt").open("w+") for node in range(2)]
    nodes = [
        subprocess.Popen([*launcher, *new(tmp_path / "run")], env=env, stdout=out, stderr=out)
        for out in said
    ]
    try:
        codes = [node.wait(120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    texts = [Path(out.name).read_text() for out in said]
    assert codes == [0, 0], texts
    assert "".join(texts).count("PlainEngine on 2 x cpu") == 1
    for (_, mine), (_, theirs) in zip(losses(tmp_path / "run"), losses(reference[0]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
