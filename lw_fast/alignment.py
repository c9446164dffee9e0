"""Which token of a frozen LM is the same text as a token of the reader, and the loss that uses it.

A copy slot carries one reader token. Most tokens of one byte-level tokenizer also exist in another
(" Denver" is " Denver"), so the LM's own embedding of that token is a target for the slot's prefix
vector: a direct, dense signal for the channel, where the answer loss alone has to discover the
translation between two vocabularies token by token. Tokens without a counterpart have no target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lw_fast.frozen_lm import FrozenLM


def token_map(reader_tokenizer, tokenizer) -> Tensor:
    """int64 [V_reader]: the id of the same text in the other vocabulary, -1 where there is none."""
    theirs = {_text(token): i for token, i in tokenizer.get_vocab().items()}
    own = reader_tokenizer.get_vocab()
    ids = torch.full((max(own.values()) + 1,), -1, dtype=torch.int64)
    for token, i in own.items():
        ids[i] = theirs.get(_text(token), -1)
    return ids


def _text(token: str) -> str:
    """Byte-level tokenizers write a leading space as U+0120, SentencePiece as U+2581."""
    return token.replace("\u2581", "\u0120")


class Alignment:
    """The token maps from one reader to several LMs."""

    def __init__(self, reader: FrozenLM, lms: Mapping[str, FrozenLM]) -> None:
        self.maps = {
            name: token_map(reader.tokenizer, lm.tokenizer).to(lm.device)
            for name, lm in lms.items()
        }

    def shared(self, name: str) -> float:
        """Share of the reader's vocabulary that one LM also has."""
        return float((self.maps[name] >= 0).float().mean())

    def loss_sum(self, lm: FrozenLM, raw_BMD: Tensor, carried_BM: Tensor) -> Tensor:
        """Sum over examples of the mean cosine distance between copy slots and embeddings.

        Args:
            raw_BMD: the LM's prefix.
            carried_BM: reader token that each latent carries, -1 where it carries none.
        """
        twin_BM = torch.where(carried_BM >= 0, self.maps[lm.name][carried_BM.clamp_min(0)], -1)
        known_BM = twin_BM >= 0
        embeds_BMD = lm.embed(twin_BM.clamp_min(0)).float()
        distance_BM = (1 - F.cosine_similarity(raw_BMD.float(), embeds_BMD, dim=-1)) * known_BM
        return (distance_BM.sum(1) / known_BM.sum(1).clamp_min(1)).sum()
