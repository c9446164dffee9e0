"""Stage A, then Stage B from its weights, as the original's log planned them: scores per stage.

    python benchmarks/stages.py [--preset nano] [--lm.NAME SOURCE ...] [--recipes seed,ours]
                                [--epochs N] [--SETTING VALUE ...]

Two recipes on the LMs and the data of a preset. `seed`: every setting of the presets seed_stage_a
and seed_stage_b, but LMs, data and epochs. `ours`: the preset, with those settings in which the two
stages differ (BOS behind the anchor, weight of the first token, gain at decode time) as in each
stage. Stage B starts from the weights of Stage A, with a fresh optimiser. `epochs` is that of each
stage. Text and latent prompts are scored after each; writes benchmarks/results/stages_PAIR.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
from benchmarks.accuracy import score_rows
from benchmarks.rows import command_line, without_folders, write_rows
from lw_fast.cli import add_settings, split_lm_flags
from lw_fast.config import (
    FIELDS,
    Config,
    build_config,
    from_flat,
    load_preset,
    to_dict,
    to_flat,
)
from lw_fast.data import eval_spec
from lw_fast.engine import World, init_world
from lw_fast.shared import Shared
from lw_fast.train import train

STAGES = {stage: load_preset(f"seed_stage_{stage}")[0] for stage in ("a", "b")}
CHANGES = [name for name in STAGES["a"] if STAGES["a"][name] != STAGES["b"][name]]
"""Settings in which Stage B differs from Stage A."""
RECIPES = ("seed", "ours")
ASKED = {"kinds": "text,latent", "eval_every": 0, "debug_print_first": 0}
COLUMNS = ("f1", "em", "first_token_top1", "nll_token")


def stage_config(recipe: str, stage: str, ours: Config, given: Mapping[str, Any]) -> Config:
    """The settings of one stage.

    Args:
        ours: the preset with what was `given`: LMs and data of both recipes.
        given: settings of the command line, which go over both recipes.
    """
    seed, values = STAGES[stage], to_flat(ours)
    if recipe == "ours":
        chosen = values | {name: seed[name] for name in CHANGES}
    else:
        shared = {name: values[name] for name in values if FIELDS[name][0] in ("data", "backbone")}
        chosen = seed | shared | {"epochs": values["epochs"], "protocol": "clean,seed"}
    return from_flat({**chosen, **ASKED, **given}, ours.lm)


def run_stages(
    configs: Mapping[str, Config], world: World, shared: Shared, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stage, metrics) of each stage; every one starts from the weights of the one before."""
    before = None
    for stage, config in configs.items():
        yield stage, train(config, world, folder / stage, init_from=before, shared=shared)
        before = folder / stage


def stage_rows(
    metrics: Mapping[str, Any], config: Config, words: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Scores under every protocol that was asked for."""
    spec = without_folders(eval_spec(config.data.dataset, config.data.eval_dataset))
    words = dict(
        pair=words["pair"], encoder=config.encoder.encoder_type, set=spec.split(".")[0],
        engine="plain", batch=str(config.optim.batch_size), recipe=words["recipe"],
        stage=words["stage"], epochs=str(config.optim.epochs),
    )  # fmt: skip
    known = {"command": command_line(), "settings": without_folders(to_dict(config))}
    yield from score_rows(dict(metrics), words | {"protocol": "clean"}, known)
    if "seed" in metrics:
        seed = metrics["seed"] | {"samples": metrics["samples"]}
        yield from score_rows(seed, words | {"protocol": "seed"}, known)


def table_lines(recipe: str, stage: str, metrics: Mapping[str, Any]) -> Iterator[str]:
    """One line per LM and kind, protocol clean."""
    for kind in ("text", "latent"):
        for lm, scores in metrics[kind].items():
            values = " | ".join(f"{scores[name]:.3f}" for name in COLUMNS)
            yield f"| {recipe} | {stage.upper()} | {lm} | {kind} | {values} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="nano")
    add("--pair", help="name of the pair of LMs in the rows (default: the preset)")
    add("--recipes", default=",".join(RECIPES), help="some of seed, ours")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--out", type=Path, help="(default: benchmarks/results/stages_PAIR.csv)")
    add_settings(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    argv, sources = split_lm_flags(sys.argv[1:] if argv is None else argv)
    flags = vars(_parser().parse_args(argv))
    given = {name: value for name, value in flags.items() if name in FIELDS}
    recipes = flags["recipes"].split(",")
    if unknown := set(recipes) - set(RECIPES):
        sys.exit(f"error: {', '.join(sorted(unknown))}: there are {', '.join(RECIPES)}")
    ours = build_config(flags["preset"], given, sources)
    pair = flags["pair"] or flags["preset"]
    out = flags["out"] or Path(f"benchmarks/results/stages_{pair}.csv")
    world = init_world(use_deepspeed=False, device=flags["device"])
    shared = Shared()
    lms = shared.lms(ours, world.device)
    if not all(lms[name].tokenizer.chat_template for name in ours.lm):
        given.setdefault("text_format", "plain")
        print("text prompts are plain: an LM has no chat template")
    rows, lines = [], ["| recipe | stage | LM | prompt | F1 | EM | FirstTok@1 | NLL/token |"]
    lines.append("|---" * 8 + "|")
    for recipe in recipes:
        configs = {stage: stage_config(recipe, stage, ours, given) for stage in STAGES}
        with tempfile.TemporaryDirectory() as folder:
            for stage, metrics in run_stages(configs, world, shared, Path(folder)):
                words = {"pair": pair, "recipe": recipe, "stage": stage}
                rows += stage_rows(metrics, configs[stage], words)
                lines += table_lines(recipe, stage, metrics)
                write_rows(out, rows)  # a run that is stopped keeps what it measured
    print("\n".join(lines))
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
