"""Folders -> what the page shows: entries, tables, heat maps, fronts and predictions.

A value that a run does not have is None all the way to the page, which shows it as missing.
"""

from __future__ import annotations

import colorsys
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lw_fast.errors import UserError
from lw_fast.run_results import (
    RunResults,
    in_order,
    kinds_of,
    lookup,
    read_object,
    read_run,
)
from lw_fast.scoring import exact_match
from lw_fast.sweep_folder import STATE, is_sweep, read_sweep

_COLOURS = (
    "#2f7ed8", "#e07b00", "#1a9e77", "#d04a8c", "#8a63d2", "#b8a000", "#4fb3d9", "#d1495b",
)  # fmt: skip
"""Readable on white and on black, and by most colour-blind readers."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run on the page."""

    label: str
    run: RunResults
    colour: str
    state: str
    """finished, failed, stopped, or how far it is."""
    sweep: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """Axis -> value, for a point of a sweep."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was asked for."""

    entries: Sequence[Entry]
    absent: Sequence[str] = ()
    """Points of sweeps that have not begun."""

    @property
    def lms(self) -> list[str]:
        """Names of all LMs, in order of appearance."""
        return list(dict.fromkeys(lm for entry in self.entries for lm in entry.run.lms))

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        ended = {"finished", "failed", "stopped"}
        return not self.absent and all(entry.state in ended for entry in self.entries)


def collect(paths: Sequence[Path]) -> Report:
    """Reads runs and sweeps.

    Raises:
        UserError: a path is neither, or there is nothing to show.
    """
    found: list[dict[str, Any]] = []
    absent: list[str] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no such folder: {path}")
        if is_sweep(path):
            runs, missing = _points_of(path)
            found += runs
            absent += missing
        else:
            run = read_run(path)
            found.append(dict(label=path.resolve().name, run=run, state=_state(run)))
    if not found:
        raise UserError(f"nothing to report yet in {', '.join(map(str, paths))}")
    found = list({entry["run"].path.resolve(): entry for entry in found}.values())
    _tell_apart(found)
    colours = _palette(len(found))
    return Report(
        entries=[Entry(**entry, colour=c) for entry, c in zip(found, colours, strict=True)],
        absent=absent,
    )


def _points_of(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    sweep, states = read_sweep(path), read_object(path / STATE) or {}
    runs, missing = [], []
    for name, point in sweep.points.items():
        run = sweep.results(name)
        if run is None:
            missing.append(name)
            continue
        told = states.get(name, {}).get("state")
        state = told if told in ("failed", "stopped") and not run.finished else _state(run)
        runs.append(dict(label=name, run=run, state=state, sweep=path, values=dict(point.values)))
    return runs, missing


def _state(run: RunResults) -> str:
    return "finished" if run.finished else f"{run.share:.0%}"


def _tell_apart(found: Sequence[dict[str, Any]]) -> None:
    """Runs of one name get their folder's name in front, and a number if that does not help."""
    labels = [entry["label"] for entry in found]
    for entry in found:
        if labels.count(entry["label"]) > 1:
            parents = entry["run"].path.resolve().parents
            folder = parents[1] if entry.get("sweep") else parents[0]
            entry["label"] = f"{folder.name}/{entry['label']}"
    seen: dict[str, int] = {}
    for entry in found:
        seen[entry["label"]] = seen.get(entry["label"], 0) + 1
        if seen[entry["label"]] > 1:
            entry["label"] += f" ({seen[entry['label']]})"


def _palette(num: int) -> list[str]:
    if num <= len(_COLOURS):
        return list(_COLOURS[:num])
    wheel = (colorsys.hls_to_rgb(i / num, 0.52, 0.6) for i in range(num))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in wheel]


# ------------------------------------------------------------------------------- numbers


