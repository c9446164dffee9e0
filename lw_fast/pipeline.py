"""lw-fast pipeline: train and evaluate epoch by epoch in one process, under guardrails.

Writes experiment.md into the run folder: settings, scores per epoch, decisions and their reasons.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lw_fast.cli import Parser, add_settings, split_lm_flags
from lw_fast.config import (
    DEFAULT_PRESET,
    FIELDS,
    Config,
    build_config,
    from_dict,
    load_guardrails,
    preset_names,
    to_dict,
    to_flat,
)
from lw_fast.errors import UserError
from lw_fast.guardrails import METRICS, Decision, Guard, Guardrails, read_guardrails

LOG = "experiment.md"
COLUMNS = ("em", "f1", "first_token_top1", "first_token_top5", "nll_token")


def pipeline_parser() -> Parser:
    """The flags of launch/pipeline.py."""
    parser = Parser(
        prog="pipeline",
        usage="pipeline --run_dir DIR [--preset NAME] [--SETTING VALUE ...]",
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
        "--preset", default=DEFAULT_PRESET, metavar="NAME",
        help=f"{', '.join(preset_names())}, or a .toml file (default: {DEFAULT_PRESET})",
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
    config = build_config(flags["preset"], {"eval_every": 1, **overrides}, lms)
    guardrails = read_guardrails(load_guardrails(flags["preset"]))
    from lw_fast.engine import close_world, init_world

    world = init_world(use_deepspeed=False, device=flags["device"])
    try:
        run_pipeline(
            config, world, flags["run_dir"], guardrails,
            overwrite=flags["overwrite"], init_from=flags["init_from"],
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

    def after_evaluation(run: Any, metrics: Mapping[str, Any]) -> None:
        decision = guard.decide(mean_scores(metrics), to_flat(run.config))
        log.add(metrics, decision)
        if world.is_main:
            (run_dir / LOG).write_text(log.text(guard), encoding="utf-8")
        if decision.change:
            change_settings(run, decision.change)
        run.finished = decision.stop

    train(
        config, world, run_dir,
        overwrite=overwrite, init_from=init_from, after_evaluation=after_evaluation,
    )  # fmt: skip
    return guard


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
