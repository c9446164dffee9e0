"""Greedy decoding: with a cache and padding it gives what a full forward per token gives."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from lw_fast.decode import DecodeRules, greedy
from lw_fast.prompt_cache import PromptCache, left_pad

LENGTHS = [7, 3, 12, 5]
STEPS = 10
NAMES = ("llama", "qwen")


def prompts(lm, lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, lm.d_model, generator=generator) for n in lengths]


def never_stops(lm):
    """A stop token that this LM never picks: decoding runs to the end."""
    return dataclasses.replace(lm, stop_ids=frozenset({len(lm.tokenizer) - 1}))


@torch.no_grad()
def by_full_forwards(lm, prompt: torch.Tensor, steps: int, ban: int = 0) -> list[int]:
    """No cache, no padding, all logits: one forward over everything per token."""
    tokens: list[int] = []
    for step in range(steps):
        embeds = torch.cat([prompt, lm.embed(torch.tensor(tokens, dtype=torch.int64))])
        logits = lm.model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        if step < ban:
            logits[list(lm.stop_ids)] = -torch.inf
        token = int(logits.argmax())
        if token in lm.stop_ids:
            return tokens
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_argmax_of_full_forwards(name):
    lm = never_stops(tiny.frozen_lm(name))
    for prompt in prompts(lm):
        (tokens,) = greedy(PromptCache(lm, [prompt]), DecodeRules(STEPS))
        assert tokens == by_full_forwards(lm, prompt, STEPS)
        assert len(tokens) == STEPS and len(set(tokens)) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_equals_one_at_a_time(name):
    lm = never_stops(tiny.frozen_lm(name))
    alone = [greedy(PromptCache(lm, [prompt]), DecodeRules(STEPS))[0] for prompt in prompts(lm)]
    assert greedy(PromptCache(lm, prompts(lm)), DecodeRules(STEPS)) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


@pytest.mark.parametrize("name", NAMES)
def test_equally_long_prompts_equal_one_at_a_time(name):
    """The path without a mask."""
    lm = never_stops(tiny.frozen_lm(name))
    batch = prompts(lm, [6, 6, 6])
    assert left_pad(batch)[1] is None
    alone = [greedy(PromptCache(lm, [prompt]), DecodeRules(STEPS))[0] for prompt in batch]
    assert greedy(PromptCache(lm, batch), DecodeRules(STEPS)) == alone


def test_left_pad():
    rows = [torch.ones(2, 3), torch.full((4, 3), 2.0)]
    embeds, mask = left_pad(rows)
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert embeds[0, :, 0].tolist() == [0, 0, 1, 1]
    assert embeds[1, :, 0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("step", range(6))
def test_stop_tokens_end_a_row_and_are_left_out(step):
    """Wherever the stop token falls; the other rows of the batch go on."""
    lm = never_stops(tiny.frozen_lm("llama"))
    rows = prompts(lm)
    free = greedy(PromptCache(lm, rows), DecodeRules(STEPS))
    stopping = dataclasses.replace(lm, stop_ids=frozenset({free[0][step]}))
    expected = [by_full_forwards(stopping, row, STEPS) for row in rows]
    assert greedy(PromptCache(stopping, rows), DecodeRules(STEPS)) == expected
    assert len(expected[0]) <= step and any(len(row) == STEPS for row in expected)


@pytest.mark.parametrize("ban", [0, 1, 2, 5])
def test_stop_tokens_can_be_banned_for_the_first_steps(ban):
    """protocol=seed: another token is picked instead, and the ban ends when it should."""
    lm = never_stops(tiny.frozen_lm("qwen"))
    row = prompts(lm)[0]
    first, second = greedy(PromptCache(lm, [row]), DecodeRules(2))[0]
    hurried = dataclasses.replace(lm, stop_ids=frozenset({first, second}))
    (tokens,) = greedy(PromptCache(hurried, [row]), DecodeRules(STEPS, ban_stop_steps=ban))
    assert tokens == by_full_forwards(hurried, row, STEPS, ban)
    assert len(tokens) >= ban and not set(tokens) & {first, second}
    if ban == 0:
        assert tokens == []


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_no_more_tokens_than_asked(steps):
    lm = never_stops(tiny.frozen_lm("llama"))
    assert {len(row) for row in greedy(PromptCache(lm, prompts(lm)), DecodeRules(steps))} == {steps}


def test_decoding_stops_once_every_row_has_ended(monkeypatch):
    """It need not run to max_new_tokens: at most a few steps more than the longest row."""
    lm = tiny.frozen_lm("llama")
    lm = dataclasses.replace(lm, stop_ids=frozenset(range(len(lm.tokenizer))))
    calls = []
    embed = type(lm).embed
    monkeypatch.setattr(type(lm), "embed", lambda self, ids: calls.append(1) or embed(self, ids))
    assert greedy(PromptCache(lm, prompts(lm)), DecodeRules(100)) == [[]] * len(LENGTHS)
    assert len(calls) < 5


@pytest.mark.parametrize(
    ("texts", "steps"),
    [
        (["a\n", "bcd\n"], 4),  # both lines are whole within four tokens
        (["a\n", "\n\na b"], 16),  # a line without text is none
        (["a\n", "bc defgh ij\n"], 12),
        (["a\n", "b<eos>"], 4),  # a stop token will do as well
    ],
)
def test_decoding_may_stop_behind_the_first_line(monkeypatch, texts, steps):
    """The LM, scripted here, goes on with `x`; the line that matters is there all the same."""
    lm = tiny.frozen_lm("qwen")
    script = [lm.tokenizer.tokenize(text) for text in texts]
    said = lambda row, step: row[step] if step < len(row) else "x"  # noqa: E731
    asked = []

    def logits(self, hidden_BD):
        asked.append(1)
        tokens = lm.tokenizer.convert_tokens_to_ids([said(row, len(asked) - 1) for row in script])
        return torch.nn.functional.one_hot(torch.tensor(tokens), len(lm.tokenizer)).float()

    monkeypatch.setattr(type(lm), "logits", logits)
    rows = greedy(PromptCache(lm, prompts(lm, [5, 3])), DecodeRules(16, first_line=True))
    assert len(asked) == steps
    for row, text in zip(lm.tokenizer.batch_decode(rows), texts, strict=True):
        assert row.startswith(text.removesuffix("<eos>"))


def test_an_embedded_text_equals_its_token_ids():
    """Replaying the embeddings of a text is the text: the frame is the only difference."""
    lm = never_stops(tiny.frozen_lm("llama"))
    ids = torch.tensor([lm.tokenizer("Context: Ada lives in Rome.\nAnswer:").input_ids])
    with torch.no_grad():
        generated = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
    assert (
        greedy(PromptCache(lm, [lm.embed(ids[0])]), DecodeRules(STEPS))[0]
        == generated[0, ids.shape[1] :].tolist()
    )
