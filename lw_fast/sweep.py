"""lw-fast sweep: a grid, a list or a draw of settings, trained as separate runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lw_fast.cli import Parser, add_settings, split_lm_flags
from lw_fast.config import DEFAULT_PRESET, FIELDS, preset_names
from lw_fast.errors import UserError
from lw_fast.run_results import RunResults, lookup, mean_over_lms, read_object
from lw_fast.sweep_folder import STATE, Sweep, is_sweep, open_sweep, write_csv, write_whole
from lw_fast.sweep_points import Point, build_points, drawn, grid, listed, with_seeds
from lw_fast.sweep_queue import (
    FAILED,
    FINISHED,
    RUNNING,
    WAITING,
    Job,
    Queue,
    StopRule,
    new_jobs,
    visible_devices,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def sweep_parser() -> Parser:
    """The flags of launch/sweep.py."""
    parser = Parser(
        prog="sweep",
        usage="sweep --sweep_dir DIR [--grid NAME=V,V ...] [--seeds N,N] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train one run per point, one at a time on every visible GPU (or on the CPU).\n\n"
            "  python launch/sweep.py --sweep_dir runs/mxd --grid latent_len=8,16 d_z=64,128\n"
            "  python launch/sweep.py --sweep_dir runs/mxd        # goes on where it stopped\n\n"
            "Run it again with more values to add points: finished ones are not repeated.\n"
            "Compare them with: lw-fast report runs/mxd --out page.html"
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   as for train; lm.NAME=A,B in --grid varies one",
    )
    add = parser.add_argument
    add("--sweep_dir", type=Path, required=True, metavar="DIR", help="folder of the sweep")
    add("--grid", nargs="+", metavar="NAME=V,V", help="every combination of these settings")
    add("--list", nargs="+", metavar="'NAME=V NAME=V'", help="these points, instead of a grid")
    add("--random", type=int, metavar="N", help="only N points of the grid, drawn at random")
    add("--random_seed", type=int, default=0, metavar="N", help="seed of that draw (default: 0)")
    add("--seeds", default="", metavar="N,N", help="train each point once per seed")
    add(
        "--preset", default=DEFAULT_PRESET, metavar="NAME",
        help=f"{', '.join(preset_names())}, or a .toml file (default: {DEFAULT_PRESET})",
    )  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add(
        "--stop_ratio", type=float, default=0.0, metavar="X",
        help="stop a run whose first-token accuracy is below X times the best run's at --stop_at "
        "of its steps (default: 0, stop none)",
    )  # fmt: skip
    add("--stop_at", type=float, default=0.3, metavar="X", help="share of steps (default: 0.3)")
    add("--stopped_again", action="store_true", help="go on with runs that the rule had stopped")
    add("--dry_run", action="store_true", help="show the points and train nothing")
    add_settings(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/sweep.py: trains what is not finished."""
    argv, lms = split_lm_flags(argv)
    flags = vars(sweep_parser().parse_args(argv))
    rule = _rule(flags)
    points = _points(flags, lms)
    from rich.console import Console

    console = Console(soft_wrap=True)
    if flags["dry_run"]:
        for point in points:
            console.print(point.name, highlight=False, markup=False)
        return
    with _locked(flags["sweep_dir"], points):
        sweep = open_sweep(flags["sweep_dir"], points)
        _train(sweep, flags, rule, console)


def _rule(flags: dict[str, Any]) -> StopRule:
    if not (0 <= flags["stop_ratio"] <= 1 and 0 < flags["stop_at"] < 1):
        raise UserError("--stop_ratio must lie between 0 and 1, and --stop_at inside 0 to 1")
    return StopRule(ratio=flags["stop_ratio"], at=flags["stop_at"])


