"""The A/B table: one change per row, scored as the evaluation does, with honest intervals."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from lw_fast import cli
from lw_fast.ablate import BASE, ROWS, Row, ablate, main, markdown, read_change
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.evaluate import evaluate
from lw_fast.model import retuned
from lw_fast.train import train

NUM = 8
ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)


@pytest.fixture(scope="module")
def model():
    return tiny.latent_model(kinds="latent")


@pytest.fixture(scope="module")
def rows(model):
    changes = {line: read_change(line) for line in ("prefix_gain=3.0", "debug_topk=2")}
    return {(row.change, row.lm): row for row in ablate(model, tiny.examples(NUM), changes)}


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_rows_are_scored_as_an_evaluation_does(tmp_path, model, rows, gain):
    line = BASE if gain == 1.0 else f"prefix_gain={gain}"
    tuned = retuned(model, {"prefix_gain": gain})
    metrics = evaluate(tuned, tiny.examples(NUM), tmp_path)
    for name in ("llama", "qwen"):
        for score, (value, lo, hi) in rows[line, name].scores.items():
            assert value == pytest.approx(metrics["latent"][name][score])
            assert lo <= value <= hi


def test_what_changes_nothing_gains_nothing(rows):
    for name in ("llama", "qwen"):
        assert set(rows["debug_topk=2", name].gains.values()) == {(0.0, 0.0, 0.0)}
        assert rows["debug_topk=2", name].scores == rows[BASE, name].scores


def test_a_row_leaves_the_model_alone(model):
    z = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.bridge.prefix("llama", z)
        other = retuned(model, {"calibration": "none"})
        assert not torch.equal(other.bridge.prefix("llama", z), before)
        assert torch.equal(model.bridge.prefix("llama", z), before)
    assert next(other.bridge.parameters()) is next(model.bridge.parameters())


def test_the_default_rows_are_decode_time_settings():
    assert all(read_change(line) for line in ROWS)


@pytest.mark.parametrize("line", ["prefix_gain", "latent_len=4", "prefix_gian=1"])
def test_bad_rows(line):
    with pytest.raises(UserError, match="is not NAME=VALUE with a decode-time setting"):
        read_change(line)


def test_bold_means_that_the_interval_leaves_zero_out():
    scores = dict.fromkeys(("f1", "em", "first_token_top1"), (0.5, 0.4, 0.6))
    gains = [(0.0, 0.0, 0.0), (0.2, 0.1, 0.3), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)]
    names = [BASE, "up", "noise", "down"]
    table = [
        Row(lm="qwen", change=name, scores=scores, gains={"f1": gain})
        for name, gain in zip(names, gains, strict=True)
    ]
    base, up, noise, down = markdown(table).splitlines()[2:]
    assert base.endswith("|  |") and "**" in up and "**" in down and "**" not in noise
    assert "0.500 [0.400, 0.600]" in base


def test_the_command_writes_the_table(tmp_path, lm_dirs, qa_file, capsys):
    config = tiny.config(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=16, eval_samples=5, epochs=1,
        lm=lm_dirs, kinds="latent",
    )  # fmt: skip
    train(config, ONE, tmp_path / "run")
    assert cli.run(main, ["--ckpt", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "left out: latent_anchor_mode=chat" in capsys.readouterr().out
    folder = tmp_path / "run" / "ablation_epoch1"
    found = json.loads((folder / "ablation.json").read_text())
    lines = [BASE, *(line for line in ROWS if "chat" not in line)]
    assert [(r["change"], r["lm"]) for r in found] == [
        (line, lm) for line in lines for lm in lm_dirs
    ]
    assert len((folder / "ablation.md").read_text().splitlines()) == 2 + len(found)
    wrong = ["--ckpt", str(tmp_path / "run"), "--rows", "lr=1", "--device", "cpu"]
    assert cli.run(main, wrong) == cli.EXIT_USER_ERROR


def test_other_checkpoints_are_rows(tmp_path, lm_dirs, qa_file, monkeypatch):
    """The first-token weight needs a run of its own; LMs are loaded once, and the row's scores
    are those of that run's own evaluation."""
    from lw_fast import model as module

    settings = dict(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=16, eval_samples=5, epochs=1,
        lm=lm_dirs, kinds="latent",
    )  # fmt: skip
    train(tiny.config(**settings), ONE, tmp_path / "a")
    changes = {"first_token_ce_weight": 1.0, "log_every": 7}
    metrics = train(tiny.config(**settings | changes), ONE, tmp_path / "b")
    loads, load = [], module.load_frozen_lm
    monkeypatch.setattr(module, "load_frozen_lm", lambda *a: loads.append(a[0]) or load(*a))
    flags = ["--ckpt", str(tmp_path / "a"), str(tmp_path / "b"), "--rows", "prefix_gain=1.1"]
    flags += ["--out_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.run(main, flags) == 0
    assert loads == list(lm_dirs)
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    line = "b/epoch1: first_token_ce_weight=1.0"
    assert [row["change"] for row in found[::2]] == [BASE, "prefix_gain=1.1", line]
    for row in found[-2:]:
        for name, (value, lo, hi) in row["scores"].items():
            assert value == pytest.approx(metrics["latent"][row["lm"]][name])
            assert lo <= value <= hi
    train(tiny.config(**settings | {"lm": {"llama": lm_dirs["llama"], "qwen": lm_dirs["llama"]}}),
          ONE, tmp_path / "c")  # fmt: skip
    flags[2] = str(tmp_path / "c")
    assert cli.run(main, flags) == cli.EXIT_USER_ERROR


def test_the_default_rows_are_those_of_the_experiments_log():
    """BOS, gain, nucleus, anchor mode and calibration; the first-token weight is a checkpoint."""
    varied = {word.partition("=")[0] for line in ROWS for word in line.split()}
    assert varied == {
        "append_bos_after_prefix", "prefix_gain", "first_token_top_p", "first_token_temperature",
        "latent_anchor_mode", "calibration",
    }  # fmt: skip
