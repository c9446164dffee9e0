"""Prompts that were read once: whatever is read behind them is as if all had been read at once."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from lw_fast.decode import DecodeRules, greedy
from lw_fast.forcing import forced_rows, forced_rows_behind
from lw_fast.prompt_cache import PromptCache

LENGTHS = {"unequal": [7, 3, 12], "equal": [6, 6, 6]}
ANSWERS = [[5, 6, 7, 8], [], [9, 10]]


@pytest.fixture(params=["llama", "qwen"])
def lm(request):
    return tiny.frozen_lm(request.param)


@pytest.fixture(params=LENGTHS)
def prompts(request, lm):
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, lm.d_model, generator=generator) for n in LENGTHS[request.param]]


@torch.no_grad()
def test_tokens_read_in_parts_equal_one_forward_pass(lm, prompts):
    """Several tokens, then one more: positions, padding and causality are those of a whole row."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    read = PromptCache(lm, prompts)
    hidden = torch.cat([read.hidden_BD[:, None], read.read(ids[:, :3]), read.read(ids[:, 3:])], 1)
    for prompt, tokens, found in zip(prompts, ids, hidden, strict=True):
        whole = lm.hidden(torch.cat([prompt, lm.embed(tokens)])[None])[0]
        torch.testing.assert_close(found, whole[len(prompt) - 1 :], rtol=1e-4, atol=1e-5)


def test_a_fork_leaves_its_prompts_as_they_were(lm, prompts):
    """Before or after it, greedy decoding gives the same."""
    expected = greedy(PromptCache(lm, prompts), DecodeRules(6))
    read = PromptCache(lm, prompts)
    fork = read.fork()
    fork.read(torch.full((3, 4), 9))
    assert greedy(read.fork(), DecodeRules(6)) == expected
    assert greedy(read, DecodeRules(6)) == expected
    assert greedy(fork, DecodeRules(6)) != expected


@torch.no_grad()
def test_forced_rows_behind_equal_those_of_one_forward_pass(lm, prompts):
    """Same targets and hidden states, with and without EOS, for an empty answer too."""
    complete_B = np.array([True, True, False])
    expected_ND, rows = forced_rows(lm, prompts, ANSWERS, complete_B, eos=3)
    hidden_ND, behind = forced_rows_behind(PromptCache(lm, prompts), ANSWERS, complete_B, eos=3)
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-4, atol=1e-5)
    for column in ("target", "example", "first"):
        assert (getattr(behind, column) == getattr(rows, column)).all()
    assert len(hidden_ND) == 5 + 1 + 2
