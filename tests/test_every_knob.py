"""Every setting has a test, and turning one changes what it should in a run and nothing else.

A run decides its data, weights, order and rates before its first step, and losses, gradient and
update in it. `facts` reads all of these; KNOBS says which of them each setting may change. What
cannot be seen there (a card, several processes, files, answers) has its test named in ELSEWHERE.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_idle import ONE_LINE

from lw_fast.config import FIELDS, GROUPS
from lw_fast.engine import World
from lw_fast.optim import lr_factor, param_groups
from lw_fast.train import setup_run
from lw_fast.train_step import gold_span_draws, train_step

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)

# What a change of the input, of the weights or of the batch must end in.
STEP = {"terms", "loss", "norm", "update"}
# What a change of weights of the loss must end in: what is weighted stays.
WEIGHTING = {"loss", "norm", "update"}
DATA = {"questions", "sources", "targets"} | STEP
SHAPES = {"parameters", "weights"} | STEP

BYTE = {"encoder_type": "byte"}
KL = {"kl_weight": 0.5}
SCALE = {"adapter_freeze_scale": False, "scale": 1.5}  # away from where its penalty is none
FIXED = {"calibration": "fixed"}
# (settings of both runs, the setting and its other value, facts that differ)
KNOBS: list[tuple[dict, dict, set]] = [
    # data
    ({}, {"dataset": "other"}, DATA),
    ({}, {"eval_dataset": "other"}, {"evaluation"}),
    ({}, {"samples": 24}, DATA | {"order", "rates", "draws"}),
    ({}, {"eval_samples": 3}, {"evaluation"}),
    ({}, {"data_seed": 7}, DATA),
    ({}, {"eval_seed": 7}, {"evaluation"}),
    ({}, {"max_answer_tokens": 1}, {"targets"} | STEP),
    ({"samples": 0}, {"max_answer_chars": 5}, DATA | {"order", "rates", "draws"}),
    ({}, {"channel_spans": 1}, DATA | {"order", "rates", "draws"}),
    # encoder
    ({}, {"encoder_type": "byte"}, {"sources"} | SHAPES),
    ({}, {"encoder_type": "byte_seed"}, {"sources"} | SHAPES),
    ({}, {"latent_len": 8}, {"targets"} | SHAPES),
    ({}, {"d_z": 24}, SHAPES),
    (BYTE, {"max_bytes": 60}, {"sources"} | STEP),
    ({}, {"max_bytes": 60}, set()),
    ({}, {"max_source_tokens": 16}, {"sources"} | STEP),
    (BYTE, {"max_source_tokens": 16}, set()),
    ({}, {"copy_slots": 0}, SHAPES),
    ({"copy_slots": 0}, {"span_head": False}, SHAPES),
    ({}, {"span_weight": 0.5}, WEIGHTING),
    ({}, {"gold_span_until": 0.0}, {"draws"} | STEP),
    ({}, {"encoder_dim": 24}, SHAPES),
    ({}, {"encoder_layers": 2}, SHAPES),
    ({}, {"encoder_heads": 4}, STEP),
    ({}, {"encoder_dropout": 0.3}, STEP),
    (BYTE, {"copy_bytes": 2}, SHAPES),
    ({}, {"reader": "llama"}, {"sources"} | SHAPES),
    ({}, {"reader_layers": "0,1,2"}, SHAPES),
    ({}, {"reader_cache": "off"}, set()),
    # adapter
    ({}, {"adapter_type": "linear"}, SHAPES),
    ({}, {"adapter_dim": 24}, SHAPES),
    ({}, {"adapter_bound": 0.5}, STEP),
    ({}, {"adapter_freeze_scale": False}, {"parameters", "update"}),  # calibration cancels it
    ({}, {"calibration": "embed_rms"}, {"loudness"} | STEP),
    ({}, {"calibration": "fixed"}, {"loudness"} | STEP),
    ({}, {"calibration": "none"}, {"loudness"} | STEP),
    (FIXED, {"prefix_target_rms": 0.5}, {"loudness"} | STEP),
    ({}, {"prefix_gain": 2.0}, set()),  # at decode time only
    # sequence
    ({}, {"warm_anchor_text": "A:"}, {"targets"} | STEP),
    ({}, {"train_append_bos_after_prefix": "yes"}, {"targets"} | STEP),
    ({}, {"compat": "double_shift"}, {"targets"} | STEP),
    ({}, {"compat": "original"}, {"targets"} | STEP),
    # loss
    ({}, {"first_token_ce_weight": 0.5}, WEIGHTING),
    ({"first_token_ce_weight": 0.5}, {"first_token_ce_schedule": "linear"}, {"update"}),
    ({}, {"supervise_first_k": 1}, {"targets"} | STEP),
    ({}, {"lms_per_step": "one"}, STEP),
    ({}, {"kl_weight": 0.5}, STEP),
    (KL, {"kl_temperature": 2.0}, STEP),
    (KL, {"kl_top_k": 4}, STEP),
    (SCALE, {"scale_l2": 0.1}, WEIGHTING),
    ({}, {"adapter_rms_l2": 0.1}, WEIGHTING),
    ({}, {"align_weight": 0.5}, WEIGHTING),
    # optim
    ({}, {"epochs": 4}, {"order", "rates", "draws", "update"}),
    ({}, {"batch_size": 4}, {"order", "rates", "draws"} | STEP),
    ({}, {"lr": 1e-3}, {"rates", "update"}),
    ({}, {"adapter_lr": 2e-3}, {"rates", "update"}),
    ({}, {"schedule": "constant"}, {"rates"}),
    ({}, {"warmup_steps": 4}, {"rates", "update"}),
    ({}, {"min_lr_ratio": 0.5}, {"rates"}),
    ({}, {"weight_decay": 0.5}, {"rates", "update"}),
    ({}, {"beta1": 0.5}, {"update"}),
    ({}, {"beta2": 0.5}, {"update"}),
    ({}, {"max_grad_norm": 0.01}, {"update"}),
    ({}, {"seed": 7}, {"weights", "order", "draws"} | STEP),
    ({}, {"precision": "bf16"}, STEP),
    # backbone
    ({}, {"grad_ckpt": True}, set()),
]

# Setting -> the test that turns it, where no fact above shows it.
ELSEWHERE = {
    "micro_batch_size": "test_train.py::test_accumulation_does_not_change_a_run",
    "backbone_dtype": "test_frozen_lm.py::test_backbone_dtype",
    "attn_implementation": "test_frozen_lm.py::test_attention_can_be_chosen",
    "grad_ckpt": "test_train_knobs.py::test_grad_ckpt_runs_each_layer_twice",
    "trust_remote_code": "test_security.py::test_code_of_a_model_runs_only_if_trusted",
    "reader_cache": "test_batches.py::test_reader_cache_off_and_auto",
    "teacher_cache": "test_teacher.py::test_micro_batches_and_the_cache_do_not_change_a_run",
    "prefix_gain": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "layout": "test_packing.py::test_packed_and_padded_agree",
    "compile": "test_packing.py::test_one_graph_serves_all_layers_and_steps",
    "kernels": "test_model.py::test_lms_in_memory_serve_several_models",
    "lm_parallel": "test_placement.py::test_lm_parallel_in_groups",
    "shard_lms": "test_placement.py::test_sharded_lms_train_like_whole_ones",
    "kinds": "test_evaluate.py::test_what_was_not_run_is_absent",
    "text_tuned_steps": "test_text_tuned.py::test_by_default_it_takes_as_many_steps_as_the_latent",
    "text_tuned_lr": "test_text_tuned.py::test_the_key_is_what_decides_the_result",
    "protocol": "test_evaluate.py::test_only_the_seed_protocol",
    "max_new_tokens": "test_eval_knobs.py::test_shorter_answers_are_the_beginnings_of_longer_ones",
    "chunk_size": "test_evaluate.py::test_the_batch_size_of_evaluation_does_not_matter",
    "min_new_tokens": "test_evaluate.py::test_the_seed_protocol_bans_stop_tokens",
    "eos_ban_steps": "test_evaluate.py::test_the_seed_protocol_bans_stop_tokens",
    "latent_anchor_mode": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "latent_anchor_text": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "append_bos_after_prefix": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "first_token_top_p": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "first_token_temperature": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "text_format": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "token_budget_k": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "token_budget_mode": "test_eval_knobs.py::test_a_knob_changes_its_kinds_only",
    "debug_print_first": "test_eval_knobs.py::test_peeks_are_the_first_answers_and_first_steps",
    "debug_topk": "test_eval_knobs.py::test_peeks_are_the_first_answers_and_first_steps",
    "fresh_eval": "test_kept_latents.py::test_kept_and_fresh_evaluations_are_byte_identical",
    "sequential_eval": (
        "test_kept_latents.py::test_sequential_eval_changes_no_file_and_has_one_lm_at_a_time"
    ),
    "log_every": "test_train.py::test_log_rows_are_means_over_their_steps",
    "eval_every": "test_train.py::test_run_folder",
    "smoke_samples": "test_train.py::test_smoke_samples_shorten_all_evaluations_but_the_last",
    "save_every": "test_train.py::test_extra_checkpoints_and_pruning",
    "keep_last": "test_train.py::test_extra_checkpoints_and_pruning",
    "keep_best": "test_train.py::test_the_best_checkpoint_stays",
    "profile": "test_profiling.py::test_a_run_on_a_cpu_is_profiled",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, lm_dirs, qa_file):
    """Where data sets are, and LMs that are in memory."""
    other = tmp_path_factory.mktemp("data") / "other.json"
    tiny.write_squad(other, tiny.examples(56)[16:])
    lms = {name: tiny.frozen_lm(name, seed=i) for i, name in enumerate(("llama", "qwen"))}
    return {"qa": str(qa_file), "other": str(other), "lm": lm_dirs, "lms": lms}


def facts(files, scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    """What a run decides before its first step, in it, and (update) by its second; with that
    adapter.scale at the start."""
    settings = dict(dataset="qa", eval_dataset="qa", samples=32, eval_samples=6, epochs=2)
    settings |= dict(warmup_steps=2, lm=files["lm"]) | changes
    for name in ("dataset", "eval_dataset"):
        settings[name] = files[settings[name]]
    config = tiny.config(**settings)
    run = setup_run(config, ONE, Path(), None, files["lms"])
    bridge, tables = run.model.bridge, run.tables
    with torch.no_grad():
        for adapter in bridge.adapters.values():
            adapter.scale.fill_(scale)
    steps = range(run.total_steps)
    found = {
        "questions": [(e.id, e.answers) for e in tables.examples],
        "evaluation": [e.id for e in run.eval_examples],
        "sources": (tables.sources.flat_ids.tolist(), tables.sources.length_N.tolist()),
        "targets": {name: _targets(table) for name, table in tables.answers.items()},
        "parameters": {n: (p.shape, p.requires_grad) for n, p in bridge.named_parameters()},
        "weights": _weights(bridge),
        "order": [run.order.step(step).tolist() for step in steps],
        "rates": (
            [lr_factor(step, run.total_steps, config.optim) for step in steps],
            sorted((g["lr"], g["weight_decay"]) for g in param_groups(bridge, config.optim)),
        ),
        "draws": [gold_span_draws(config, step, run.total_steps, 99).tolist() for step in steps],
        "loudness": [bridge.calibration(name) for name in run.model.lms],
    }
    norm = train_step(run)
    sums = {name: value.tolist() for name, value in run.sums.items() if name != "counts"}
    found |= {"loss": sums.pop("loss"), "terms": sums, "norm": float(norm)}
    run.global_step += 1
    train_step(run)
    return found | {"update": _weights(bridge)}


def _targets(table) -> list:
    batch = table.batch(np.arange(len(table.length_N)))
    rows = (batch.head_H, batch.tail_BT, batch.position_N, batch.target_N, batch.first_N)
    return [row.tolist() for row in rows]


def _weights(bridge) -> dict[str, list]:
    return {name: value.tolist() for name, value in bridge.state_dict().items()}


@pytest.fixture(scope="module")
def base(files):
    """Facts of both sides' common settings, each computed once."""
    known: dict[str, dict] = {}

    def of(settings: dict) -> dict[str, Any]:
        return known.setdefault(str(settings), facts(files, **settings))

    return of


