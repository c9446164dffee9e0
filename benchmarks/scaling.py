"""Training throughput on several GPUs against one: data parallel, ZeRO, one LM per GPU.

    python benchmarks/scaling.py --gpus 2 --preset 8b --dataset train.json \
        --lm.llama random:llama-3.1-8b --lm.qwen random:qwen2.5-7b
    python benchmarks/scaling.py --device cpu --gpus 2 --batch_size 8 --steps 2 --warm_up 1

Writes benchmarks/results/scaling_PAIR.csv after every case. Each case is a torchrun of its own
(benchmarks/scaling_worker.py), so that one which fails or fills the card leaves a row that says so
and nothing else. The first case, one GPU without DeepSpeed, is what the others are compared with:

    weak efficiency     rate of N GPUs / (N x rate of one), with as many questions per GPU
    strong efficiency   the same, with as many questions in all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import torch

from benchmarks.rows import case_words, command_line, measured, without_folders, write_rows
from benchmarks.steps import quantiles
from lw_fast.cli import Parser, add_settings, run, split_lm_flags
from lw_fast.config import FIELDS, build_config
from lw_fast.data import NAMES
from lw_fast.errors import UserError

WORKER = Path(__file__).with_name("scaling_worker.py")
BASE = {"encoder_type": "byte_seed", "samples": 1024, "kinds": "latent"}
"""Settings of every case unless a flag says otherwise; as in throughput.py."""
ENGINES: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    "plain": (None, {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {"shard_lms": "yes"}),
    "lm_parallel": (None, {"lm_parallel": True}),
}
"""Name -> ds_config and settings."""
SCALINGS = ("weak", "strong")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GRACE = 60
"""Seconds that torchrun gets to end its processes."""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    engine: str
    gpus: int
    batch: int
    """Questions per step, over all GPUs."""
    scaling: str | None = None
    """None: the one GPU that the others are compared with."""


@dataclass
class Bench:
    """What all cases share."""

    pair: str
    preset: str
    device: str
    settings: Mapping[str, Any]
    lms: Mapping[str, str]
    warm_up: int
    steps: int
    case_seconds: float
    out: Path
    base_rate: float | None = None
    """samples/s of one GPU."""
    failed: list[str] = field(default_factory=list)
    started: bool = False

    def measure(self, case: Case) -> None:
        """Runs one case and writes its rows."""
        words, began = self._words(case), time.monotonic()
        ds_config, changes = ENGINES[case.engine]
        settings = {**self.settings, **changes, "batch_size": case.batch}
        build_config(self.preset, settings, self.lms)  # a mistake here is one in every case
        task = {
            "preset": self.preset, "settings": settings, "lms": dict(self.lms),
            "ds_config": ds_config, "device": self.device,
            "warm_up": self.warm_up, "steps": self.steps,
        }  # fmt: skip
        found, problem = run_ranks(task, case.gpus, self.case_seconds)
        about = {"command": command_line(), "settings": without_folders(settings)}
        if found is None:
            self.failed.append(words)
            metric = "out_of_memory" if "out of memory" in problem.lower() else "failed"
            print(f"{metric.upper()} {words}\n{problem}", file=sys.stderr, flush=True)
            about["problem"] = without_folders(last_error(problem))
            rows = [measured("scaling", words, metric, 1, "1", config=about)]
        else:
            rows = self._rows(case, words, found, about)
        write_rows(self.out, rows, append=self.started)
        self.started = True
        shown = (f"{row['metric']}={row['value']:.4g}" for row in rows)
        print(words, *shown, f"({time.monotonic() - began:.0f} s)", sep="  ", flush=True)

    def _rows(
        self, case: Case, words: str, found: Mapping[str, Any], about: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        rates = [n / s for n, s in zip(found["samples"], found["seconds"], strict=True)]
        values = {
            "samples/s": (rates, "1/s"),
            "seconds": (found["seconds"], "s"),
            "first_step_seconds": ([found["first_step_seconds"]], "s"),
        }
        if found["peak_gib"] is not None:
            values["peak_gib"] = ([found["peak_gib"]], "GiB")
        if case.scaling is None:
            self.base_rate = quantiles(rates)[1]
        elif self.base_rate is not None:
            shares = [rate / (case.gpus * self.base_rate) for rate in rates]
            values[f"{case.scaling}_efficiency"] = (shares, "1")
        rows = []
        for metric, (samples, unit) in values.items():
            low, middle, high = quantiles(samples)
            rows.append(measured(
                "scaling", words, metric, middle, unit,
                p20=low, p80=high, n=len(samples), config=about,
            ) | {"device": found["device"]})  # fmt: skip
        return rows

    def _words(self, case: Case) -> str:
        on_cpu = self.device == "cpu"
        return case_words(
            pair=self.pair,
            engine=case.engine,
            gpus=0 if on_cpu else case.gpus,
            processes=case.gpus if on_cpu else None,
            batch=case.batch,
            encoder=self.settings["encoder_type"],
            scaling=case.scaling,
        )


def cases(gpus: int, batch: int, engines: Sequence[str], scalings: Sequence[str]) -> Iterator[Case]:
    """One GPU with `batch` questions, then each engine on all GPUs, weak scaling first."""
    yield Case("plain", 1, batch)
    for scaling in scalings:
        for engine in engines:
            yield Case(engine, gpus, batch * gpus if scaling == "weak" else batch, scaling)


# ------------------------------------------------------------------------------- the processes


def torchrun(processes: int) -> list[str]:
    """On a port that the rendezvous finds free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes), str(WORKER)]


