"""Draws the ladder, the rivals and their peak memory from stored rows, and writes them as a table.

    python benchmarks/plot_throughput.py benchmarks/results/throughput_8b.csv \
        --out docs/throughput_8b.png --table docs/throughput.md

The table replaces what stands between `<!-- rows PAIR -->` and `<!-- end -->` in the document.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.rows import read_rows

COLOURS = {
    "ours": "tab:blue",
    "original": "tab:grey",
    "peft": "tab:orange",
    "peft_liger": "tab:red",
}
COLUMNS = (
    "samples/s", "positions/s", "supervised_tokens/s", "mfu", "peak_gib", "first_step_seconds",
)  # fmt: skip


def cases(path: Path) -> list[tuple[dict[str, str], dict[str, dict[str, Any]]]]:
    """(words, metric -> row) of each case, in the order of the file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_rows(path):
        if "impl=" in row["case"]:
            found.setdefault(row["case"], {})[row["metric"]] = row
    return [
        (dict(word.split("=", 1) for word in case.split()), metrics)
        for case, metrics in found.items()
    ]


def title(words: dict[str, str]) -> str:
    """What a case is called: its rung, or what tells it from the others."""
    if words["impl"] != "ours":
        name = {"peft": "PEFT", "peft_liger": "PEFT + Liger"}.get(words["impl"], words["impl"])
        return f"{name}, batch {words['batch']}"
    if "rung" in words:
        number, _, name = words["rung"].partition("_")
        return f"{number}: {name.replace('_', ' ')}"
    detail = {
        "batches": f"batch {words['batch']}",
        "fp8": f"fp8, batch {words['batch']}",
        "encoders": f"encoder {words['encoder']}",
        "attention": f"attention {words['attn']}",
        "engines": f"engine {words['engine']}",
    }[words["group"]]
    return f"last rung, {detail}"


def draw(path: Path, out: Path) -> None:
    """Two panels of bars: samples/s and peak GiB; a case out of memory has no bar but says so."""
    shown = cases(path)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.8 + 0.32 * len(shown)), sharey=True, width_ratios=(2, 1)
    )
    for axes, metric, form in ((left, "samples/s", "%.0f"), (right, "peak_gib", "%.1f")):
        for y, (words, metrics) in enumerate(shown):
            row = metrics.get(metric)
            if row:
                spread = [[row["value"] - row["p20"]], [row["p80"] - row["value"]]]
                bar = axes.barh(y, row["value"], color=COLOURS[words["impl"]], xerr=spread)
                axes.bar_label(bar, fmt=form, fontsize=7, padding=3)
            elif "out_of_memory" in metrics:
                axes.text(0, y, " out of memory", va="center", fontsize=7)
        axes.set_xlabel(metric)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(shown)), [title(words) for words, _ in shown], fontsize=8)
    left.invert_yaxis()
    device = read_rows(path)[0]["device"]
    figure.suptitle(f"{path.stem.removeprefix('throughput_')} on {device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def table(path: Path) -> str:
    """The cases as a Markdown table, with the rows' device, versions and commit below."""
    heads = ("case", "batch", "engine", "dtype", "s/step (p20-p80)", *COLUMNS)
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for words, metrics in cases(path):
        seconds = metrics.get("seconds")
        if seconds:
            step = f"{seconds['value']:.4g} ({seconds['p20']:.4g}-{seconds['p80']:.4g})"
        else:
            step = "out of memory"
        numbers = [f"{metrics[c]['value']:.4g}" if c in metrics else "" for c in COLUMNS]
        cells = [title(words), words["batch"], words["engine"], words["dtype"], step, *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    row = read_rows(path)[-1]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers"))
    return "\n".join([*lines, "", f"Rows: {path.name}; {row['device']}, {versions}, "
                      f"commit {row['commit']}, {row['date']}."])  # fmt: skip


def put_table(document: Path, pair: str, text: str) -> None:
    """Replaces the marked place of a pair in a document."""
    old = document.read_text(encoding="utf-8")
    mark = f"<!-- rows {pair} -->"
    pattern = re.compile(re.escape(mark) + r"\n.*?<!-- end -->", re.S)
    if not pattern.search(old):
        sys.exit(f"error: {document} has no place marked {mark}")
    new = pattern.sub(lambda _: f"{mark}\n{text}\n<!-- end -->", old)
    document.write_text(new, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="CSV file of benchmarks/throughput.py")
    parser.add_argument("--out", type=Path, help="picture to write")
    parser.add_argument("--table", type=Path, help="document to put the table into")
    args = parser.parse_args()
    if args.out:
        draw(args.rows, args.out)
    if args.table:
        put_table(args.table, args.rows.stem.removeprefix("throughput_"), table(args.rows))


if __name__ == "__main__":
    main()
