"""One LM per process: the training, evaluation and files of one process that holds them all."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import fault_worker
import pytest
import tiny
import torch
from test_elastic import ROOT
from test_faults import new, train

from lw_fast import checkpoint
from lw_fast.config import BackboneConfig
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.frozen_lm import load_frozen_lm, outline
from lw_fast.placement import place

PARALLEL = ["--lm_parallel", "true"]
KINDS = ["--kinds", "text,latent", "--eval_samples", "4"]
TERMS = ["--first_token_ce_weight", "0.5", "--adapter_rms_l2", "0.1", "--scale_l2", "0.1"]
TERMS += ["--adapter_freeze_scale", "false"]
TIMES = ("time", "seconds_per_step", "encode_sec", "wall_clock_sec")


def world(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, size=size, device=tiny.CPU)


def config(**changes):
    return tiny.config(lm={"llama": "a", "qwen": "b"}, **changes)


# ------------------------------------------------------------------------------- who does what


def test_data_parallel():
    placed = [place(config(), world(rank, 4)) for rank in range(4)]
    assert [(p.share, p.shares, p.ranks_per_share) for p in placed] == [
        (rank, 4, 1) for rank in range(4)
    ]
    assert {p.lms for p in placed} == {("llama", "qwen")}


def test_lm_parallel_in_groups():
    placed = [place(config(lm_parallel=True), world(rank, 4)) for rank in range(4)]
    assert [(p.share, p.lms) for p in placed] == [
        (0, ("llama",)), (0, ("qwen",)), (1, ("llama",)), (1, ("qwen",)),
    ]  # fmt: skip
    assert {(p.shares, p.ranks_per_share) for p in placed} == {(2, 2)}


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"lm_parallel": True}, 3, "needs a multiple of 2 processes, one per LM; got 3"),
        ({"lm_parallel": True, "batch_size": 3}, 4, "batch_size 3 cannot be divided among 2"),
        ({"lm_parallel": True, "lms_per_step": "one"}, 2, "needs lms_per_step=all"),
        ({"shard_lms": "yes"}, 2, "shard_lms needs a ds_config of stage 3"),
    ],
)
def test_what_cannot_be_placed(changes, size, message):
    with pytest.raises(UserError, match=message):
        place(config(**changes), world(0, size))


def test_an_outline_has_the_shape_and_no_weights(lm_dirs):
    backbone = BackboneConfig()
    for name, source in lm_dirs.items():
        whole = load_frozen_lm(name, source, backbone, tiny.CPU)
        shape = outline(name, source, backbone, tiny.CPU)
        assert whole.is_here and not shape.is_here
        assert {p.device.type for p in shape.model.parameters()} == {"meta"}
        for fact in ("d_model", "vocab_size", "dtype", "num_layer_parameters"):
            assert getattr(whole, fact) == getattr(shape, fact)
        assert shape.tokenizer.get_vocab() == whole.tokenizer.get_vocab()


# ------------------------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process that holds both LMs; dropout and every term of the loss are on."""
    here = tmp_path_factory.mktemp("alone")
    train(new(here / "run", *KINDS, *TERMS), here / "said.txt")
    return here / "run"


def numbers(values):
    """Nested tables without what the clock says."""
    if not isinstance(values, dict):
        return values
    kept = {k: v for k, v in values.items() if k not in TIMES and not k.endswith("/s")}
    return {key: numbers(value) for key, value in kept.items()}


def flat(values, name="") -> dict[str, float | str]:
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}
    return {name: values}


