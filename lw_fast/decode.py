"""Greedy decoding behind prompts that were read, batched.

Decode hardening follows the original: stop tokens may be banned for the first steps, and only the
first token may be sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lw_fast.frozen_lm import FrozenLM
from lw_fast.prompt_cache import PromptCache

STOP_CHECK_EVERY = 4
"""Steps between looks at whether every row has ended (each look waits for the device)."""


@dataclass(frozen=True)
class DecodeRules:
    """How tokens are picked."""

    max_new_tokens: int
    ban_stop_steps: int = 0
    """Stop tokens cannot be chosen before this step."""
    first_top_p: float = 1.0
    """Nucleus of the first token."""
    first_temperature: float = 0.0
    """Temperature of the first token; 0: the likeliest."""
    seed: int = 0
    """Of the first tokens, where they are sampled."""
    first_line: bool = False
    """Only the first line with text in it matters: what follows may be missing."""

    def draws(self, num: int) -> np.ndarray:
        """One number in [0, 1) per prompt, whatever batch it will be in."""
        return np.random.default_rng(self.seed).random(num)


def sample_nucleus(
    logits_BV: Tensor, top_p: float, temperature: float, draws_B: np.ndarray
) -> Tensor:
    """Token ids [B] from the likeliest tokens that together reach `top_p`; each draw in [0, 1)
    picks one of its row by inverting the cumulative distribution."""
    probs_BV, ids_BV = (logits_BV.float() / temperature).softmax(-1).sort(descending=True)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    probs_BV = probs_BV.masked_fill(before_BV >= top_p, 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    draws_B1 = torch.as_tensor(draws_B, dtype=torch.float32, device=logits_BV.device)[:, None]
    rank_B1 = torch.searchsorted(cumulative_BV, draws_B1 * cumulative_BV[:, -1:], right=True)
    last_B1 = (probs_BV > 0).sum(-1, keepdim=True) - 1  # rounding must not leave the nucleus
    return ids_BV.gather(1, rank_B1.minimum(last_B1)).squeeze(1)


@torch.no_grad()
def greedy(
    prompts: PromptCache, rules: DecodeRules, draws_B: np.ndarray | None = None
) -> list[list[int]]:
    """Continues every prompt; returns token ids up to, not including, a stop token.

    `draws_B`, one of `rules.draws` per prompt, is needed where the first token is sampled.
    """
    lm, hidden_BD = prompts.lm, prompts.hidden_BD
    stop_ids = torch.tensor(sorted(lm.stop_ids), device=lm.device)
    chosen: list[Tensor] = []
    for step in range(rules.max_new_tokens):
        if step:
            hidden_BD = prompts.read(chosen[-1][:, None])[:, -1]
        logits_BV = lm.logits(hidden_BD)
        if step < rules.ban_stop_steps:
            logits_BV[:, stop_ids] = -torch.inf
        if step == 0 and rules.first_temperature > 0:
            token_B = sample_nucleus(logits_BV, rules.first_top_p, rules.first_temperature, draws_B)
        else:
            token_B = logits_BV.argmax(-1)
        chosen.append(token_B)
        if len(chosen) % STOP_CHECK_EVERY == 0 and lm.everywhere(_have_ended(lm, chosen, rules)):
            break
    return _rows(lm, chosen)


def _rows(lm: FrozenLM, chosen: Sequence[Tensor]) -> list[list[int]]:
    return [_until_stop(row, lm.stop_ids) for row in torch.stack(list(chosen), dim=1).tolist()]


def _have_ended(lm: FrozenLM, chosen: Sequence[Tensor], rules: DecodeRules) -> bool:
    """Whether every row has: with a stop token or, if that will do, with its first line."""
    going_on = [row for row in _rows(lm, chosen) if len(row) == len(chosen)]
    if not rules.first_line:
        return not going_on
    texts = lm.tokenizer.batch_decode(going_on, skip_special_tokens=True)
    return all("\n" in text.lstrip() for text in texts)


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:i]
    return tokens
