"""Parameter groups and the learning-rate schedule."""

import pytest
import torch
from torch import nn

from lw_fast.config import OptimConfig
from lw_fast.optim import lr_factor, param_groups


def bridge() -> nn.Module:
    module = nn.Module()
    module.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    module.adapters = nn.ModuleDict({"llama": nn.Linear(4, 2)})
    module.adapters["llama"].register_parameter(
        "scale", nn.Parameter(torch.ones(2), requires_grad=False)
    )
    return module


def by_name(module: nn.Module, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in module.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in param_groups(module, optim)
        for p in group["params"]
    }


def test_groups_split_by_part_and_dimension():
    optim = OptimConfig(lr=1e-4, adapter_lr=3e-4, weight_decay=0.1)
    assert by_name(bridge(), optim) == {
        "encoder.0.weight": (1e-4, 0.1),
        "encoder.0.bias": (1e-4, 0.0),
        "encoder.1.weight": (1e-4, 0.0),
        "encoder.1.bias": (1e-4, 0.0),
        "adapters.llama.weight": (3e-4, 0.1),
        "adapters.llama.bias": (3e-4, 0.0),
    }


def test_adapter_lr_zero_means_lr_and_groups_merge():
    optim = OptimConfig(lr=1e-4, adapter_lr=0.0, weight_decay=0.1)
    assert {lr for lr, _ in by_name(bridge(), optim).values()} == {1e-4}
    assert len(param_groups(bridge(), optim)) == 2
    assert len(param_groups(bridge(), OptimConfig(adapter_lr=0.0, weight_decay=0.0))) == 1


def test_frozen_module_has_no_groups():
    assert param_groups(bridge().requires_grad_(False), OptimConfig()) == []


def test_warmup_is_linear_and_moves_from_the_first_step():
    optim = OptimConfig(warmup_steps=4)
    assert [lr_factor(s, 100, optim) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_ends_at_the_floor_and_stays_there():
    optim = OptimConfig(warmup_steps=2, min_lr_ratio=0.1)
    factors = [lr_factor(s, 11, optim) for s in range(11)]
    assert factors[2] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert lr_factor(6, 11, optim) == pytest.approx(0.55)  # half way
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert lr_factor(500, 11, optim) == pytest.approx(0.1)


def test_constant_schedule():
    optim = OptimConfig(schedule="constant", warmup_steps=1, min_lr_ratio=0.0)
    assert {lr_factor(s, 10, optim) for s in range(10)} == {1.0}


@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_shorter_than_the_warmup(total):
    optim = OptimConfig(warmup_steps=3)
    assert all(0 < lr_factor(s, total, optim) <= 1 for s in range(total))