def run_ranks(
    task: Mapping[str, Any], processes: int, seconds: float
) -> tuple[dict[str, Any] | None, str]:
    """(what rank 0 wrote, or None, and what the processes printed)."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    with tempfile.TemporaryDirectory() as folder:
        task_file, result = Path(folder) / "case.json", Path(folder) / "result.json"
        task_file.write_text(json.dumps(task), encoding="utf-8")
        process = subprocess.Popen(
            [*torchrun(processes), str(task_file), str(result)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes; killed, it would leave them
            said, _ = process.communicate(timeout=GRACE)
            return None, f"{said}\nTimeoutError: not done after {seconds:g} s"
        if process.returncode:
            return None, said
        return json.loads(result.read_text(encoding="utf-8")), said


def last_error(said: str) -> str:
    """The last line that names an error of ours or of Python, as far as there is one."""
    lines = [line.split("]:")[-1].strip() for line in said.strip().splitlines()]
    named = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return (named or lines or ["no output"])[-1][:300]


# ------------------------------------------------------------------------------- the command


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog="scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--gpus", type=int, default=2, metavar="N", help="GPUs of the cases but the first")
    add("--preset", default="nano", metavar="NAME", help="the settings to start from")
    add("--pair", metavar="NAME", help="the word pair= of the rows (default: the preset)")
    add("--engines", default=",".join(ENGINES), metavar="A,B", help="what to measure")
    add("--scalings", default=",".join(SCALINGS), metavar="A,B", help="weak, strong or both")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add("--warm_up", type=int, default=3, metavar="N", help="steps before the measured ones")
    add("--steps", type=int, default=8, metavar="N", help="measured steps per case")
    add("--case_seconds", type=float, default=300, metavar="X", help="longest time of a case")
    add("--max_seconds", type=float, default=float("inf"), metavar="X", help="start no case later")
    add("--out", type=Path, metavar="CSV", help="file to write")
    add_settings(made, ("data", "encoder", "adapter", "optim", "backbone"))
    return made


def main(argv: Sequence[str]) -> None:
    """Command line; --batch_size is the number of questions per GPU."""
    argv, lms = split_lm_flags(argv)
    flags = vars(parser().parse_args(argv))
    settings = {**BASE, **{name: value for name, value in flags.items() if name in FIELDS}}
    batch = settings.pop("batch_size", 64)
    if "dataset" in settings and settings["dataset"] not in NAMES:  # a file without evaluation part
        settings.setdefault("eval_dataset", settings["dataset"])
    engines, scalings = (_words(flags[name], known) for name, known in (
        ("engines", ENGINES), ("scalings", SCALINGS),
    ))  # fmt: skip
    if min(flags["warm_up"], flags["steps"], flags["gpus"]) < 1:
        raise UserError("gpus, warm_up and steps must be at least 1")
    pair, on_gpu = flags["pair"] or flags["preset"], torch.cuda.is_available()
    bench = Bench(
        pair=pair,
        preset=flags["preset"],
        device="cpu" if flags["device"] == "auto" and not on_gpu else flags["device"],
        settings=settings,
        lms=lms,
        warm_up=flags["warm_up"],
        steps=flags["steps"],
        case_seconds=flags["case_seconds"],
        out=flags["out"] or Path(f"benchmarks/results/scaling_{pair}.csv"),
    )
    began = time.monotonic()
    for case in cases(flags["gpus"], batch, engines, scalings):
        if time.monotonic() - began > flags["max_seconds"]:
            print(f"not started after {flags['max_seconds']:g} s: {case}")
            continue
        bench.measure(case)
    print(f"rows in {bench.out}")
    if bench.failed:
        raise UserError(f"{len(bench.failed)} cases failed: {'; '.join(bench.failed)}")


def _words(text: str, known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    words = text.split(",")
    if unknown := [word for word in words if word not in known]:
        raise UserError(f"{unknown[0]!r} is unknown; there are {', '.join(known)}")
    return words


if __name__ == "__main__":
    sys.exit(run(main))
