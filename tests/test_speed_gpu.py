"""On a GPU: packed attention, compiled layers and FP8 against the plain path."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from lw_fast.batches import AnswerTable
from lw_fast.bridge import frozen_lm_loss
from lw_fast.config import BackboneConfig
from lw_fast.fp8 import Float8Linear
from lw_fast.frozen_lm import load_frozen_lm
from lw_fast.packed_attention import _masked, _short, _varlen

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
ANSWERS = ["Paris", "a small green bicycle", "1066", "in the old town by the river"] * 8
PADDED = BackboneConfig(layout="padded", compile="no")
SOURCES = ("random:smollm2-135m", "random:qwen2.5-0.5b")


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("packed", [_short, _varlen])
@pytest.mark.parametrize("heads, groups, width", [(2, 1, 64), (3, 3, 64), (8, 4, 128), (4, 7, 128)])
def test_packed_attention_is_masked_attention(heads, groups, width, packed):
    torch.manual_seed(0)
    lengths = [40, 1, 57, 0, 33]
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=CUDA)
    rows, options = sum(lengths), dict(device=CUDA, dtype=torch.bfloat16)
    inputs = [torch.randn(rows, n, width, **options) for n in (heads * groups, heads, heads)]
    grad, results = torch.randn(rows, heads * groups, width, **options), []
    for attend, dtype in ((packed, torch.bfloat16), (_masked, torch.float32)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
        out = attend(*leaves, cu, max(lengths), width**-0.5)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(*results, strict=True):
        assert relative(ours, truth) < 1e-2


@pytest.mark.parametrize("rows", [1, 17, 2560])
def test_fp8_linear_is_its_emulation(rows):
    """The tensor cores accumulate in less than fp32: two digits are enough here."""
    torch.manual_seed(0)
    exact = torch.nn.Linear(896, 4864, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    module = Float8Linear(exact)
    module.allow_backward()
    x = torch.randn(rows, 896, device=CUDA, dtype=torch.bfloat16)
    grad, results = torch.randn(rows, 4864, device=CUDA, dtype=torch.bfloat16), []
    for twin, device in ((module, CUDA), (None, tiny.CPU), (exact, CUDA)):
        twin = twin or Float8Linear(exact).to(device)
        if isinstance(twin, Float8Linear):
            twin.allow_backward()
        leaf = x.detach().clone().to(device).requires_grad_()
        out = twin(leaf)
        out.backward(grad.to(device))
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    gpu, emulated, bf16 = results
    for ours, same, true in zip(gpu, emulated, bf16, strict=True):
        assert relative(ours, same) < 1e-2 < relative(ours, true) < 6e-2


@pytest.mark.parametrize("source", SOURCES)
def test_packed_and_compiled_agree_with_padded(source):
    """Loss and prefix gradient of a whole LM, all three ways, from the same weights."""
    torch.manual_seed(0)
    lm = load_frozen_lm("lm", source, PADDED, CUDA)
    prefix = 0.02 * torch.randn(len(ANSWERS), 6, lm.d_model, device=CUDA)
    results = []
    for compile_ in (None, "no", "yes"):
        config = BackboneConfig(layout="packed", compile=compile_ or "no")
        runner = lm if compile_ is None else lm.rerun(config)
        batch = AnswerTable(runner, ANSWERS, tiny.config()).batch(np.arange(len(ANSWERS)))
        assert (batch.packing is None) == (compile_ is None)
        leaf = prefix.clone().requires_grad_()
        loss, _ = frozen_lm_loss(runner, leaf, batch, row_weight=1 / 64, first_weight=0.0)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (padded, grad), *others = results
    for loss, other_grad in others:
        assert relative(loss, padded) < 1e-3
        assert relative(other_grad, grad) < 5e-2
