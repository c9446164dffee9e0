"""Evaluation knobs: turning one changes what it should and nothing else."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch

from lw_fast import checkpoint
from lw_fast.chat import SYSTEM, assistant_header, chat_ids
from lw_fast.config import from_flat, to_dict
from lw_fast.decode import DecodeRules, greedy, sample_nucleus
from lw_fast.errors import UserError
from lw_fast.eval_files import CSV_HEADER
from lw_fast.evaluate import evaluate
from lw_fast.model import load_model, split_state
from lw_fast.prompt_cache import PromptCache
from lw_fast.prompts import KINDS, LATENT_KINDS, decode_frame
from lw_fast.sequence import make_frame, tokenize_answers

NUM = 6
NAMES = ("llama", "qwen")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def with_template(tokenizer, template: str = TEMPLATE):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def chatty_model(**changes):
    model = tiny.latent_model(**{"kinds": ",".join(KINDS)} | changes)
    lms = {
        name: dataclasses.replace(lm, tokenizer=with_template(lm.tokenizer))
        for name, lm in model.lms.items()
    }
    return dataclasses.replace(model, lms=lms)


def scores(tmp_path, name="x", model=None, **changes):
    """{kind: {lm: (answers, NLL, length)}} of an evaluation."""
    metrics = evaluate(model or chatty_model(**changes), tiny.examples(NUM), tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").open()]
    return {
        kind: {
            lm: (
                [row[f"{kind}_pred_{lm}"] for row in rows],
                metrics[kind][lm]["nll_token"],
                metrics[kind][lm]["prompt_tokens"],
            )
            for lm in NAMES
        }
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return scores(tmp_path_factory.mktemp("plain"))


def changed_kinds(a, b) -> set[str]:
    return {kind for kind in KINDS if a[kind] != b[kind]}


# ------------------------------------------------------------------------------- what changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"latent_anchor_mode": "none"}, set(LATENT_KINDS)),
        ({"latent_anchor_mode": "chat"}, set(LATENT_KINDS)),
        ({"latent_anchor_mode": "text", "latent_anchor_text": "The answer is"}, set(LATENT_KINDS)),
        ({"latent_anchor_mode": "text"}, set()),
        ({"append_bos_after_prefix": "yes"}, set(LATENT_KINDS)),
        ({"append_bos_after_prefix": "no"}, set()),
        ({"append_bos_after_prefix": "auto"}, set()),
        ({"prefix_gain": 1.5}, set(LATENT_KINDS)),
        ({"calibration": "embed_rms"}, set(LATENT_KINDS)),
        ({"calibration": "fixed"}, set(LATENT_KINDS)),
        ({"calibration": "none"}, set(LATENT_KINDS)),
        ({"prefix_target_rms": 0.5}, set()),
        ({"warm_anchor_text": "A:"}, set(KINDS)),
        ({"min_new_tokens": 1, "eos_ban_steps": 2}, set()),
        ({"first_token_temperature": 3.0, "first_token_top_p": 0.9}, set(LATENT_KINDS)),
        ({"first_token_top_p": 1.0}, set()),
        ({"text_format": "chat"}, set(KINDS) - set(LATENT_KINDS)),
        ({"token_budget_mode": "chat_full"}, {"token_budget"}),
        ({"token_budget_k": 3}, {"token_budget"}),
        ({"debug_print_first": 0}, set()),
        ({"debug_topk": 0}, set()),
    ],
)
def test_a_knob_changes_its_kinds_only(tmp_path, plain, changes, expected):
    assert changed_kinds(plain, scores(tmp_path, **changes)) == expected


def test_shorter_answers_are_the_beginnings_of_longer_ones(tmp_path, plain):
    """max_new_tokens changes answers alone."""
    turned = scores(tmp_path, max_new_tokens=1)
    for kind in KINDS:
        for lm in NAMES:
            (short, *rest), (long, *expected) = turned[kind][lm], plain[kind][lm]
            assert rest == expected
            assert all(b.startswith(a) for a, b in zip(short, long, strict=True))
    assert turned != plain


def test_bos_behind_the_anchor_is_for_tokenizers_that_have_one(tmp_path, plain):
    turned = scores(tmp_path, append_bos_after_prefix="yes")["latent"]
    assert turned["llama"] != plain["latent"]["llama"]
    assert turned["qwen"] == plain["latent"]["qwen"]  # no BOS: a logged no-op
    assert turned["llama"][2] == plain["latent"]["llama"][2] + 1


def test_text_baselines_do_not_get_the_bos_of_training(tmp_path):
    turned = scores(tmp_path, "bos", train_append_bos_after_prefix="yes")
    without = scores(tmp_path, "none")
    assert changed_kinds(turned, without) == set(LATENT_KINDS)


# ------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", NAMES)
def test_by_default_latents_stand_in_the_frame_of_training(name):
    for bos in ("yes", "no", "auto"):
        for text in ("Answer: ", ""):
            settings = tiny.config(train_append_bos_after_prefix=bos, warm_anchor_text=text)
            tokenizer = tiny.frozen_lm(name).tokenizer
            expected = make_frame(tokenizer, settings.sequence)
            assert decode_frame("latent", tokenizer, settings) == expected


def test_a_chat_anchor_is_the_assistant_header():
    tokenizer = with_template(tiny.frozen_lm("llama").tokenizer)
    frame = decode_frame("latent", tokenizer, tiny.config(latent_anchor_mode="chat"))
    assert tokenizer.decode(frame.anchor) == "[assistant]\n"
    assert frame.anchor == assistant_header(tokenizer) and frame.head
    ids, _ = tokenize_answers(tokenizer, "", ["Oslo"], 9, chat=frame.chat)
    assert tokenizer.decode(ids[0]) == "Oslo"  # no space behind a header


def test_chat_prompts_have_one_bos_and_the_original_words():
    tokenizer = with_template(tiny.frozen_lm("llama").tokenizer)
    (ids,) = chat_ids(tokenizer, ["Context: C\nQuestion: Q\nAnswer: "])
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    expected = f"[system]{SYSTEM}\n[user]Context: C\nQuestion: Q\nAnswer: \n[assistant]\n"
    assert tokenizer.decode(ids[1:]) == expected


@pytest.mark.parametrize(("mode", "cut"), [("content_only", "content"), ("chat_full", "prompt")])
def test_token_budget_cuts_the_content_or_the_whole_chat(tmp_path, mode, cut):
    settings = dict(text_format="chat", token_budget_mode=mode, token_budget_k=5)
    lengths = scores(tmp_path, **settings)["token_budget"]
    for name in NAMES:
        tokenizer = with_template(tiny.frozen_lm(name).tokenizer)
        empty = len(chat_ids(tokenizer, [""])[0])
        assert lengths[name][2] == 5 if cut == "prompt" else empty < lengths[name][2] <= empty + 6


@pytest.mark.parametrize(
    "changes",
    [{"text_format": "chat"}, {"latent_anchor_mode": "chat"}, {"token_budget_mode": "chat_full"}],
)
def test_without_a_chat_template_that_is_an_error(tmp_path, changes):
    model = tiny.latent_model(kinds="text,latent,token_budget", **changes)
    with pytest.raises(UserError, match="has no chat template: use text_format=plain"):
        evaluate(model, tiny.examples(2), tmp_path)


def test_a_template_that_refuses_a_system_role_is_an_error():
    template = "{{ raise_exception('System role not supported') }}"
    tokenizer = with_template(tiny.frozen_lm("qwen").tokenizer, template)
    with pytest.raises(UserError, match="System role not supported"):
        chat_ids(tokenizer, ["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_token_top_p": 0.9}, "needs first_token_temperature above 0"),
        ({"first_token_top_p": 0.0}, "first_token_top_p must be above 0"),
        ({"first_token_top_p": 1.5}, "at most 1"),
        ({"first_token_temperature": -1.0}, "must not be negative"),
        ({"latent_anchor_text": "A:"}, "needs latent_anchor_mode=text"),
        ({"latent_anchor_mode": "text", "warm_anchor_text": ""}, "needs latent_anchor_text"),
    ],
)
def test_contradictory_knobs_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**changes)


# ------------------------------------------------------------------------------- first token


def test_sample_nucleus_inverts_the_distribution():
    """Shares of many evenly spaced draws are the probabilities, within the nucleus."""
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    draws = (np.arange(1000) + 0.5) / 1000
    rows = probs.log().expand(1000, -1)
    share = sample_nucleus(rows, 1.0, 1.0, draws).bincount(minlength=4) / 1000
    torch.testing.assert_close(share, probs, atol=0.002, rtol=0)
    share = sample_nucleus(rows, 0.7, 1.0, draws).bincount(minlength=4) / 1000
    expected = torch.tensor([0.0, 2 / 3, 0.0, 1 / 3])
    torch.testing.assert_close(share, expected, atol=0.002, rtol=0)
    assert set(sample_nucleus(rows, 0.01, 1.0, draws).tolist()) == {1}
    assert set(sample_nucleus(rows, 1.0, 0.01, draws).tolist()) == {1}


def test_only_the_first_token_is_sampled_and_the_seed_fixes_it():
    lm = tiny.frozen_lm("llama")
    lm = dataclasses.replace(lm, stop_ids=frozenset({len(lm.tokenizer) - 1}))
    generator = torch.Generator().manual_seed(0)
    prompts = [0.3 * torch.randn(5, lm.d_model, generator=generator) for _ in range(6)]
    rules = DecodeRules(6, first_temperature=5.0, seed=1)
    sampled = greedy(PromptCache(lm, prompts), rules, rules.draws(6))
    assert sampled == greedy(PromptCache(lm, prompts), rules, rules.draws(6))
    other = dataclasses.replace(rules, seed=2)
    assert sampled != greedy(PromptCache(lm, prompts), other, other.draws(6))
    for prompt, tokens in zip(prompts, sampled, strict=True):
        forced = torch.cat([prompt, lm.embed(torch.tensor(tokens[:1]))])
        assert greedy(PromptCache(lm, [forced]), DecodeRules(5)) == [tokens[1:]]


def test_sampling_does_not_depend_on_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("lw_fast.evaluate.TEXT_PROMPT", 20)
    knobs = dict(first_token_temperature=3.0, first_token_top_p=0.95)
    a, b = (scores(tmp_path, str(n), **knobs, chunk_size=n) for n in (1, 8))
    assert [a[kind][lm][0] for kind in KINDS for lm in NAMES] == [
        b[kind][lm][0] for kind in KINDS for lm in NAMES
    ]


# ------------------------------------------------------------------------------- train_stats


def saved_run(folder, lm_dirs, stats):
    model = tiny.latent_model(calibration="none", lm=lm_dirs)
    encoder, adapters = split_state(model.bridge.state_dict())
    config = to_dict(from_flat({**tiny.SETTINGS, "calibration": "none"}, lm_dirs))
    return checkpoint.save(
        folder, "epoch1", encoder=encoder, adapters=adapters, optimizer={}, config=config,
        progress={"epoch": 1, "global_step": 1}, stats=stats,
    )  # fmt: skip


def test_train_stats_gives_the_prefix_the_loudness_of_training(tmp_path, lm_dirs):
    stats = {name: {"rms_mean_cal": 0.25 * (i + 1)} for i, name in enumerate(NAMES)}
    path = saved_run(tmp_path, lm_dirs, stats)
    z = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    model = load_model(path, tiny.CPU, {"calibration": "train_stats"})
    fixed = load_model(path, tiny.CPU, {"calibration": "fixed", "prefix_target_rms": 0.25})
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            prefix = model.bridge.prefix(name, z)
            assert prefix.square().mean().sqrt().item() == pytest.approx(0.25 * (i + 1), rel=1e-4)
        assert torch.equal(model.bridge.prefix("llama", z), fixed.bridge.prefix("llama", z))


@pytest.mark.parametrize("stats", [None, {"llama": {"rms_mean_cal": 1.0}}])
def test_train_stats_without_the_file_says_so(tmp_path, lm_dirs, stats):
    path = saved_run(tmp_path, lm_dirs, stats)
    load_model(path, tiny.CPU)
    with pytest.raises(UserError, match=r"calibration=train_stats: .* has no training_stats\.json"):
        load_model(path, tiny.CPU, {"calibration": "train_stats"})


# ------------------------------------------------------------------------------- files


def test_metrics_csv_has_the_original_columns(tmp_path):
    model = chatty_model(kinds="text,latent,token_budget", protocol="clean,seed", token_budget_k=4)
    metrics = evaluate(model, tiny.examples(NUM), tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_HEADER
    groups = ["text", "latent", "token_budget"]
    expected = [(p + g, lm) for p in ("", "seed_") for g in groups for lm in NAMES]
    found = [(row["group"], row["model"]) for row in rows if "joint" not in row["group"]]
    assert sorted(found) == sorted(expected)
    row = next(r for r in rows if (r["group"], r["model"]) == ("seed_latent", "qwen"))
    assert float(row["F1"]) == metrics["seed"]["latent"]["qwen"]["f1_single"]
    assert float(row["compression"]) == metrics["compression"]["qwen"]
    assert (row["M"], row["samples"], row["token_budget_k"]) == ("6", str(NUM), "4")
    assert {"joint", "seed_joint"} <= {r["group"] for r in rows}


def test_chat_prompts_are_written_as_they_were_used(tmp_path):
    model = chatty_model(kinds="text", text_format="chat")
    metrics = evaluate(model, tiny.examples(NUM), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    for name in NAMES:
        texts = [row[f"prompt_{name}_chat"] for row in rows]
        for text, row in zip(texts, rows, strict=True):
            assert f"[system]{SYSTEM}\n[user]{row['prompt_raw']}Answer: \n[assistant]\n" in text
        ids = model.lms[name].tokenizer(texts, add_special_tokens=False).input_ids
        mean = sum(map(len, ids)) / NUM
        assert metrics["text"][name]["prompt_tokens"] == pytest.approx(mean)
    evaluate(chatty_model(kinds="text"), tiny.examples(1), tmp_path)
    assert "_chat" not in (tmp_path / "predictions.jsonl").read_text()


def test_the_original_json_keys(tmp_path):
    metrics = evaluate(chatty_model(), tiny.examples(NUM), tmp_path)
    assert metrics.keys() >= set(
        "samples max_new_tokens latent_len device dtype avg_prompt_tokens compression "
        "payload_bytes wire text latent token_budget joint debug oracle dataset".split()
    )
    assert metrics["wire"]["latent_bytes"] == 2 * 6 * 16


def test_peeks_are_the_first_answers_and_first_steps(tmp_path):
    model = chatty_model(debug_print_first=2, debug_topk=4)
    debug = evaluate(model, tiny.examples(NUM), tmp_path)["debug"]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    for name in NAMES:
        shown = debug[name]["first_generations"]
        assert [s["answer"] for s in shown] == [r[f"latent_pred_{name}"] for r in rows[:2]]
        assert [s["gold"] for s in shown] == [r["gold"] for r in rows[:2]]
        for step in debug[name]["first_step"]:
            p = [candidate["p"] for candidate in step]
            assert len(p) == 4 and p == sorted(p, reverse=True) and 0 < sum(p) <= 1
    assert len(debug["llama"]["first_step"]) == 2
