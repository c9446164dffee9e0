"""The tuned soft prompt before the full text: where it stands, what it learns, how it is kept."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import tiny
import torch

from lw_fast import text_tuned
from lw_fast.chat import SYSTEM
from lw_fast.config import RESUMABLE_CHANGES
from lw_fast.errors import UserError
from lw_fast.evaluate import evaluate
from lw_fast.prompts import Latents, decode_frame, make_prompts, text_prompt
from lw_fast.text_tuned import key_facts, start_ids, tune, tuned_prompts

NUM = 6
NAMES = ("llama", "qwen")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("LW_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text_tuned"


@pytest.fixture
def settings(qa_file):
    return dict(
        dataset=str(qa_file), eval_dataset=str(qa_file), kinds="text,text_tuned",
        text_tuned_steps=3, warmup_steps=0,
    )  # fmt: skip


# ------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("text_format", ["plain", "chat"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_soft_prompt_stands_behind_bos_and_before_the_text(name, text_format):
    """The rest is the kind `text`, embedding by embedding."""
    model = tiny.latent_model(text_format=text_format)
    lm, examples = model.lms[name], tiny.examples(NUM)
    if text_format == "chat":
        lm.tokenizer = copy.deepcopy(lm.tokenizer)
        lm.tokenizer.chat_template = TEMPLATE
    soft_MD = torch.randn(5, lm.d_model)
    latents = Latents(torch.empty(0), None, {name: soft_MD})
    made = {}
    for kind in ("text", "text_tuned"):
        frame = decode_frame(kind, lm.tokenizer, model.config)
        prompts = make_prompts(
            kind, lm, frame, examples, latents, model.bridge, gain=1.0, token_budget_k=0
        )
        made[kind] = prompts.embeds(range(NUM))
        assert prompts.lengths == [len(embeds) for embeds in made[kind]]
    bos = int(name == "llama")
    for plain, tuned in zip(made["text"], made["text_tuned"], strict=True):
        assert torch.equal(tuned, torch.cat([plain[:bos], soft_MD, plain[bos:]]))
        if bos:
            assert torch.equal(tuned[0], lm.embed(torch.tensor(lm.tokenizer.bos_token_id)))


def test_a_kind_without_its_soft_prompt_is_an_error():
    model = tiny.latent_model()
    lm = model.lms["qwen"]
    frame, latents = decode_frame("text", lm.tokenizer, model.config), Latents(torch.empty(0), None)
    with pytest.raises(KeyError, match="qwen"):
        make_prompts(
            "text_tuned", lm, frame, tiny.examples(2), latents, model.bridge,
            gain=1.0, token_budget_k=0,
        )  # fmt: skip


@pytest.mark.parametrize("num", [3, 500])
def test_it_starts_as_an_instruction(num):
    lm = tiny.frozen_lm("llama")
    words = lm.tokenizer(SYSTEM, add_special_tokens=False).input_ids
    ids = start_ids(lm, num)
    assert len(ids) == num and ids == [words[i % len(words)] for i in range(num)]


# ------------------------------------------------------------------------------- tuning


def mean_nll(lm, prompt_MD, examples) -> float:
    """NLL per answer token and EOS, one example at a time, one token at a time, all logits."""
    tok, nll = lm.tokenizer, []
    for example in examples:
        text = text_prompt(example.context, example.question)
        head = [tok.bos_token_id] if lm.name == "llama" else []
        anchor = tok("Answer:", add_special_tokens=False).input_ids
        answer = tok(f"Answer: {example.answers[0]}", add_special_tokens=False).input_ids
        answer = answer[len(anchor) :]
        ids = [*tok(text, add_special_tokens=False).input_ids, *anchor]
        for step, target in enumerate([*answer, tok.eos_token_id]):
            head_HD = lm.embed(torch.tensor(head, dtype=torch.int64))
            rest_SD = lm.embed(torch.tensor([*ids, *answer[:step]]))
            embeds = torch.cat([head_HD, prompt_MD, rest_SD])[None]
            nll.append(-lm.model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)[target])
    return torch.stack(nll).mean()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_answers_token_by_token(name, monkeypatch):
    """Of the mean over all tokens of the batch, however many passes it takes."""
    lm, examples = tiny.frozen_lm(name), tiny.examples(5)
    config = tiny.config()
    frame = decode_frame("text_tuned", lm.tokenizer, config)
    prompt = 0.3 * torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(0))
    naive = prompt.clone().requires_grad_()
    expected = mean_nll(lm, naive, examples)
    expected.backward()
    for positions in (10**6, 150):
        monkeypatch.setattr(text_tuned, "POSITIONS", positions)
        leaf = prompt.clone().requires_grad_()
        got = text_tuned._backward(lm, frame, examples, leaf, 32)
        assert float(got) == pytest.approx(expected.item(), rel=1e-5)
        assert (leaf.grad - naive.grad).abs().max() <= 1e-5 * naive.grad.norm()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_touches_nothing_else(name, settings):
    lm, examples = tiny.frozen_lm(name), tiny.examples(16)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    random_state = torch.get_rng_state()
    settings = settings | dict(text_tuned_steps=30, text_tuned_lr=0.3)
    tuned = tune(lm, examples, tiny.config(**settings))
    start = lm.embed(torch.tensor(start_ids(lm, 6)))
    assert tuned.prompt_MD.shape == (6, lm.d_model) and tuned.steps == 30
    with torch.no_grad():
        first, last = (mean_nll(lm, p, examples[:4]) for p in (start, tuned.prompt_MD))
    assert last < 0.9 * first
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert not any(p.grad is not None for p in lm.model.parameters())
    again = tune(lm, examples, tiny.config(**settings))
    assert torch.equal(again.prompt_MD, tuned.prompt_MD)


def test_by_default_it_takes_as_many_steps_as_the_latent():
    lm, examples = tiny.frozen_lm("qwen"), tiny.examples(21)
    config = tiny.config(batch_size=4, epochs=2, text_tuned_steps=0)
    assert tune(lm, examples, config).steps == 10  # 5 whole batches, twice


def test_too_few_questions_are_one_line():
    with pytest.raises(UserError, match="do not fill a batch"):
        tune(tiny.frozen_lm("qwen"), tiny.examples(3), tiny.config(batch_size=8))


def test_a_loss_that_is_not_finite_is_an_error(settings):
    lm = tiny.frozen_lm("llama")
    torch.nn.init.constant_(lm.model.base_model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        tune(lm, tiny.examples(8), tiny.config(**settings))


# ------------------------------------------------------------------------------- cache


def test_tuned_once_and_read_back(settings, cache, monkeypatch):
    model = tiny.latent_model(**settings)
    first = tuned_prompts(model)
    files = sorted(path.name for path in cache.iterdir())
    assert [name.partition("-")[0] for name in files] == list(NAMES)
    monkeypatch.setattr(text_tuned, "tune", None)
    again = tuned_prompts(model)
    for name in NAMES:
        assert torch.equal(first[name].prompt_MD, again[name].prompt_MD)
        assert again[name].steps == 3 and again[name].seconds == first[name].seconds


@pytest.mark.parametrize("damage", ["cut", "other key"])
def test_a_file_that_does_not_fit_is_tuned_again(settings, cache, caplog, damage):
    model = tiny.latent_model(**settings)
    first = tuned_prompts(model)["qwen"]
    (path,) = cache.glob("qwen-*")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-20])
    else:
        at = data.index(b'"key":"') + 7
        path.write_bytes(data[:at] + b"0" * 64 + data[at + 64 :])
    with caplog.at_level(logging.WARNING):
        again = tuned_prompts(model)["qwen"]
    assert "tuning again" in caplog.text
    assert torch.equal(first.prompt_MD, again.prompt_MD)
    assert path.read_bytes()[:8] == data[:8] and len(path.read_bytes()) == len(data)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"text_tuned_steps": 4}, False),
        ({"text_tuned_lr": 0.5}, False),
        ({"latent_len": 7}, False),
        ({"batch_size": 4}, False),
        ({"seed": 1}, False),
        ({"warm_anchor_text": "A:"}, False),
        ({"max_answer_tokens": 2}, False),
        ({"chunk_size": 3}, True),
        ({"max_new_tokens": 9}, True),
        ({"kl_weight": 1.0}, True),
        ({"lr": 0.1}, True),
    ],
)
def test_the_key_is_what_decides_the_result(settings, changes, same):
    lm, examples = tiny.frozen_lm("llama"), tiny.examples(9)
    facts = key_facts(lm, examples, tiny.config(**settings))
    other = key_facts(lm, examples, tiny.config(**settings | changes))
    assert (json.dumps(facts) == json.dumps(other)) == same


def test_the_key_knows_the_weights_and_the_questions(settings):
    config, examples = tiny.config(**settings), tiny.examples(9)
    facts = key_facts(tiny.frozen_lm("llama"), examples, config)
    assert facts != key_facts(tiny.frozen_lm("llama", seed=5), examples, config)
    assert facts != key_facts(tiny.frozen_lm("llama"), examples[:-1], config)


# ------------------------------------------------------------------------------- evaluation


def test_evaluation_scores_it_like_the_others(settings, tmp_path):
    model = tiny.latent_model(**settings)
    metrics = evaluate(model, tiny.examples(NUM), tmp_path / "eval")
    for name in NAMES:
        assert metrics["text_tuned"][name].keys() == metrics["text"][name].keys()
        length = [metrics[kind][name]["prompt_tokens"] for kind in ("text", "text_tuned")]
        assert length[1] == length[0] + 6
        assert metrics["tuning"][name]["steps"] == 3
        assert metrics["text_tuned"][name]["nll_token"] != metrics["text"][name]["nll_token"]
    rows = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").open()]
    assert all(f"text_tuned_pred_{name}" in row for row in rows for name in NAMES)
    assert "\ntext_tuned,llama," in (tmp_path / "eval" / "metrics.csv").read_text()


def test_what_was_not_asked_for_is_not_tuned(settings, tmp_path, cache):
    model = tiny.latent_model(**settings | dict(kinds="text"))
    metrics = evaluate(model, tiny.examples(NUM), tmp_path / "eval")
    assert "tuning" not in metrics and not cache.exists()


def test_the_benchmark_has_its_rows(settings, tmp_path):
    from benchmarks.accuracy import score_rows

    metrics = evaluate(tiny.latent_model(**settings), tiny.examples(NUM), tmp_path / "eval")
    rows = list(score_rows(metrics, {"pair": "tiny"}, {}))
    cases = {row["case"] for row in rows if row["metric"] == "f1"}
    assert {f"pair=tiny lm={name} kind=text_tuned" for name in NAMES} <= cases
    assert len(cases) == 4


def test_the_knobs_may_change_when_a_run_resumes():
    assert {"text_tuned_steps", "text_tuned_lr"} <= RESUMABLE_CHANGES
    for bad in ({"text_tuned_steps": -1}, {"text_tuned_lr": 0.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            tiny.config(**bad)
