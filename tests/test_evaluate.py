"""Evaluation of tiny models: what is written, that it repeats itself, and that batches agree."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from lw_fast.data import Example
from lw_fast.errors import UserError
from lw_fast.evaluate import Scorer, encode, evaluate, read_prompts, run_kind, table_rows
from lw_fast.prompts import KINDS, make_prompts
from lw_fast.scoring import score
from lw_fast.sequence import make_frame

NUM = 10
KIND_KEYS = {
    "em", "f1", "em_single", "f1_single", "nll_token", "first_token_top1", "first_token_top5",
    "unique_predictions", "most_frequent_share", "answers_collapsed", "prompt_tokens",
    "wall_clock_sec",
}  # fmt: skip
ALL_KINDS = ",".join(KINDS)


def run(out_dir, examples=None, **changes):
    changes = {"kinds": ALL_KINDS, "protocol": "clean"} | changes
    model = tiny.latent_model(**changes)
    metrics = evaluate(model, examples or tiny.examples(NUM), out_dir)
    written = json.loads((out_dir / "metrics.json").read_text())
    rows = [json.loads(line) for line in (out_dir / "predictions.jsonl").open()]
    return metrics, written, rows


def without_times(node):
    """Metrics apart from those that no two runs share."""
    if isinstance(node, dict):
        return {k: without_times(v) for k, v in node.items() if not k.endswith("_sec")}
    return node


# ------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every kind under both protocols."""
    return run(tmp_path_factory.mktemp("eval"), protocol="clean,seed", max_new_tokens=4)


def test_metrics_of_every_kind_and_protocol(both):
    metrics, written, _ = both
    assert written == metrics
    for table in (metrics, metrics["seed"]):
        for kind in KINDS:
            assert table[kind].keys() == {"llama", "qwen"}
            for scores in table[kind].values():
                assert scores.keys() == KIND_KEYS
                assert all(math.isfinite(value) for value in scores.values())
        golds = {"em", "f1", "em_single", "f1_single"}
        assert table["joint"].keys() == golds | {"agreement", "oracle_f1"}
        assert table["oracle"].keys() == golds
        assert table["oracle"]["f1"] == table["joint"]["oracle_f1"]


def test_metrics_about_the_run(both):
    metrics, _, _ = both
    assert metrics["samples"] == NUM and metrics["latent_len"] == 6 and metrics["d_z"] == 16
    assert metrics["payload_bytes"]["fp32"] == 4 * 6 * 16
    assert metrics["payload_bytes"]["fp16"] == 2 * 6 * 16
    for name in ("llama", "qwen"):
        tokens = metrics["avg_prompt_tokens"][name]
        assert metrics["compression"][name] == pytest.approx(tokens / 6)
        prefix = metrics["diagnostics"]["prefix"][name]
        assert prefix.keys() == {"prefix_std", "embed_rms", "adapter_scale", "raw_rms"}
        assert prefix["prefix_std"] == pytest.approx(prefix["embed_rms"], rel=0.1)
        # latents, BOS and anchor
        assert metrics["latent"][name]["prompt_tokens"] < metrics["text"][name]["prompt_tokens"]
    assert metrics["span"].keys() == {"em", "f1"}
    assert metrics["dtype"] == {"llama": "float32", "qwen": "float32"}


def test_predictions_hold_every_prediction_with_its_golds(both):
    _, _, rows = both
    assert [row["id"] for row in rows] == [e.id for e in tiny.examples(NUM)]
    expected = {"id", "question", "prompt_raw", "gold", "golds", "span_pred"}
    for kind in KINDS:
        for name in ("llama", "qwen"):
            expected |= {f"{kind}_pred_{name}", f"seed_{kind}_pred_{name}"}
    assert all(row.keys() == expected for row in rows)
    assert [row["golds"] for row in rows] == [list(e.answers) for e in tiny.examples(NUM)]


def test_scores_are_those_of_the_written_predictions(both):
    """The table can be recomputed from predictions.jsonl."""
    metrics, _, rows = both
    for kind in KINDS:
        for name in ("llama", "qwen"):
            predictions = [row[f"{kind}_pred_{name}"] for row in rows]
            expected = score(predictions, [row["golds"] for row in rows]).means()
            assert expected.items() <= metrics[kind][name].items()


