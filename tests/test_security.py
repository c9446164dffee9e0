"""A checkpoint or a model from a stranger: its pickles and its code do not run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_checkpoint import Payload, reseal
from test_train import ONE

from lw_fast import cli
from lw_fast.config import BackboneConfig
from lw_fast.errors import UserError
from lw_fast.frozen_lm import load_frozen_lm
from lw_fast.train import train

LMS = ("llama", "qwen")


def poison(folder: Path, name: str, target: Path, *, raw: bool) -> None:
    """Puts the payload into a file of a checkpoint; the manifest agrees with it."""
    path = folder / name
    if raw:
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"weight": Payload(target)}, path)
    reseal(folder, name)


def is_live(path: Path, target: Path, *, raw: bool) -> bool:
    """Whether an unrestricted load would have fallen for it."""
    pickle.loads(path.read_bytes()) if raw else torch.load(path, weights_only=False)
    return target.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lm_dirs, qa_file) -> Path:
    folder = tmp_path_factory.mktemp("security") / "run"
    data = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=8, eval_samples=2)
    train(tiny.config(lm=lm_dirs, epochs=1, kinds="latent", **data), ONE, folder)
    return folder


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("raw", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["encoder.pt", "adapter_llama.pt", "state.pt"])
@pytest.mark.parametrize("command", ["resume", "init_from", "eval", "eval of a checkpoint", "demo"])
def test_a_malicious_checkpoint_does_not_run(trained, tmp_path, capsys, command, name, raw):
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    target, new = tmp_path / "owned", str(tmp_path / "new")
    poison(run_dir / "epoch1", name, target, raw=raw)
    lms = [word for lm in LMS for word in (f"--lm.{lm}", lm)]  # never read: the checkpoint is first
    line = {
        "resume": ["train", "--run_dir", str(run_dir), "--resume", "--epochs", "2"],
        "init_from": ["train", "--run_dir", new, "--init_from", str(run_dir), *lms],
        "eval": ["eval", "--ckpt", str(run_dir), "--out_dir", new],
        "eval of a checkpoint": ["eval", "--ckpt", str(run_dir / "epoch1"), "--out_dir", new],
        "demo": ["demo", "--ckpt", str(run_dir)],
    }[command]
    assert cli.run(cli.COMMANDS[line[0]], [*line[1:], "--device", "cpu"]) == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert f"{name} is refused" in said or f"{name} cannot be read" in said
    assert not target.exists()
    assert is_live(run_dir / "epoch1" / name, target, raw=raw)


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_model_runs_only_if_trusted(tmp_path, lm_dirs, monkeypatch, trust):
    """A model folder that names its own Python code."""
    folder, target = Path(shutil.copytree(lm_dirs["qwen"], tmp_path / "lm")), tmp_path / "owned"
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnLM"}
    settings |= {"model_type": "own_model", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        f"Path({str(target)!r}).touch()\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own_model'\n"
        "class OwnLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    config = BackboneConfig(trust_remote_code=trust)
    if trust:
        lm = load_frozen_lm("qwen", str(folder), config, tiny.CPU)
        assert type(lm.model).__name__ == "OwnLM"
    else:
        with pytest.raises(UserError, match="lm.qwen: "):
            load_frozen_lm("qwen", str(folder), config, tiny.CPU)
    assert target.exists() is trust
