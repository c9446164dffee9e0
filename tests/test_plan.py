"""The plan against what is really there: counted weights, and the one measured step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from lw_fast import cli, plan
from lw_fast.config import build_config
from lw_fast.errors import UserError
from lw_fast.plan import GIB, Job

ROOT = Path(__file__).parents[1]
PAIR = {"llama": "llama-3.1-8b", "qwen": "random:qwen2.5-7b@somewhere"}


def terms(config, **job) -> dict[str, float]:
    return {term.name: term.bytes / GIB for term in plan.plan(config, Job(**job))}


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_weights_are_those_of_the_model(lm_dirs, name):
    lm = tiny.frozen_lm(name)
    shape = plan.read_shape(name, lm_dirs[name])
    assert shape.layer_weights + shape.other_weights == lm.model.num_parameters()


def test_trainable_parameters_are_those_of_the_bridge(lm_dirs):
    for changes in ({}, {"encoder_type": "byte"}, {"encoder_type": "byte_seed"}):
        config = tiny.config(lm=lm_dirs, **changes)
        shapes = {name: plan.read_shape(name, folder) for name, folder in lm_dirs.items()}
        reader = shapes["qwen"] if config.encoder.encoder_type == "lm" else None
        bridge = tiny.latent_model(**changes).bridge
        expected = sum(p.numel() for p in bridge.parameters())
        assert plan.count_trainable(config, shapes, reader) == expected


def test_a_measured_step():
    """Both LMs, eager layers, 64 questions of 40 positions on an H100: 40.6 GiB."""
    settings = dict(batch_size=64, latent_len=31)  # and the frame, and 5 of an answer
    planned = terms(build_config("8b", settings, PAIR), answer_len=5)
    lms = sum(gib for name, gib in planned.items() if "llama" in name or "qwen" in name)
    assert lms == pytest.approx(40.6, rel=0.05)


def activations(planned: dict[str, float]) -> float:
    (value,) = (gib for name, gib in planned.items() if name.startswith("activations"))
    return value


def test_only_the_largest_lm_has_activations():
    """And a third, smaller LM adds its weights and an adapter, nothing else."""
    two = terms(build_config("8b", {}, PAIR))
    third = {**PAIR, "smol": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    three = terms(build_config("8b", {}, third))
    assert [name for name in two if name.startswith("activations")] == ["activations of llama"]
    assert three["activations of llama"] == two["activations of llama"]
    assert 0.2 < three["frozen weights of smol"] < 0.3


def test_what_grows_with_what():
    base = build_config("8b", {"batch_size": 64}, PAIR)
    one, two = terms(base), terms(base, gpus=2)
    assert activations(two) < 0.55 * activations(one)
    assert two["frozen weights of llama"] == one["frozen weights of llama"]  # never sharded
    stages = [terms(base, gpus=8, zero_stage=stage)["trained part"] for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True) and len(set(stages)) == 3
    offloaded = terms(base, gpus=8, zero_stage=3, offload=frozenset({"optimizer", "param"}))
    assert offloaded["trained part"] < stages[-1]
    nf4 = terms(build_config("8b", {"backbone_dtype": "nf4"}, PAIR))
    assert nf4["frozen weights of llama"] < 0.4 * one["frozen weights of llama"]
    cached = terms(base, cached_tokens=2**20)
    assert cached["reader cache"] == pytest.approx(2**20 * 3 * 3584 * 2 / GIB)
    assert "reader" not in cached


def test_a_reader_of_its_own_is_loaded_too():
    config = build_config("8b", {"reader": "qwen2.5-0.5b"}, PAIR)
    assert 0.9 < terms(config)["frozen weights of reader"] < 1.0


def run(*words: str) -> int:
    return cli.run(cli.COMMANDS["plan"], list(words))


def test_the_command(capsys):
    small = ["--preset", "8b", "--gpus", "2", "--batch_size", "64"]
    assert run(*small, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")) == 0
    out = capsys.readouterr().out
    assert "32 questions per pass on each of 2 GPUs" in out
    assert "ZeRO-2 on 2" in out and "GiB per rank of 80 GiB: fits" in out
    assert run("--preset", "8b", "--batch_size", "512", "--card_gib", "48") == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    advised = int(out.split("--micro_batch_size ")[1].split()[0])
    assert run("--preset", "8b", "--batch_size", "512", "--card_gib", "48",
               "--micro_batch_size", str(advised)) == 0  # fmt: skip
    assert "does not fit" not in capsys.readouterr().out
    assert run("--preset", "8b", "--card_gib", "24") == 0
    assert "no micro-batch size does; try --backbone_dtype nf4" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["nano", "small", "seed_stage_a", "8b"])
def test_every_preset_has_a_plan(preset, capsys):
    assert run("--preset", preset) == 0
    assert "expected" in capsys.readouterr().out


def test_mistakes(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(UserError, match="lm.a: the shape of x/y is not known here"):
        plan.read_shape("a", "x/y")
    for values, message in (
        ({"model_type": "gpt2"}, "plan knows Llama and Qwen2, not model_type 'gpt2'"),
        ({"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8}, "lacks num_hidden"),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            plan.read_shape("a", str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        plan.read_shape("a", str(folder))
    assert run("--gpus", "3", "--batch_size", "64") == 2
    assert run("--ds_config", str(tmp_path / "none.json")) == 2
    assert run("--ds_config", str(folder / "config.json")) == 2
