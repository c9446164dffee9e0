"""Who moves the weights: one device, data parallel, or DeepSpeed ZeRO, behind one interface.

    world = init_world(use_deepspeed=bool(ds_config))
    engine = build_engine(module, config, world, ds_config, accumulation=2)
    for micro, batch in enumerate(batches):
        loss = loss_sum(engine(batch)) / global_count
        engine.backward(loss, last=micro == len(batches) - 1)
    norm = engine.step(lr_factor(step, total_steps, config.optim))

Only the trainable module is inside an engine; the frozen LMs stay outside and gradients flow
through them to its outputs. Gradients of micro-batches and ranks are SUMMED: a loss that was
divided by the global count gives the same step however the batch was cut.

This folder alone imports deepspeed, and does so where it is used.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lw_fast.config import Config
from lw_fast.engine.base import Engine
from lw_fast.engine.ds_config import load_ds_config
from lw_fast.engine.plain import PlainEngine
from lw_fast.engine.sharding import Sharding
from lw_fast.engine.world import World, close_world, init_world, watch_peers
from lw_fast.engine.zero import ZeroEngine

__all__ = [
    "Engine",
    "PlainEngine",
    "Sharding",
    "World",
    "ZeroEngine",
    "build_engine",
    "close_world",
    "init_world",
    "load_ds_config",
    "watch_peers",
]


def build_engine(
    module: nn.Module,
    config: Config,
    world: World,
    ds_config: dict[str, Any] | None,
    accumulation: int,
) -> Engine:
    """Moves the module to the device, makes it equal on all ranks and wraps it.

    Args:
        module: Trainable module with fp32 weights; autocast, if any, happens in its forward.
        ds_config: From `load_ds_config`; None picks the engine without DeepSpeed.
        accumulation: Micro-batches per step and rank.
    """
    module.to(world.device)
    if ds_config is None:
        return PlainEngine(module, config.optim, world)
    return ZeroEngine(module, config.optim, world, ds_config, accumulation)
