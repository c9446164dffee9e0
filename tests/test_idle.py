"""Settings that are idle are no-ops indeed, and the commands say so in one line."""

from __future__ import annotations

import logging

import pytest
import tiny

from lw_fast import cli
from lw_fast.config import FIELDS, preset_names
from lw_fast.engine import World
from lw_fast.idle import IDLE, idle
from lw_fast.train import train

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
SEED = {"encoder_type": "byte_seed", "span_head": True}
ONE_LINE = [
    ({"encoder_type": "lm", "max_bytes": 9}, "max_bytes", "encoder_type is lm"),
    ({"encoder_type": "byte", "max_source_tokens": 9}, "max_source_tokens", "is byte"),
    ({"encoder_type": "byte", "reader_layers": "0"}, "reader_layers", "is byte"),
    (SEED | {"encoder_layers": 3}, "encoder_layers", "is byte_seed"),
    ({"encoder_type": "lm", "copy_bytes": 2}, "copy_bytes", "is lm"),
    ({"span_head": False, "span_weight": 2.0}, "span_weight", "span_head is false"),
    ({"copy_slots": 0, "gold_span_until": 1.0}, "gold_span_until", "no copy slots"),
    ({"adapter_type": "linear", "adapter_dim": 9}, "adapter_dim", "adapter_type is linear"),
    ({"prefix_target_rms": 1.0}, "prefix_target_rms", "calibration is per_slot"),
    ({"scale_l2": 0.1}, "scale_l2", "adapter_freeze_scale is true"),
    ({"first_token_ce_schedule": "linear"}, "first_token_ce_schedule", "weight is 0"),
    ({"kl_top_k": 9}, "kl_top_k", "kl_weight is 0"),
    ({"lms_per_step": "one"}, "lms_per_step", "there is one LM"),
    ({"schedule": "constant", "min_lr_ratio": 0.5}, "min_lr_ratio", "schedule is constant"),
    ({"smoke_samples": 9}, "smoke_samples", "eval_every is 0"),
    (
        {"eval_every": 1, "eval_samples": 9, "smoke_samples": 9},
        "smoke_samples",
        "eval_samples is no larger",
    ),
    ({"keep_best": False}, "keep_best", "keep_last is 0"),
    ({"kinds": "text", "text_tuned_steps": 9}, "text_tuned_steps", "kinds has no text_tuned"),
    ({"kinds": "text", "token_budget_k": 9}, "token_budget_k", "kinds has no token_budget"),
    ({"kinds": "latent", "text_format": "chat"}, "text_format", "kinds has no text"),
    ({"kinds": "text", "first_token_top_p": 1.0}, "first_token_top_p", "kinds has no latent"),
    ({"protocol": "clean", "eos_ban_steps": 2}, "eos_ban_steps", "protocol has no seed"),
    ({"debug_print_first": 0, "debug_topk": 2}, "debug_topk", "debug_print_first is 0"),
]


@pytest.mark.parametrize(("settings", "name", "why"), ONE_LINE)
def test_what_is_idle_is_one_line_if_it_was_asked_for(settings, name, why):
    config = tiny.config(**settings, lm={"llama": "x"})
    (line,) = idle(config, {name})
    assert line.startswith(f"{name} has no effect: ") and line.endswith(why)
    assert idle(config, ()) == []


def test_every_rule_is_shown_above():
    """A rule without a case would be a claim that nothing checks."""
    for names, is_idle, _ in IDLE:
        assert any(
            name in names.split() and is_idle(tiny.config(**settings, lm={"llama": "x"}))
            for settings, name, _ in ONE_LINE
        ), names


@pytest.mark.parametrize("changes", [{"kl_weight": 1.0, "kl_top_k": 9}, {"lr": 0.1}])
def test_what_has_an_effect_is_no_line(changes):
    assert idle(tiny.config(**changes), changes) == []


def test_names_are_settings():
    assert {name for names, *_ in IDLE for name in names.split()} <= FIELDS.keys()


@pytest.mark.parametrize("preset", preset_names())
def test_flags_are_reported_and_presets_are_not(preset, caplog, monkeypatch):
    flags = {"resume": False, "init_from": None, "preset": preset}
    with caplog.at_level(logging.WARNING):
        cli.run_config(flags, {"kl_top_k": 9}, {})
        monkeypatch.setenv("RANK", "1")
        cli.run_config(flags, {"kl_top_k": 9}, {})
    assert [record.getMessage() for record in caplog.records] == [
        "kl_top_k has no effect: kl_weight is 0"
    ]


def test_evaluation_says_it_too(tmp_path, lm_dirs, qa_file, caplog):
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=8, eval_samples=2)
    train(tiny.config(**files, lm=lm_dirs, epochs=1, kinds="latent"), ONE, tmp_path / "run")
    flags = ["--ckpt", str(tmp_path / "run"), "--out_dir", str(tmp_path / "out")]
    flags += ["--eos_ban_steps", "2", "--prefix_gain", "1.5", "--device", "cpu"]
    assert cli.run(cli.eval_main, flags) == 0
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert said == ["eos_ban_steps has no effect: protocol has no seed"]
