"""benchmarks/kernels.py works from end to end; on a CPU it measures nothing worth reading."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU run is a measurement of its own")
def test_kernels_benchmark_writes_rows_table_and_plot(tmp_path):
    env = dict(os.environ, PYTHONPATH=str(ROOT / "kernels"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernels.py", "--out_dir", tmp_path],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["rows"] > 10
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    metrics = {row["metric"] for row in rows}
    assert {"seconds", "peak_gib", "bandwidth_fraction", "speedup_vs_eager"} <= metrics
    assert all(float(r["value"]) < 0.01 for r in rows if r["metric"] == "rel_error")
    assert "| ours |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").exists()
