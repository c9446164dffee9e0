"""The folder of a sweep.

sweep.json      the axes, the settings that all points share, the points
state.json      runs that failed or were stopped early, and why
sweep.csv       one row per point: values, state, metrics
runs/NAME/      a run folder like any other
points/NAME.toml, logs/NAME.txt     its settings as a preset, and what it printed
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lw_fast.config import from_dict
from lw_fast.errors import UserError
from lw_fast.run_results import RunResults, kinds_of, lookup, read_object, read_run
from lw_fast.sweep_points import Point, base_of, join, to_toml

FORMAT = 1
SWEEP = "sweep.json"
STATE = "state.json"
CSV = "sweep.csv"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep folder's content."""

    folder: Path
    axes: tuple[str, ...]
    base: Mapping[str, Any]
    """Settings shared by all points."""
    points: Mapping[str, Point]
    """By name."""

    def run_dir(self, name: str) -> Path:
        """Where the run of a point lives."""
        return self.folder / "runs" / name

    def preset(self, name: str) -> Path:
        """The settings of a point as a preset."""
        return self.folder / "points" / f"{name}.toml"

    def log(self, name: str) -> Path:
        """What the run of a point printed."""
        return self.folder / "logs" / f"{name}.txt"

    def results(self, name: str) -> RunResults | None:
        """What the run of a point has written, if it has begun."""
        path = self.run_dir(name)
        return read_run(path) if (path / "config.json").exists() else None


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> Sweep:
    """Reads a sweep folder.

    Raises:
        UserError: it is not one, or it is damaged.
    """
    content = read_object(folder / SWEEP)
    if content is None:
        raise UserError(f"{folder} is not a sweep folder: it has no readable {SWEEP}")
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{folder / SWEEP} has format {content['format']}, not {FORMAT}")
        base, axes = content["base"], tuple(content["axes"])
        points = [
            Point(values=values, config=from_dict(join(base, values)))
            for values in content["points"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / SWEEP} is damaged: {error}") from None
    except UserError as error:
        raise UserError(f"{folder / SWEEP}: {error}") from None
    return Sweep(folder=folder, axes=axes, base=base, points={p.name: p for p in points})


def open_sweep(folder: Path, asked: Sequence[Point]) -> Sweep:
    """Makes the folder, or adds points to the sweep in it; without points, takes it as it is.

    Raises:
        UserError: it holds something else, or a sweep over other axes or from other settings.
    """
    if not asked:
        return read_sweep(folder)
    axes = tuple(asked[0].values)
    base = base_of(asked[0].config, axes)
    points = {point.name: point for point in asked}
    if is_sweep(folder):
        old = read_sweep(folder)
        _check_same(old, axes, base)
        axes = old.axes  # their order is part of the runs' names
        points = {**old.points, **{p.name: p for p in (_in_order(p, axes) for p in asked)}}
    elif folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder} holds something else than a sweep; choose another --sweep_dir")
    sweep = Sweep(folder=folder, axes=axes, base=base, points=points)
    for name in ("runs", "points", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, point in points.items():
        sweep.preset(name).write_text(to_toml(point.config), encoding="utf-8")
    content = {
        "format": FORMAT,
        "axes": axes,
        "base": base,
        "points": [dict(point.values) for point in points.values()],
    }
    write_whole(folder / SWEEP, json.dumps(content, indent=2) + "\n")
    return sweep


def _in_order(point: Point, axes: Sequence[str]) -> Point:
    return Point(values={axis: point.values[axis] for axis in axes}, config=point.config)


def _check_same(old: Sweep, axes: Sequence[str], base: Mapping[str, Any]) -> None:
    if set(old.axes) != set(axes):
        raise UserError(
            f"{old.folder} is a sweep over {', '.join(old.axes)}, not over {', '.join(axes)}; "
            "choose another --sweep_dir"
        )
    changed = [
        f"{name} {old.base.get(name)!r} -> {base.get(name)!r}"
        for name in sorted(old.base.keys() | base.keys())
        if old.base.get(name) != base.get(name)
    ]
    if changed:
        raise UserError(
            f"{old.folder} is a sweep from other settings ({', '.join(changed)}): its points could "
            "not be compared; choose another --sweep_dir"
        )


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ------------------------------------------------------------------------------- the table


_LOG_COLUMNS = ("samples/s", "positions/s", "seconds_per_step", "mfu", "peak_gib")


def csv_rows(sweep: Sweep, states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per point; what is not known is absent."""
    rows = []
    for name, point in sweep.points.items():
        run = sweep.results(name)
        rows.append(
            {"run": name, **point.values, **states.get(name, {})}
            | {key: value for key, value in result_row(run).items() if value is not None}
        )
    return rows


def result_row(run: RunResults | None) -> dict[str, float | None]:
    """The numbers of one run, flat: `latent/qwen/f1`, `span/f1`, `samples/s` of the last row."""
    if run is None:
        return {}
    metrics, last = run.metrics, (run.rows[-1] if run.rows else None)
    row: dict[str, float | None] = {"share": run.share}
    for kind in kinds_of(metrics, run.lms):
        for lm in run.lms:
            for name in ("f1", "em", "nll_token", "first_token_top1"):
                row[f"{kind}/{lm}/{name}"] = lookup(metrics, kind, lm, name)
    row["span/f1"] = lookup(metrics, "span", "f1")
    row["payload_bytes_fp16"] = lookup(metrics, "payload_bytes", "fp16")
    for lm in run.lms:
        row[f"compression/{lm}"] = lookup(metrics, "compression", lm)
    return row | {name: lookup(last, name) for name in _LOG_COLUMNS}


def write_csv(sweep: Sweep, states: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes sweep.csv; an unknown number is an empty cell."""
    rows = csv_rows(sweep, states)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(sweep.folder / CSV, text.getvalue())
    return sweep.folder / CSV