@pytest.mark.parametrize("kinds", ["latent", "text,no_context", "shuffled , latent"])
def test_what_was_not_run_is_absent(tmp_path, kinds):
    metrics, _, rows = run(tmp_path, kinds=kinds)
    ran = {kind.strip() for kind in kinds.split(",")}
    assert {kind for kind in KINDS if kind in metrics} == ran
    assert "seed" not in metrics and ("joint" in metrics) == ("latent" in ran)
    written = {key.split("_pred_")[0] for key in rows[0] if "_pred_" in key}
    assert written == ran
    assert {row[1] for row in table_rows(metrics, ["llama", "qwen"])} == ran


def test_without_a_span_head_there_is_no_span(tmp_path):
    metrics, _, rows = run(tmp_path, kinds="latent", encoder_type="byte_seed")
    assert "span" not in metrics and "span_pred" not in rows[0]


@pytest.mark.parametrize("encoder_type", ["byte", "lm"])
def test_predicted_spans_are_text_of_the_context(tmp_path, encoder_type):
    _, _, rows = run(tmp_path, kinds="latent", encoder_type=encoder_type)
    for row, example in zip(rows, tiny.examples(NUM), strict=True):
        assert row["span_pred"] in f" {example.context}"
    assert any(row["span_pred"] for row in rows)


