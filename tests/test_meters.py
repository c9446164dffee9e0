"""Rates with a hand-made clock, FLOPs by hand, and the environment record."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from lw_fast import meters
from lw_fast.meters import LMCost, Meter, environment, max_over_ranks, mfu, peak_memory

CPU = torch.device("cpu")
COST = LMCost(layer_params=1000, hidden_size=8, vocab_size=100)


class Clock:
    """Time that passes only when told to; counts how often the device was waited for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits = 0

    def __call__(self) -> float:
        return self.now

    def wait(self) -> None:
        self.waits += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, **more) -> Meter:
    return Meter({"a": COST, "b": COST}, clock=clock, synchronize=clock.wait, **more)


def step(meter: Meter, clock: Clock, seconds: float, lms: str = "ab") -> None:
    meter.step(
        samples=4,
        source_bytes=3000,
        positions=dict.fromkeys(lms, 160),
        supervised_tokens=dict.fromkeys(lms, 20),
    )
    clock.now += seconds


def test_flops_of_a_frozen_lm_are_4n_per_position_and_4dv_per_row():
    assert COST.training_flops(160, 20) == 4 * 1000 * 160 + 4 * 8 * 100 * 20
    llama = LMCost(layer_params=6_979_588_096, hidden_size=4096, vocab_size=128256)
    assert llama.training_flops(64 * 40, 64 * 5) == pytest.approx(72.14e12, rel=1e-3)


def test_mfu_is_a_share_of_what_all_devices_could_do():
    assert mfu(6e14, 2.0, 1e15) == 0.3
    assert mfu(6e14, 2.0, 1e15, devices=3) == pytest.approx(0.1)
    assert mfu(6e14, 2.0, None) is None
    assert mfu(6e14, 0.0, 1e15) is None


def test_rates_are_named_by_what_they_count(clock):
    meter = make(clock, ceiling=1e6, devices=2)
    for _ in range(5):
        step(meter, clock, 0.5)
    flops = 5 * 2 * COST.training_flops(160, 20)
    assert meter.report() == {
        "samples/s": 8.0,
        "positions/s": 640.0,
        "supervised_tokens/s": 80.0,
        "source_bytes/s": 6000.0,
        "seconds_per_step": 0.5,
        "mfu": pytest.approx(flops / 2.5 / 2e6),
    }
    assert clock.waits == 1, "steps must not wait for the device"


def test_an_lm_that_sits_out_costs_nothing(clock):
    meter = make(clock, ceiling=1e6)
    step(meter, clock, 1.0, lms="a")
    report = meter.report()
    assert report["positions/s"] == 160
    assert report["mfu"] == pytest.approx(COST.training_flops(160, 20) / 1e6)


def test_each_report_starts_anew_and_overall_leaves_out_the_first(clock):
    meter = make(clock)
    step(meter, clock, 9.0)  # compilation
    assert meter.overall()["samples/s"] == pytest.approx(4 / 9), "nothing better is known yet"
    meter.report()
    step(meter, clock, 1.0)
    assert meter.report()["samples/s"] == 4.0
    step(meter, clock, 3.0)
    assert meter.overall()["samples/s"] == 2.0
    assert meter.report()["samples/s"] == pytest.approx(4 / 3)
    assert meter.overall()["samples/s"] == 2.0


def test_paused_time_does_not_count(clock):
    meter = make(clock)
    meter.report()
    step(meter, clock, 1.0)
    with meter.paused():
        clock.now += 50
    with pytest.raises(KeyError), meter.paused():
        clock.now += 50
        raise KeyError
    step(meter, clock, 1.0)
    assert meter.overall()["samples/s"] == 4.0
    assert meter.report()["samples/s"] == 4.0


def test_no_time_and_no_steps_give_no_rates(clock):
    report = make(clock).report()
    assert set(report.values()) == {None}


def test_memory_and_ceiling_are_unknown_on_a_cpu():
    meters.reset_peak_memory(CPU)
    assert peak_memory(CPU) == {"peak_gib": None, "peak_reserved_gib": None}
    assert meters.matmul_ceiling(CPU) is None


def test_max_over_ranks(tmp_path):
    values = {"peak_gib": 1.5, "peak_reserved_gib": None}
    assert max_over_ranks(values, CPU) == values
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert max_over_ranks(values, CPU) == values
    finally:
        torch.distributed.destroy_process_group()


def test_environment_is_a_json_record():
    record = environment()
    json.dumps(record)
    row = "torch triton transformers deepspeed device driver cores commit date".split()
    assert set(row) <= set(record)
    assert record["torch"] == torch.__version__ and record["device"] and record["cores"] >= 1
    assert meters._version("no-such-package") is None


def test_commit_of_a_checkout_and_of_an_installed_copy(monkeypatch, tmp_path):
    package = tmp_path / "repo" / "lw_fast"
    package.mkdir(parents=True)
    monkeypatch.setattr(meters, "__file__", str(package / "meters.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # inside a git hook they would name the outer repository
    assert meters._commit() is None

    def git(*words: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(("git", *identity, *words), cwd=package.parent, check=True)

    (package / "meters.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x", "--no-verify")
    commit = meters._commit()
    assert len(commit) == 40
    (package / "meters.py").write_text("2")
    assert meters._commit() == f"{commit}-dirty"


def test_commands_that_fail_print_nothing():
    assert meters._output("no-such-command") is None
    assert meters._output("false") is None
    assert meters._output("echo", " 1 ") == "1"


def test_driver_is_the_first_line(monkeypatch):
    monkeypatch.setattr(meters, "_output", lambda *_: "580.82\n580.82")
    assert meters._driver() == "580.82"


@pytest.mark.gpu
def test_ceiling_and_memory_of_a_gpu():
    device = torch.device("cuda", 0)
    meters.reset_peak_memory(device)
    ceiling = meters.matmul_ceiling(device)
    assert 1e13 < ceiling < 1e16
    peak = peak_memory(device)
    assert peak["peak_reserved_gib"] >= peak["peak_gib"] >= 3 * 2 * 8192**2 / meters.GIB
