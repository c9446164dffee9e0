"""Greedy decoding with a KV cache from input embeddings, batched and left-padded.

Decode hardening follows the original: stop tokens may be banned for the first steps, and only the
first token may be sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lw_fast.frozen_lm import FrozenLM

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

    def draws(self, num: int) -> np.ndarray:
        """One number in [0, 1) per prompt, whatever batch it will be in."""
        return np.random.default_rng(self.seed).random(num)


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompts [S_i, D] -> [B, S, D] and mask [B, S] (1 = real), None where all are equally long."""
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) == 1:
        return torch.stack(list(prompts)), None
    embeds_BSD = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    position_S = torch.arange(embeds_BSD.shape[1], device=embeds_BSD.device)
    length_B1 = torch.tensor(lengths, device=embeds_BSD.device)[:, None]
    return embeds_BSD, (position_S >= embeds_BSD.shape[1] - length_B1).long()


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
    lm: FrozenLM,
    prompts: Sequence[Tensor],
    rules: DecodeRules,
    draws_B: np.ndarray | None = None,
) -> list[list[int]]:
    """Continues every prompt [S_i, D]; returns token ids up to, not including, a stop token.

    `draws_B`, one of `rules.draws` per prompt, is needed where the first token is sampled.
    """
    from transformers import DynamicCache

    embeds_BSD, mask_BS = left_pad(prompts)
    stop_ids = torch.tensor(sorted(lm.stop_ids), device=lm.device)
    cache = DynamicCache(config=lm.model.config)
    position_BS = None if mask_BS is None else (mask_BS.cumsum(1) - 1).clamp_min(0)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=lm.device)
    chosen: list[Tensor] = []
    for step in range(rules.max_new_tokens):
        output = lm.backbone(
            inputs_embeds=embeds_BSD,
            attention_mask=mask_BS,
            position_ids=position_BS,
            past_key_values=cache,
            use_cache=True,
        )
        logits_BV = lm.logits(output.last_hidden_state[:, -1])
        if step < rules.ban_stop_steps:
            logits_BV[:, stop_ids] = -torch.inf
        if step == 0 and rules.first_temperature > 0:
            token_B = sample_nucleus(logits_BV, rules.first_top_p, rules.first_temperature, draws_B)
        else:
            token_B = logits_BV.argmax(-1)
        chosen.append(token_B)
        ended_B = ended_B | torch.isin(token_B, stop_ids)
        if step % STOP_CHECK_EVERY == STOP_CHECK_EVERY - 1 and lm.everywhere(ended_B.all()):
            break
        embeds_BSD = lm.embed(token_B[:, None])
        if mask_BS is not None:
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(prompts), 1)], dim=1)
            position_BS = position_BS[:, -1:] + 1
    return [_until_stop(row, lm.stop_ids) for row in torch.stack(chosen, dim=1).tolist()]


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:i]
    return tokens
