"""Teacher forcing behind prompts of any length: which hidden states predict an answer.

In one forward pass, right-padded, or behind prompts that were read before; rows are gathered before
`lm_head`, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lw_fast.batches import to_device
from lw_fast.frozen_lm import FrozenLM
from lw_fast.prompt_cache import PromptCache
from lw_fast.sequence import SupervisedRows, pair_targets


def forced_rows(
    lm: FrozenLM,
    prompts: Sequence[Tensor],
    answers: Sequence[Sequence[int]],
    complete_B: np.ndarray,
    eos: int,
) -> tuple[Tensor, SupervisedRows]:
    """Hidden states [N, D] of the rows that predict an answer token or EOS, and what these are.

    Args:
        prompts: input embeddings [S_i, D] of each example, from BOS to anchor.
        answers: token ids of each answer.
        complete_B: bool; whether EOS follows the answer.
        eos: the token that ends an answer.
    """
    answers_BL, length_B = _right_pad(answers)
    answer_embeds = lm.embed(to_device(answers_BL, lm.device))
    whole = [
        torch.cat([prompt, answer[:length]])
        for prompt, answer, length in zip(prompts, answer_embeds, length_B, strict=True)
    ]
    embeds_BSD = pad_sequence(whole, batch_first=True)
    rows = pair_targets(
        answers_BL,
        length_B,
        complete_B,
        prefix_len=np.array([len(prompt) for prompt in prompts]),
        seq_len=embeds_BSD.shape[1],
        eos=eos,
    )
    hidden_ND = lm.hidden(embeds_BSD).flatten(0, 1)[to_device(rows.position, lm.device)]
    return hidden_ND, rows


def forced_rows_behind(
    prompts: PromptCache, answers: Sequence[Sequence[int]], complete_B: np.ndarray, eos: int
) -> tuple[Tensor, SupervisedRows]:
    """`forced_rows` behind prompts that were read; the answers are read there too. No gradient."""
    answers_BL, length_B = _right_pad(answers)
    hidden_BLD = prompts.read(to_device(answers_BL, prompts.lm.device))
    hidden_BSD = torch.cat([prompts.hidden_BD[:, None], hidden_BLD], dim=1)
    seq_len = hidden_BSD.shape[1]
    rows = pair_targets(answers_BL, length_B, complete_B, prefix_len=1, seq_len=seq_len, eos=eos)
    return hidden_BSD.flatten(0, 1)[to_device(rows.position, prompts.lm.device)], rows


def _right_pad(answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L] and how many of each row are real."""
    length_B = np.array([len(tokens) for tokens in answers])
    answers_BL = np.zeros((len(answers), max(length_B.max(), 1)), dtype=np.int64)
    for row, tokens in zip(answers_BL, answers, strict=True):
        row[: len(tokens)] = tokens
    return answers_BL, length_B


def batches_by_length(lengths: Sequence[int], most_positions: int) -> Iterator[np.ndarray]:
    """Indices of examples in batches of like length that hold at most `most_positions` positions,
    padding included (or one example)."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and lengths[order[end]] * (end + 1 - start) > most_positions
        if full or end == len(order):
            yield order[start:end]
            start = end
