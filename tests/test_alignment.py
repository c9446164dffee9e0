"""Tokens of the reader and their twins in another vocabulary; the pull of copy slots to them."""

from __future__ import annotations

import pytest
import tiny
import torch

from lw_fast.alignment import Alignment, token_map
from lw_fast.lm_sources import load_tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizer("a", "nano:llama"), load_tokenizer("b", "nano:qwen")


def test_mapped_tokens_are_the_same_text(tokenizers):
    """Both ways, and neither everything nor nothing is shared."""
    for reader, other in (tokenizers, tokenizers[::-1]):
        ids = token_map(reader, other)
        known = (ids >= 0).nonzero().flatten().tolist()
        assert 100 < len(known) < len(ids)
        for i in known:
            assert reader.convert_ids_to_tokens(i) == other.convert_ids_to_tokens(int(ids[i]))
        missing = set((ids < 0).nonzero().flatten().tolist())
        texts = set(other.get_vocab())
        assert not {reader.convert_ids_to_tokens(i) for i in missing} & texts


def test_a_tokenizer_maps_to_itself(tokenizers):
    ids = token_map(tokenizers[0], tokenizers[0])
    assert ids.tolist() == list(range(len(ids)))


def test_loss_is_zero_at_the_embeddings_and_ignores_the_rest():
    """The mean over slots that have a twin; loudness, empty slots and global slots do not count."""
    model = tiny.latent_model()
    lm, alignment = model.lms["llama"], model.bridge.alignment
    twin_of = alignment.maps["llama"]
    known = (twin_of >= 0).nonzero().flatten()[5:8].tolist()
    copied = torch.tensor([[known[0], known[1], -1, -1, -1], [known[2], -1, -1, -1, -1]])
    raw = torch.randn(2, 5, lm.d_model)
    for b, k in (0, 0), (0, 1), (1, 0):
        raw[b, k] = 7 * lm.embed(twin_of[copied[b, k]])
    assert alignment.loss_sum(lm, raw, copied).item() == pytest.approx(0.0, abs=1e-5)
    raw[0, 0] *= -1  # cosine -1: distance 2 in one of two slots
    assert alignment.loss_sum(lm, raw, copied).item() == pytest.approx(1.0, abs=1e-5)
    twin_of[known[0]] = -1  # without a twin the slot has no target
    assert alignment.loss_sum(lm, raw, copied).item() == pytest.approx(0.0, abs=1e-5)


def test_descent_turns_slots_into_embeddings():
    model = tiny.latent_model()
    lm, alignment = model.lms["qwen"], model.bridge.alignment
    known = (alignment.maps["qwen"] >= 0).nonzero().flatten()[:4]
    raw = torch.randn(1, 4, lm.d_model).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.1)
    before = alignment.loss_sum(lm, raw, known[None]).item()
    for _ in range(100):
        optimizer.zero_grad()
        alignment.loss_sum(lm, raw, known[None]).backward()
        optimizer.step()
    assert alignment.loss_sum(lm, raw, known[None]).item() < 0.05 * before


def test_shared_share_is_told():
    reader = tiny.latent_model().lms["qwen"]
    assert Alignment(reader, {"qwen": reader}).shared("qwen") == 1.0
