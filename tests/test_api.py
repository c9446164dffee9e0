"""LatentPrompt: what a notebook does with a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import lw_fast
from lw_fast import run_folder
from lw_fast.api import Latent, LatentPrompt
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.evaluate import encode
from lw_fast.scoring import clean_prediction
from lw_fast.train import train

ROOT = Path(__file__).parents[1]
EXAMPLES = tiny.examples(5)
PAIRS = [(e.context, e.question) for e in EXAMPLES]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, lm_dirs, qa_file):
    folder = tmp_path_factory.mktemp("api") / "run"
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=16, eval_samples=2)
    world = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
    train(tiny.config(**files, lm=lm_dirs, kinds="latent", epochs=2), world, folder)
    return folder


@pytest.fixture(scope="module")
def lp(run_dir):
    return LatentPrompt.from_checkpoint(run_dir, device="cpu")


@pytest.fixture(scope="module")
def z(lp):
    return lp.encode(PAIRS)


def test_encodes_what_the_evaluation_encodes(lp, z):
    assert z.values.shape == (5, 6, 16) and len(z) == 5 and z.payload_bytes == 4 * 6 * 16
    assert torch.equal(z.values, encode(lp.model, EXAMPLES).z_NMZ)


def test_a_text_without_a_question(lp):
    assert torch.isfinite(lp.encode(["Ada lives in Paris."]).values).all()
    assert not torch.equal(lp.encode(["Ada"]).values, lp.encode([("Ada", "Who?")]).values)


def test_the_batch_changes_nothing(lp, z):
    alone = lp.encode(PAIRS[3:4])
    torch.testing.assert_close(alone.values, z[3].values, atol=1e-5, rtol=1e-4)
    assert z[-1].values.equal(z.values[4:]) and len(z[1:3]) == 2


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_plain_generate_takes_the_prefix(lp, z, name):
    """[BOS] Z [anchor] through `generate` of transformers gives our own answers."""
    lm, embeds = lp.lms[name], lp.prefix(name, z)
    head = 1 if name == "llama" else 0
    anchor = lm.tokenizer("Answer:", add_special_tokens=False).input_ids
    assert embeds.shape == (5, head + 6 + len(anchor), lm.d_model) and not embeds.requires_grad
    assert torch.equal(embeds[0, head + 6 :], lm.embed(torch.tensor(anchor)))
    rows = lm.model.generate(
        inputs_embeds=embeds,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=list(lm.stop_ids),
        pad_token_id=lm.tokenizer.eos_token_id,
    )
    theirs = lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert lp.generate(name, z, max_new_tokens=4) == [clean_prediction(text) for text in theirs]


def test_text_answers_and_their_cost(lp):
    tokens = lp.text_tokens("qwen", PAIRS)
    assert len(lp.generate_from_text("qwen", PAIRS, max_new_tokens=2)) == 5
    text = f"Context: {PAIRS[0][0]}\nQuestion: {PAIRS[0][1]}\n"
    assert tokens[0] == len(lp.lms["qwen"].tokenizer(text).input_ids)


def test_z_survives_a_file(lp, z, tmp_path):
    loaded = Latent.load(z.save(tmp_path / "z.safetensors"))
    assert loaded.values.equal(z.values) and loaded.config_hash == z.config_hash
    assert lp.generate("qwen", loaded) == lp.generate("qwen", z)
    half = z.save(tmp_path / "half.safetensors", dtype=torch.float16)
    torch.testing.assert_close(Latent.load(half).values, z.values, atol=2e-3, rtol=2e-3)
    assert half.stat().st_size < 2 * z.values.numel() + 400


def test_z_of_another_checkpoint_is_refused(lp, z, run_dir):
    earlier = LatentPrompt.from_checkpoint(run_dir / "epoch1", device="cpu")
    assert earlier.config_hash == lp.config_hash
    with pytest.raises(UserError, match="other weights"):
        earlier.generate("qwen", z)
    other = Latent(values=z.values, config_hash="0" * 12, weights_hash=z.weights_hash)
    with pytest.raises(UserError, match="other settings.*000000000000"):
        lp.prefix("qwen", other)


def test_decode_settings_do_not_change_the_hash(lp, z, run_dir):
    """How one decodes is not part of what Z means."""
    changed = LatentPrompt.from_checkpoint(run_dir, device="cpu", max_new_tokens=1, prefix_gain=0.5)
    assert changed.model.config.eval.max_new_tokens == 1
    assert not changed.prefix("qwen", z).equal(lp.prefix("qwen", z))


@pytest.mark.parametrize(
    "texts", ["one string", [], [("context",)], [("a", "b", "c")], [3], [("a", None)]]
)
def test_what_cannot_be_encoded(lp, texts):
    with pytest.raises(UserError, match="text|pair"):
        lp.encode(texts)


def test_mistakes(lp, z, run_dir, tmp_path):
    with pytest.raises(UserError, match="no LM is named 'gpt'; there are llama, qwen"):
        lp.generate("gpt", z)
    with pytest.raises(UserError, match="max_new_tokens"):
        lp.generate("qwen", z, max_new_tokens=0)
    assert lp.generate("qwen", z[:0]) == []
    with pytest.raises(UserError, match="no such folder"):
        LatentPrompt.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="unknown setting"):
        LatentPrompt.from_checkpoint(run_dir, device="cpu", max_new_token=1)
    with pytest.raises(UserError, match="cannot write"):
        z.save(tmp_path / "no" / "z.safetensors")
    (tmp_path / "z.safetensors").write_bytes(b"no")
    for name in ("z.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match="not a latent prompt file"):
            Latent.load(tmp_path / name)


def test_a_foreign_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"z": torch.zeros(2, 3, 4)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match="lw_fast did not write it"):
        Latent.load(tmp_path / "z.safetensors")


def test_long_texts_are_told(lp, caplog):
    with caplog.at_level("WARNING", logger="lw_fast"):
        lp.encode(["short", "Ada lives in Rome. " * 400])
    assert "1 of 2 texts were too long" in caplog.text


def test_the_package_offers_it_lazily():
    code = "import lw_fast, sys; assert 'torch' not in sys.modules; lw_fast.LatentPrompt"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert lw_fast.LatentPrompt is LatentPrompt and lw_fast.Latent is Latent
    with pytest.raises(AttributeError, match="Nothing"):
        _ = lw_fast.Nothing


def test_hash_is_that_of_the_folder(lp, run_dir):
    from lw_fast.config import config_hash

    assert lp.config_hash == config_hash(run_folder.read_config(run_dir / "epoch2"))
