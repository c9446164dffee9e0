"""lw-fast report: writes the page, once or as often as a run changes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from lw_fast.cli import Parser
from lw_fast.errors import UserError
from lw_fast.report.report_data import Report, collect
from lw_fast.report.report_page import page
from lw_fast.report.report_plots import plots
from lw_fast.sweep_folder import write_whole


def report_parser() -> Parser:
    """The flags of launch/report.py."""
    parser = Parser(
        prog="report",
        usage="report RUN_OR_SWEEP [RUN_OR_SWEEP ...] [--out page.html] [--watch]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write runs and sweeps as one HTML page (no network needed) and PNG plots.\n\n"
            "  python launch/report.py runs/first runs/second --out page.html\n"
            "  python launch/report.py runs/mxd --watch       # again and again, while it trains"
        ),
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="run and sweep folders")
    add(
        "--out", type=Path, default=Path("report.html"), metavar="FILE",
        help="the page; the PNGs go into FILE_plots/ (default: report.html)",
    )  # fmt: skip
    add(
        "--predictions", type=int, default=500, metavar="N",
        help="questions per run in the browser of predictions (default: 500)",
    )  # fmt: skip
    add("--watch", action="store_true", help="write the page anew until all runs have ended")
    add(
        "--every", type=float, default=15.0, metavar="S", help="seconds between looks (default: 15)"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/report.py: writes the page."""
    flags = report_parser().parse_args(argv)
    if flags.every <= 0 or flags.predictions < 0:
        raise UserError("--every must be greater than 0, and --predictions not negative")
    if not flags.watch:
        write_report(collect(flags.paths), flags.out, max_predictions=flags.predictions)
        print(f"written to {flags.out}")
        return
    print(f"writing {flags.out}; Ctrl-C ends")
    watch(flags.paths, flags.out, flags.every, max_predictions=flags.predictions)


def write_report(report: Report, out: Path, *, max_predictions: int, reload: int = 0) -> None:
    """Writes the page and, into OUT_plots/, its figures as PNGs.

    Raises:
        UserError: they cannot be written.
    """
    drawn = plots(report)
    text = page(report, drawn, max_predictions=max_predictions, reload=reload)
    folder = out.with_name(f"{out.stem}_plots")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for old in folder.glob("[0-9][0-9]-*.png"):
            old.unlink()
        for plot in drawn:
            (folder / f"{plot.name}.png").write_bytes(plot.png)
        write_whole(out, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def watch(paths: Sequence[Path], out: Path, every: float, *, max_predictions: int) -> None:
    """Writes the page whenever a run has written something, until all runs have ended."""
    previous: object = None
    while True:
        state = _signature(paths)
        if state != previous:
            previous, report = state, collect(paths)
            reload = 0 if report.finished else max(1, round(every))
            write_report(report, out, max_predictions=max_predictions, reload=reload)
            if report.finished:
                return
        time.sleep(every)


_WATCHED = ("config.json", "log.jsonl", "metrics.json", "predictions.jsonl", "state.json")


def _signature(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What the page depends on: names, sizes and times of the files that it reads."""
    files = [file for path in paths for name in _WATCHED for file in path.rglob(name)]
    stats = [(file, file.stat()) for file in sorted(files)]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
