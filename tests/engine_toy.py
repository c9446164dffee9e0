"""A trainable module and a frozen "LM" small enough to train in milliseconds, for engine tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lw_fast.config import Config, from_flat
from lw_fast.engine import Engine, World, build_engine

STEPS = 6
ROWS = 8

# Every parameter counts as large, so that stage 3 shards even these.
ZERO = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero2_offload": {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        }
    },
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
        }
    },
}
for _config in ZERO.values():
    _config["zero_optimization"]["reduce_bucket_size"] = 4096


class Toy(nn.Module):
    """Encoder and two adapters; sizes are odd so that shards need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh())
        self.adapters = nn.ModuleDict({"llama": nn.Linear(7, 3), "qwen": nn.Linear(7, 3)})
        self.idle = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("rms", torch.ones(()))

    def forward(self, x: Tensor, lms: tuple[str, ...]) -> list[Tensor]:
        z = self.encoder(x)
        return [self.adapters[lm](z) * self.scale for lm in lms]


def toy_config(**changes: Any) -> Config:
    settings = dict(lr=1e-2, adapter_lr=2e-2, batch_size=ROWS, max_grad_norm=0.5, weight_decay=0.1)
    return from_flat({**settings, **changes}, {})


def build(
    world: World, ds_config: dict | None, accumulation: int = 1, config: Config | None = None
) -> Engine:
    """The same initial weights on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Toy()
    return build_engine(
        module, config or toy_config(), world, copy.deepcopy(ds_config), accumulation
    )


def data() -> tuple[nn.Module, Tensor]:
    """A frozen LM and one batch [ROWS, 5] per step."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lm = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)).requires_grad_(False)
        return lm, torch.randn(STEPS, ROWS, 5)


BOTH = ("llama", "qwen")


def lms_by_turns(step: int, micro: int) -> tuple[str, ...]:
    """Leaves out an adapter now in this micro-batch, now in a whole step."""
    return (("llama",), BOTH, ("qwen",))[(step + micro) % 3]


def train(
    engine: Engine,
    *,
    start: int = 0,
    steps: int = STEPS,
    accumulation: int = 1,
    lms=None,
    parts: list[dict[str, float]] | None = None,
) -> list[float]:
    """Each rank takes its share of every batch, in `accumulation` pieces; returns the norms, and
    adds those of each part to `parts`."""
    lm, batches = (part.to(engine.world.device) for part in data())
    norms = []
    for step in range(start, steps):
        share = batches[step].chunk(engine.world.size)[engine.world.rank]
        for micro, piece in enumerate(share.chunk(accumulation)):
            names = lms(step, micro) if lms else BOTH
            loss = sum(lm(prefix).pow(2).sum() for prefix in engine(piece, names)) / ROWS
            engine.backward(loss, last=micro == accumulation - 1)
        norms.append(float(engine.step(1.0 - 0.1 * step, with_parts=parts is not None)))
        if parts is not None:
            parts.append({part: float(norm) for part, norm in engine.part_norms.items()})
    return norms


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
