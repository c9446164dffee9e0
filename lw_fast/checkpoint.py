"""Checkpoints: only what is trained, written whole or not at all, verified before it is used.

    RUN/latest              name of the newest checkpoint, for people and other programs
    RUN/.lock               held by the process that writes into this run
    RUN/epoch3/encoder.pt, adapter_<lm>.pt      plain state dicts
              state.pt                          epoch, global_step, ..., args, optimizer
              config.json, training_stats.json
              manifest.json                     SHA-256 and size of each file, versions

A folder becomes a checkpoint in one rename, after all of it has reached the disk. A process killed
at any point leaves the checkpoints before it untouched, and at most a hidden folder that the next
save removes. Nothing here unpickles anything but tensors and plain values.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pickle
import platform
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lw_fast.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_PARTIAL = ".partial-"  # a checkpoint being written
_DOOMED = ".old-"  # a checkpoint being replaced or pruned; still whole if the process was killed


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns; all tensors on the CPU."""

    path: Path
    encoder: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    stats: dict[str, Any] | None


# --------------------------------------------------------------------------------------- save


def save(
    run_dir: str | Path,
    name: str,
    *,
    encoder: Mapping[str, Tensor],
    adapters: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    stats: Mapping[str, Any] | None = None,
    keep_last: int = 0,
    spare: Collection[str] = (),
) -> Path:
    """Writes the checkpoint RUN_DIR/NAME atomically; one rank calls it.

    Args:
        name: Folder name; an existing checkpoint of that name is replaced.
        encoder, adapters: State dicts on the CPU; adapters by LM name.
        optimizer: From `Engine.optimizer_state`.
        progress: epoch, global_step and whatever else resuming needs (tensors and plain values).
        config: From `config.to_dict`.
        stats: Content of training_stats.json.
        keep_last: Afterwards only this many newest checkpoints remain; 0 keeps all.
        spare: Names of checkpoints that remain however old they are (the best one, say).

    Raises:
        UserError: The disk is full or not writable; older checkpoints are intact.
    """
    run_dir = Path(run_dir)
    files: dict[str, Any] = {"encoder.pt": dict(encoder)}
    files |= {f"adapter_{lm}.pt": dict(state) for lm, state in adapters.items()}
    files["state.pt"] = {**progress, "args": dict(config), "optimizer": dict(optimizer)}
    files["config.json"] = dict(config)
    if stats is not None:
        files["training_stats.json"] = dict(stats)
    partial = run_dir / f"{_PARTIAL}{name}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run_dir)
        partial.mkdir()
        _write_folder(partial, files, int(progress["global_step"]))
        path = _publish(partial, run_dir / name)
        write_text(run_dir / "latest", name + "\n")
        _prune(run_dir, keep_last, spare)
    except OSError as error:
        raise UserError(
            f"could not save checkpoint {run_dir / name}: {error.strerror or error}; "
            "the checkpoints before it are intact"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well
    return path


def _write_folder(folder: Path, files: Mapping[str, Any], global_step: int) -> None:
    """Writes and syncs the files, and the manifest last."""
    entries = {}
    for name, content in files.items():
        data = _to_bytes(name, content)
        _write_synced(folder / name, data)
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {
        "format": FORMAT,
        "global_step": global_step,
        "files": entries,
        "versions": _versions(),
    }
    _write_synced(folder / MANIFEST, _to_bytes(MANIFEST, manifest))
    _sync_folder(folder)


def _to_bytes(name: str, content: Any) -> bytes:
    # Serialised in memory, so that a full disk shows as an OSError of a plain write.
    if name.endswith(".json"):
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, path: Path) -> Path:
    """Gives a complete folder its name; a checkpoint that had it stays whole until then."""
    doomed = path.with_name(f"{_DOOMED}{path.name}")
    if path.exists():
        os.rename(path, doomed)
    try:
        os.rename(partial, path)
    except OSError:
        if doomed.exists():
            os.rename(doomed, path)
        raise
    _sync_folder(path.parent)
    if doomed.exists():
        shutil.rmtree(doomed)
    return path