def curve(entry: Entry, *names: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of the first of `names` that the log has; NaN where not finite."""
    name = next((n for n in names if any(n in row for row in entry.run.rows)), None)
    if name is None:
        return [], []
    points = [(row["epoch"], lookup(row, name)) for row in entry.run.rows if name in row]
    return [x for x, _ in points], [float("nan") if y is None else y for _, y in points]


def eval_curve(entry: Entry, *keys: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a number in the evaluations; absent ones are left out."""
    points = [(float(e), lookup(m, *keys)) for e, m in entry.run.evaluations.items()]
    known = [(epoch, value) for epoch, value in points if value is not None]
    return [epoch for epoch, _ in known], [value for _, value in known]


def latent_f1(entry: Entry, lm: str | None = None) -> float | None:
    """Latent F1 of one LM, or the mean over all of the run's LMs; None unless all have it."""
    lms = [lm] if lm else entry.run.lms
    values = [lookup(entry.run.metrics, "latent", name, "f1") for name in lms]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def typical(entry: Entry, name: str) -> float | None:
    """Median of a logged number; the first row, which warms up, counts only if it is alone."""
    rows = entry.run.rows[1:] or entry.run.rows
    values = [value for row in rows if (value := lookup(row, name)) is not None]
    return statistics.median(values) if values else None


ACCURACY = ("f1", "em", "first_token_top1", "nll_token", "prompt_tokens", "wall_clock_sec")


def accuracy_rows(entry: Entry) -> list[tuple[str, str, list[float | None]]]:
    """(LM, kind, ACCURACY values) of every kind that was run, under every protocol."""
    metrics, rows = entry.run.metrics or {}, []
    for lm in entry.run.lms:
        for protocol, table in (("", metrics), (" (seed)", metrics.get("seed") or {})):
            for kind in kinds_of(table, [lm]):
                values = [lookup(table, kind, lm, name) for name in ACCURACY]
                rows.append((lm, kind + protocol, values))
    return rows


RATES = ("samples/s", "positions/s", "supervised_tokens/s", "source_bytes/s", "seconds_per_step")
COSTS = ("mfu", "peak_gib", "peak_reserved_gib")


def cost_values(entry: Entry) -> dict[str, float | None]:
    """What a run costs and saves, beside its accuracy."""
    metrics = entry.run.metrics
    return {
        "M": entry.run.config.get("latent_len"),
        "d_z": entry.run.config.get("d_z"),
        "bytes (fp16)": lookup(metrics, "payload_bytes", "fp16"),
        **{f"tokens/M {lm}": lookup(metrics, "compression", lm) for lm in entry.run.lms},
        "latent F1": latent_f1(entry),
        "span F1": lookup(metrics, "span", "f1"),
        "joint F1": lookup(metrics, "joint", "f1"),
        "agreement": lookup(metrics, "joint", "agreement"),
        "Z cosine": lookup(metrics, "diagnostics", "z_cosine"),
        **{name: typical(entry, name) for name in RATES},
        "mfu": typical(entry, "mfu"),
        "peak GiB": typical(entry, "peak_gib"),
    }


def settings_that_differ(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, where they are not all the same."""
    names = dict.fromkeys(name for entry in entries for name in entry.run.config if name != "lm")
    table = {name: [entry.run.config.get(name) for entry in entries] for name in names}
    lms = dict.fromkeys(lm for entry in entries for lm in entry.run.lms)
    table |= {f"lm.{lm}": [entry.run.config["lm"].get(lm) for entry in entries] for lm in lms}
    return {name: row for name, row in table.items() if any(value != row[0] for value in row)}


# ------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Mean latent F1 over a plane of a sweep."""

    title: str
    x_name: str
    y_name: str
    x: Sequence[Any]
    y: Sequence[Any]
    cells: Mapping[tuple[Any, Any], float]
    """(x, y) -> mean over the other axes; a cell without a result is absent."""


def heat_maps(report: Report) -> list[HeatMap]:
    """M x d_z (or the first two axes that vary) of every sweep: the mean over LMs, then each."""
    maps = []
    for path in dict.fromkeys(entry.sweep for entry in report.entries if entry.sweep):
        entries = [entry for entry in report.entries if entry.sweep == path]
        plane = _plane(entries)
        if plane is None:
            continue
        for lm in (None, *dict.fromkeys(lm for entry in entries for lm in entry.run.lms)):
            made = _heat_map(path.resolve().name, entries, plane, lm)
            maps += [made] if made.cells else []
    return maps


def _plane(entries: Sequence[Entry]) -> tuple[str, str] | None:
    varying = [
        axis for axis in entries[0].values if len({entry.values[axis] for entry in entries}) > 1
    ]
    if {"latent_len", "d_z"} <= set(varying):
        return "latent_len", "d_z"
    varying = [axis for axis in varying if axis != "seed"]
    return (varying[0], varying[1]) if len(varying) > 1 else None


def _heat_map(
    name: str, entries: Sequence[Entry], plane: tuple[str, str], lm: str | None
) -> HeatMap:
    x_name, y_name = plane
    groups: dict[tuple[Any, Any], list[float]] = {}
    for entry in entries:
        value = latent_f1(entry, lm)
        if value is not None:
            groups.setdefault((entry.values[x_name], entry.values[y_name]), []).append(value)
    return HeatMap(
        title=f"{name}: latent F1, {lm or 'mean over LMs'}",
        x_name=x_name,
        y_name=y_name,
        x=_ordered(entry.values[x_name] for entry in entries),
        y=_ordered(entry.values[y_name] for entry in entries),
        cells={key: statistics.fmean(values) for key, values in groups.items()},
    )


def _ordered(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def pareto(points: Sequence[tuple[float, float]], *, more_x: bool) -> list[tuple[float, float]]:
    """The points (x, y) that none beats: y as high as possible, x as high (`more_x`) or low."""
    sign = -1 if more_x else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (sign * point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


# ------------------------------------------------------------------------------- predictions


def predictions(entry: Entry, limit: int) -> list[dict[str, Any]]:
    """Questions of the newest evaluation: {id, question, context, golds, answers}, where answers is
    LM -> kind -> [prediction, right]. Right is an exact match with any gold."""
    rows = []
    for row in entry.run.predictions()[:limit]:
        golds = [str(gold) for gold in row.get("golds") or [row.get("gold", "")]]
        rows.append(
            {
                "id": str(row.get("id", "")),
                "question": str(row.get("question", "")),
                "context": str(row.get("prompt_raw", "")),
                "golds": golds,
                "answers": {lm: _answers(row, lm, golds) for lm in entry.run.lms},
            }
        )
    return rows


def _answers(row: Mapping[str, Any], lm: str, golds: Sequence[str]) -> dict[str, list[Any]]:
    end = f"_pred_{lm}"
    kinds = in_order(key.removesuffix(end) for key in row if key.endswith(end))
    answers = {kind: row[kind + end] for kind in kinds}
    return {
        kind: [text, exact_match(text, golds) == 1.0]
        for kind, text in answers.items()
        if isinstance(text, str)
    }
