"""nf4 and int8 on a CPU: what is quantised, evaluation, training through it, refusals."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import quantised as quantised_benchmark
from benchmarks.rows import read_rows
from lw_fast import cli, lm_sources, quantised
from lw_fast.config import BackboneConfig
from lw_fast.engine import World, close_world, init_world, load_ds_config
from lw_fast.errors import UserError
from lw_fast.frozen_lm import FrozenLM, load_frozen_lm
from lw_fast.prompts import KINDS
from lw_fast.train import train

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[5, 77, 201, 9, 130, 64]])
ERROR = {"nf4": 0.5, "int8": 0.1}
"""Largest relative error of hidden states against fp32: four bits cost 9 % per random matrix."""
ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> dict[str, str]:
    """The tiny pair in widths that are whole blocks of 64, as those of real LMs are."""
    folder = tmp_path_factory.mktemp("wide")
    for name, width in (("llama", 64), ("qwen", 128)):
        lm = tiny.frozen_lm(name, hidden_size=width, intermediate_size=192, initializer_range=0.1)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llama", "qwen")}


def load(source, kind: str) -> FrozenLM:
    return load_frozen_lm("mine", str(source), BackboneConfig(backbone_dtype=kind), tiny.CPU)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().float() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_only_layers_are_quantised(dirs, name, kind):
    """Embeddings, head and norms stay bf16, so that kernels and embed_rms can read them."""
    lm, exact = load(dirs[name], kind), load(dirs[name], "bf16")
    small = {n for n, p in lm.model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(small) == 2 * 7 and all(".layers." in name for name in small)
    assert lm.dtype == torch.bfloat16 and lm.embed_rms == exact.embed_rms
    head, its_head = (x.model.get_output_embeddings().weight for x in (lm, exact))
    assert torch.equal(head, its_head)


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_close_to_the_exact_lm(dirs, name, kind):
    """Hidden states, scores and the gradient of the prefix; and not equal to them."""
    lm, exact = load(dirs[name], kind), load(dirs[name], "fp32")
    embeds = exact.embed(IDS).detach()
    seen = []
    for one in (lm, exact):
        leaf = embeds.to(one.dtype).requires_grad_()
        hidden = one.hidden(leaf)
        scores = one.score(hidden[0], IDS[0])
        scores.loss.sum().backward()
        logits = one.logits(hidden[0]).float()
        expected = torch.nn.functional.cross_entropy(logits, IDS[0], reduction="none")
        torch.testing.assert_close(scores.nll, expected, atol=0.05, rtol=0.01)
        seen.append((hidden, leaf.grad))
    assert 0 < relative(seen[0][0], seen[1][0]) < ERROR[kind]
    assert 0 < relative(seen[0][1], seen[1][1]) < 2 * ERROR[kind]


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_a_pass_without_gradients_changes_nothing(dirs, kind):
    """bitsandbytes packs weights for inference; training goes on behind every evaluation."""
    lm = load(dirs["llama"], kind)

    def gradient() -> torch.Tensor:
        leaf = lm.embed(IDS).detach().requires_grad_()
        lm.hidden(leaf).float().square().sum().backward()
        return leaf.grad

    before, hidden = gradient(), lm.hidden(lm.embed(IDS).requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(lm.hidden(lm.embed(IDS)), hidden)
    assert torch.equal(gradient(), before)


@pytest.mark.parametrize("kind", quantised.KINDS)
@pytest.mark.parametrize("shape", list(lm_sources.RANDOM_SHAPES))
def test_random_lms_are_quantised_layer_by_layer(monkeypatch, shape, kind):
    """Of the real architecture, whole, and never two bf16 matrices of its layers at once."""
    from transformers.integrations import bitsandbytes as integration

    small = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, vocab_size=800)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    known = lm_sources.RANDOM_SHAPES[shape]
    monkeypatch.setitem(lm_sources.RANDOM_SHAPES, shape, known | small | heads)
    converter = getattr(integration, {"nf4": "Bnb4bitQuantize", "int8": "Bnb8bitQuantize"}[kind])
    convert, calls = converter.convert, []

    def spying(self, values, *, model, **rest):
        for name, weight in model.named_parameters():
            waits = weight.is_meta or weight.dtype in (torch.uint8, torch.int8)
            assert waits or ".layers." not in name or weight.dim() == 1
        calls.append(*values)
        return convert(self, values, model=model, **rest)

    monkeypatch.setattr(converter, "convert", spying)
    lm = load(f"random:{shape}", kind)
    assert len(calls) == 2 * 7 == len(set(calls))
    everything = [*lm.model.parameters(), *lm.model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in everything)
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert tied == known["tie_word_embeddings"]
    hidden, other = lm.hidden(lm.embed(IDS)), lm.hidden(lm.embed(IDS.flip(1)))
    assert hidden.isfinite().all() and hidden.float().std() == pytest.approx(1, abs=0.1)
    assert not torch.allclose(hidden, other.flip(1), atol=0.01)  # positions count


# ------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world():
    yield init_world(use_deepspeed=True, device="cpu")
    close_world()


def settings(dirs, qa_file, **changes):
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=6)
    short = dict(epochs=6, lr=5e-3, adapter_lr=1e-2, encoder_dropout=0.0)
    return tiny.config(lm=dirs, **files | short | changes)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").open()]


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_training_through_quantised_lms(dirs, qa_file, tmp_path, world, kind):
    """Plain and ZeRO-2 engines agree, and the loss falls."""
    config = settings(dirs, qa_file, backbone_dtype=kind)
    train(config, ONE, tmp_path / "plain")
    ds_config = load_ds_config(ROOT / "ds_configs" / "zero2.json")
    train(config, world, tmp_path / "zero2", ds_config=ds_config)
    plain, zero2 = losses(tmp_path / "plain"), losses(tmp_path / "zero2")
    assert zero2 == pytest.approx(plain, rel=0.02)  # bf16 LMs turn last bits into small steps
    assert len(plain) == 24 and math.fsum(plain[-4:]) < 0.8 * math.fsum(plain[:4])


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_zero3_is_refused(dirs, qa_file, tmp_path, world, kind):
    ds_config = load_ds_config(ROOT / "ds_configs" / "zero3.json")
    config = settings(dirs, qa_file, backbone_dtype=kind)
    with pytest.raises(UserError, match=f"backbone_dtype={kind} does not go with ZeRO-3") as error:
        train(config, world, tmp_path / "run", ds_config=ds_config)
    assert "\n" not in str(error.value) and "zero2" in str(error.value)


@pytest.fixture(scope="module")
def trained(dirs, qa_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(settings(dirs, qa_file, epochs=1), ONE, folder)
    return folder


@pytest.mark.parametrize("flags", [["--load_4bit"], ["--backbone_dtype", "int8"]])
def test_all_kinds_are_evaluated(trained, tmp_path, flags):
    where = ["--ckpt", str(trained), "--out_dir", str(tmp_path), "--device", "cpu"]
    assert cli.run(cli.eval_main, [*where, "--kinds", ",".join(KINDS), *flags]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["dtype"] == {"llama": "bfloat16", "qwen": "bfloat16"}
    for kind in KINDS:
        for lm in ("llama", "qwen"):
            assert math.isfinite(metrics[kind][lm]["nll_token"]) and 0 <= metrics[kind][lm]["f1"]
    exact = json.loads((trained / "eval_epoch1" / "metrics.json").read_text())
    nll, its_nll = (m["latent"]["qwen"]["nll_token"] for m in (metrics, exact))
    assert nll != its_nll and nll == pytest.approx(its_nll, rel=0.2)


# ------------------------------------------------------------------------------- the benchmark


def measured(out: Path, *argv: str) -> dict[tuple[str, str], float]:
    """(case, metric) -> value of the rows that one call writes; none may name a folder."""
    flags = ["--pair", "tiny", "--device", "cpu", "--out", str(out)]
    assert cli.run(quantised_benchmark.main, [*argv, *flags]) == 0
    rows = read_rows(out)
    assert not any("/" in str(row["config"]).replace("benchmarks/quantised.py", "") for row in rows)
    return {(row["case"], row["metric"]): row["value"] for row in rows}


def test_benchmark_of_memory_and_latency(dirs, qa_file, tmp_path):
    lms = [f"--lm.{name}={source}" for name, source in dirs.items()]
    data = ["--eval_dataset", str(qa_file), "--eval_samples", "3", "--max_new_tokens", "2"]
    data += ["--reader_layers", "0,2"]
    what = ["memory", "--dtypes", "int8,nf4", "--seconds", "0", "--kinds", "text,latent"]
    rows = measured(tmp_path / "rows.csv", *what, *lms, *data)
    assert {metric for _, metric in rows} == {"seconds"}  # no GPU: no memory, rather than zeros
    assert all(value > 0 for value in rows.values())
    # Per dtype two phases; per LM and batch size two prefills and the token.
    assert len(rows) == 2 * (2 + 2 * 2 * 3)
    assert (
        "pair=tiny lm=qwen kind=latent dtype=nf4 phase=token batch=64 positions=16",
        "seconds",
    ) in rows


def test_benchmark_of_accuracy(trained, tmp_path):
    what = ["accuracy", "--ckpt", str(trained), "--dtypes", "bf16,nf4"]
    rows = measured(tmp_path / "rows.csv", *what)
    for lm in ("llama", "qwen"):
        for kind in ("text", "latent"):
            exact, small = (
                f"pair=tiny lm={lm} kind={kind} dtype={dtype}" for dtype in ("bf16", "nf4")
            )
            assert (exact, "f1_change") not in rows
            for metric in quantised_benchmark.SCORES:
                change = rows[small, f"{metric}_change"]
                assert change == pytest.approx(rows[small, metric] - rows[exact, metric], abs=1e-5)
                lo, hi = (rows[small, f"{metric}_change_{end}"] for end in ("lo", "hi"))
                assert lo <= change <= hi


def test_benchmark_refuses_an_unknown_dtype(capsys):
    argv = ["memory", "--pair", "tiny", "--dtypes", "nf5"]
    assert cli.run(quantised_benchmark.main, argv) == 2
    assert "--dtypes: nf5 not among" in capsys.readouterr().err


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_without_bitsandbytes(dirs, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import raises ImportError
    with pytest.raises(UserError, match="needs bitsandbytes: pip install 'lw_fast") as error:
        load(dirs["qwen"], kind)
    assert "\n" not in str(error.value)


def test_a_width_that_bitsandbytes_gets_wrong(lm_dirs):
    with pytest.raises(UserError, match="layers of width 32 wrongly on CPUs"):
        load(lm_dirs["llama"], "nf4")
    assert load(lm_dirs["llama"], "int8").d_model == 32


def test_the_options():
    nf4, int8 = quantised.quantisation("nf4"), quantised.quantisation("int8")
    assert nf4.load_in_4bit and nf4.bnb_4bit_quant_type == "nf4" and nf4.bnb_4bit_use_double_quant
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16
    assert int8.load_in_8bit and not int8.load_in_4bit