def weights(loaded: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """Without the biases of keys, which change no attention: their gradient is rounding alone."""
    named = dict(loaded.encoder)
    for lm, state in loaded.adapters.items():
        named |= {f"{lm}.{name}": tensor for name, tensor in state.items()}
    return {n: t.chunk(2)[1] if n.endswith("kv.bias") else t for n, t in named.items()}


def read(path: Path):
    return json.loads(path.read_text())


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").open()]


@pytest.mark.parametrize("engine", ["plain", "zero1", "zero2"])
def test_two_processes_with_one_lm_each_equal_one(alone, tmp_path, engine):
    run_dir = tmp_path / "run"
    argv = new(run_dir, *KINDS, *TERMS, *PARALLEL)
    if engine != "plain":
        argv += ["--ds_config", str(ROOT / "ds_configs" / f"{engine}.json")]
    ranks = fault_worker.start_ranks(argv, tmp_path, {})
    assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].said + ranks[1].said
    for mine, theirs in zip(rows(run_dir), rows(alone), strict=True):
        assert list(numbers(mine)) == list(numbers(theirs))
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-6)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    one, two = (checkpoint.load(folder / "epoch2") for folder in (alone, run_dir))
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)
    for name, stats in one.stats.items():
        assert two.stats[name] == pytest.approx(stats, rel=1e-5)
    mine, theirs = (
        flat(numbers(read(folder / "eval_epoch2" / "metrics.json"))) for folder in (run_dir, alone)
    )
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        same = value if isinstance(value, str | bool) else pytest.approx(value, rel=1e-3, abs=1e-6)
        assert mine[key] == same, key
    said = [
        (folder / "eval_epoch2" / "predictions.jsonl").read_text() for folder in (run_dir, alone)
    ]
    assert said[0] == said[1]


def test_a_rank_loads_its_own_lm_only(tmp_path):
    """The encoder reads bytes: nobody needs the other LM."""
    argv = new(tmp_path / "run", *PARALLEL, "--encoder_type", "byte", "--epochs", "1")
    ranks = fault_worker.start_ranks(
        argv, tmp_path, {rank: {"note_loads": tmp_path / f"{rank}.json"} for rank in range(2)}
    )
    assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].said
    assert [read(tmp_path / f"{rank}.json") for rank in range(2)] == [["llama"], ["qwen"]]


# By default ZeRO-3 keeps weights below 100,000 values whole, which here would be all of them.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def test_sharded_lms_train_like_whole_ones(tmp_path):
    """Half of each layer per rank: the same losses and answers, and nothing of it is saved."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ds_config = tmp_path / "zero3.json"
    ds_config.write_text(json.dumps(ZERO3))
    for run_dir, shard in ((whole, "no"), (cut, "auto")):
        argv = new(run_dir, *KINDS, "--ds_config", str(ds_config), "--shard_lms", shard)
        facts = {rank: {"note_residents": tmp_path / f"{shard}{rank}.json"} for rank in (0, 1)}
        ranks = fault_worker.start_ranks(argv, tmp_path, facts)
        assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].said + ranks[1].said
    for mine, theirs in zip(rows(cut), rows(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    one, two = (checkpoint.load(folder / "epoch2") for folder in (whole, cut))
    # AdamW divides by the gradient's size: where that is next to nothing, rounding shows.
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-4)
    assert (
        two.path.joinpath("state.pt").stat().st_size < 1.1 * (one.path / "state.pt").stat().st_size
    )
    said = [(run / "eval_epoch2" / "predictions.jsonl").read_text() for run in (whole, cut)]
    assert said[0] == said[1]
    for rank in (0, 1):
        full, part = (read(tmp_path / f"{shard}{rank}.json") for shard in ("no", "auto"))
        assert full["layers"] == part["layers"]
        for name in ("llama", "qwen"):
            assert part["resident"][name] < 0.62 * full["resident"][name]


@pytest.mark.slow
def test_two_groups_equal_data_parallel(tmp_path):
    """Four processes, two LMs: each pair works on half of each batch."""
    plain = [rank.wait(120) for rank in fault_worker.start_ranks(new(tmp_path / "a"), tmp_path, {})]
    argv = new(tmp_path / "b", *PARALLEL)
    groups = [rank.wait(120) for rank in fault_worker.start_ranks(argv, tmp_path, {}, size=4)]
    assert plain + groups == [0] * 6
    for mine, theirs in zip(rows(tmp_path / "b"), rows(tmp_path / "a"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_a_run_goes_on_with_another_placement(alone, tmp_path):
    """Half on one process, the rest on two with one LM each."""
    run_dir = tmp_path / "run"
    first = fault_worker.start(new(run_dir, *KINDS, *TERMS), tmp_path / "said.txt", kill_in_step=5)
    assert first.wait() == -signal.SIGKILL
    argv = ["--device", "cpu", "--run_dir", str(run_dir), "--resume", *PARALLEL]
    ranks = fault_worker.start_ranks(argv, tmp_path, {})
    assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].said
    for mine, theirs in zip(rows(run_dir), rows(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
