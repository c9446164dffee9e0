"""Runs that share LMs and sources in one process: the same results, and nothing loaded twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch

from lw_fast import checkpoint, shared
from lw_fast.config import from_dict, to_dict
from lw_fast.engine import World
from lw_fast.shared import Shared
from lw_fast.train import train

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
TRAINED_ONLY = dict(latent_len=4, d_z=8, lr=1e-3, seed=7, batch_size=4, epochs=1, kinds="latent")
"""Changes that touch neither LMs nor sources."""


@pytest.fixture
def settings(lm_dirs, qa_file):
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=16, eval_samples=4)
    return tiny.config(lm=lm_dirs, epochs=1, **files)


def changed(config, **changes):
    return from_dict(to_dict(config) | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "epoch1").encoder


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the LMs that were loaded."""
    names, load = [], shared.load_frozen_lm
    monkeypatch.setattr(
        shared, "load_frozen_lm", lambda name, *rest: names.append(name) or load(name, *rest)
    )
    return names


def tables_of(kept: Shared, config) -> list[torch.Tensor]:
    """The states that a reader would give to a run of these settings, twice asked for."""
    model = shared_model(kept, config)
    return [kept.tables(model, tiny.examples(4)).sources.states for _ in range(2)]


def shared_model(kept: Shared, config):
    from lw_fast.model import build_model

    return build_model(config, tiny.CPU, kept.lms(config, tiny.CPU))


def test_a_run_among_others_equals_one_alone(settings, tmp_path, loads):
    """Bit for bit: weights, and what was logged and scored."""
    kept, other = Shared(), changed(settings, **TRAINED_ONLY)
    train(settings, ONE, tmp_path / "before", shared=kept)
    train(other, ONE, tmp_path / "among", shared=kept)
    assert sorted(loads) == ["llama", "qwen"]
    train(other, ONE, tmp_path / "alone")
    among, alone = weights(tmp_path / "among"), weights(tmp_path / "alone")
    assert among.keys() == alone.keys() and all(torch.equal(among[k], alone[k]) for k in alone)
    nll = [
        json.loads((tmp_path / name / "eval_epoch1" / "metrics.json").read_text())["latent"]
        for name in ("among", "alone")
    ]
    assert nll[0]["qwen"]["nll_token"] == nll[1]["qwen"]["nll_token"]


def test_sources_are_read_once(settings):
    kept = Shared()
    first, again = tables_of(kept, settings)
    assert first is again is not None
    assert tables_of(kept, changed(settings, **TRAINED_ONLY))[0] is first


@pytest.mark.parametrize(
    "change", [dict(reader_layers="1"), dict(samples=8), dict(reader_cache="off")]
)
def test_other_sources_are_read_anew(settings, change):
    kept = Shared()
    before = tables_of(kept, settings)[0]
    after = tables_of(kept, changed(settings, **change))[0]
    assert after is None if "reader_cache" in change else after is not before


def test_lms_follow_the_settings(settings, lm_dirs, loads):
    """Another precision or source is another LM; those of no use any more are let go."""
    kept = Shared()
    first = kept.lms(settings, tiny.CPU)
    assert kept.lms(settings, tiny.CPU)["qwen"] is first["qwen"]
    coarse = kept.lms(changed(settings, backbone_dtype="bf16"), tiny.CPU)
    assert {lm.dtype for lm in coarse.values()} == {torch.bfloat16}
    del loads[:]
    moved = changed(settings, backbone_dtype="bf16", lm=lm_dirs | {"qwen": lm_dirs["llama"]})
    assert kept.lms(moved, tiny.CPU)["llama"] is coarse["llama"] and loads == ["qwen"]
    assert kept.lms(settings, tiny.CPU)["qwen"] is not first["qwen"]


def test_a_reader_that_only_reads(settings, lm_dirs, loads):
    alone = dataclasses.replace(settings, lm={"llama": lm_dirs["llama"]})
    kept, config = Shared(), changed(alone, reader=lm_dirs["qwen"])
    model = shared_model(kept, config)
    assert loads == ["llama", "reader"] and model.reader.lm.d_model == 24
    assert shared_model(kept, config).reader.lm.model is model.reader.lm.model