def _points(flags: dict[str, Any], lms: dict[str, str]) -> list[Point]:
    """The points asked for; none: those of the folder."""
    overrides = {name: value for name, value in flags.items() if name in FIELDS}
    if flags["grid"] and flags["list"]:
        raise UserError("give --grid or --list, not both")
    values = grid(flags["grid"] or []) if not flags["list"] else listed(flags["list"])
    if flags["random"] is not None:
        values = drawn(values, flags["random"], flags["random_seed"])
    values = with_seeds(values, _seeds(flags["seeds"]))
    if values and values[0]:
        return build_points(values, flags["preset"], overrides, lms)
    if not is_sweep(flags["sweep_dir"]):
        raise UserError("nothing to vary: give --grid NAME=V,V, --list or --seeds")
    if overrides or lms:
        raise UserError("settings go with --grid; without it, the sweep goes on as it is")
    return []


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise UserError(f"--seeds {text}: write numbers, as in 1,2,3") from None


@contextmanager
def _locked(folder: Path, points: Sequence[Point]) -> Iterator[None]:
    """One sweep process per folder. What is to be refused is refused before a lock is left."""
    if points and folder.exists() and not is_sweep(folder):
        open_sweep(folder, points)
    from lw_fast.checkpoint import lock_run

    with lock_run(folder):
        yield


def _train(sweep: Sweep, flags: dict[str, Any], rule: StopRule, console: Console) -> None:
    devices = visible_devices(flags["device"])
    if not devices:
        raise UserError("--device cuda: PyTorch sees no GPU here")
    states = read_object(sweep.folder / STATE) or {}
    jobs = new_jobs(sweep, states, again=flags["stopped_again"])
    done = sum(job.over for job in jobs)
    console.print(
        f"{len(jobs)} points, {done} of them done; on {', '.join(devices)}", highlight=False
    )
    with _view(sweep, console) as show:

        def on_change(jobs: Sequence[Job]) -> None:
            states = {job.name: _state(job) for job in jobs}
            write_whole(sweep.folder / STATE, json.dumps(states, indent=2) + "\n")
            write_csv(sweep, states)
            show(jobs)

        on_change(jobs)
        Queue(sweep, jobs, devices, rule=rule, on_change=on_change).run()
    console.print(f"results: {sweep.folder / 'sweep.csv'}", highlight=False)
    failed = [job for job in jobs if job.state == FAILED]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed, {failed[0].name} with {failed[0].error}; "
            f"see {sweep.log(failed[0].name)}; running the sweep again tries them again"
        )


def _state(job: Job) -> dict[str, Any]:
    return {"state": job.state, "tries": job.tries, "error": job.error}


# ------------------------------------------------------------------------------- the live table


@contextmanager
def _view(sweep: Sweep, console: Console):
    """A live table on a terminal, otherwise one line per change of a run."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        yield lambda jobs: live.update(table_of(sweep, jobs), refresh=True)


def _lines(console: Console):
    shown: dict[str, tuple[str, int]] = {}

    def show(jobs: Sequence[Job]) -> None:
        for job in jobs:
            if (
                shown.get(job.name) == (job.state, job.tries)
                or job.state == WAITING
                and not job.error
            ):
                continue
            shown[job.name] = (job.state, job.tries)
            note = f" ({job.error})" if job.error else ""
            console.print(f"{job.state:8} {job.name}{note}", highlight=False, markup=False)

    return show


_COLOURS = {FINISHED: "green", RUNNING: "cyan", FAILED: "red", WAITING: "dim"}


def table_of(sweep: Sweep, jobs: Sequence[Job]) -> Table:
    """Every point: where it stands and how good it is so far."""
    from rich.table import Table

    table = Table(*sweep.axes, "state", "done", "first token", "latent F1", "text F1")
    for job in jobs:
        run = sweep.results(job.name)
        values = [str(value) for value in sweep.points[job.name].values.values()]
        table.add_row(*values, job.state, *_progress(run), style=_COLOURS.get(job.state, "yellow"))
    return table


def _progress(run: RunResults | None) -> list[str]:
    if run is None:
        return ["", "", "", ""]
    first = mean_over_lms(run.rows[-1], run.lms, "first_token_top1") if run.rows else None
    return [f"{run.share:.0%}", _number(first), _f1(run, "latent"), _f1(run, "text")]


def _f1(run: RunResults, kind: str) -> str:
    """One per LM, in their order."""
    return " ".join(_number(lookup(run.metrics, kind, lm, "f1")) for lm in run.lms).strip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