def test_only_the_seed_protocol(tmp_path):
    metrics, _, rows = run(tmp_path, kinds="latent", protocol="seed")
    assert "latent" in metrics["seed"] and "latent" not in metrics
    assert any(key.startswith("seed_latent_pred") for key in rows[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": "text,latnet"}, "kinds must name some of text, .*: 'text,latnet'"),
        ({"kinds": " , "}, "kinds must name some of text"),
        ({"kinds": "span_text", "span_head": False}, "needs an encoder with a span head"),
        ({"kinds": "span_text", "encoder_type": "byte_seed"}, "needs encoder_type byte or lm"),
        ({"protocol": ""}, "protocol must name some of clean, seed"),
        ({"protocol": "clean,strict"}, "protocol must name some of clean, seed"),
    ],
)
def test_bad_kinds_and_protocols(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- repeatable


def test_two_evaluations_are_byte_identical(tmp_path):
    """Same seed, same files, apart from the times."""
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # whatever happened before must not matter
        run(tmp_path / name, protocol="clean,seed")
    a, b = ((tmp_path / n / "predictions.jsonl").read_bytes() for n in "ab")
    assert a == b
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab")
    assert without_times(a) == without_times(b) != a


def test_the_batch_size_of_evaluation_does_not_matter(tmp_path, monkeypatch):
    """Predictions agree exactly; log-likelihoods up to rounding."""
    from lw_fast import evaluate as module

    monkeypatch.setattr(module, "TEXT_PROMPT", 12)  # tiny prompts are short
    sizes, cache = [], module.PromptCache
    monkeypatch.setattr(module, "PromptCache", lambda lm, p: sizes.append(len(p)) or cache(lm, p))
    results, largest = [], []
    for chunk_size in (1, 4, 64):
        sizes.clear()
        results.append(run(tmp_path / str(chunk_size), chunk_size=chunk_size))
        largest.append((max(sizes), min(sizes)))
    assert largest[0] < largest[1] <= largest[2] == (NUM, NUM) and min(largest[1]) < NUM
    for metrics, _, rows in results[1:]:
        assert rows == results[0][2]
        for kind in KINDS:
            for name in ("llama", "qwen"):
                nll = [m[kind][name]["nll_token"] for m in (metrics, results[0][0])]
                assert nll[0] == pytest.approx(nll[1], rel=1e-5)


def test_evaluation_leaves_dropout_off(tmp_path):
    settings = dict(encoder_dropout=0.5, kinds="latent")
    model = tiny.latent_model(**settings)
    model.bridge.train()
    evaluate(model, tiny.examples(NUM), tmp_path / "a")
    run(tmp_path / "b", **settings)
    a, b = ((tmp_path / n / "predictions.jsonl").read_bytes() for n in "ab")
    assert a == b


# ------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("kind", ["text", "latent", "no_context"])
@torch.no_grad()
def test_nll_equals_a_loop_without_padding(kind, monkeypatch):
    """Teacher-forced NLL of each gold, and first-token hits, one example at a time."""
    monkeypatch.setattr("lw_fast.evaluate.TEXT_PROMPT", 20)
    model, examples = tiny.latent_model(chunk_size=4), tiny.examples(NUM)
    model.bridge.eval()
    latents = encode(model, examples)
    for lm in model.lms.values():
        result = run_kind(kind, "clean", lm, model, examples, latents)
        frame = make_frame(lm.tokenizer, model.config.sequence)
        prompts = make_prompts(
            kind, lm, frame, examples, latents, model.bridge, gain=1.0, token_budget_k=6
        )
        for i, example in enumerate(examples):
            text = f"Answer: {example.answers[0]}"
            ids = lm.tokenizer(text, add_special_tokens=False).input_ids[len(frame.anchor) :]
            (prompt,) = prompts.embeds([i])
            whole = torch.cat([prompt, lm.embed(torch.tensor(ids))])[None]
            logits = lm.model(inputs_embeds=whole).logits[0, len(prompt) - 1 : -1]
            nll = -logits.log_softmax(-1)[range(len(ids)), ids]
            assert result.scores.nll[i] == pytest.approx(nll.sum().item(), rel=1e-5)
            assert result.scores.tokens[i] == len(ids)
            rank = (logits[0] > logits[0, ids[0]]).sum()
            assert result.scores.first_top1[i] == (rank == 0)
            assert result.scores.first_top5[i] == (rank < 5)


def scored(lm, frame, prompts, answers, model, count_eos):
    scorer = Scorer(lm, frame, answers, model.config, count_eos=count_eos)
    for index, read in read_prompts(lm, prompts, model.config.eval.chunk_size):
        scorer.score(index, read)
    return scorer.scores


def test_eos_counts_only_where_asked():
    model, examples = tiny.latent_model(), tiny.examples(4)
    model.bridge.eval()
    lm, latents = model.lms["llama"], encode(model, examples)
    frame = make_frame(lm.tokenizer, model.config.sequence)
    prompts = make_prompts(
        "text", lm, frame, examples, latents, model.bridge, gain=1.0, token_budget_k=6
    )
    golds = [example.answers[0] for example in examples]
    without, with_eos = (scored(lm, frame, prompts, golds, model, flag) for flag in (False, True))
    assert (with_eos.tokens == without.tokens + 1).all()
    assert (with_eos.nll > without.nll).all()
    assert with_eos.first_top1.tolist() == without.first_top1.tolist()


def test_the_seed_protocol_bans_stop_tokens(tmp_path, monkeypatch):
    """min_new_tokens and eos_ban_steps: an LM that wants to stop at once must go on."""
    from lw_fast import evaluate as module

    seen = []
    greedy = module.greedy
    monkeypatch.setattr(
        module,
        "greedy",
        lambda p, rules, *rest: seen.append(rules) or greedy(p, rules, *rest),
    )
    run(tmp_path, kinds="latent", protocol="clean,seed", min_new_tokens=3, eos_ban_steps=5)
    assert {(r.max_new_tokens, r.ban_stop_steps) for r in seen} == {(3, 0), (3, 5)}
    seen.clear()
    run(
        tmp_path, kinds="latent", protocol="seed", min_new_tokens=7, eos_ban_steps=5,
        max_new_tokens=7,
    )  # fmt: skip
    assert {r.ban_stop_steps for r in seen} == {7}


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"token_budget_k": 1000}, True),
        ({}, False),
        ({"token_budget_k": 1000, "kinds": "latent"}, False),
    ],
)
def test_a_budget_that_cuts_nothing_says_so(tmp_path, caplog, changes, warned):
    metrics, _, _ = run(tmp_path, **{"kinds": "text,token_budget"} | changes)
    assert ("token_budget is text for qwen: no text has over 1000" in caplog.text) is warned
    if warned:
        same = ("f1", "nll_token", "prompt_tokens")
        text, budget = metrics["text"]["qwen"], metrics["token_budget"]["qwen"]
        assert [text[name] for name in same] == [budget[name] for name in same]


def test_unanswerable_questions_are_scored_too(tmp_path):
    """No gold: the empty prediction is the right one, and the files stay whole."""
    examples = [*tiny.examples(3), Example("none", "Ada lives in Rome.", "Who left?", (), -1)]
    metrics, _, rows = run(tmp_path, examples)
    assert metrics["samples"] == 4
    assert rows[3]["gold"] == "" and rows[3]["golds"] == []
    answered, _, _ = run(tmp_path / "answered", examples[:3])
    for kind in ("latent", "text", "no_context"):  # no answer, no token: not a miss
        for name in ("first_token_top1", "first_token_top5", "nll_token"):
            expected = answered[kind]["llama"][name]
            assert metrics[kind]["llama"][name] == pytest.approx(expected, rel=1e-5)
    empty = {**dict.fromkeys(("em", "f1"), 1.0), "em_single": 1.0, "f1_single": 1.0}
    assert score([""], [()]).means() == empty and score(["Rome"], [()]).means()["f1"] == 0.0
    assert all(math.isfinite(metrics[k]["llama"]["nll_token"]) for k in KINDS)


