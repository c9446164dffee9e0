"""On a GPU, long prompts run on fused attention, never on the kernel that stores S x S scores."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lw_fast.config import BackboneConfig
from lw_fast.decode import DecodeRules, greedy
from lw_fast.frozen_lm import load_frozen_lm
from lw_fast.prompt_cache import PromptCache

pytestmark = pytest.mark.gpu

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@pytest.fixture(scope="module", params=["nano:llama", "nano:qwen"])
def lm(request):
    return load_frozen_lm("lm", request.param, BackboneConfig(), torch.device("cuda"))


def prompts(lm, lengths):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 500, (n,), generator=generator) for n in lengths]
    return [lm.embed(row.cuda()) for row in rows]


@torch.no_grad()
def test_scoring_needs_no_mask(lm):
    """Right padding needs no mask, so plain causal attention applies."""
    embeds = torch.stack(prompts(lm, [200] * 4))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert lm.hidden(embeds).isfinite().all()


def test_gradient_through_the_lm_is_fused_too(lm):
    embeds = torch.stack(prompts(lm, [60] * 4)).requires_grad_()
    with sdpa_kernel(FUSED):
        lm.hidden(embeds).float().square().sum().backward()
    assert embeds.grad.isfinite().all() and embeds.grad.any()


@pytest.mark.parametrize("lengths", [[40] * 3, [200, 150, 31]])
def test_decoding_is_fused(lm, lengths):
    """Equal lengths go without a mask, unequal ones with one; both give what the maths gives."""
    rules = DecodeRules(max_new_tokens=6)
    with sdpa_kernel(FUSED):
        fused = greedy(PromptCache(lm, prompts(lm, lengths)), rules)
    with sdpa_kernel([SDPBackend.MATH]):
        plain = greedy(PromptCache(lm, prompts(lm, lengths)), rules)
    same = sum(a == b for a, b in zip(fused, plain, strict=True))
    assert same >= len(lengths) - 1  # bf16 may turn one near tie
