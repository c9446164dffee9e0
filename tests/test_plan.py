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
    assert lms_of(STEP | {"layout": "padded"}) == pytest.approx(40.6, rel=0.05)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_measured_compiled_step(dtype):
    """The same, compiled: 37.1 GiB, with two copies of fp8 weights as with one of bf16."""
    assert lms_of(STEP | {"backbone_dtype": dtype}) == pytest.approx(37.1, rel=0.03)


STEP = dict(batch_size=64, latent_len=31)  # and the frame, and 5 of an answer


def lms_of(settings) -> float:
    planned = terms(build_config("8b", settings, PAIR), answer_len=5)
    return sum(gib for name, gib in planned.items() if "llama" in name or "qwen" in name)


# Llama-3.1-8B by hand: 32 layers of 4096 x (4096 + 1024 + 1024 + 4096) attention, 3 x 4096 x 14336
# MLP and two norms; then embedding and head of 128256 x 4096 and the last norm.
LAYERS = 32 * (4096 * 10240 + 3 * 4096 * 14336 + 2 * 4096)
ENDS = 2 * 128256 * 4096 + 4096


@pytest.mark.parametrize(
    ("dtype", "layer_byte"), [("bf16", 2), ("fp32", 4), ("fp8", 2), ("int8", 1), ("nf4", 0.515875)]
)
def test_weights_by_dtype(dtype, layer_byte):
    config = build_config("8b", {"backbone_dtype": dtype}, PAIR)
    by_hand = LAYERS * layer_byte + ENDS * (4 if dtype == "fp32" else 2)
    assert terms(config)["frozen weights of llama"] == pytest.approx(by_hand / GIB)


def test_sharded_layers():
    """Half of the layers on each of two ranks, both ends whole, a billion weights at a time."""
    config = build_config("8b", {"shard_lms": "yes"}, PAIR)
    two = terms(config, gpus=2, zero_stage=3)
    assert two["frozen weights of llama"] == pytest.approx((LAYERS + 2 * ENDS) / GIB)
    assert two["gathered layers"] == pytest.approx(2e9 / GIB)
    assert "gathered layers" not in terms(build_config("8b", {}, PAIR), gpus=2, zero_stage=2)
    small = build_config("8b", {}, {"llama": "smollm2-135m", "qwen": "qwen2.5-0.5b"})
    assert terms(small, gpus=2, zero_stage=3)["gathered layers"] < 0.7  # all of 0.36 B


def test_one_lm_per_gpu():
    """The fullest rank: one LM, and the whole batch where there are as many LMs as ranks."""
    both = build_config("8b", {"batch_size": 64}, PAIR)
    apart = build_config("8b", {"batch_size": 64, "lm_parallel": True}, PAIR)
    two, four, plain = terms(apart, gpus=2), terms(apart, gpus=4), terms(both)
    assert "frozen weights of qwen" not in two and "frozen weights of reader" in two
    assert two["frozen weights of llama"] == plain["frozen weights of llama"]
    assert activations(two) == activations(plain)
    assert activations(four) == pytest.approx(activations(two) / 2, rel=0.02)
    byte = build_config("8b", {"lm_parallel": True, "encoder_type": "byte"}, PAIR)
    assert "frozen weights of reader" not in terms(byte, gpus=2)
    with pytest.raises(UserError, match="multiple of 2 processes"):
        terms(apart, gpus=3)


def test_recomputed_and_compiled_layers():
    """bf16 values per position of an eager layer: four widths, queries, keys, values and output,
    three MLP rows; compiled two and two; recomputed one width per layer and one layer whole."""
    eager, compiled = 4 * 4096 + 10240 + 3 * 14336, 2 * 4096 + 10240 + 2 * 14336
    kept = {}
    for layout in ("padded", "packed"):
        for grad_ckpt in (False, True):
            settings = STEP | {"layout": layout, "grad_ckpt": grad_ckpt}
            planned = terms(build_config("8b", settings, PAIR), answer_len=5)
            kept[layout, grad_ckpt] = activations(planned)
    by_hand = {
        ("padded", False): 32 * eager, ("padded", True): 32 * 4096 + eager,
        ("packed", False): 32 * compiled, ("packed", True): 32 * 4096 + compiled,
    }  # fmt: skip
    logits = kept["padded", False] - by_hand["padded", False] * 2560 * 2 / GIB
    assert 0 < logits < 0.5
    for case, values in by_hand.items():
        assert kept[case] == pytest.approx(values * 2560 * 2 / GIB + logits)


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
    assert two["frozen weights of llama"] == one["frozen weights of llama"]  # not sharded
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
    apart = ["--lm_parallel", "true", "--encoder_type", "byte", "--gpus", "2", "--card_gib", "24"]
    assert run("--preset", "8b", "--batch_size", "16", *apart) == 0
    out = capsys.readouterr().out
    assert "16 questions per pass" in out and "GiB per rank of 24 GiB: fits" in out


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


COLUMNS = {
    "bf16, one GPU": ({}, {}),
    "`--grad_ckpt true`": ({"grad_ckpt": True}, {}),
    "nf4, one GPU": ({"backbone_dtype": "nf4"}, {}),
    "bf16, ZeRO-3 on two": ({}, {"gpus": 2, "zero_stage": 3}),
    "bf16, `--lm_parallel` on two": (
        {"encoder_type": "byte", "lm_parallel": True}, {"gpus": 2},
    ),
}  # fmt: skip
"""Of the table in docs/scaling.md: settings, and the job."""


def cell(settings, job, card: int) -> str:
    """The largest micro-batch that fits a card, and what it needs."""
    source = 1200 if settings.get("encoder_type") == "byte" else 300  # bytes, or tokens
    job = Job(**job, card_gib=card, answer_len=5, source_len=source)
    config = build_config("8b", settings, PAIR)
    size = plan.largest_micro_batch(config, job)
    if not size:
        return "does not fit"
    config = build_config("8b", settings | {"micro_batch_size": size}, PAIR)
    gib = sum(term.bytes for term in plan.plan(config, job)) / GIB
    return f"{size} ({gib:.0f} GiB)"


def test_the_table_of_the_document():
    """docs/scaling.md shows what the plan computes."""
    lines = [f"| card | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for card in (80, 48, 40, 24):
        cells = " | ".join(cell(*column, card) for column in COLUMNS.values())
        lines.append(f"| {card} GiB | {cells} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "scaling.md").read_text(), table
