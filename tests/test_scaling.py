"""benchmarks/scaling.py: two processes on the nano pair, and cases that do not come through."""

from __future__ import annotations

import sys

import pytest

from benchmarks import scaling, scaling_worker
from benchmarks.rows import read_rows
from benchmarks.steps import Timing, Work
from lw_fast.cli import run

SMALL = "--device cpu --gpus 2 --steps 2 --warm_up 1 --samples 32 --batch_size 4".split()


def bench(out, *flags: str) -> tuple[int, dict[str, dict[str, dict]]]:
    """The exit status, and the rows by case and metric."""
    status = run(scaling.main, [*SMALL, *flags, "--out", str(out)])
    found: dict[str, dict[str, dict]] = {}
    for row in read_rows(out):
        found.setdefault(row["case"], {})[row["metric"]] = row
    return status, found


def test_one_and_two_processes(tmp_path):
    status, found = bench(tmp_path / "a.csv", "--engines", "plain", "--scalings", "weak")
    assert status == 0
    words = "pair=nano engine=plain gpus=0 processes={} batch={} encoder=byte_seed"
    one, two = found[words.format(1, 4)], found[words.format(2, 8) + " scaling=weak"]
    assert one.keys() == {"samples/s", "seconds", "first_step_seconds"}
    for metrics, batch in ((one, 4), (two, 8)):
        assert metrics["seconds"]["n"] == 2
        assert metrics["samples/s"]["value"] * metrics["seconds"]["value"] == pytest.approx(
            batch, rel=0.5
        )
        assert metrics["seconds"]["config"]["settings"]["batch_size"] == batch
    expected = two["samples/s"]["value"] / (2 * one["samples/s"]["value"])
    assert two["weak_efficiency"]["value"] == pytest.approx(expected, rel=1e-4)


def test_cases():
    order = list(scaling.cases(4, 64, ["plain", "zero2"], ["weak", "strong"]))
    assert order == [
        scaling.Case("plain", 1, 64),
        scaling.Case("plain", 4, 256, "weak"),
        scaling.Case("zero2", 4, 256, "weak"),
        scaling.Case("plain", 4, 64, "strong"),
        scaling.Case("zero2", 4, 64, "strong"),
    ]


def test_ranks_are_joined():
    def timing(seconds, peak):
        return Timing(seconds[0], seconds, [Work(8, {}, {})] * 2, peak)

    found = scaling_worker.over_ranks([timing([1.0, 4.0], 3.0), timing([2.0, 3.0], 5.0)])
    assert found == {
        "seconds": [2.0, 4.0], "samples": [8, 8], "first_step_seconds": 2.0, "peak_gib": 5.0,
    }  # fmt: skip


STUB = """
import json, sys, time
case = json.load(open(sys.argv[-2]))
if case["ds_config"] == "zero2":
    sys.exit("[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
if case["ds_config"] == "zero3":
    time.sleep(60)
if case["settings"].get("lm_parallel"):
    print("[rank0]: ValueError: no file /somewhere/x.json")
    sys.exit("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: no")
seconds = [1.0, 2.0, 4.0]
found = {"seconds": seconds, "samples": [case["settings"]["batch_size"]] * 3}
found |= {"first_step_seconds": 9.0, "peak_gib": 7.5, "device": "a card"}
json.dump(found, open(sys.argv[-1], "w"))
"""


@pytest.fixture
def stub(monkeypatch):
    """Stands in for torchrun."""
    monkeypatch.setattr(scaling, "torchrun", lambda processes: [sys.executable, "-c", STUB])


def test_a_case_that_fails_leaves_a_row_and_the_next_one_starts(stub, tmp_path, capsys):
    status, found = bench(tmp_path / "a.csv", "--scalings", "strong", "--case_seconds", "2")
    assert status == 2 and "3 cases failed" in capsys.readouterr().err
    by_engine = {case.split()[1]: metrics for case, metrics in found.items() if "scaling" in case}
    strong = by_engine["engine=plain"]
    assert strong["strong_efficiency"]["value"] == pytest.approx(0.5)  # the same time on two
    assert strong["samples/s"]["value"] == pytest.approx(2.0)
    assert strong["peak_gib"]["value"] == 7.5 and strong["peak_gib"]["device"] == "a card"
    assert list(by_engine["engine=zero2"]) == ["out_of_memory"]
    failed = {
        engine: by_engine[f"engine={engine}"]["failed"] for engine in ("zero3", "lm_parallel")
    }
    assert failed["zero3"]["config"]["problem"] == "TimeoutError: not done after 2 s"
    assert failed["lm_parallel"]["config"]["problem"] == "ValueError: no file x.json"


def test_no_case_starts_late(stub, tmp_path, capsys):
    status, found = bench(tmp_path / "a.csv", "--max_seconds", "0.01", "--engines", "plain")
    assert status == 0 and len(found) == 1  # the first one starts in time
    assert capsys.readouterr().out.count("not started") == 2


@pytest.mark.parametrize("flags", [("--engines", "zero9"), ("--scalings", "none"), ("--gpus", "0")])
def test_mistakes(flags, tmp_path):
    assert run(scaling.main, [*SMALL, *flags]) == 2
