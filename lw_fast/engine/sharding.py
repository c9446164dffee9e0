"""Frozen LMs cut into shards: the layers of each are a ZeRO-3 engine without an optimizer.

Each rank keeps its part of every layer and gathers a layer while it runs, forward or backward.
Embedding and output layer stay whole on every rank, so that anything may read their weights (an
eighth of an 8B model). All ranks must call the same LMs in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lw_fast.engine.world import World, import_deepspeed


class Sharding:
    """Cuts LMs into one shard per rank."""

    def __init__(self, ds_config: dict[str, Any], world: World) -> None:
        """`ds_config`: the training's; its zero_optimization serves the LMs too."""
        zero = ds_config["zero_optimization"]
        self._zero = {key: value for key, value in zero.items() if key != "offload_optimizer"}
        self._world = world

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """DeepSpeed's config for an LM of this dtype; also what `from_pretrained` goes by."""
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": dict(self._zero),
            "bf16": {"enabled": dtype == torch.bfloat16},
        }

    def cut(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Leaves this rank with its shard of the layers of a transformers causal LM, which may
        have been loaded whole or in shards. Collective."""
        deepspeed = import_deepspeed(self._world.device)
        with _ends_aside(deepspeed, model):
            deepspeed.initialize(model=model.base_model, config=self.config(dtype))

    def everywhere(self, flag: bool | torch.Tensor) -> bool:
        """Whether it is true on all ranks, which must go on alike. Collective."""
        told = torch.as_tensor(flag, device=self._world.device).float().reshape(1)
        return bool(self._world.all_reduce(told, "min"))


@contextlib.contextmanager
def _ends_aside(deepspeed: Any, model: nn.Module) -> Iterator[None]:
    """Inside, the model has no embedding, so that it is not cut; both ends are whole afterwards."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = {}  # tied weights stay one
    for end in (embedding, head):
        for name, param in list(end.named_parameters(recurse=False)):
            if id(param) not in whole:
                whole[id(param)] = _whole(deepspeed, param)
            setattr(end, name, whole[id(param)])
    model.set_input_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_input_embeddings(embedding)


def _whole(deepspeed: Any, param: nn.Parameter) -> nn.Parameter:
    if not hasattr(param, "ds_id"):
        return param
    with deepspeed.zero.GatheredParameters([param]):
        return nn.Parameter(param.data.clone(), requires_grad=False)
