"""Entries -> figures. SVG goes into the page and takes the page's text colour; PNG goes beside it.

A figure for which no run has numbers is not made.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lw_fast.report.report_data import (
    Entry,
    HeatMap,
    Report,
    cost_values,
    curve,
    eval_curve,
    heat_maps,
    latent_f1,
    pareto,
)
from lw_fast.run_results import lookup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#21292f"
"""Text and axes; in the page's SVG it becomes `currentColor`."""
MAX_POINTS = 400
"""Of one line; longer ones are thinned out."""
COLLAPSE_ALARM = 0.95

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10, "axes.grid": True,
    "grid.alpha": 0.25, "grid.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "figure.constrained_layout.use": True, "axes.titlelocation": "left",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure, drawn."""

    name: str
    section: str
    title: str
    svg: str
    png: bytes


def plots(report: Report) -> list[Plot]:
    """All figures for which there are numbers."""
    import matplotlib

    drawn: list[Plot] = []
    for section, title, draw in _figures(report):
        name = f"{len(drawn):02}-" + "".join(c if c.isalnum() else "-" for c in title.lower())
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure, axes = _canvas(title)
            if draw(axes):
                svg, png = _rendered(figure, title)
                drawn.append(Plot(name=name, section=section, title=title, svg=svg, png=png))
    return drawn


def _canvas(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.1))
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _rendered(figure: Figure, title: str) -> tuple[str, bytes]:
    from html import escape

    vector, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{escape(title)}"', 1
    ), pixels.getvalue()


Draw = Callable[["Axes"], bool]
"""Draws, and says whether there was something to draw."""


def _figures(report: Report) -> Iterator[tuple[str, str, Draw]]:
    entries = report.entries
    for lm in report.lms:
        yield "curves", f"{lm}: loss per answer token", _lines(entries, f"{lm}/nll_token")
        yield (
            "curves",
            f"{lm}: first token right (training)",
            _lines(entries, f"{lm}/first_token_top1", share=True),
        )
        yield "curves", f"{lm}: latent F1, text dashed", _f1(entries, lm)
    yield "curves", "total loss", _lines(entries, "loss")
    yield "curves", "span loss", _lines(entries, "span_loss")
    yield "diagnostics", "mean cosine of Z over the batch", _cosine(entries)
    yield "diagnostics", "spread of Z", _evals(entries, "diagnostics", "z_std")
    for lm in report.lms:
        yield "diagnostics", f"{lm}: prefix spread over embedding RMS", _loudness(entries, lm)
    yield "diagnostics", "gradient norm", _lines(entries, "grad_norm")
    for name in ("samples/s", "positions/s", "supervised_tokens/s", "source_bytes/s", "mfu"):
        yield "rates", name.replace("_", " "), _lines(entries, name, from_zero=True)
    yield "rates", "peak memory allocated, GiB", _lines(entries, "peak_gib", from_zero=True)
    for heat_map in heat_maps(report):
        yield "sweeps", heat_map.title, _heat(heat_map)
    if len(entries) > 1:
        yield (
            "sweeps",
            "latent F1 against bytes sent (fp16)",
            _front(
                entries, lambda entry: cost_values(entry)["bytes (fp16)"], "bytes", more_x=False
            ),
        )
        yield (
            "sweeps",
            "latent F1 against tokens replaced per latent",
            _front(entries, _compression, "tokens replaced by one latent", more_x=True),
        )


# ------------------------------------------------------------------------------- lines


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    step = math.ceil(len(xs) / MAX_POINTS) if xs else 1
    first = (len(xs) - 1) % step if xs else 0  # so that the last point stays
    return xs[first::step], ys[first::step]


def _plot(axes: Axes, entry: Entry, xs: Sequence[float], ys: Sequence[float], **style: Any) -> bool:
    if not any(math.isfinite(y) for y in ys):
        return False
    xs, ys = _thin(xs, ys)
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(xs) < 3 else {}
    axes.plot(xs, ys, color=entry.colour, linewidth=1.5, **(marker | style))
    return True


def _lines(
    entries: Sequence[Entry], name: str, *, share: bool = False, from_zero: bool = False
) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = [_plot(axes, entry, *curve(entry, name)) for entry in entries]
        axes.set_xlabel("epoch")
        if share:
            axes.set_ylim(0, 1.02)
        elif from_zero and any(drawn):
            axes.set_ylim(bottom=0)
        return any(drawn)

    return draw


