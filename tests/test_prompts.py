"""Prompt kinds: what the frozen LM reads in each, token by token."""

from __future__ import annotations

import pytest
import tiny
import torch

from lw_fast.prompts import KINDS, Latents, make_prompts, text_prompt
from lw_fast.sequence import make_frame

NUM = 6


@pytest.fixture(scope="module")
def model():
    return tiny.latent_model()


@pytest.fixture(scope="module")
def latents():
    z = torch.randn(NUM, 6, 16, generator=torch.Generator().manual_seed(0))
    soft = {"llama": torch.ones(6, 32), "qwen": torch.ones(6, 24)}
    return Latents(z, [f"span {i}" for i in range(NUM)], soft)


def prompts(model, name: str, kind: str, latents, **options):
    lm = model.lms[name]
    frame = make_frame(lm.tokenizer, model.config.sequence)
    options = dict(gain=1.0, token_budget_k=4) | options
    made = make_prompts(
        kind, lm, frame, tiny.examples(NUM), latents, model.bridge.eval(), **options
    )
    with torch.no_grad():
        return lm, frame, made, made.embeds(range(NUM))


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("kind", ["text", "token_budget", "span_text", "no_context"])
def test_text_kinds(model, latents, name, kind):
    """[BOS where the tokenizer adds one][the text][anchor], as the LM's own embeddings."""
    lm, frame, made, embeds = prompts(model, name, kind, latents)
    for i, example in enumerate(tiny.examples(NUM)):
        text = {
            "text": text_prompt(example.context, example.question),
            "token_budget": text_prompt(example.context, example.question),
            "span_text": f"Context: span {i}\nQuestion: {example.question}\n",
            "no_context": f"Question: {example.question}\n",
        }[kind]
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        ids = ids[:4] if kind == "token_budget" else ids
        whole = torch.tensor([*frame.head, *ids, *frame.anchor])
        assert torch.equal(embeds[i], lm.embed(whole))
        assert made.lengths[i] == len(whole)


def test_the_text_prompt_is_the_one_the_nano_pair_was_trained_on():
    from lw_fast import nano

    assert text_prompt("C", "Q") == nano.PROMPT.format(context="C", question="Q")


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_latent_prompts(model, latents, name, gain):
    """The calibrated prefix of each example, in the frame of training."""
    lm, frame, made, embeds = prompts(model, name, "latent", latents, gain=gain)
    with torch.no_grad():
        prefix = model.bridge.prefix(name, latents.z_NMZ) * gain
        head, anchor = (lm.embed(torch.tensor(t).long()) for t in (frame.head, frame.anchor))
    for i in range(NUM):
        torch.testing.assert_close(embeds[i], torch.cat([head, prefix[i], anchor]))
    assert made.lengths == [len(embeds[0])] * NUM


@pytest.mark.parametrize("num", [2, 3, NUM])
def test_shuffled_is_always_another_examples_latent(model, latents, num):
    """Every example gets one other, none twice."""
    lm = model.lms["qwen"]
    frame = make_frame(lm.tokenizer, model.config.sequence)
    some = Latents(latents.z_NMZ[:num], None)
    made = {
        kind: make_prompts(
            kind, lm, frame, tiny.examples(num), some, model.bridge, gain=1.0, token_budget_k=4
        ).embeds(range(num))
        for kind in ("latent", "shuffled")
    }
    taken = [
        [j for j in range(num) if torch.equal(made["shuffled"][i], made["latent"][j])]
        for i in range(num)
    ]
    assert sorted(j for js in taken for j in js) == list(range(num))
    assert all(js != [i] for i, js in enumerate(taken))


def test_embeddings_come_on_demand_and_in_the_asked_order(model, latents):
    for kind in KINDS:
        *_, made, embeds = prompts(model, "llama", kind, latents)
        with torch.no_grad():
            again = made.embeds([4, 1])
        torch.testing.assert_close(again, [embeds[4], embeds[1]])
