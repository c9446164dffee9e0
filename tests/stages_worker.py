"""What every rank of tests/test_stages_bf16.py runs.

    torchrun --nproc_per_node 2 tests/stages_worker.py OUT.json [cpu|cuda]

Trains the nano pair with bf16 LMs for some steps under every engine and writes OUT.json: engine ->
loss and gradient norm of each step. Starting DeepSpeed takes seconds, so one run does it all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lw_fast.config import build_config  # noqa: E402
from lw_fast.engine import World, close_world, init_world, load_ds_config  # noqa: E402
from lw_fast.train import setup_run  # noqa: E402
from lw_fast.train_step import train_step  # noqa: E402

STEPS = 5
SETTINGS = {
    "backbone_dtype": "bf16", "batch_size": 16, "samples": 96, "eval_samples": 4, "warmup_steps": 2,
    "compile": "no", "lr": 5e-5, "adapter_lr": 5e-5,
}  # fmt: skip
"""The rates are low: AdamW's first steps follow the sign of each gradient, however small it is, so
that rounding would grow from step to step."""
ENGINES = {
    "plain": (None, {}),
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "lm_parallel": (None, {"lm_parallel": True}),
    "lm_parallel_zero2": ("zero2", {"lm_parallel": True}),
    "zero3": ("zero3", {"shard_lms": "yes"}),
    "plain_after_zero3": (None, {}),
}
"""Stage 3 comes late: for it DeepSpeed replaces torch's linear, for good, by one that rounds before
it adds the bias. In bf16 that moves a gradient's norm by some per cent, without any stage."""


def train(world: World, ds_name: str | None, changes: dict[str, Any]) -> dict[str, list[float]]:
    """Loss (of all ranks together) and gradient norm of each step. Collective."""
    ds_config = None
    if ds_name:
        ds_config = load_ds_config(ROOT / "ds_configs" / f"{ds_name}.json")
        if ds_name == "zero3":  # by default the nano pair is too small to be cut
            ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config = build_config("nano", {**SETTINGS, **changes}, {})
    run = setup_run(config, world, Path(tempfile.gettempdir()), ds_config)
    assert all(lm.dtype == torch.bfloat16 for lm in run.model.lms.values())
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    for _ in range(STEPS):
        norm = train_step(run)
        run.global_step += 1
        found["loss"].append(float(world.all_reduce(run.sums["loss"])))
        found["norm"].append(float(norm))
        run.sums.clear()
    return found


def main() -> None:
    out, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    world = init_world(use_deepspeed=True, device=device, timeout_seconds=60)
    found = {name: train(world, *how) for name, how in ENGINES.items()}
    if world.is_main:
        out.write_text(json.dumps({"size": world.size, "device": device, "engines": found}))
    world.barrier()
    close_world()


if __name__ == "__main__":
    main()
