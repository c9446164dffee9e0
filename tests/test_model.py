"""Putting a model together from settings, and back together from a checkpoint."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from lw_fast import checkpoint
from lw_fast.config import to_dict
from lw_fast.errors import UserError
from lw_fast.model import (
    build_model,
    evaluation_examples,
    join_state,
    load_model,
    split_state,
    training_examples,
)


@pytest.fixture
def config(lm_dirs):
    return tiny.config(lm=lm_dirs)


def saved(model, run_dir):
    """A checkpoint of a model's weights."""
    encoder, adapters = split_state(model.bridge.state_dict())
    return checkpoint.save(
        run_dir, "epoch1", encoder=encoder, adapters=adapters,
        optimizer={"step": 0, "moments": {}}, progress={"epoch": 1, "global_step": 1},
        config=to_dict(model.config),
    )  # fmt: skip


@pytest.mark.parametrize("encoder_type", ["byte_seed", "byte", "lm"])
def test_build_model(config, encoder_type):
    encoder = dataclasses.replace(config.encoder, encoder_type=encoder_type)
    model = build_model(dataclasses.replace(config, encoder=encoder), tiny.CPU)
    assert list(model.lms) == ["llama", "qwen"]
    assert (model.reader is None) == (encoder_type != "lm")
    if model.reader:  # a reader that is one of the LMs is not loaded twice
        assert model.reader.lm is model.lms["qwen"]
    frozen = {id(p) for lm in model.lms.values() for p in lm.model.parameters()}
    assert not frozen & {id(p) for p in model.bridge.parameters()}
    widths = {n: a.net[1].out_features for n, a in model.bridge.adapters.items()}
    assert widths == {"llama": 32, "qwen": 24}


def test_a_third_lm_may_read(config, lm_dirs):
    encoder = dataclasses.replace(config.encoder, reader=lm_dirs["llama"])
    model = build_model(dataclasses.replace(config, encoder=encoder), tiny.CPU)
    assert model.reader.lm not in model.lms.values()
    assert model.reader.lm.d_model == 32 and set(model.bridge.adapters) == {"llama", "qwen"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm": {}}, "no frozen LM is named"),
        ({"reader": ""}, "encoder_type=lm needs --reader"),
        ({"reader": "./none"}, "lm.reader: no such model folder: ./none"),
        ({"reader_layers": "0,9"}, "reader_layers '0,9' is outside 0..2"),
        ({"lm": {"train": "x"}}, "lm.train: PyTorch uses this name itself"),
    ],
)
def test_mistakes(lm_dirs, changes, message):
    with pytest.raises(UserError, match=message):
        build_model(tiny.config(**{"lm": lm_dirs} | changes), tiny.CPU)


def test_state_splits_and_joins():
    state = tiny.latent_model().bridge.state_dict()
    encoder, adapters = split_state(state)
    assert adapters.keys() == {"llama", "qwen"}
    assert {"net.0.weight", "net.1.bias", "scale"} <= adapters["llama"].keys()
    joined = join_state(encoder, adapters)
    assert joined.keys() == state.keys()
    assert all(joined[name] is state[name] for name in state)


def test_a_checkpoint_loads_with_its_settings(config, tmp_path):
    model = build_model(config, tiny.CPU)
    torch.nn.init.normal_(model.bridge.encoder.project.weight)  # not what the seed gives
    loaded = load_model(saved(model, tmp_path), tiny.CPU, {"max_new_tokens": 9})
    assert loaded.config.eval.max_new_tokens == 9
    assert loaded.config.encoder == config.encoder
    state = loaded.bridge.state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.bridge.state_dict().items())


def test_an_lm_may_come_from_elsewhere(config, tmp_path, lm_dirs):
    path = saved(build_model(config, tiny.CPU), tmp_path)
    loaded = load_model(path, tiny.CPU, lms={"llama": lm_dirs["llama"] + "/."})
    assert loaded.lms["llama"].source.endswith("/.")
    with pytest.raises(UserError, match="has no adapter for smol"):
        load_model(path, tiny.CPU, lms={"smol": lm_dirs["llama"]})


@pytest.mark.parametrize("changes", [{"adapter_dim": 8}, {"adapter_type": "linear"}])
def test_settings_that_do_not_fit_the_weights(config, tmp_path, changes):
    path = saved(build_model(config, tiny.CPU), tmp_path)
    with pytest.raises(UserError, match="does not fit these settings"):
        load_model(path, tiny.CPU, changes)


def test_an_lm_of_another_width(config, tmp_path, lm_dirs):
    """The adapter of llama cannot serve the narrower qwen."""
    path = saved(build_model(config, tiny.CPU), tmp_path)
    with pytest.raises(UserError, match="does not fit these settings"):
        load_model(path, tiny.CPU, lms={"llama": lm_dirs["qwen"]})


def test_examples(qa_file):
    """Questions first, spans to repeat after them; the evaluation set is its own subset."""
    config = tiny.config(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=12, eval_samples=5
    )
    examples, note = training_examples(config)
    assert len(examples) == 12 and note == "12 of 40 questions, 0 spans to repeat"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, channel_spans=2))
    with_spans, note = training_examples(config)
    spans = with_spans[12:]
    assert with_spans[:12] == examples and all(not e.question for e in spans)
    assert note == f"12 of 40 questions, {len(spans)} spans to repeat"
    assert len(spans) == 2 * len({e.context for e in examples})
    evaluated = evaluation_examples(config)
    assert len(evaluated) == 5 and evaluated == evaluation_examples(config)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_seed=1))
    assert evaluation_examples(other) != evaluated


def test_lms_in_memory_serve_several_models(config, lm_dirs):
    """Nothing is loaded again, and each model runs them as its own settings say."""
    encoder = dataclasses.replace(config.encoder, reader=lm_dirs["llama"])
    first = build_model(dataclasses.replace(config, encoder=encoder), tiny.CPU)
    lms = {**first.lms, "reader": first.reader.lm}
    backbone = dataclasses.replace(
        config.backbone, kernels="torch", grad_ckpt=True, attn_implementation="eager"
    )
    again = dataclasses.replace(config, encoder=encoder, backbone=backbone)
    second = build_model(again, tiny.CPU, lms)
    assert {lm.model for lm in second.lms.values()} == {lm.model for lm in first.lms.values()}
    assert second.reader.lm.model is first.reader.lm.model
    qwen = second.lms["qwen"]
    assert qwen.kernels == "torch" and qwen.grad_ckpt
    assert qwen.model.config._attn_implementation == "eager"
    assert first.lms["qwen"].kernels == "auto" and not first.lms["qwen"].grad_ckpt
    for a, b in zip(first.bridge.parameters(), second.bridge.parameters(), strict=True):
        assert torch.equal(a, b)
