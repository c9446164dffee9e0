"""lw-fast pipeline: train and evaluate epoch by epoch in one process, under guardrails.

Writes experiment.md into the run folder: settings, scores per epoch, decisions and their reasons;
and guardrails.json, the rules. Decisions follow from rules and scores alone, so that a resumed
pipeline takes those of the finished epochs again from their metrics.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lw_fast import checkpoint
from lw_fast.cli import Parser, add_settings, run_config, split_lm_flags
from lw_fast.config import (
    DEFAULT_PRESET,
    FIELDS,
    Config,
    from_dict,
    load_guardrails,
    preset_names,
    to_dict,
    to_flat,
)
from lw_fast.errors import UserError
from lw_fast.eval_files import METRICS_FILE
from lw_fast.guardrails import METRICS, Decision, Guard, Guardrails, read_guardrails

LOG = "experiment.md"
RULES = "guardrails.json"
COLUMNS = ("em", "f1", "first_token_top1", "first_token_top5", "nll_token")


def pipeline_parser() -> Parser:
    """The flags of launch/pipeline.py."""
    parser = Parser(
        prog="pipeline",
        usage="pipeline --run_dir DIR [--preset NAME | --resume] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train and evaluate epoch by epoch, apply the preset's guardrails, keep a log.\n\n"
            "  python launch/pipeline.py --preset seed_stage_a --run_dir runs/stage_a\n"
            "  python launch/pipeline.py --preset my_rules.toml --run_dir runs/mine"
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   as for train",
    )
    add = parser.add_argument
    add("--run_dir", type=Path, required=True, metavar="DIR", help="run folder")
    add(
        "--preset", default=None, metavar="NAME",
        help=f"{', '.join(preset_names())}, or a .toml file (default: {DEFAULT_PRESET})",
    )  # fmt: skip
    add(
        "--resume", action="store_true",
        help="continue the pipeline in --run_dir, with its rules and the decisions already taken",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace the run in --run_dir")
    add("--init_from", type=Path, metavar="DIR", help="start from the weights of another run")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add_settings(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/pipeline.py: one run under guardrails."""
    argv, lms = split_lm_flags(argv)
    flags = vars(pipeline_parser().parse_args(argv))
    overrides = {name: value for name, value in flags.items() if name in FIELDS}
    if flags["resume"] and flags["preset"] is not None:
        raise UserError("--resume goes on under the rules in --run_dir: leave --preset out")
    config = run_config(flags, {"eval_every": 1, **overrides}, lms)
    guardrails = (
        saved_guardrails(flags["run_dir"])
        if flags["resume"]
        else read_guardrails(load_guardrails(flags["preset"] or DEFAULT_PRESET))
    )
    from lw_fast.engine import close_world, init_world

    world = init_world(use_deepspeed=False, device=flags["device"])
    try:
        run_pipeline(
            config, world, flags["run_dir"], guardrails,
            resume=flags["resume"], overwrite=flags["overwrite"], init_from=flags["init_from"],
        )  # fmt: skip
        if world.is_main:
            print(f"experiment log: {flags['run_dir'] / LOG}")
    finally:
        close_world()


def run_pipeline(
    config: Config,
    world: Any,
    run_dir: Path,
    guardrails: Guardrails,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
) -> Guard:
    """Trains under guardrails; returns the guard with the scores of every epoch.

    Raises:
        UserError: as for `train`, or `config` does not evaluate latents after every epoch.
    """
    from lw_fast.evaluate import asked_for
    from lw_fast.train import train

    if config.run.eval_every != 1 or "latent" not in asked_for(config)[0]:
        raise UserError("a pipeline needs eval_every=1 and latent among the kinds")
    for rule in guardrails.rules:  # a value that is wrong must not wait for its epoch
        from_dict({**to_dict(config), **rule.change})
    epochs = config.optim.epochs
    last = min(guardrails.stop_after or epochs, epochs)
    guard, log = (
        Guard(dataclasses.replace(guardrails, stop_after=last)),
        ExperimentLog(config, guardrails),
    )

    def on_start(run: Any) -> None:
        if world.is_main:
            table = json.dumps(dataclasses.asdict(guardrails), indent=2)
            checkpoint.write_text(run_dir / RULES, table + "\n")
        for metrics in finished_evaluations(run):
            after_evaluation(run, metrics)
        if run.finished:
            raise UserError(f"nothing to resume: {run_dir} was ended after epoch {run.epoch}")

    def after_evaluation(run: Any, metrics: Mapping[str, Any]) -> None:
        decision = guard.decide(mean_scores(metrics), to_flat(run.config))
        log.add(metrics, decision)
        if world.is_main:
            checkpoint.write_text(run_dir / LOG, log.text(guard))
        if decision.change:
            change_settings(run, decision.change)
        run.finished = decision.stop

    train(
        config, world, run_dir,
        resume=resume, overwrite=overwrite, init_from=init_from,
        on_start=on_start, after_evaluation=after_evaluation,
    )  # fmt: skip
    return guard


