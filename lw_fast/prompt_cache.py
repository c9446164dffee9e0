"""Prompts that an LM has read once, to be continued more than once.

What answers are worth and which one the LM gives both start from the same forward pass over the
prompts: the longest part of an evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lw_fast.frozen_lm import FrozenLM


class PromptCache:
    """A batch of prompts with its KV cache, and whatever tokens were read behind them."""

    hidden_BD: Tensor
    """The last hidden state of every prompt: it predicts the first token of an answer."""

    @torch.no_grad()
    def __init__(self, lm: FrozenLM, prompts: Sequence[Tensor]) -> None:
        """Reads the input embeddings [S_i, D] of every prompt, left-padded."""
        from transformers import DynamicCache

        self.lm, self._cache = lm, DynamicCache(config=lm.model.config)
        embeds_BSD, self._mask_BS = left_pad(prompts)
        self.hidden_BD = self._forward(embeds_BSD)[:, -1].clone()

    def fork(self) -> PromptCache:
        """The same prompts again: what is read there is not read here."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other

    @torch.no_grad()
    def read(self, ids_BL: Tensor) -> Tensor:
        """Hidden states [B, L, D] of L tokens behind what was read so far, causal."""
        if self._mask_BS is not None:
            self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(ids_BL)], dim=1)
        return self._forward(self.lm.embed(ids_BL))

    def _forward(self, embeds_BLD: Tensor) -> Tensor:
        position_BL = None
        if self._mask_BS is not None:
            position_BL = (self._mask_BS.cumsum(1) - 1).clamp_min(0)[:, -embeds_BLD.shape[1] :]
        return self.lm.backbone(
            inputs_embeds=embeds_BLD,
            attention_mask=self._mask_BS,
            position_ids=position_BL,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompts [S_i, D] -> [B, S, D] and mask [B, S] (1 = real), None where all are equally long."""
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) == 1:
        return torch.stack(list(prompts)), None
    embeds_BSD = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    position_S = torch.arange(embeds_BSD.shape[1], device=embeds_BSD.device)
    length_B1 = torch.tensor(lengths, device=embeds_BSD.device)[:, None]
    return embeds_BSD, (position_S >= embeds_BSD.shape[1] - length_B1).long()
