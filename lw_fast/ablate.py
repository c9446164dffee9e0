"""lw-fast ablate: decode-time knobs over one checkpoint, one row each, with 95 % intervals.

Every row is compared with the first one on the same questions (paired bootstrap): a difference
whose interval holds 0 is noise. What changes training (the first-token weight, say) needs a
checkpoint of its own: each further one is a row too, named by its settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lw_fast.cli import Parser, add_settings, split_lm_flags
from lw_fast.config import FIELDS, GROUPS, differences
from lw_fast.errors import UserError
from lw_fast.scoring import bootstrap_interval, mean, paired_bootstrap, score

if TYPE_CHECKING:
    from lw_fast.data import Example
    from lw_fast.evaluate import Result
    from lw_fast.model import LatentModel
    from lw_fast.prompts import Latents

ROWS = (
    "latent_anchor_mode=none",
    "latent_anchor_mode=chat",
    "append_bos_after_prefix=no",
    "append_bos_after_prefix=yes",
    "prefix_gain=1.1",
    "prefix_gain=1.25",
    "first_token_top_p=0.9 first_token_temperature=0.7",
    "calibration=per_slot",
    "calibration=embed_rms",
    "calibration=train_stats",
    "calibration=none",
)
"""The A/B table of the original experiment's log, as far as it needs no training."""

