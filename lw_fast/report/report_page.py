"""The page: one HTML file with its style, script, plots and data inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from lw_fast.config import from_dict
from lw_fast.errors import UserError
from lw_fast.report.report_data import (
    ACCURACY,
    Entry,
    Report,
    accuracy_rows,
    cost_values,
    predictions,
    settings_that_differ,
)
from lw_fast.report.report_plots import COLLAPSE_ALARM, Plot
from lw_fast.sweep_points import to_toml

SECTIONS = {
    "runs": "Runs",
    "accuracy": "Accuracy, speed and memory",
    "sweeps": "Sweeps and trade-offs",
    "curves": "Learning curves",
    "diagnostics": "Calibration and collapse",
    "rates": "Rates and memory",
    "predictions": "Predictions",
    "settings": "Settings",
}

FILTERS = {
    "all": "all questions",
    "latent_only": "latent right, text wrong",
    "text_only": "text right, latent wrong",
    "latent_right": "latent right",
    "latent_wrong": "latent wrong",
    "both_wrong": "both wrong",
    "won": "right here, wrong in the other run",
    "lost": "wrong here, right in the other run",
}

_HEADS = dict(
    zip(ACCURACY, ("F1", "EM", "FirstTok@1", "NLL/token", "tokens", "seconds"), strict=True)
)


def page(report: Report, plots: Sequence[Plot], *, max_predictions: int, reload: int = 0) -> str:
    """The whole page; `reload` seconds make the browser load it again, 0 not."""
    bodies = {
        "runs": _runs(report),
        "accuracy": _accuracy(report),
        "predictions": _predictions(report, max_predictions),
        "settings": _settings(report),
    }
    for section in SECTIONS.keys() - bodies.keys():
        bodies[section] = _figures([plot for plot in plots if plot.section == section])
    kept = {key: title for key, title in SECTIONS.items() if bodies[key]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in kept.items())
    sections = "".join(
        f'<section id="{key}"><h2>{title}</h2>{bodies[key]}</section>\n'
        for key, title in kept.items()
    )
    refresh = f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    labels = ", ".join(entry.label for entry in report.entries[:3])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{refresh}<link rel="icon" href="data:,"><title>lw_fast: {escape(labels)}</title>\n'
        f"<style>\n{_file('page.css')}</style></head>\n<body><h1>lw_fast report</h1>"
        f"<nav>{links}</nav>{_legend(report)}\n{sections}"
        f"<script>\n{_file('page.js')}</script></body></html>\n"
    )


def _file(name: str) -> str:
    return (resources.files("lw_fast.report") / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- tables


def shown(value: Any) -> str:
    """A value as a table cell shows it; None is a dash, never a zero."""
    if value is None:
        return '<span class="missing" title="not measured">&ndash;</span>'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
    return escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, names: int = 1) -> str:
    """A sortable table; the first `names` columns are text (and may be HTML already)."""
    top = "".join(
        f'<th class="sorts{" name" if i < names else ""}">{escape(head)}</th>'
        for i, head in enumerate(heads)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="name">{cell}</td>' for cell in row[:names])
        + "".join(_cell(cell) for cell in row[names:])
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    key = "" if value is None else escape(str(value), quote=True)
    return f'<td data-value="{key}">{shown(value)}</td>'


def _name(entry: Entry) -> str:
    return f'<span class="chip" style="background:{entry.colour}"></span>{escape(entry.label)}'


def _legend(report: Report) -> str:
    return (
        f'<div class="legend">{"".join(f"<span>{_name(e)}</span>" for e in report.entries)}</div>'
    )


def _runs(report: Report) -> str:
    costs = [cost_values(entry) for entry in report.entries]
    columns = [c for c in dict.fromkeys(c for row in costs for c in row)]
    rows = [
        [_name(entry), _mark(entry, row), *(row.get(column) for column in columns)]
        for entry, row in zip(report.entries, costs, strict=True)
    ]
    notes = "".join(
        f'<p class="note">{escape(entry.label)}: no evaluation yet.</p>'
        for entry in report.entries
        if entry.run.metrics is None
    )
    if report.absent:
        notes += f'<p class="note">Not begun: {escape(", ".join(report.absent))}.</p>'
    return table(["run", "state", *columns], rows, names=2) + notes + _differences(report)


def _mark(entry: Entry, costs: Mapping[str, Any]) -> str:
    cosine = costs["Z cosine"]
    collapsed = cosine is not None and cosine > COLLAPSE_ALARM
    return entry.state + (' <span class="alarm">Z collapsed</span>' if collapsed else "")


def _differences(report: Report) -> str:
    if len(report.entries) < 2:
        return ""
    different = settings_that_differ(report.entries)
    if not different:
        return '<p class="note">All settings are the same.</p>'
    heads = ["setting that differs", *(entry.label for entry in report.entries)]
    return table(heads, [[escape(name), *values] for name, values in different.items()])


def _accuracy(report: Report) -> str:
    rows = [
        [_name(entry), escape(lm), escape(kind), *values]
        for entry in report.entries
        for lm, kind, values in accuracy_rows(entry)
    ]
    if not rows:
        return '<p class="note">No run has been evaluated yet.</p>'
    heads = ["run", "LM", "prompt", *(_HEADS[name] for name in ACCURACY)]
    note = (
        '<p class="note">tokens: mean prompt length in positions, BOS and anchor included; '
        "seconds: generating and scoring all questions of that row. Rates and peak memory are in "
        "the table of runs. A kind that was not run has no row.</p>"
    )
    return table(heads, rows, names=3) + note


def _figures(plots: Sequence[Plot]) -> str:
    if not plots:
        return ""
    drawn = "".join(f"<figure>{plot.svg}</figure>\n" for plot in plots)
    return f'<div class="plots">{drawn}</div>'


# ------------------------------------------------------------------------------- predictions


def _predictions(report: Report, limit: int) -> str:
    runs = [
        {"label": entry.label, "lms": entry.run.lms, "rows": rows}
        for entry in report.entries
        if (rows := predictions(entry, limit))
    ]
    if not runs:
        return ""
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in FILTERS.items())
    return (
        '<div class="controls"><select id="run" aria-label="run"></select>'
        '<select id="other" aria-label="compare with"><option value="">compare with ...</option>'
        '</select><select id="lm" aria-label="LM"><option value="">any LM</option></select>'
        f'<select id="filter" aria-label="filter">{options}</select>'
        '<input id="search" type="search" placeholder="search" aria-label="search"></div>'
        '<div class="note" id="count"></div><div id="cards"></div>'
        '<button id="more" hidden>more</button>'
        f'<script type="application/json" id="predictions-data">{_json(runs)}</script>'
    )


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# ------------------------------------------------------------------------------- settings


def _settings(report: Report) -> str:
    return "".join(_settings_of(entry) for entry in report.entries)


def _settings_of(entry: Entry) -> str:
    machine = "\n".join(f"{name}: {value}" for name, value in entry.run.environment.items())
    return (
        f"<details><summary>{_name(entry)}</summary>"
        "<p>Save this as <code>run.toml</code>, then <code>lw-fast train --preset run.toml</code>:"
        f"</p><pre>{escape(_preset(entry.run.config))}</pre>"
        f"<p>It ran on:</p><pre>{escape(machine or 'unknown')}</pre></details>"
    )


def _preset(config: Mapping[str, Any]) -> str:
    try:
        return to_toml(from_dict(config))
    except UserError as error:  # of another version
        return f"# {error}\n{json.dumps(config, indent=2)}"
