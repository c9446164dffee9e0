"""benchmarks/memory.py on the nano pair: what it expects follows what is varied."""

from __future__ import annotations

import sys

import pytest

from benchmarks import memory
from benchmarks.rows import read_rows


@pytest.fixture
def rows(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SWEEPS", {"batch_size": (2, 8), "max_answer_tokens": (2, 32)})
    out = tmp_path / "memory.csv"
    argv = ["memory.py", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    memory.main()
    return read_rows(out)


def test_rows_of_a_cpu_hold_the_expectation_alone(rows):
    assert {row["metric"] for row in rows} == {"expected_gib"}
    small, large, short, long = rows
    assert large["value"] > small["value"] and long["value"] > short["value"]
    terms = small["config"]["terms_gib"]
    assert sum(terms.values()) == pytest.approx(small["value"], rel=1e-5)
    assert "reserve" not in terms and terms["trained part"] > 0
    activations = [row["config"]["terms_gib"]["encoder"] for row in (small, large)]
    assert activations[1] == pytest.approx(4 * activations[0])
    assert "answer=32" in long["case"] and "varied=max_answer_tokens" in long["case"]
