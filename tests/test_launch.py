"""The real commands, as a user types them: each launcher trains the same, to rounding."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lw_fast import checkpoint

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENV = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
ENV |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ENV |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

# The preset nano, made small; no dropout there, so that ranks draw none apart.
SETTINGS = """
--samples 32 --eval_samples 8 --batch_size 8 --epochs 1 --log_every 1 --save_every 2
--warmup_steps 2 --latent_len 4 --d_z 16 --encoder_dim 16 --encoder_layers 1 --encoder_heads 2
--adapter_dim 16 --max_new_tokens 3 --kinds latent,text --device cpu
""".split()
STEPS = 4


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def commands() -> dict[str, list[str]]:
    """What stands before `launch/train.py`, and the flags that belong to it."""
    zero2 = ["--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    train = str(ROOT / "launch" / "train.py")
    deepspeed = ["deepspeed", "--master_port", free_port()]
    return {
        "plain": [sys.executable, train],
        "deepspeed": [*deepspeed, train, *zero2],
        "deepspeed 2": [*deepspeed, "--num_gpus", "2", train, *zero2],
        "torchrun 2": ["torchrun", "--standalone", "--nproc_per_node", "2", train],
    }


def launch(command: list[str], run_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    """Runs a training from another folder than the repository's."""
    command = [*command, "--run_dir", str(run_dir), *flags]
    done = subprocess.run(
        command, env=ENV, capture_output=True, text=True, timeout=200, cwd=run_dir.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").open()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, subprocess.CompletedProcess]]:
    here = tmp_path_factory.mktemp("launch")
    done = {}
    for name, command in commands().items():
        run_dir = here / name.replace(" ", "_")
        done[name] = (run_dir, launch(command, run_dir, *SETTINGS))
    return done


@pytest.mark.parametrize("name", list(commands()))
def test_every_launcher_trains_the_same(runs, name):
    """Losses of each step to 3e-6 (ranks add up in another order), and the same numbers beside
    them; once per run, not per rank."""
    expected, rows = log_of(runs["plain"][0]), log_of(runs[name][0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for mine, theirs in zip(rows, expected, strict=True):
        for key in ("loss", "span_loss", "llama/nll_token", "qwen/nll_token"):
            assert mine[key] == pytest.approx(theirs[key], rel=3e-6, abs=1e-6), (name, key)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["lr_factor"] == theirs["lr_factor"]
        assert mine["llama/first_token_top5"] == theirs["llama/first_token_top5"]


@pytest.mark.parametrize("name", list(commands()))
def test_every_launcher_writes_the_same_folder(runs, name):
    run_dir, plain = runs[name][0], runs["plain"][0]

    def files(folder: Path) -> set[str]:
        every = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {file for file in every if not file.startswith("tensorboard")}

    assert files(run_dir) == files(plain)
    a, b = (checkpoint.load(folder / "epoch1") for folder in (run_dir, plain))
    # All weights together: AdamW carries the rounding of a bias without influence (span.bias) far.
    norm = sum(tensor.square().sum() for tensor in b.encoder.values()) ** 0.5
    apart = sum((a.encoder[key] - t).square().sum() for key, t in b.encoder.items()) ** 0.5
    assert apart < 1e-3 * norm
    for lm, stats in b.stats.items():  # over all ranks
        assert a.stats[lm] == pytest.approx(stats, rel=1e-5)
    metrics = [
        json.loads((f / "eval_epoch1" / "metrics.json").read_text()) for f in (run_dir, plain)
    ]
    for kind in ("latent", "text"):
        for lm in ("llama", "qwen"):
            mine, theirs = (m[kind][lm]["nll_token"] for m in metrics)
            assert mine == pytest.approx(theirs, rel=1e-4)


def test_the_end_of_a_run_is_a_table(runs):
    """Both LMs and every kind that ran, once, and where it all lies."""
    for name, (run_dir, done) in runs.items():
        assert done.stdout.count("FirstTok@5") == 1, name
        for words in (("llama", "text"), ("qwen", "latent")):
            assert any(all(w in line for w in words) for line in done.stdout.splitlines()), name
        assert done.stdout.count(f"run folder: {run_dir}") == 1, name
        assert "Traceback" not in done.stderr + done.stdout


def test_no_compiler_runs(runs):
    """Neither DeepSpeed nor Triton builds anything on the way."""
    for name, (_, done) in runs.items():
        for word in ("ninja", "Building extension", "g++", "nvcc"):
            assert word not in done.stdout + done.stderr, name


def test_two_processes_resume(runs, tmp_path):
    """From the middle of the epoch, as after a crash; its statistics are those of both ranks."""
    whole, parts = runs["torchrun 2"][0], tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "epoch1")
    shutil.rmtree(parts / "eval_epoch1")
    done = launch(commands()["torchrun 2"], parts, "--resume", "--device", "cpu")
    assert "step2 at step 2" in done.stderr
    for mine, theirs in zip(log_of(parts), log_of(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    stats = [checkpoint.load(folder / "epoch1").stats for folder in (parts, whole)]
    assert stats[0]["qwen"] == pytest.approx(stats[1]["qwen"], rel=1e-6)
    assert stats[0]["qwen"]["count"] == 32


def test_evaluating_a_run(runs, tmp_path):
    """launch/eval.py gives the numbers of the run's own evaluation."""
    run_dir = runs["plain"][0]
    command = [sys.executable, str(ROOT / "launch" / "eval.py"), "--ckpt", str(run_dir)]
    command += ["--out_dir", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100, cwd="/")
    assert done.returncode == 0, done.stderr
    a, b = (
        (folder / "predictions.jsonl").read_bytes()
        for folder in (tmp_path / "out", run_dir / "eval_epoch1")
    )
    assert a == b
    assert "FirstTok@5" in done.stdout and f"written to {tmp_path / 'out'}" in done.stdout


def test_a_mistake_under_a_launcher(tmp_path):
    """Both ranks stop: no hang, no traceback of ours, the line once."""
    command = [*commands()["torchrun 2"], "--run_dir", str(tmp_path / "run"), "--latent_len", "0"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("error: latent_len must be greater than 0, got 0") >= 1
