"""Stage A, then Stage B: the presets run on any LMs, and benchmarks/stages.py compares recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from benchmarks import stages
from benchmarks.rows import read_rows
from lw_fast import cli, lm_sources
from lw_fast.config import FIELDS, build_config, differences, load_preset
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.shared import Shared

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=800,
)  # fmt: skip
CHANGES = {
    "prefix_gain",
    "train_append_bos_after_prefix",
    "append_bos_after_prefix",
    "first_token_ce_weight",
}

# ------------------------------------------------------------------------------- the presets


@pytest.fixture
def random_pair(monkeypatch) -> list[str]:
    """The 8B and the 7B as `random:` LMs, with layers that fit into a test."""
    shapes = {name: shape | SMALL for name, shape in lm_sources.RANDOM_SHAPES.items()}
    monkeypatch.setattr(lm_sources, "RANDOM_SHAPES", shapes)
    return ["--lm.llama", "random:llama-3.1-8b", "--lm.qwen", "random:qwen2.5-7b"]


def train(preset: str, run_dir: Path, qa_file: Path, *more: str) -> None:
    size = ["--dataset", str(qa_file), "--eval_dataset", str(qa_file), "--eval_samples", "6"]
    size += ["--samples", "24", "--batch_size", "8", "--epochs", "1"]
    where = ["--run_dir", str(run_dir), "--device", "cpu"]
    cli.train_main(["--preset", preset, *size, *where, *more])


def test_both_stages_run_on_random_weights(random_pair, qa_file, tmp_path):
    """The whole command with every other setting of the presets, B from the weights of A."""
    plain = ["--text_format", "plain", "--log_every", "1"]
    train("seed_stage_a", tmp_path / "a", qa_file, *random_pair, *plain)
    start = ["--init_from", str(tmp_path / "a")]
    train("seed_stage_b", tmp_path / "b", qa_file, *random_pair, *plain, *start)
    for stage in ("a", "b"):
        folder = tmp_path / stage
        saved = json.loads((folder / "config.json").read_text())
        values, _ = load_preset(f"seed_stage_{stage}")
        given = {"dataset", "samples", "eval_samples", "batch_size", "epochs", "text_format"}
        assert {name: saved[name] for name in values.keys() - given} == {
            name: values[name] for name in values.keys() - given
        }
        assert len((folder / "log.jsonl").read_text().splitlines()) == 3
        metrics = json.loads((folder / "eval_epoch1" / "metrics.json").read_text())
        assert set(metrics["seed"]["latent"]) == {"llama", "qwen"}


def test_a_missing_chat_template_is_told_before_training(random_pair, qa_file, tmp_path):
    """The stages ask for chat prompts, which the tokenizers of nano do not have."""
    with pytest.raises(UserError, match="no chat template"):
        train("seed_stage_a", tmp_path / "a", qa_file, *random_pair)
    assert not (tmp_path / "a" / "log.jsonl").exists()


# ------------------------------------------------------------------------------- the benchmark


def test_the_stages_differ_as_the_log_says():
    assert set(stages.CHANGES) == CHANGES


@pytest.mark.parametrize("stage", ["a", "b"])
def test_the_seed_recipe_is_its_preset_but_for_lms_data_and_size(stage):
    ours = build_config("nano", {"epochs": 3, "samples": 64})
    config = stages.stage_config("seed", stage, ours, {"samples": 64})
    assert config.lm == ours.lm and config.data == ours.data and config.optim.epochs == 3
    changed = set(differences(build_config(f"seed_stage_{stage}"), config)) - {"lm"}
    changed -= {name for name in changed if FIELDS[name][0] in ("data", "backbone")}
    assert changed <= {"epochs", "protocol", "kinds", "eval_every", "debug_print_first"}


@pytest.mark.parametrize(("stage", "weight", "gain"), [("a", 0.5, 1.0), ("b", 1.0, 1.15)])
def test_our_recipe_takes_only_what_the_stages_change(stage, weight, gain):
    ours = build_config("nano")
    config = stages.stage_config("ours", stage, ours, {})
    assert set(differences(ours, config)) <= CHANGES | set(stages.ASKED)
    assert (config.loss.first_token_ce_weight, config.adapter.prefix_gain) == (weight, gain)


def test_settings_of_the_command_line_go_over_both():
    given = {"lr": 1e-3, "batch_size": 16}
    ours = build_config("nano", given)
    for recipe in stages.RECIPES:
        optim = stages.stage_config(recipe, "a", ours, given).optim
        assert (optim.lr, optim.batch_size) == (1e-3, 16)


def test_stage_b_starts_from_stage_a(monkeypatch, tmp_path):
    starts = []

    def train(config, world, run_dir, *, init_from, shared):
        starts.append((run_dir, init_from))

    monkeypatch.setattr(stages, "train", train)
    list(stages.run_stages({"a": tiny.config(), "b": tiny.config()}, ONE, Shared(), tmp_path))
    assert starts == [(tmp_path / "a", None), (tmp_path / "b", tmp_path / "a")]


def test_rows_of_every_stage_kind_and_protocol(lm_dirs, qa_file, tmp_path, capsys):
    """Both recipes on LMs without a chat template, whose text prompts are plain then."""
    size = dict(dataset=qa_file, eval_dataset=qa_file, samples=16, eval_samples=6, epochs=1)
    small = {k: tiny.SETTINGS[k] for k in ("batch_size", "latent_len", "d_z", "encoder_dim")}
    small |= {"encoder_heads": 2, "reader_layers": "0,2", "max_new_tokens": 3}
    words = [w for name, value in (size | small).items() for w in (f"--{name}", str(value))]
    words += [w for name, path in lm_dirs.items() for w in (f"--lm.{name}", path)]
    out = tmp_path / "stages.csv"
    stages.main([*words, "--device", "cpu", "--pair", "tiny", "--out", str(out)])
    rows = read_rows(out)
    f1 = [row["case"] for row in rows if row["metric"] == "f1"]
    # Two stages of two LMs and two kinds; the seed's recipe under its own protocol as well.
    assert len(f1) == len(set(f1)) == 2 * 2 * 2 * 3
    assert sum("recipe=seed" in case and "protocol=seed" in case for case in f1) == 8
    assert {row["metric"] for row in rows} >= {"em", "first_token_top1", "nll_token"}
    for row in rows:
        assert f"encoder={row['config']['settings']['encoder_type']} " in row["case"]
    assert str(tmp_path) not in out.read_text()
    shown = capsys.readouterr().out
    assert shown.count("| seed | A |") == shown.count("| ours | B |") == 4
