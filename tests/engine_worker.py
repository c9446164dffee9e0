"""What every rank of tests/test_engine_distributed.py runs.

    torchrun --nproc_per_node 2 tests/engine_worker.py FOLDER

Reads FOLDER/in.pt, the weights and optimizer state of one process after half of the training, and
writes FOLDER/out.pt, a dict per engine. Starting DeepSpeed takes seconds, so one run does it all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from engine_toy import (  # noqa: E402
    STEPS,
    ZERO,
    Toy,
    build,
    data,
    lms_by_turns,
    toy_config,
    train,
)

from lw_fast.engine import Engine, World, build_engine, close_world, init_world  # noqa: E402


def states(engine: Engine) -> dict[str, Any]:
    return {"weights": engine.module_state(), "optimizer": engine.optimizer_state()}


def whole_run(world: World, ds_config: dict | None, accumulation: int, **options) -> dict[str, Any]:
    engine = build(world, ds_config, accumulation)
    parts: list[dict[str, float]] = []
    norms = train(engine, accumulation=accumulation, parts=parts, **options)
    return {"norms": norms, "parts": parts, **states(engine)}


def resumed_run(world: World, ds_config: dict | None, given: dict[str, Any]) -> dict[str, Any]:
    engine = build(world, ds_config)
    engine.load_module_state(given["weights"])
    engine.load_optimizer_state(given["optimizer"])
    norms = train(engine, start=STEPS // 2)
    return {"norms": norms, **states(engine)}


def half_run(world: World, ds_config: dict | None) -> dict[str, Any]:
    engine = build(world, ds_config)
    train(engine, steps=STEPS // 2)
    return states(engine)


def nan_on_one_rank(world: World, ds_config: dict | None) -> list[Any]:
    """The norm that each rank saw, and whether its weights stayed as they were."""
    engine = build(world, ds_config)
    before = engine.module_state()
    lm, batches = (part.to(world.device) for part in data())
    loss = lm(engine(batches[0], ("llama",))[0]).sum()
    engine.backward(loss * float("nan") if world.rank == 1 else loss, last=True)
    norm = float(engine.step(1.0))
    after = engine.module_state()
    return world.all_gather((norm, all(torch.equal(before[n], after[n]) for n in before)))


def different_start(world: World, ds_config: dict | None) -> bool:
    """Whether ranks that built different weights train rank 0's."""
    torch.manual_seed(world.rank)
    module = Toy()
    rank_0 = {name: t.clone() for name, t in module.state_dict().items()}
    engine = build_engine(module, toy_config(), world, ds_config, 1)
    mine = engine.module_state()
    everyone = world.all_gather((rank_0, mine))
    return all(
        torch.equal(weights[name], everyone[0][0][name])
        for _, weights in everyone
        for name in weights
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int, default=0, help="passed by deepspeed")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = args.folder
    torch.set_num_threads(1)
    world = init_world(use_deepspeed=True, device=args.device, timeout_seconds=60)
    given = torch.load(folder / "in.pt", weights_only=True)
    results: dict[str, Any] = {"size": world.size}
    for name, ds_config in {"plain": None, **ZERO}.items():
        results[name] = {
            "whole": whole_run(world, ds_config, 1),
            "accumulated": whole_run(world, ds_config, 2),
            "by_turns": whole_run(world, ds_config, 2, lms=lms_by_turns),
            "resumed": resumed_run(world, ds_config, given),
            "half": half_run(world, ds_config),
            "nan": nan_on_one_rank(world, ds_config),
            "same_start": different_start(world, ds_config),
        }
    total = world.all_reduce(torch.tensor([world.rank + 1.0], device=world.device))
    largest = world.all_reduce(torch.tensor([float(world.rank)], device=world.device), op="max")
    results["reduced"] = [float(total), float(largest)]
    world.barrier()
    if world.is_main:
        torch.save(results, folder / "out.pt")
    close_world()


if __name__ == "__main__":
    main()
