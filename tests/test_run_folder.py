"""Run folders: nothing is lost, a resumed run is the same run."""

from __future__ import annotations

import json

import pytest
import tiny

from lw_fast import run_folder
from lw_fast.config import to_dict
from lw_fast.errors import UserError
from lw_fast.run_folder import drop_rows_after, prepare, read_config, resolve_checkpoint

CONFIG = tiny.config(lm={"llama": "a/b"})


def start(run_dir, config=CONFIG, *, resume=False, overwrite=False):
    prepare(run_dir, config, resume=resume, overwrite=overwrite)


@pytest.fixture
def run(tmp_path):
    """A folder in which a run has logged something."""
    start(tmp_path / "run")
    run_folder.append_row(tmp_path / "run", {"step": 1, "loss": 2.0})
    return tmp_path / "run"


def content(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_gets_settings_and_environment(tmp_path):
    start(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == to_dict(CONFIG)
    assert read_config(tmp_path / "a" / "b") == CONFIG
    assert json.loads((tmp_path / "a" / "b" / "environment.json").read_text())["torch"]


def test_a_run_is_not_overwritten_unasked(run):
    before = content(run)
    with pytest.raises(UserError, match="already holds a run: pass --resume or --overwrite"):
        start(run, tiny.config(lr=1.0))
    assert content(run) == before


def test_overwrite_starts_anew(run):
    (run / "epoch1").mkdir()
    (run / "epoch1" / "encoder.pt").write_text("x")
    start(run, tiny.config(lr=1.0), overwrite=True)
    assert content(run).keys() == {"config.json", "environment.json"}
    assert read_config(run).optim.lr == 1.0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
        {"config.json": "[]", "thesis.tex": "years of work"},
    ],
)
def test_a_folder_of_something_else_is_never_touched(tmp_path, files, overwrite):
    """A model folder holds a config.json as well."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(UserError, match="something else than a run"):
        start(tmp_path, overwrite=overwrite)
    assert content(tmp_path) == before


def test_a_start_that_failed_does_not_block_the_folder(tmp_path):
    """Settings were written, then the model was not found: the next try needs no flag."""
    start(tmp_path)
    start(tmp_path, tiny.config(lr=1.0))
    assert read_config(tmp_path).optim.lr == 1.0


def test_an_empty_folder_or_a_lock_alone_is_free(tmp_path):
    (tmp_path / ".lock").write_text("")
    start(tmp_path)


def test_resume_keeps_the_run_and_takes_what_may_change(run):
    changed = tiny.config(lm={"llama": "a/b"}, epochs=9, log_every=7, kinds="text")
    start(run, changed, resume=True)
    assert (run / "log.jsonl").exists()
    assert read_config(run) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5, "d_z": 8}, "d_z 16 -> 8, lr 0.0005 -> 0.5; .* use --init_from"),
        ({"lm": {"llama": "c/d"}}, r"lm \{'llama': 'a/b'\} -> \{'llama': 'c/d'\}"),
        ({"dataset": "squad", "epochs": 3}, "cannot change dataset 'nano' -> 'squad'; "),
    ],
)
def test_resume_refuses_another_configuration(run, changes, message):
    before = content(run)
    with pytest.raises(UserError, match=message) as error:
        start(run, tiny.config(**{"lm": {"llama": "a/b"}} | changes), resume=True)
    assert "\n" not in str(error.value) and "epochs" not in str(error.value)
    assert content(run) == before


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run or checkpoint folder: it has no config.json"):
        start(tmp_path / "none", resume=True)
    with pytest.raises(UserError, match="contradict"):
        start(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[[1, 2, 3]]", b"7", b"null", b"\xff\xfe\x00", b'{"lm": 5}']
)
def test_damaged_settings(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json is damaged") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_of_another_version_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"lm": {}, "latent_width": 3}')
    with pytest.raises(UserError, match="config.json: unknown setting 'latent_width'"):
        read_config(tmp_path)


def test_rows_after_the_resumed_step_go(run):
    for step in (2, 3, 4):
        run_folder.append_row(run, {"step": step})
    drop_rows_after(run, 2)
    rows = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2}]


def test_a_row_cut_in_the_middle_is_dropped(run):
    """The machine went down while a row was written."""
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    drop_rows_after(run, 5)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").open()] == [1]


def test_no_log_yet(tmp_path):
    drop_rows_after(tmp_path, 1)
    assert not (tmp_path / "log.jsonl").exists()


def test_resolve_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        resolve_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        resolve_checkpoint(tmp_path)
