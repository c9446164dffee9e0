"""Draws F1 by prompt kind from stored rows.

python benchmarks/plot_accuracy.py benchmarks/results/accuracy_nano.csv ... --out docs/accuracy.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

KINDS = ("text", "text_tuned", "latent", "span_text", "token_budget", "no_context", "shuffled")
COLOURS = dict(zip(KINDS, plt.get_cmap("tab10").colors, strict=False))


def f1_of(path: Path) -> dict[tuple[str, str], float]:
    """(LM, kind) -> F1."""
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            words = dict(word.split("=", 1) for word in row["case"].split())
            if row["metric"] == "f1" and "kind" in words:
                found[words["lm"], words["kind"]] = float(row["value"])
    return found


def draw(axes, title: str, scores: dict[tuple[str, str], float]) -> None:
    """Grouped bars, one group per LM; a kind that was not run has no bar."""
    kinds = [kind for kind in KINDS if any(k == kind for _, k in scores)]
    lms = list(dict.fromkeys(lm for lm, _ in scores))
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        for j, lm in enumerate(lms):
            if (lm, kind) not in scores:
                continue
            bar = axes.bar(j + i * width, scores[lm, kind], width, color=COLOURS[kind],
                           label=kind if j == 0 else None)  # fmt: skip
            axes.bar_label(bar, fmt="%.2f", fontsize=7)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(lms))], lms)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("F1")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="CSV files of benchmarks/accuracy.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, panels = plt.subplots(1, len(args.rows), figsize=(5 * len(args.rows), 3.2))
    for axes, path in zip([panels] if len(args.rows) == 1 else panels, args.rows, strict=True):
        draw(axes, path.stem.removeprefix("accuracy_"), f1_of(path))
    handles = {h.get_label(): h for axes in figure.axes for h in axes.containers if h.get_label()}
    handles = {k: h for k, h in handles.items() if not k.startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
