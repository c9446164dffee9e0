"""Turns a finished sweep into rows: per point what was scored and what it cost.

    python benchmarks/sweep_rows.py runs/mxd --pair small --set squad_dev --command "..."

Writes benchmarks/results/sweep_PAIR.csv. The axes of the sweep are words of each case, as in
`lm=qwen kind=latent latent_len=8 d_z=64`. Points that have not finished are left out, and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
from benchmarks.accuracy import cost_rows, environment_of, score_rows
from benchmarks.rows import measured, write_rows
from lw_fast.cli import Parser, run
from lw_fast.errors import UserError
from lw_fast.run_results import RunResults, lookup
from lw_fast.sweep_folder import Sweep, read_sweep


def sweep_rows(
    sweep: Sweep, words: dict[str, str], command: str, commit: str | None = None
) -> Iterator[dict]:
    """The rows of all finished points."""
    for name, point in sweep.points.items():
        found = sweep.results(name)
        if found is None or not found.finished:
            continue
        axes = {axis: str(value).rsplit("/", 1)[-1] for axis, value in point.values.items()}
        yield from point_rows(found, words | axes, {"command": command, "point": name}, commit)


def point_rows(
    found: RunResults, words: dict[str, str], about: dict, commit: str | None
) -> Iterator[dict]:
    """What the run of one point reached, where it ran."""
    words = words | {"encoder": found.config["encoder_type"], "batch": found.config["batch_size"]}
    rows = [*score_rows(found.metrics, words, about), *cost_rows(found.rows, words, about)]
    for form in ("fp16", "text_utf8"):
        value = lookup(found.metrics, "payload_bytes", form)
        case = rows[-1]["case"]
        rows.append(measured("accuracy", case, f"payload_bytes_{form}", value, "B", config=about))
    where = environment_of(found.path, found.metrics["device"], commit)
    yield from (row | where | {"benchmark": "sweep"} for row in rows)


def main(argv: list[str]) -> None:
    """Command line."""
    parser = Parser(prog="sweep_rows", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="sweep folder")
    parser.add_argument("--pair", required=True, help="name of the pair of LMs: nano, small, 8b")
    parser.add_argument("--set", dest="dataset", required=True, help="name of the evaluation set")
    parser.add_argument("--command", required=True, help="the command that made the sweep")
    parser.add_argument("--commit", help="commit that trained it, where the runs could not know")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args(argv)
    sweep = read_sweep(args.sweep)
    words = {"pair": args.pair, "set": args.dataset, "protocol": "clean"}
    rows = list(sweep_rows(sweep, words, args.command, args.commit))
    if not rows:
        raise UserError(f"{args.sweep}: no point has finished")
    missing = len(sweep.points) - len({row["config"]["point"] for row in rows})
    out = args.out or Path(f"benchmarks/results/sweep_{args.pair}.csv")
    write_rows(out, rows)
    print(f"{len(rows)} rows in {out}" + (f"; {missing} points have not finished" * bool(missing)))


if __name__ == "__main__":
    sys.exit(run(main))
