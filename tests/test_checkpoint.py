"""Checkpoints: whole or not at all, verified, pruned, locked, and never unpickled blindly."""

import errno
import hashlib
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_killer import save, step_of

from lw_fast import checkpoint
from lw_fast.errors import UserError

KILLER = Path(__file__).with_name("checkpoint_killer.py")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def reseal(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file that was changed."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------- round trip


def test_round_trip(run):
    encoder = {"weight": torch.randn(3, 4), "half": torch.randn(5).bfloat16()}
    adapters = {"llama": {"w": torch.randn(2)}, "qwen2": {"w": torch.randn(2)}}
    optimizer = {"step": 7, "moments": {"encoder.weight": {"exp_avg": torch.randn(3, 4)}}}
    progress = {"epoch": 2, "global_step": 7, "rng": torch.get_rng_state(), "seen": [1, (2, 3)]}
    path = checkpoint.save(
        run,
        "epoch2",
        encoder=encoder,
        adapters=adapters,
        optimizer=optimizer,
        progress=progress,
        config={"lr": 1e-3, "lm": {"llama": "x"}},
        stats={"llama": {"count": 3}},
    )
    assert path == run / "epoch2" == checkpoint.latest(run)
    assert (run / "latest").read_text() == "epoch2\n"
    loaded = checkpoint.load(path)
    assert loaded.path == path
    assert loaded.encoder.keys() == encoder.keys()
    assert all(torch.equal(loaded.encoder[k], encoder[k]) for k in encoder)
    assert loaded.encoder["half"].dtype == torch.bfloat16
    assert list(loaded.adapters) == ["llama", "qwen2"]
    assert torch.equal(loaded.adapters["qwen2"]["w"], adapters["qwen2"]["w"])
    moment = loaded.optimizer["moments"]["encoder.weight"]["exp_avg"]
    assert loaded.optimizer["step"] == 7
    assert torch.equal(moment, optimizer["moments"]["encoder.weight"]["exp_avg"])
    assert torch.equal(loaded.progress.pop("rng"), progress["rng"])
    assert loaded.progress == {"epoch": 2, "global_step": 7, "seen": [1, (2, 3)]}
    assert loaded.config == {"lr": 1e-3, "lm": {"llama": "x"}}
    assert loaded.stats == {"llama": {"count": 3}}


def test_files_are_the_ones_of_the_original(run):
    """Plain state dicts, and a state.pt with epoch, global_step, args and optimizer."""
    save(run, 1)
    folder = run / "epoch1"
    assert names(folder) == {
        "encoder.pt",
        "adapter_llama.pt",
        "adapter_qwen.pt",
        "state.pt",
        "config.json",
        "manifest.json",
    }
    encoder = torch.load(folder / "encoder.pt", weights_only=True)
    assert list(encoder) == ["weight"]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() == {"epoch", "global_step", "args", "optimizer"}
    assert json.loads((folder / "config.json").read_text()) == state["args"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert checkpoint.load(folder).stats is None


def test_saving_again_replaces(run):
    save(run, 1, name="epoch1")
    save(run, 5, name="epoch1")
    assert step_of(run / "epoch1") == 5
    assert names(run) == {"epoch1", "latest"}


def test_permissions_follow_the_umask(run):
    before = os.umask(0o027)
    try:
        save(run, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((run / "epoch1").stat().st_mode) == 0o750
    for path in (run / "epoch1").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


# ------------------------------------------------------------------------------- pruning


def test_only_the_newest_are_kept(run):
    """Judged by step, not by name or time; folders that are not checkpoints are left alone."""
    for foreign in ("eval_epoch1", "notes"):
        (run / foreign).mkdir(parents=True)
        (run / foreign / "state.pt").write_text("mine")
    (run / "notes" / "manifest.json").write_text('{"files": {}}')
    for step in (9, 10, 11, 2):
        save(run, step, keep_last=2)
    assert names(run) == {"eval_epoch1", "notes", "epoch10", "epoch11", "latest"}
    save(run, 12, keep_last=0)
    assert {"epoch10", "epoch11", "epoch12"} < names(run)


def test_the_best_one_is_spared(run):
    for step in (1, 2, 3, 4):
        save(run, step, keep_last=1, spare=["epoch2"])
    assert names(run) == {"epoch2", "epoch4", "latest"}


# ------------------------------------------------------------------------------- off the thread


def content(step: int) -> dict:
    return dict(
        encoder={},
        adapters={},
        optimizer={},
        progress={"epoch": step, "global_step": step},
        config={},
    )


def test_saver_does_not_wait_for_the_disk(run, monkeypatch):
    disk = threading.Event()
    write = checkpoint._write_synced

    def slow(path, data):
        assert disk.wait(20)
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write_synced", slow)
    with checkpoint.Saver() as saver:
        assert saver.wait() is None
        saver.save(run, "epoch1", **content(1))
        assert not (run / "epoch1").exists()
        disk.set()
        saver.save(run, "epoch2", **content(2))  # after the first is whole
        assert checkpoint.load(run / "epoch1").progress["global_step"] == 1
        assert saver.wait() == run / "epoch2"
        saver.save(run, "epoch3", **content(3))
    assert checkpoint.latest(run) == run / "epoch3"


def test_saver_tells_of_a_failed_save(run):
    run.write_text("not a folder")
    saver = checkpoint.Saver()
    saver.save(run, "epoch1", **content(1))
    with pytest.raises(UserError, match="could not save"):
        saver.save(run, "epoch2", **content(2))
    with pytest.raises(UserError, match="could not save"):
        with saver:
            saver.save(run, "epoch3", **content(3))


# ------------------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-9])
    elif how == "altered":
        path.write_bytes(data[:-9] + bytes(255 - b for b in data[-9:]))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


FILES = ("encoder.pt", "adapter_qwen.pt", "state.pt", "config.json", "manifest.json")


@pytest.mark.parametrize("how", ["truncated", "altered", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_taken(run, name, how, caplog):
    for step in (1, 2, 3):
        save(run, step, keep_last=0)
    damage(run / "epoch3" / name, how)
    with pytest.raises(UserError, match=f"epoch3.*{name}") as error:
        checkpoint.load(run / "epoch3")
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(run) == run / "epoch2"
    assert "skipping a damaged checkpoint" in caplog.text and name in caplog.text


def test_damaged_ones_do_not_push_out_good_ones(run):
    save(run, 1)
    save(run, 2)
    damage(run / "epoch2" / "manifest.json", "truncated")
    save(run, 3, keep_last=2)
    assert {"epoch1", "epoch3"} < names(run)


def test_nothing_to_load(run, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        checkpoint.load(run / "epoch1")
    with pytest.raises(UserError, match="manifest.json is missing"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.latest(tmp_path)
    save(run, 1)
    damage(run / "epoch1" / "state.pt", "truncated")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.latest(run)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}])
def test_a_well_formed_file_that_is_no_state(run, content):
    save(run, 1)
    torch.save(content, run / "epoch1" / "state.pt")
    reseal(run / "epoch1", "state.pt")
    with pytest.raises(UserError, match="state.pt (must hold a dict|lacks args, global_step)"):
        checkpoint.load(run / "epoch1")


# ------------------------------------------------------------------------------- security


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["encoder.pt", "adapter_llama.pt", "state.pt"])
@pytest.mark.parametrize("raw", [False, True])
def test_a_malicious_pickle_does_not_run(run, tmp_path, name, raw):
    target = tmp_path / "owned"
    save(run, 1)
    path = run / "epoch1" / name
    if raw:
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"weight": Payload(target)}, path)
    reseal(run / "epoch1", name)  # the attacker can write manifests too
    with pytest.raises(UserError, match=f"{name} (is refused|cannot be read)"):
        checkpoint.load(run / "epoch1")
    assert not target.exists()
    torch.load(path, weights_only=False) if not raw else pickle.loads(path.read_bytes())
    assert target.exists()  # the payload was live


# ------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("function", "calls"),
    [("_write_synced", 0), ("_write_synced", 3), ("fsync", 2), ("fsync", 6), ("fsync", 9)],
)
def test_disk_full(run, monkeypatch, function, calls):
    """Wherever the disk runs full: a clear error, nothing left behind, the older one intact."""
    save(run, 1)
    left = calls

    def full(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    where = os if function == "fsync" else checkpoint
    real = getattr(where, function)
    monkeypatch.setattr(where, function, full)
    with pytest.raises(UserError, match="could not save .*epoch2: No space left on device"):
        save(run, 2)
    monkeypatch.undo()
    assert step_of(run / "epoch1") == 1
    assert not [name for name in names(run) if name.startswith(".")]
    save(run, 3)
    assert step_of(checkpoint.latest(run)) == 3


def test_replacing_fails_and_the_old_one_returns(run, monkeypatch):
    save(run, 1, name="last")
    rename = os.rename

    def refuse(source, target):
        if Path(source).name.startswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        save(run, 2, name="last")
    assert names(run) == {"last", "latest"} and step_of(run / "last") == 1


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="could not save"):
        save(tmp_path / "file", 1)
    with (
        pytest.raises(UserError, match="cannot write into"),
        checkpoint.lock_run(tmp_path / "file"),
    ):
        pass


def test_kill_at_every_point_of_a_save(tmp_path):
    """SIGKILL before each change to the disk and inside each file: the newest complete checkpoint
    loads, saving goes on, and no rubbish stays."""
    result = subprocess.run(
        [sys.executable, str(KILLER), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[2]) > 30, result.stdout


# ------------------------------------------------------------------------------- lock


def test_a_second_process_is_refused(run):
    with checkpoint.lock_run(run):
        with pytest.raises(UserError, match=f"in use by another process .pid {os.getpid()} on "):
            with checkpoint.lock_run(run):
                pass
    with checkpoint.lock_run(run):
        pass


HOLD = """
import sys, time
from lw_fast.checkpoint import lock_run
with lock_run(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock(run):
    root = str(KILLER.parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"pid {holder.pid} on"), checkpoint.lock_run(run):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with checkpoint.lock_run(run):
        pass