def differing(a: dict, b: dict) -> set[str]:
    return {name for name in a if a[name] != b[name]}


def short(value) -> str:
    """The same in every process: a set prints in any order."""
    return "+".join(sorted(value))[:40] if isinstance(value, set | frozenset) else str(value)[:40]


@pytest.mark.parametrize(("common", "change", "expected"), KNOBS, ids=short)
def test_a_setting_changes_what_it_should_and_nothing_else(files, base, common, change, expected):
    assert differing(base(common), facts(files, **common | change)) == expected


def test_what_evaluates_and_logs_does_not_touch_training(files, base):
    """All settings of these groups at once."""
    changes = {
        name: _other(name) for group in ("eval", "run") for name in GROUPS[group].__annotations__
    }
    changes |= {"first_token_top_p": 0.9, "latent_anchor_mode": "text"}
    changes |= {"text_format": "plain", "token_budget_mode": "content_only"}  # no chat template
    assert differing(base({}), facts(files, **changes)) == set()


@pytest.mark.parametrize(("settings", "name", "_why"), ONE_LINE)
def test_what_is_said_to_be_idle_changes_nothing(files, base, settings, name, _why):
    common = {"lm": {"llama": files["lm"]["llama"]}}
    common |= {other: value for other, value in settings.items() if other != name}
    turned = facts(files, **common | {name: settings[name]})
    assert differing(base(common), turned) <= {"draws"}  # of gold spans, which nobody reads


def _other(name: str) -> Any:
    spec = FIELDS[name][1]
    if name in ("kinds", "protocol"):
        return {"kinds": "text,no_context", "protocol": "seed"}[name]
    if spec.metadata["choices"]:
        return spec.metadata["choices"][-1]
    match spec.default:
        case bool():
            return not spec.default
        case str():
            return "A:"
    return spec.default + 1


def test_every_setting_has_its_test():
    turned = {name for _, change, expected in KNOBS if expected for name in change}
    assert turned | ELSEWHERE.keys() == FIELDS.keys()
    assert not turned & ELSEWHERE.keys()
    for name, place in ELSEWHERE.items():
        file, test = place.split("::")
        text = (Path(__file__).parent / file).read_text()
        found = re.search(rf"^def {test}\(", text, re.M)
        assert found and re.search(rf"\b{name}\b", text), f"{name}: {place}"
