"""One measured number is one CSV row; every benchmark writes its rows through this module.

from benchmarks.rows import case_words, measured, write_rows
rows = [measured("kernels", case_words(op="prefix_concat", impl="ours"), "seconds", 1e-5, "s")]
write_rows("benchmarks/results/kernels.csv", rows)
"""

from __future__ import annotations

import csv
import datetime
import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

COLUMNS = (
    "benchmark",
    "case",
    "metric",
    "value",
    "unit",
    "p20",
    "p80",
    "n",
    "device",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "commit",
    "date",
    "config",
)


def case_words(**words: Any) -> str:
    """`key=value` words in the given order; None leaves a word out."""
    return " ".join(f"{key}={value}" for key, value in words.items() if value is not None)


def measured(
    benchmark: str,
    case: str,
    metric: str,
    value: float,
    unit: str,
    *,
    p20: float | None = None,
    p80: float | None = None,
    n: int = 1,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row without its environment; `value` is the median of `n` measurements."""
    return {
        "benchmark": benchmark,
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "p20": value if p20 is None else p20,
        "p80": value if p80 is None else p80,
        "n": n,
        "config": dict(config or {}),
    }


@functools.cache
def environment() -> dict[str, str]:
    """Device, package versions ("" if absent), commit and date: what makes a row comparable."""
    packages = ("torch", "triton", "transformers", "deepspeed")
    return {
        "device": device_name(),
        **{name: _version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and its number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} x{torch.get_num_threads()}"


def without_folders(value: Any) -> Any:
    """Text without the folders of this machine: absolute and dotted paths become file names.
    Mappings are gone through; other values stay as they are."""
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    return re.sub(r"(?<![^\s,=@'\"])\.{0,2}/(?:[^\s,/]+/)*(?=[^\s,/])", "", value)


def command_line() -> str:
    """How this benchmark was called."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return without_folders(shlex.join(["python", script, *sys.argv[1:]]))


def write_rows(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, append: bool = False
) -> None:
    """Write `rows` with the environment added; `append` adds to a file that may exist."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not append or not path.exists()
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            full = environment() | dict(row)
            full["config"] = json.dumps(full.get("config") or {}, sort_keys=True)
            for key in ("value", "p20", "p80"):
                full[key] = f"{full[key]:.6g}"
            writer.writerow(full)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers as floats and `config` decoded."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(row[key]) for key in ("value", "p20", "p80")}
        row |= {"n": int(row["n"]), "config": json.loads(row["config"])}
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Short commit, "+" if the tree differs from it; COMMIT stands in where git is absent."""

    def git(*args: str) -> str:
        out = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return out.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