def write_text(path: Path, text: str) -> None:
    """Replaces a small file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        _write_synced(partial, data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def tidy(run_dir: str | Path) -> None:
    """Finishes what a killed process left half done; only for the holder of the lock."""
    run_dir = Path(run_dir)
    _remove_leftovers(run_dir)
    for path in _newest_first(run_dir)[:1]:
        write_text(run_dir / "latest", path.name + "\n")


def _remove_leftovers(run_dir: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in run_dir.glob(f"{_PARTIAL}*"):
        _remove(path)
    for path in run_dir.glob(f"{_DOOMED}*"):
        name = path.name.removeprefix(_DOOMED)
        if (run_dir / name).exists() or _problem(path):
            _remove(path)
        else:
            os.rename(path, run_dir / name)  # killed between the two renames of _publish


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _prune(run_dir: Path, keep_last: int, spare: Collection[str]) -> None:
    """Removes all but the newest checkpoints; a folder without a manifest is not one."""
    old = _newest_first(run_dir)[keep_last:] if keep_last else []
    for path in (path for path in old if path.name not in spare):
        doomed = path.with_name(f"{_DOOMED}{path.name}")
        os.rename(path, doomed)  # half removed, it must not pass for a damaged checkpoint
        shutil.rmtree(doomed)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lw_fast", "torch", "transformers", "deepspeed"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


class Saver:
    """`save` off the training thread, one checkpoint at a time, in order.

        with Saver() as saver:
            saver.save(run_dir, name, ...)      # waits for the one before, then returns at once

    The tensors must be copies that training leaves alone, as an engine's states are. A save that
    failed raises at the next `save`, `check` or `wait`, or at the end of the block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, run_dir: str | Path, name: str, **content: Any) -> None:
        """Takes the arguments of the function `save`."""
        self.wait()
        self._pending = self._thread.submit(save, run_dir, name, **content)

    def check(self) -> None:
        """Raises if the last save has failed by now; does not wait for it."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> Path | None:
        """The last checkpoint, once it is on the disk; None if there is none to wait for."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        with self._thread:  # shut down also if the save failed
            self.wait()


# --------------------------------------------------------------------------------------- load


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint folder after verifying each of its files.

    Raises:
        UserError: Not a checkpoint, or a file is missing, truncated or altered; it is named.
    """
    path = Path(path)
    if problem := _problem(path):
        raise UserError(problem)
    state = _load_tensors(path / "state.pt")
    if missing := {"args", "optimizer", "epoch", "global_step"} - state.keys():
        raise UserError(f"{path / 'state.pt'} lacks {', '.join(sorted(missing))}")
    names = _read_manifest(path)["files"]
    stats = "training_stats.json"
    return Checkpoint(
        path=path,
        encoder=_load_tensors(path / "encoder.pt"),
        adapters={
            name.removeprefix("adapter_").removesuffix(".pt"): _load_tensors(path / name)
            for name in names
            if name.startswith("adapter_")
        },
        optimizer=state.pop("optimizer"),
        config=state.pop("args"),
        progress=state,
        stats=json.loads((path / stats).read_bytes()) if stats in names else None,
    )


def latest(run_dir: str | Path) -> Path:
    """The newest checkpoint of a run (by global step) that is complete.

    A damaged one is skipped with a warning that says what is wrong with it.

    Raises:
        UserError: There is none.
    """
    run_dir = Path(run_dir)
    for path in _without_manifest(run_dir):
        log.warning("skipping a damaged checkpoint: %s", _problem(path))
    for path in _newest_first(run_dir):
        problem = _problem(path)
        if not problem:
            return path
        log.warning("skipping a damaged checkpoint: %s", problem)
    raise UserError(f"{run_dir} holds no complete checkpoint")


def _newest_first(run_dir: Path) -> list[Path]:
    """Checkpoint folders with a readable manifest, by global step, then by time."""
    found = []
    for path in run_dir.glob(f"*/{MANIFEST}"):
        manifest = _read_manifest(path.parent)
        if manifest and not path.parent.name.startswith(_PARTIAL):
            found.append((manifest["global_step"], path.stat().st_mtime_ns, path.parent))
    return [folder for *_, folder in sorted(found, reverse=True)]


_REQUIRED = {"encoder.pt", "state.pt", "config.json"}


def _without_manifest(run_dir: Path) -> list[Path]:
    """Folders that look like a checkpoint whose manifest is missing or unreadable."""
    folders = sorted(path.parent for path in run_dir.glob("[!.]*/state.pt"))
    return [folder for folder in folders if not _read_manifest(folder)]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if it is missing or not one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sizes = {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
        whole = isinstance(manifest["global_step"], int) and sizes.keys() >= _REQUIRED
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _problem(folder: Path) -> str:
    """What keeps a folder from being a complete checkpoint; empty if nothing does."""
    if not folder.is_dir():
        return f"there is no checkpoint folder {folder}"
    manifest = _read_manifest(folder)
    if manifest is None:
        what = "damaged" if (folder / MANIFEST).exists() else "missing"
        return f"{folder} is not a complete checkpoint: {MANIFEST} is {what}"
    for name, entry in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size} bytes instead of {entry['bytes']}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
                return f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}"
    return ""


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dict, got {type(content).__name__}")
    return content


# --------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def lock_run(run_dir: str | Path) -> Iterator[None]:
    """Keeps a second process out of a run folder; the kernel frees the lock if this one dies.

    Raises:
        UserError: Another process holds it, or the folder cannot be written.
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {run_dir}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{run_dir} is in use by another process ({holder}); wait for it or choose "
                "another --run_dir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
