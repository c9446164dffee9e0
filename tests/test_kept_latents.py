"""Kept Z: the same files as with a fresh one, and never used for anything else than its own."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import tiny
import torch

from lw_fast import evaluate as module
from lw_fast.errors import UserError
from lw_fast.evaluate import evaluate
from lw_fast.frozen_lm import FrozenLM
from lw_fast.kept_latents import FILE
from lw_fast.model import LatentModel

NUM = 6
SETTINGS = dict(fresh_eval=False, kinds="text,latent,span_text,shuffled")


@pytest.fixture
def encodings(monkeypatch):
    """One entry per call of the encoder's loop."""
    calls, work = [], module.encode
    monkeypatch.setattr(module, "encode", lambda *args: calls.append(1) or work(*args))
    return calls


def run(folder, model: LatentModel | None = None, examples=None, **changes):
    model = model or tiny.latent_model(**SETTINGS | changes)
    metrics = evaluate(model, examples or tiny.examples(NUM), folder)
    return (folder / "predictions.jsonl").read_bytes(), without_times(metrics)


def without_times(node):
    if isinstance(node, dict):
        return {k: without_times(v) for k, v in node.items() if not k.endswith("_sec")}
    return node


@pytest.mark.parametrize("encoder_type", ["byte", "lm"])
def test_kept_and_fresh_evaluations_are_byte_identical(tmp_path, encodings, caplog, encoder_type):
    fresh = run(tmp_path / "fresh", fresh_eval=True, encoder_type=encoder_type)
    assert not (tmp_path / "fresh" / FILE).exists()
    first = run(tmp_path / "kept", encoder_type=encoder_type)
    assert len(encodings) == 2
    with caplog.at_level(logging.INFO):
        again = run(tmp_path / "kept", encoder_type=encoder_type)
    assert len(encodings) == 2  # not encoded again
    assert fresh == first == again
    assert f"Z of {NUM} questions comes from" in caplog.text


def bump(model: LatentModel, parameters) -> LatentModel:
    with torch.no_grad():
        next(iter(parameters)).view(-1)[0].add_(1e-3)
    return model


def other_weights():
    model = tiny.latent_model(**SETTINGS)
    return bump(model, model.bridge.encoder.parameters()), None


def other_reader():
    model = tiny.latent_model(**SETTINGS)
    return bump(model, model.reader.lm.model.parameters()), None


def other_settings():
    return tiny.latent_model(**SETTINGS, max_source_tokens=20), None


def other_question():
    asked = tiny.examples(NUM)
    asked[2] = dataclasses.replace(asked[2], question="Who?")
    return tiny.latent_model(**SETTINGS), asked


def other_order():
    return tiny.latent_model(**SETTINGS), tiny.examples(NUM)[::-1]


def fewer_questions():
    return tiny.latent_model(**SETTINGS), tiny.examples(NUM - 1)


@pytest.mark.parametrize(
    "change",
    [other_weights, other_reader, other_settings, other_question, other_order, fewer_questions],
)
def test_z_of_something_else_is_noticed(tmp_path, encodings, caplog, change):
    run(tmp_path / "kept")
    model, examples = change()
    expected = run(tmp_path / "fresh", copy.deepcopy(model), examples)
    caplog.clear()
    assert run(tmp_path / "kept", model, examples) == expected
    assert len(encodings) == 3 and "encoding anew" in caplog.text
    run(tmp_path / "kept", change()[0], examples)
    assert len(encodings) == 3  # the new Z took its place


def test_knobs_of_decoding_and_gold_answers_do_not_touch_z(tmp_path, encodings):
    run(tmp_path)
    golds = [dataclasses.replace(e, answers=("x",), answer_start=-1) for e in tiny.examples(NUM)]
    run(tmp_path, examples=golds, prefix_gain=1.5, max_new_tokens=2, latent_anchor_mode="none")
    assert len(encodings) == 1


@pytest.mark.parametrize("content", [b"", b"no such file type", None])
def test_a_damaged_file_is_made_anew(tmp_path, encodings, caplog, content):
    expected = run(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-40] if content is None else content)
    assert run(tmp_path) == expected
    assert len(encodings) == 2 and "encoding anew" in caplog.text
    assert (tmp_path / FILE).read_bytes() == data


# ------------------------------------------------------------------------------- sequential_eval


@pytest.mark.parametrize("protocol", ["clean", "clean,seed"])
def test_sequential_eval_changes_no_file_and_has_one_lm_at_a_time(tmp_path, monkeypatch, protocol):
    knobs = dict(kinds="text,latent", protocol=protocol)
    expected = run(tmp_path / "all", tiny.latent_model(**knobs))
    fetched, present, backbone, visit = [], [], FrozenLM.backbone, FrozenLM.visit

    def watched_visit(lm, device):
        fetched.append((lm.name, str(device)))
        return visit(lm, device)

    def watched_backbone(lm, *args, **kwargs):
        present.append((lm.name, len(fetched)))
        return backbone(lm, *args, **kwargs)

    monkeypatch.setattr(FrozenLM, "visit", watched_visit)
    monkeypatch.setattr(FrozenLM, "backbone", watched_backbone)
    assert run(tmp_path / "one", tiny.latent_model(**knobs, sequential_eval=True)) == expected
    assert fetched[:3] == [("llama", "cpu"), ("qwen", "cpu"), ("qwen", "cpu")]  # and the reader
    # Every pass belongs to the LM that was fetched last.
    assert present and all(fetched[count - 1][0] == name for name, count in present)
    assert len({count for name, count in present if name == "llama"}) > 1  # answers, then the rest


def test_parked_lms_wait_on_the_cpu_and_come_back(tmp_path):
    """visit() moves there and back; an error does not leave the LM behind."""
    lm = tiny.frozen_lm("llama")
    moves = []
    lm.model.to = lambda device: moves.append(str(device))
    with pytest.raises(RuntimeError), lm.visit(torch.device("meta")):
        raise RuntimeError
    assert moves == ["meta", "cpu"]


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantised_lms_cannot_move(dtype):
    with pytest.raises(UserError, match=f"sequential_eval cannot move .*{dtype}"):
        tiny.config(sequential_eval=True, backbone_dtype=dtype)


def test_gold_answers_are_scored_once_for_all_protocols(tmp_path, monkeypatch):
    calls, work = [], module.Scorer
    monkeypatch.setattr(
        module, "Scorer", lambda *a, **k: calls.append(k["count_eos"]) or work(*a, **k)
    )
    run(tmp_path, tiny.latent_model(kinds="text,latent", protocol="clean,seed"))
    assert calls.count(False) == 4  # two LMs, two kinds
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for kind in ("text", "latent"):
        for name in ("llama", "qwen"):
            nll = [table[kind][name]["nll_token"] for table in (metrics, metrics["seed"])]
            assert nll[0] == nll[1]
