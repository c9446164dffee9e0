"""--profile: which part of a step the time is put down to, and what is written."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import tiny
import torch

from lw_fast.engine import World
from lw_fast.profiling import OTHER, PREFIX, WARM_UP, breakdown, part, profiled
from lw_fast.train import train

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)


def span(name: str, start: float, end: float) -> dict:
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start}


def launch(number: int, time: float) -> dict:
    event = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": time, "dur": 1}
    return event | {"args": {"correlation": number}}


def kernel(number: int, start: float, end: float) -> dict:
    event = {"cat": "kernel", "name": "k", "ts": start, "dur": end - start}
    return event | {"args": {"correlation": number}}


def wait(name: str, time: float) -> dict:
    return {"cat": "cuda_runtime", "name": name, "ts": time, "dur": 5, "args": {}}


TRACE = [
    span("ProfilerStep#5", 0, 10_000),
    span("ProfilerStep#6", 10_000, 20_000),
    span(PREFIX + "LM forward", 1_000, 5_000),
    span(PREFIX + "head", 3_000, 4_000),
    span(PREFIX + "LM backward", 5_000, 6_000),
    span(PREFIX + "optimizer", 12_000, 13_000),
    launch(1, 1_500), kernel(1, 2_000, 6_000),  # runs on after the host has left the part
    launch(2, 3_500), kernel(2, 6_000, 7_000),
    launch(3, 5_500), kernel(3, 7_000, 9_000),  # from the autograd thread: only the clock says so
    launch(4, 12_500), kernel(4, 13_000, 14_000),
    kernel(99, 14_000, 14_500),
    wait("cudaStreamSynchronize", 12_600), wait("cudaStreamSynchronize", 500),
    wait("cudaDeviceSynchronize", 25_000),  # the profiler's own, behind the last step
    {"cat": "cpu_op", "name": "aten::_local_scalar_dense", "ts": 2_000, "dur": 1},
    {"ph": "M", "name": "process_name"},
]  # fmt: skip


def test_time_is_put_down_to_the_innermost_part():
    found = breakdown(TRACE)
    assert found.steps == 2 and found.step_ms == 10.0
    host = {"LM forward": 1.5, "head": 0.5, "LM backward": 0.5, "optimizer": 0.5, OTHER: 7.0}
    assert found.host_ms == host
    device = {"LM forward": 2.0, "head": 0.5, "LM backward": 1.0, "optimizer": 0.5, OTHER: 0.25}
    assert found.device_ms == device
    assert found.idle_ms == 2.0  # 9 to 13 ms, over two steps


def test_the_table_counts_waits_inside_the_steps():
    found = breakdown(TRACE)
    assert found.waits == {
        "optimizer": {"cudaStreamSynchronize": 1},
        OTHER: {"cudaStreamSynchronize": 1},
    }
    lines = found.table().splitlines()
    assert lines[2] == "| LM forward | 1.50 | 15 | 2.00 | 47 |  |"
    assert lines[-1] == "Host waits per step: cudaStreamSynchronize 1."
    assert "GPU idle (host gap): 2.00 ms per step." in lines
    calm = breakdown([e for e in TRACE if "Synchronize" not in e["name"]])
    assert calm.table().endswith("Host waits per step: none.")


def test_a_run_on_a_cpu_is_profiled(lm_dirs, qa_file, tmp_path):
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), eval_samples=4, lm=lm_dirs)
    train(tiny.config(**files, profile=3, batch_size=4, epochs=1), ONE, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        found = breakdown(json.load(file)["traceEvents"])
    assert found.steps == 3 and found.device_ms == {}
    parts = "data reader encoder adapters head log optimizer".split()
    parts += ["LM forward", "LM backward", "bridge backward", OTHER]
    assert found.host_ms.keys() == set(parts) and min(found.host_ms.values()) > 0
    assert sum(found.host_ms.values()) < 2 * found.step_ms
    text = (folder / "profile.md").read_text()
    assert all(f"| {name} |" in text for name in parts) and "GPU" not in text
    assert not part.active


def test_nothing_is_written_unless_asked_for(tmp_path):
    with profiled(tmp_path / "profile", 0) as step_done:
        assert not part.active
        with part("head"):
            step_done()
    assert list(tmp_path.iterdir()) == []


def test_a_run_too_short_to_profile_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), profiled(tmp_path / "profile", 3) as step_done:
        for _ in range(WARM_UP - 1):
            step_done()
    assert "nothing was written" in caplog.text and not (tmp_path / "profile").exists()
    assert not part.active


def test_a_part_returns_what_it_wraps_and_lets_errors_through():
    @part("head")
    def double(x):
        return 2 * x

    part.active = True
    try:
        assert double(torch.ones(2)).tolist() == [2, 2]
        with pytest.raises(TypeError):
            double(None)
        assert double(3) == 6
    finally:
        part.active = False
