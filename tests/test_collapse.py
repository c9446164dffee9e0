"""benchmarks/collapse.py: each fault of the original beside its fix, and nothing else changed."""

from __future__ import annotations

import json

import pytest
import tiny

from benchmarks import collapse
from benchmarks.rows import read_rows, without_folders
from lw_fast import shared
from lw_fast.config import build_config, differences, from_dict, to_dict


def flags(lm_dirs, qa_file, **changes) -> list[str]:
    """Two epochs on tiny LMs."""
    settings = tiny.SETTINGS | dict(dataset=qa_file, eval_dataset=qa_file, eval_samples=6)
    settings |= dict(samples=16, device="cpu", d_z=16) | changes
    settings.pop("kinds")
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return words + [w for name, path in lm_dirs.items() for w in (f"--lm.{name}", path)]


def test_the_original_values_are_those_of_its_preset():
    assert collapse.TARGETS["original"] == {
        "compat": "original", "first_token_ce_weight": 0.5, "train_append_bos_after_prefix": "yes",
    }  # fmt: skip
    rate = {"lr": 5e-5, "adapter_lr": 0.0, "schedule": "constant", "warmup_steps": 0}
    assert collapse.RATES["seed"] == rate
    assert collapse.TARGETS["right"] == collapse.RATES["ours"] == {}


@pytest.mark.parametrize("encoder", ["byte_seed", "byte", "lm"])
def test_a_cell_changes_its_factors_only(encoder):
    base = build_config("nano")
    changes = {**collapse.ENCODERS[encoder], **collapse.TARGETS["original"]}
    cell = from_dict({**to_dict(base), **changes, **collapse.RATES["seed"]})
    factors = {*collapse.TARGETS["original"], *collapse.RATES["seed"]}
    assert set(differences(base, cell)) - {"encoder_type"} == factors
    assert cell.encoder.encoder_type == encoder


def test_the_prior_is_counted_on_first_tokens():
    """Trained on two a's and one b; a begins half of the answers that are asked for."""
    lm = tiny.frozen_lm("llama")
    ids = lm.tokenizer([" rice", " Paris"], add_special_tokens=False).input_ids
    firsts = [tokens[0] for tokens in ids]
    assert firsts[0] != firsts[1]
    prior = collapse.first_token_prior(
        lm, tiny.config(), ["Paris", "rice", "Paris"], ["rice", "Paris", "Paris", "rice"]
    )
    assert prior.share == 0.5
    assert prior.token == lm.tokenizer.decode([firsts[1]])


def test_every_mix_is_measured_with_equal_steps(lm_dirs, qa_file, tmp_path, monkeypatch, capsys):
    """Eight cells over LMs that are loaded once; the rows name no folder of this machine."""
    loaded = []
    load = shared.load_frozen_lm
    monkeypatch.setattr(shared, "load_frozen_lm", lambda *a: loaded.append(a[0]) or load(*a))
    out = tmp_path / "rows.csv"
    collapse.main([*flags(lm_dirs, qa_file), "--out", str(out), "--pair", "tiny"])
    assert loaded == ["llama", "qwen"]
    rows = read_rows(out)
    scores = [row for row in rows if row["metric"] == "first_token_top1"]
    assert len(scores) == len({row["case"] for row in scores}) == 8 * 2
    assert all("steps=4" in row["case"] and "pair=tiny" in row["case"] for row in rows)
    assert {row["metric"] for row in rows} == {*collapse.SCORES, "first_token_prior", "seconds"}
    for row in rows:
        settings = row["config"]["settings"]
        original = "targets=original" in row["case"]
        assert (settings["compat"] == "original") == original
        assert f"encoder={settings['encoder_type']} " in row["case"]
        assert (settings["lr"] == 5e-5) == ("lr=seed" in row["case"])
    assert str(tmp_path) not in out.read_text() and lm_dirs["llama"] not in out.read_text()
    table = capsys.readouterr().out
    assert table.count("| byte_seed | original |") == table.count("| lm | right |") == 2
    assert "one token always" in table


def test_unknown_values_of_a_factor_are_refused():
    with pytest.raises(SystemExit, match="lstm: there are byte_seed, byte, lm"):
        collapse.main(["--encoders", "lm,lstm"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b/c.gguf", "c.gguf"),
        ("../x/y.json,/x/z.json", "y.json,z.json"),
        ("--dataset=/a/b.json --out runs/x", "--dataset=b.json --out runs/x"),
        ("HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"),
        ("random:x@/a/b.gguf", "random:x@b.gguf"),
    ],
)
def test_folders_are_left_out(text, expected):
    assert without_folders({"lm": {"a": text}, "n": 1}) == {"lm": {"a": expected}, "n": 1}
    assert json.dumps(without_folders(text)) == json.dumps(expected)
