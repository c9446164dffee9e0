"""Frozen linears in e4m3: close to the linear they replace, in both passes."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from lw_fast.config import BackboneConfig
from lw_fast.fp8 import E4M3_MAX, Float8Linear, allow_backward, cast_rows, to_fp8
from lw_fast.frozen_lm import load_frozen_lm

ROUNDING = 2.0**-4
"""Half a step of e4m3's three mantissa bits, relative to a normal number."""


def linear(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(48, 32, bias=bias).requires_grad_(False)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def test_a_row_is_cast_to_within_rounding():
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([1e-4, 1.0, 30.0, 1e4, 0.0])[:, None]
    x8, scale = cast_rows(x)
    assert x8.dtype == torch.float8_e4m3fn and x8.float().abs().max() <= E4M3_MAX
    back = x8.float() * scale
    normal = x.abs() > scale * 2.0**-6
    assert ((back - x).abs()[normal] <= ROUNDING * x.abs()[normal] * 1.001).all()
    assert not back[-1].any()  # a row of zeros stays one


def test_not_finite_stays_not_finite():
    x8, scale = cast_rows(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]]))
    assert not (x8.float() * scale).isfinite().all(dim=1).any()


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_are_close(bias):
    exact, x = linear(bias), torch.randn(3, 7, 48)
    module = Float8Linear(exact)
    module.allow_backward()
    twins = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [exact(twins[0]), module(twins[1])]
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert 0.001 < relative(outputs[1], outputs[0]) < ROUNDING
    assert 0.001 < relative(twins[1].grad, twins[0].grad) < ROUNDING
    with torch.no_grad():
        torch.testing.assert_close(module(x), outputs[1].detach())


def test_the_gradient_is_that_of_the_cast_weights():
    """Exactly: with a one-hot gradient nothing but the weights is rounded."""
    module = Float8Linear(linear(bias=False))
    module.allow_backward()
    x = torch.zeros(32, 48, requires_grad=True)
    module(x).backward(torch.eye(32))
    used = module.weight8_NK.float() * module.scale_1N.t()
    torch.testing.assert_close(x.grad, used, rtol=1e-6, atol=0)


def test_only_linears_are_replaced():
    tree = nn.ModuleDict({"norm": nn.LayerNorm(48), "inner": nn.Sequential(linear(), nn.GELU())})
    to_fp8(tree)
    assert isinstance(tree["inner"][0], Float8Linear)
    assert isinstance(tree["norm"], nn.LayerNorm)
    assert not any(isinstance(module, nn.Linear) for module in tree.modules())
    assert tree["inner"][0].weight8_KN is None
    allow_backward(tree)
    assert tree["inner"][0].weight8_KN.is_contiguous()


@pytest.mark.parametrize("source", ["nano:llama", "nano:qwen"])
def test_a_whole_lm(source):
    """Hidden states and the gradient of the input embeddings stay near through all layers; the
    tokens are random, where tiny LMs are least robust (unrelated ones would be 1.4 apart)."""
    exact = load_frozen_lm("lm", source, BackboneConfig(), tiny.CPU)
    cast = load_frozen_lm("lm", source, BackboneConfig(backbone_dtype="fp8"), tiny.CPU)
    embeds = exact.embed(torch.arange(40).view(2, 20))
    grads, hidden = [], []
    for lm in (exact, cast):
        leaf = embeds.detach().clone().to(lm.dtype).requires_grad_()
        hidden.append(lm.hidden(leaf))
        hidden[-1].float().square().sum().backward()
        grads.append(leaf.grad.float())
    assert relative(hidden[1].float(), hidden[0]) < 0.35
    assert relative(grads[1], grads[0]) < 0.5
    assert not any(p.requires_grad for p in cast.model.parameters())
    assert isinstance(cast.model.get_output_embeddings(), nn.Linear)  # the head is not cast
