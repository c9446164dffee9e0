"""One rank of one case of benchmarks/scaling.py: trains some steps and times them.

    torchrun --standalone --nproc_per_node 2 benchmarks/scaling_worker.py CASE.json RESULT.json

Rank 0 writes what was measured: times are those of the slowest rank in each step, the peak is the
highest of all ranks, rates are of all ranks together.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
from benchmarks.rows import device_name
from benchmarks.steps import ProductStep, Timing, time_steps
from lw_fast.cli import find_ds_config
from lw_fast.config import build_config
from lw_fast.engine import World, close_world, init_world, load_ds_config
from lw_fast.train import setup_run


def measure(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Sets the case's training up and times its steps. Collective."""
    ds_config = case["ds_config"]
    run = setup_run(
        build_config(case["preset"], case["settings"], case["lms"]),
        world,
        Path(tempfile.gettempdir()),  # nothing is written
        load_ds_config(find_ds_config(Path(ds_config))) if ds_config else None,
    )
    timing = time_steps(
        ProductStep(run), warm_up=case["warm_up"], steps=case["steps"], device=world.device
    )
    return over_ranks(world.all_gather(timing)) | {"device": device_name()}


def over_ranks(timings: list[Timing]) -> dict[str, Any]:
    """What all ranks saw together; `samples` of a step are those of the whole batch already."""
    peaks = [timing.peak_gib for timing in timings if timing.peak_gib is not None]
    return {
        "seconds": [max(step) for step in zip(*(t.seconds for t in timings), strict=True)],
        "samples": [work.samples for work in timings[0].work],
        "first_step_seconds": max(timing.first_seconds for timing in timings),
        "peak_gib": max(peaks) if peaks else None,
    }


def main() -> None:
    """Command line: the case, and where its result goes."""
    case, result = Path(sys.argv[1]), Path(sys.argv[2])
    case = json.loads(case.read_text(encoding="utf-8"))
    world = init_world(use_deepspeed=case["ds_config"] is not None, device=case["device"])
    found = measure(case, world)
    if world.is_main:
        result.write_text(json.dumps(found), encoding="utf-8")
    close_world()


if __name__ == "__main__":
    main()
