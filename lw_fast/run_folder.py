"""The folder of a run: who may write into it, and with which settings.

config.json  environment.json  log.jsonl  tensorboard/  epochN/ (checkpoint)  eval_epochN/
latest, best  (names of checkpoints)
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lw_fast import checkpoint
from lw_fast.config import RESUMABLE_CHANGES, Config, differences, from_dict, to_dict
from lw_fast.errors import UserError
from lw_fast.meters import environment

CONFIG = "config.json"
ENVIRONMENT = "environment.json"


def read_config(folder: Path) -> Config:
    """The settings of a run or checkpoint folder."""
    path = folder / CONFIG
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise UserError(f"{folder} is not a run or checkpoint folder: it has no {CONFIG}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def prepare(run_dir: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Makes the folder ready for this run, or refuses; writes config.json.

    Raises:
        UserError: it holds another run, or resuming would change what a training step computes.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other")
    if resume:
        _check_same(read_config(run_dir), config)
        checkpoint.tidy(run_dir)
        mark_best(run_dir)
    elif run_dir.exists() and (names := _names(run_dir)):
        if not _is_run(run_dir):
            raise UserError(f"{run_dir} holds something else than a run; choose another --run_dir")
        # A start that failed (a mistyped model, say) left nothing worth keeping.
        if not overwrite and names - {CONFIG, ENVIRONMENT}:
            raise UserError(f"{run_dir} already holds a run: pass --resume or --overwrite")
        _clear(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # A process killed in the middle of it must leave the settings that resuming reads.
    write_config(run_dir, config)
    checkpoint.write_text(run_dir / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")


def write_config(run_dir: Path, config: Config) -> None:
    """The settings that resuming reads."""
    checkpoint.write_text(run_dir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def _names(run_dir: Path) -> set[str]:
    """What is in a folder besides what a start that was killed may have left."""
    names = {path.name for path in run_dir.iterdir()}
    return {name for name in names if not name.startswith((".lock", ".partial-"))}


def _is_run(folder: Path) -> bool:
    """Whether its config.json is a run's; a model folder has a file of that name too."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and isinstance(values.get("lm"), dict)


def _check_same(old: Config, new: Config) -> None:
    changed = {k: v for k, v in differences(old, new).items() if k not in RESUMABLE_CHANGES}
    if changed:
        listed = ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items())
        raise UserError(
            f"--resume cannot change {listed}; to start a new run from its weights use --init_from"
        )


def _clear(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.name == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def append_row(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Adds one row to log.jsonl."""
    with (run_dir / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(run_dir: Path, step: int) -> None:
    """Removes rows of steps that a resumed run will log again."""
    path = run_dir / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the machine went down in the middle of it
            continue
        if row["step"] <= step:
            kept.append(json.dumps(row))
    checkpoint.write_text(path, "".join(line + "\n" for line in kept))


def best_checkpoint(run_dir: Path) -> str | None:
    """The checkpoint whose latent prompts have the highest F1, mean over the LMs; the earlier of
    equals. None where no evaluation of a checkpoint that is still there has latent prompts."""
    scores = {}
    for path in run_dir.glob("eval_epoch*/metrics.json"):
        name = path.parent.name.removeprefix("eval_")
        metrics = json.loads(path.read_text(encoding="utf-8"))
        latent = metrics.get("latent") or metrics.get("seed", {}).get("latent")
        if latent and (run_dir / name / checkpoint.MANIFEST).exists():
            scores[name] = statistics.fmean(row["f1"] for row in latent.values())
    return max(scores, key=lambda name: (scores[name], -_number(name)), default=None)


def _number(name: str) -> int:
    return int(name.removeprefix("epoch"))


def mark_best(run_dir: Path) -> None:
    """Writes the name of the best checkpoint into `best`, for people and other programs."""
    if name := best_checkpoint(run_dir):
        checkpoint.write_text(run_dir / "best", name + "\n")


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest complete one of a run folder."""
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")
    return path if (path / "state.pt").exists() else checkpoint.latest(path)