def _f1(entries: Sequence[Entry], lm: str) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = []
        for entry in entries:
            xs, ys = eval_curve(entry, "latent", lm, "f1")
            drawn.append(_plot(axes, entry, xs, ys, marker="o", markersize=4))
            text = lookup(entry.run.metrics, "text", lm, "f1")
            if text is not None:
                axes.axhline(text, color=entry.colour, linewidth=1, linestyle="--")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("epoch")
        return any(drawn)

    return draw


def _evals(entries: Sequence[Entry], *keys: str) -> Draw:
    def draw(axes: Axes) -> bool:
        axes.set_xlabel("epoch")
        return any(
            [_plot(axes, e, *eval_curve(e, *keys), marker="o", markersize=4) for e in entries]
        )

    return draw


def _cosine(entries: Sequence[Entry]) -> Draw:
    def draw(axes: Axes) -> bool:
        drawn = _evals(entries, "diagnostics", "z_cosine")(axes)
        axes.axhline(COLLAPSE_ALARM, color="#d1495b", linewidth=1, linestyle=":")
        axes.annotate("collapsed", (0.02, COLLAPSE_ALARM), xycoords=("axes fraction", "data"),
                      va="bottom", color="#d1495b")  # fmt: skip
        axes.set_ylim(top=1.05)
        return drawn

    return draw


def _loudness(entries: Sequence[Entry], lm: str) -> Draw:
    """1 means: the prefix is as loud as the LM's own embeddings."""

    def draw(axes: Axes) -> bool:
        drawn = []
        for entry in entries:
            points = []
            for epoch, metrics in entry.run.evaluations.items():
                spread = lookup(metrics, "diagnostics", "prefix", lm, "prefix_std")
                own = lookup(metrics, "diagnostics", "prefix", lm, "embed_rms")
                if spread is not None and own:
                    points.append((float(epoch), spread / own))
            xs, ys = [x for x, _ in points], [y for _, y in points]
            drawn.append(_plot(axes, entry, xs, ys, marker="o", markersize=4))
        axes.set_xlabel("epoch")
        return any(drawn)

    return draw


# ------------------------------------------------------------------------------- maps and fronts


def _heat(heat_map: HeatMap) -> Draw:
    def draw(axes: Axes) -> bool:
        nan = float("nan")
        grid = [[heat_map.cells.get((x, y), nan) for x in heat_map.x] for y in heat_map.y]
        axes.imshow(grid, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
        axes.grid(False)
        for row, y in enumerate(heat_map.y):
            for column, x in enumerate(heat_map.x):
                value = heat_map.cells.get((x, y))
                shown = "missing" if value is None else f"{value:.2f}"
                ink = INK if value is None else ("white" if value < 0.6 else "black")
                axes.text(column, row, shown, ha="center", va="center", color=ink)
        axes.set_xticks(range(len(heat_map.x)), [str(x) for x in heat_map.x])
        axes.set_yticks(range(len(heat_map.y)), [str(y) for y in heat_map.y])
        axes.set_xlabel(heat_map.x_name)
        axes.set_ylabel(heat_map.y_name)
        return True

    return draw


def _compression(entry: Entry) -> float | None:
    values = [lookup(entry.run.metrics, "compression", lm) for lm in entry.run.lms]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _front(
    entries: Sequence[Entry], x_of: Callable[[Entry], float | None], label: str, *, more_x: bool
) -> Draw:
    def draw(axes: Axes) -> bool:
        points = []
        for entry in entries:
            x, y = x_of(entry), latent_f1(entry)
            if x is not None and y is not None and x > 0:
                points.append((x, y))
                axes.scatter([x], [y], color=entry.colour, s=28, zorder=3)
        if points:
            front = pareto(points, more_x=more_x)
            axes.plot(*zip(*front, strict=True), color=INK, linewidth=1, linestyle="--")
            axes.set_xscale("log", base=2)
            ticks = sorted({x for x, _ in points})
            if len(ticks) <= 8:
                axes.set_xticks(ticks, [f"{x:.4g}" for x in ticks], rotation=30)
                axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(label)
        axes.set_ylabel("latent F1, mean over LMs")
        return bool(points)

    return draw