BASE = "as it is"
SCORES = ("f1", "em", "first_token_top1")
TUNABLE = {f.name for f in dataclasses.fields(GROUPS["eval"])}
TUNABLE |= {"calibration", "prefix_target_rms", "prefix_gain"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One LM under one change; per score the mean and its interval, and the gain over the base."""

    lm: str
    change: str
    scores: Mapping[str, tuple[float, float, float]]
    gains: Mapping[str, tuple[float, float, float]]


def ablate_parser() -> Parser:
    """The flags of launch/ablate.py."""
    parser = Parser(
        prog="ablate",
        usage="ablate --ckpt DIR [DIR ...] [--rows 'NAME=V NAME=V' ...] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Score the latent prompts of a checkpoint under one change at a time.\n\n"
            "  python launch/ablate.py --ckpt runs/first\n"
            "  python launch/ablate.py --ckpt runs/first runs/twice_the_first_token\n"
            "  python launch/ablate.py --ckpt runs/first --rows prefix_gain=1.1 prefix_gain=1.25"
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   another source for an LM of the checkpoint",
    )
    add = parser.add_argument
    add(
        "--ckpt", type=Path, required=True, nargs="+", metavar="DIR",
        help="run or checkpoint; others of the same LMs are compared with the first",
    )  # fmt: skip
    add("--out_dir", type=Path, metavar="DIR", help="(default: ablation_CHECKPOINT beside it)")
    add(
        "--rows", nargs="+", metavar="'NAME=V NAME=V'",
        help="changes, one row each (default: the table of the original experiment's log)",
    )  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to evaluate")
    add_settings(parser, ("data", "eval", "adapter", "backbone"))
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/ablate.py: writes ablation.md and ablation.json."""
    argv, lms = split_lm_flags(argv)
    flags = vars(ablate_parser().parse_args(argv))
    overrides = {name: value for name, value in flags.items() if name in FIELDS}
    if "samples" in overrides:  # as in launch/eval.py
        overrides["eval_samples"] = overrides.pop("samples")
    changes = {line: read_change(line) for line in flags["rows"] or ROWS}
    from lw_fast.engine import init_world
    from lw_fast.model import evaluation_examples, load_model
    from lw_fast.run_folder import resolve_checkpoint

    path, *others = [resolve_checkpoint(path) for path in flags["ckpt"]]
    out_dir = flags["out_dir"] or path.parent / f"ablation_{path.name}"
    world = init_world(use_deepspeed=False, device=flags["device"])
    model = load_model(path, world.device, overrides, lms)
    if flags["rows"] is None and not all(lm.tokenizer.chat_template for lm in model.lms.values()):
        del changes["latent_anchor_mode=chat"]
        print("left out: latent_anchor_mode=chat (an LM has no chat template)")
    rivals = _rivals(model, others, overrides, lms)
    rows = ablate(model, evaluation_examples(model.config), changes, rivals)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "ablation.md").write_text(markdown(rows), encoding="utf-8")
    listed = [dataclasses.asdict(row) for row in rows]
    (out_dir / "ablation.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))
    print(f"written to {out_dir}")


def read_change(line: str) -> dict[str, str]:
    """`"prefix_gain=1.1 latent_anchor_mode=none"` -> settings.

    Raises:
        UserError: not NAME=VALUE, or a setting that a checkpoint cannot be evaluated with.
    """
    change = {}
    for word in line.split():
        name, equals, value = word.partition("=")
        if not equals or name not in TUNABLE:
            raise UserError(f"--rows: {word!r} is not NAME=VALUE with a decode-time setting")
        change[name] = value
    return change


def _rivals(
    model: LatentModel,
    paths: Sequence[Path],
    overrides: Mapping[str, Any],
    lms: Mapping[str, str],
) -> Iterator[tuple[str, LatentModel]]:
    """Other checkpoints over the same LMs, which stay in memory, one at a time."""
    from lw_fast.model import load_model

    for path in paths:
        rival = load_model(path, model.device, overrides, lms, loaded=model.lms)
        if _lms_of(rival) != _lms_of(model):
            raise UserError(f"{path} is over other LMs than the first checkpoint")
        yield f"{path.parent.name}/{path.name}: {_otherwise(model, rival)}", rival


def _lms_of(model: LatentModel) -> tuple[dict[str, str], str]:
    return dict(model.config.lm), model.config.backbone.backbone_dtype


def _otherwise(model: LatentModel, rival: LatentModel) -> str:
    """The settings in which two checkpoints differ, as a row's name."""
    changed = differences(model.config, rival.config)
    words = [
        f"{name}={new}"
        for name, (_, new) in changed.items()
        if FIELDS[name][0] not in ("run", "placement")
    ]
    return " ".join(words) or "the same settings"


def ablate(
    model: LatentModel,
    examples: Sequence[Example],
    changes: Mapping[str, Mapping[str, Any]],
    rivals: Iterable[tuple[str, LatentModel]] = (),
) -> list[Row]:
    """The base, every change and every rival, on every LM; a model encodes each question once."""
    from lw_fast.evaluate import asked_for, run_kind

    rows, base = [], {}
    for line, tuned, latents in _measured(model, examples, changes, rivals):
        protocol = asked_for(tuned.config)[1][0]
        for name, lm in tuned.lms.items():
            result = run_kind("latent", protocol, lm, tuned, examples, latents)
            values = _per_question(result, examples)
            base.setdefault(name, values)
            rows.append(_row(name, line, values, base[name], model.config.data.eval_seed))
    return rows


def _measured(
    model: LatentModel,
    examples: Sequence[Example],
    changes: Mapping[str, Mapping[str, Any]],
    rivals: Iterable[tuple[str, LatentModel]],
) -> Iterator[tuple[str, LatentModel, Latents]]:
    """Each row's name, model and latents."""
    from lw_fast.evaluate import encode
    from lw_fast.model import retuned

    model.bridge.eval()
    latents = encode(model, examples)
    yield BASE, model, latents
    for line, change in changes.items():
        yield line, retuned(model, change), latents
    for line, rival in rivals:
        rival.bridge.eval()
        yield line, rival, encode(rival, examples)


def _per_question(result: Result, examples: Sequence[Example]) -> dict[str, list[float]]:
    from lw_fast.evaluate import has_answer

    scores = score(result.predictions, [example.answers for example in examples])
    first = result.scores.first_top1[has_answer(examples)].tolist()
    return {"f1": scores.f1, "em": scores.em, "first_token_top1": first}


def _row(
    lm: str,
    change: str,
    values: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
    seed: int,
) -> Row:
    gains = {name: paired_bootstrap(values[name], base[name], seed) for name in SCORES}
    return Row(
        lm=lm,
        change=change,
        scores={
            name: (mean(values[name]), *bootstrap_interval(values[name], seed)) for name in SCORES
        },
        gains={name: (gain.difference, gain.lo, gain.hi) for name, gain in gains.items()},
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table; a gain is in bold where its interval leaves 0 out."""
    head = "| LM | change | F1 | EM | FirstTok@1 | F1 against the base |"
    lines = [head, "|---" * 6 + "|"]
    for row in rows:
        gain, lo, hi = row.gains["f1"]
        text = f"{gain:+.3f} [{lo:+.3f}, {hi:+.3f}]"
        against = "" if row.change == BASE else f"**{text}**" if lo > 0 or hi < 0 else text
        cells = [f"{m:.3f} [{a:.3f}, {b:.3f}]" for m, a, b in (row.scores[s] for s in SCORES)]
        lines.append(f"| {' | '.join([row.lm, row.change, *cells, against])} |")
    return "\n".join(lines) + "\n"
