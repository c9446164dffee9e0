"""Training knobs: turning one changes what it should and nothing else."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import tiny
import torch
from engine_toy import ZERO

from lw_fast.batches import AnswerTable
from lw_fast.config import LossConfig
from lw_fast.engine import World, close_world, init_world
from lw_fast.losses import first_token_weight
from lw_fast.train import train
from lw_fast.train_step import lms_of_step

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)


# ------------------------------------------------------------------------------- first token


def test_first_token_weight_is_constant_or_falls_to_nothing():
    constant = LossConfig(first_token_ce_weight=0.5)
    linear = LossConfig(first_token_ce_weight=0.5, first_token_ce_schedule="linear")
    assert [first_token_weight(constant, step, 4) for step in range(4)] == [0.5] * 4
    assert [first_token_weight(linear, step, 4) for step in range(4)] == [0.5, 0.375, 0.25, 0.125]


# ------------------------------------------------------------------------------- first K tokens


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_only_the_first_k_answer_tokens_are_targets(name, k):
    lm, answers = tiny.frozen_lm(name), ["Rome", "New York", "fresh bread"]
    full = AnswerTable(lm, answers, tiny.config())
    cut = AnswerTable(lm, answers, tiny.config(supervise_first_k=k))
    for i in range(len(answers)):
        index = np.array([i])
        all_targets = full.batch(index).target_N.tolist()
        ends = full.length_N[i] <= k  # then EOS is supervised as well
        assert cut.batch(index).target_N.tolist() == (all_targets if ends else all_targets[:k])
        assert cut.num_targets(index) == len(cut.batch(index).target_N)
    assert cut.frame == full.frame


def test_k_beyond_every_answer_is_a_no_op_with_a_warning(caplog):
    lm, answers = tiny.frozen_lm("qwen"), ["Rome", "New York"]
    with caplog.at_level(logging.WARNING):
        cut = AnswerTable(lm, answers, tiny.config(supervise_first_k=30))
    assert "supervise_first_k=30 has no effect" in caplog.text
    full = AnswerTable(lm, answers, tiny.config())
    assert np.array_equal(cut.ids_NL, full.ids_NL)
    assert np.array_equal(cut.complete_N, full.complete_N)


# ------------------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_grad_ckpt_runs_each_layer_twice(name):
    grads, calls = {}, {}
    for grad_ckpt in (False, True):
        lm = tiny.frozen_lm(name)
        lm.grad_ckpt = grad_ckpt
        count = calls[grad_ckpt] = []
        for layer in lm.model.base_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        embeds = torch.randn(2, 5, lm.d_model, generator=torch.Generator().manual_seed(0))
        embeds.requires_grad_()
        lm.hidden(embeds).square().sum().backward()
        grads[grad_ckpt] = embeds.grad
    assert (len(calls[False]), len(calls[True])) == (2, 4)
    assert torch.equal(grads[False], grads[True])


def test_grad_ckpt_leaves_decoding_alone():
    """Layers go back to evaluation mode, with their cache; nothing within ever left it."""
    from lw_fast.decode import DecodeRules, greedy
    from lw_fast.prompt_cache import PromptCache

    lm = tiny.frozen_lm("llama")
    prompt = [torch.randn(5, lm.d_model, generator=torch.Generator().manual_seed(0))]
    expected = greedy(PromptCache(lm, prompt), DecodeRules(5))
    lm.grad_ckpt = True
    modes = []
    attention = lm.model.base_model.layers[0].self_attn
    attention.register_forward_hook(lambda module, *_: modes.append(module.training))
    lm.hidden(torch.randn(1, 4, lm.d_model, requires_grad=True)).sum().backward()
    assert modes == [False, False]
    assert not any(module.training for module in lm.model.modules())
    assert greedy(PromptCache(lm, prompt), DecodeRules(5)) == expected


# ------------------------------------------------------------------------------- one LM per step


def test_one_lm_is_drawn_per_step():
    lms = {"llama": "a", "qwen": "b"}
    assert lms_of_step(tiny.config(lm=lms), 3) == list(lms)
    one = tiny.config(lm=lms, lms_per_step="one")
    drawn = [tuple(lms_of_step(one, step)) for step in range(200)]
    assert drawn == [tuple(lms_of_step(one, step)) for step in range(200)]
    assert set(drawn) == {("llama",), ("qwen",)}
    assert 70 < drawn.count(("llama",)) < 130
    other = tiny.config(lm=lms, lms_per_step="one", seed=1)
    assert drawn != [tuple(lms_of_step(other, step)) for step in range(200)]


@pytest.fixture
def deepspeed_world():
    yield init_world(use_deepspeed=True, device="cpu")
    close_world()


def test_zero_trains_the_drawn_lm_like_the_plain_engine(
    tmp_path, lm_dirs, qa_file, deepspeed_world
):
    """The adapter that a step leaves out must not move by the gradients of the step before: left
    to itself, ZeRO-3 keeps them."""
    config = tiny.config(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=4, lm=lm_dirs,
        lms_per_step="one", micro_batch_size=4, encoder_dropout=0.0, kinds="latent",
    )  # fmt: skip
    rows = {}
    for name in ("plain", "zero1", "zero2", "zero3"):
        train(config, deepspeed_world, tmp_path / name, ds_config=copy.deepcopy(ZERO.get(name)))
        rows[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").open()]
    drawn = [tuple(lms_of_step(config, step)) for step in range(len(rows["plain"]))]
    assert len(drawn) == 8 and len(set(drawn)) == 2
    for name in ("zero1", "zero2", "zero3"):
        for found, expected in zip(rows[name], rows["plain"], strict=True):
            keys = [key for key in expected if key == "loss" or key.startswith("grad_norm")]
            assert len(keys) == 5
            assert [found[k] for k in keys] == pytest.approx([expected[k] for k in keys], rel=1e-5)
    for row, lms in zip(rows["zero3"], drawn, strict=True):
        assert [name for name in lm_dirs if row[f"grad_norm/{name}"] > 0] == list(lms)


@pytest.mark.parametrize("lms_per_step", ["all", "one"])
def test_a_run_trains_through_the_drawn_lms(tmp_path, lm_dirs, qa_file, lms_per_step):
    """Each row of the log has the drawn LM and no other."""
    config = tiny.config(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=4,
        lm=lm_dirs, lms_per_step=lms_per_step, micro_batch_size=4, first_token_ce_weight=0.5,
        first_token_ce_schedule="linear", supervise_first_k=2,
    )  # fmt: skip
    train(config, ONE, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    for row in rows:
        expected = lms_of_step(config, row["step"] - 1)
        assert {key.split("/")[0] for key in row if "nll_token" in key} == set(expected)
        assert 0 < row["loss"] < 100