def test_one_question_alone(tmp_path):
    """No pairwise cosine, no other latent to shuffle in: both absent, and the JSON is strict."""
    metrics, _, _ = run(tmp_path, tiny.examples(1), kinds="latent,shuffled")
    assert "shuffled" not in metrics
    assert "z_cosine" not in metrics["diagnostics"]
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)


# ------------------------------------------------------------------------------- joint, diagnostics


def test_joint_pick_has_the_best_summed_likelihood(tmp_path):
    """Recomputed from the predictions: the answer that both LMs together find likelier."""
    model, examples = tiny.latent_model(kinds="latent"), tiny.examples(NUM)
    metrics = evaluate(model, examples, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    latents = encode(model, examples)
    total = {}
    for candidate in ("llama", "qwen"):
        answers = [row[f"latent_pred_{candidate}"] for row in rows]
        total[candidate] = 0
        for lm in model.lms.values():
            frame = make_frame(lm.tokenizer, model.config.sequence)
            prompts = make_prompts(
                "latent", lm, frame, examples, latents, model.bridge, gain=1.0, token_budget_k=0
            )
            total[candidate] += scored(lm, frame, prompts, answers, model, True).nll
    picked = [
        row["latent_pred_llama" if a <= b else "latent_pred_qwen"]
        for row, a, b in zip(rows, total["llama"], total["qwen"], strict=True)
    ]
    expected = score(picked, [row["golds"] for row in rows]).means()
    assert metrics["joint"]["f1"] == pytest.approx(expected["f1"])
    best = max(metrics["latent"][name]["f1"] for name in ("llama", "qwen"))
    assert metrics["joint"]["oracle_f1"] >= max(best, metrics["joint"]["f1"])


def test_collapse_alarm(tmp_path):
    """Equal latents for all sources raise it; the latents of a fresh encoder do not."""
    metrics, _, _ = run(tmp_path / "fresh", kinds="latent")
    assert not metrics["diagnostics"]["z_collapsed"]
    model = tiny.latent_model(kinds="latent")
    torch.nn.init.zeros_(model.bridge.encoder.head.out[1].weight)
    torch.nn.init.ones_(model.bridge.encoder.head.out[1].bias)
    found = evaluate(model, tiny.examples(NUM), tmp_path / "dead")["diagnostics"]
    assert found["z_collapsed"] and found["z_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_alarms_are_flags_and_warnings(tmp_path, monkeypatch, caplog):
    """The same wrong answer everywhere, in every kind and protocol, and latents that are alike."""
    from lw_fast import evaluate as module

    model = tiny.latent_model(kinds="text,latent", protocol="clean,seed")
    evaluate(model, tiny.examples(NUM), tmp_path / "fresh")
    assert "alarm" not in caplog.text
    torch.nn.init.zeros_(model.bridge.encoder.head.out[1].weight)
    torch.nn.init.ones_(model.bridge.encoder.head.out[1].bias)
    the = lambda lm, prompts, *rest: ["the the"] * len(prompts.lengths)  # noqa: E731
    monkeypatch.setattr(module, "generate", the)
    metrics = evaluate(model, tiny.examples(NUM), tmp_path / "dead")
    for table in (metrics, metrics["seed"]):
        for kind in ("text", "latent"):
            assert all(scores["answers_collapsed"] for scores in table[kind].values())
    lines = [record.getMessage() for record in caplog.records if "alarm" in record.getMessage()]
    assert len(lines) == 1 + 2 * 2 * 2
    assert "latents of different questions are alike" in lines[0]
    assert "alarm: seed_latent qwen: one wrong answer to more than 20% of questions" in lines


def test_table_rows():
    scores = dict(em=0.5, f1=0.25, nll_token=1.0, first_token_top1=0.1, first_token_top5=0.2)
    metrics = {"latent": {"a": scores, "b": scores}, "text": {"a": scores, "b": scores}}
    rows = table_rows(metrics, ["a", "b"])
    assert [row[:2] for row in rows] == [
        ("a", "text"),
        ("a", "latent"),
        ("b", "text"),
        ("b", "latent"),
    ]
    assert rows[0][2:] == ("0.500", "0.250", "1.000", "0.100", "0.200")
