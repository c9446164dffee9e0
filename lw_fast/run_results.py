"""What a run folder says about its run, read without torch and while the run goes on.

Nothing here raises over a file that a running process has only half written: what is not there yet
is absent. A folder that is no run at all is a UserError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lw_fast.errors import UserError

_KNOWN = ("text", "text_tuned", "latent", "token_budget", "span_text", "no_context", "shuffled")
"""Prompt kinds in the order in which tables show them; unknown ones follow."""

_EVAL = re.compile(r"eval_epoch(\d+)")


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """One run, as far as it got."""

    path: Path
    config: Mapping[str, Any]
    """Flat settings, and the LM table under `lm`."""
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    """log.jsonl."""
    evaluations: Mapping[int, Mapping[str, Any]]
    """Epoch -> metrics.json, in the order of epochs."""

    @property
    def lms(self) -> list[str]:
        """Names of the frozen LMs."""
        return list(self.config["lm"])

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The newest evaluation, if there is one."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def share(self) -> float:
        """How much of its steps the run has logged, 0 to 1."""
        return min(1.0, self.rows[-1]["epoch"] / self.config["epochs"]) if self.rows else 0.0

    @property
    def finished(self) -> bool:
        """Whether the evaluation after the last epoch is there."""
        return self.config["epochs"] in self.evaluations

    def predictions(self) -> list[dict[str, Any]]:
        """predictions.jsonl of the newest evaluation."""
        if not self.evaluations:
            return []
        return read_rows(self.path / f"eval_epoch{max(self.evaluations)}" / "predictions.jsonl")


def read_run(path: Path) -> RunResults:
    """Reads a run folder.

    Raises:
        UserError: it is not one.
    """
    config = read_object(path / "config.json")
    if config is None or not isinstance(config.get("lm"), dict) or "epochs" not in config:
        raise UserError(f"{path} is not a run folder: it has no config.json of a run")
    return RunResults(
        path=path,
        config=config,
        environment=read_object(path / "environment.json") or {},
        rows=[row for row in read_rows(path / "log.jsonl") if {"step", "epoch"} <= row.keys()],
        evaluations=_evaluations(path),
    )


def _evaluations(path: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for folder in path.glob("eval_epoch*"):
        match = _EVAL.fullmatch(folder.name)
        metrics = read_object(folder / "metrics.json") if match else None
        if match and metrics is not None:
            found[int(match[1])] = metrics
    return dict(sorted(found.items()))


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is absent or not (yet) one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; one that is cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def lookup(table: Mapping[str, Any] | None, *keys: str) -> float | None:
    """A number deep in nested tables; None where it is absent, not a number or not finite."""
    value: Any = table
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Prompt kinds, each once, in the order in which tables show them."""
    found = dict.fromkeys(kinds)
    return [k for k in _KNOWN if k in found] + [k for k in found if k not in _KNOWN]


def kinds_of(metrics: Mapping[str, Any] | None, lms: Sequence[str]) -> list[str]:
    """The prompt kinds that an evaluation holds: tables of an F1 per LM."""
    kinds = [
        k for k in metrics or {} if any(lookup(metrics, k, lm, "f1") is not None for lm in lms)
    ]
    return in_order(kinds)


def mean_over_lms(row: Mapping[str, Any], lms: Sequence[str], name: str) -> float | None:
    """Mean of `LM/name` of a log row over the LMs; None unless all are there and finite."""
    values = [lookup(row, f"{lm}/{name}") for lm in lms]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
