import logging

import pytest
import torch
from lw_kernels import dispatch
from lw_kernels.dispatch import choose


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu():
    assert choose("op", "auto", "cpu", (torch.float32,)) == "torch"
    assert choose("op", "auto", "cuda", (torch.bfloat16,)) == "triton"
    assert choose("op", "auto", "cuda", (torch.float64,)) == "torch"


def test_forced_but_impossible_raises(monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        choose("op", "triton", "cuda", (torch.float64,))
    with pytest.raises(ValueError, match="must be one of"):
        choose("op", "cutlass", "cpu", (torch.float32,))
    with pytest.raises(ValueError, match="too wide"):
        choose("op", "triton", "cuda", (torch.float32,), "too wide")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'cpu'"):
        choose("op", "triton", "cpu", (torch.float32,))


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lw_kernels"):
        for _ in range(3):
            choose("op", "auto", "cpu", (torch.float32,))
    assert [r.getMessage() for r in caplog.records] == ["op: impl=auto -> torch on cpu"]