def saved_guardrails(run_dir: Path) -> Guardrails:
    """The rules of a pipeline's run folder.

    Raises:
        UserError: it has none, or they are damaged.
    """
    path = run_dir / RULES
    try:
        return read_guardrails(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise UserError(f"{run_dir} is not the run of a pipeline: it has no {RULES}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def finished_evaluations(run: Any) -> list[Mapping[str, Any]]:
    """Metrics of the epochs that a resumed run has behind it; that of the newest may be missing,
    and then the run begins with it. Collective.

    Raises:
        UserError: that of an earlier epoch is missing.
    """
    found: list[Mapping[str, Any]] = []
    for epoch in range(1, run.epoch + 1) if run.world.is_main else ():
        path = run.run_dir / f"eval_epoch{epoch}" / METRICS_FILE
        if not path.exists():
            break
        found.append(json.loads(path.read_bytes()))
    found = run.world.all_gather(found)[0]
    at_end = run.global_step % run.order.steps_per_epoch == 0
    if len(found) < run.epoch - at_end:
        raise UserError(f"cannot resume {run.run_dir}: it lacks the evaluation of an epoch")
    return found


def mean_scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the latent prompts, mean over the LMs; protocol clean where it was run."""
    per_lm = latent_scores(metrics).values()
    return {name: sum(scores[name] for scores in per_lm) / len(per_lm) for name in METRICS}


def latent_scores(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """LM -> scores of its latent prompts."""
    return metrics["latent"] if "latent" in metrics else metrics["seed"]["latent"]


def change_settings(run: Any, change: Mapping[str, Any]) -> None:
    """Changes live settings of a run between two epochs; tokenises again where they say so."""
    old = run.config
    new = from_dict({**to_dict(old), **change})
    run.config, run.model = new, dataclasses.replace(run.model, config=new)
    if (old.sequence, old.loss) != (new.sequence, new.loss):
        examples = run.tables.examples
        answers = run.model.answer_tables(examples)
        teachers = run.model.teachers(examples, answers)
        run.tables = dataclasses.replace(run.tables, answers=answers, teachers=teachers)


class ExperimentLog:
    """The Markdown log of one run."""

    def __init__(self, config: Config, guardrails: Guardrails) -> None:
        self.config = config
        self.guardrails = guardrails
        self.epochs: list[tuple[Mapping[str, Any], Decision]] = []

    def add(self, metrics: Mapping[str, Any], decision: Decision) -> None:
        """One more epoch."""
        self.epochs.append((metrics, decision))

    def text(self, guard: Guard) -> str:
        """All of it."""
        parts = ["# Experiment log", self._settings(), self._scores(), self._decisions()]
        if self.guardrails.expectations:
            parts.append(self._expectations(guard))
        return "\n\n".join(parts) + "\n"

    def _settings(self) -> str:
        values, start = to_flat(self.config), to_flat(Config())
        lines = [f"| lm.{name} | {source} |" for name, source in self.config.lm.items()]
        lines += [f"| {name} | {value} |" for name, value in values.items() if value != start[name]]
        head = (
            "## Settings\n\nThose that differ from the defaults.\n\n| setting | value |\n|---|---|"
        )
        return "\n".join([head, *lines])

    def _scores(self) -> str:
        names = [*COLUMNS, "most_frequent_share"]
        head = f"| epoch | LM | questions | {' | '.join(names)} |"
        lines = ["## Latent prompts, epoch by epoch", "", head, "|---" * (len(names) + 3) + "|"]
        for epoch, (metrics, _) in enumerate(self.epochs, start=1):
            for lm, scores in latent_scores(metrics).items():
                values = " | ".join(f"{scores[name]:.3f}" for name in names)
                lines.append(f"| {epoch} | {lm} | {metrics['samples']} | {values} |")
        return "\n".join(lines)

    def _decisions(self) -> str:
        lines = [
            "## Decisions",
            "",
            "| after epoch | decision | settings | reason |",
            "|---" * 4 + "|",
        ]
        for epoch, (_, decision) in enumerate(self.epochs, start=1):
            change = ", ".join(f"{name} = {value}" for name, value in decision.change.items())
            lines.append(f"| {epoch} | {decision.text} | {change} | {decision.reason} |")
        return "\n".join(lines)

    def _expectations(self, guard: Guard) -> str:
        words = {True: "yes", False: "no", None: "too early to say"}
        lines = ["## Expectations", "", "| expectation | met |", "|---|---|"]
        for expectation in self.guardrails.expectations:
            lines.append(f"| {expectation.name} | {words[expectation.met(guard.history)]} |")
        return "\n".join(lines)
