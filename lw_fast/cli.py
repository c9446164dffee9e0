"""Command lines: one flag per setting, one clear line per mistake.

The files in launch/ and the `lw-fast` command are thin twins of the functions here.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lw_fast.config import (
    DEFAULT_PRESET,
    FIELDS,
    GROUPS,
    Config,
    build_config,
    from_dict,
    preset_names,
    to_dict,
)
from lw_fast.errors import UserError
from lw_fast.idle import warn_idle

if TYPE_CHECKING:
    from lw_fast.shared import Shared

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and that takes no flag for another's abbreviation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def add_settings(parser: argparse.ArgumentParser, groups: Sequence[str] = tuple(GROUPS)) -> None:
    """Adds one flag per setting of `groups`; only flags that were given appear in the result."""
    for group in groups:
        section = parser.add_argument_group(f"{group} settings", GROUPS[group].__doc__)
        for name, (owner, spec) in FIELDS.items():
            if owner != group:
                continue
            kind = type(spec.default)
            section.add_argument(
                f"--{name}",
                default=argparse.SUPPRESS,
                type=str if kind is bool else kind,
                choices=spec.metadata["choices"],
                metavar=None if spec.metadata["choices"] else _METAVAR[kind],
                help=f"{spec.metadata['help']} (default: {_shown(spec.default)})",
            )


_METAVAR = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default) or "empty"


def split_lm_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--lm.NAME SOURCE` (or `--lm.NAME=SOURCE`) out of the arguments."""
    rest, lms, words = [], {}, iter(argv)
    for word in words:
        if not word.startswith("--lm."):
            rest.append(word)
            continue
        name, equals, source = word.removeprefix("--lm.").partition("=")
        source = source if equals else next(words, "")
        if not name.isidentifier() or not source or source.startswith("--"):
            raise UserError(f"{word} needs a name and a source, as in --lm.llama DIR")
        lms[name] = source
    return rest, lms


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command line; user errors become one line on stderr and exit status 2."""
    _quiet()
    try:
        command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _quiet() -> None:
    """Our own log lines on stderr; libraries only when something is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("lw_fast").setLevel(
        logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.showwarning = _one_line_warning


def _one_line_warning(message: Any, category: type, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        print(f"warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------- train


def train_parser() -> Parser:
    """The flags of launch/train.py."""
    parser = Parser(
        prog="train",
        usage="train [--preset NAME] [--ds_config FILE] [--run_dir DIR] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train one latent prompt for several frozen LMs, then evaluate it.\n\n"
            "  deepspeed launch/train.py --ds_config ds_configs/zero2.json\n"
            "  torchrun --nproc_per_node 2 launch/train.py --preset small\n"
            "  python launch/train.py --latent_len 8 --run_dir runs/m8\n\n"
            "Without flags it trains the preset nano: two tiny LMs that ship with the package.\n"
            "Settings come from the preset; flags change single ones."
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   hub name, folder, .gguf file, nano:llama, "
        "nano:qwen\n                     or random:SHAPE[@TOKENIZER]; repeat for several LMs",
    )
    parser.add_argument(
        "--preset", default=None, metavar="NAME",
        help=f"{', '.join(preset_names())}, or a .toml file (default: {DEFAULT_PRESET})",
    )  # fmt: skip
    parser.add_argument(
        "--ds_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed config, or a shipped one as zero2; without it: plain PyTorch",
    )
    parser.add_argument(
        "--run_dir", type=Path, metavar="DIR", help="run folder (default: runs/PRESET-DATE-TIME)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --run_dir from its newest checkpoint",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run_dir")
    parser.add_argument(
        "--auto_batch", action="store_true",
        help="find the fastest micro_batch_size that fits, then train with it",
    )  # fmt: skip
    parser.add_argument(
        "--init_from", type=Path, metavar="DIR", help="start from the weights of another run"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train"
    )
    parser.add_argument(
        "--timeout_seconds", type=float, default=600.0, metavar="X",
        help="give up on another process that is silent for this long (default: 600)",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    add_settings(parser)
    return parser


def train_main(argv: Sequence[str], shared: Shared | None = None) -> None:
    """launch/train.py: train and evaluate; `shared` as for train()."""
    argv, lms = split_lm_flags(argv)
    flags = vars(train_parser().parse_args(argv))
    overrides = {name: value for name, value in flags.items() if name in FIELDS}
    if flags["resume"] and flags["run_dir"] is None:
        raise UserError("--resume needs --run_dir")
    if flags["auto_batch"] and (flags["resume"] or "micro_batch_size" in flags):
        raise UserError("--auto_batch contradicts --resume and --micro_batch_size")
    config = run_config(flags, overrides, lms)
    from lw_fast.engine import close_world, init_world, load_ds_config, watch_peers
    from lw_fast.train import train

    if not flags["timeout_seconds"] > 0:
        raise UserError(f"timeout_seconds must be greater than 0, got {flags['timeout_seconds']}")
    world = init_world(
        use_deepspeed=flags["ds_config"] is not None,
        device=flags["device"],
        timeout_seconds=flags["timeout_seconds"],
    )
    try:
        ds_config = (
            load_ds_config(find_ds_config(flags["ds_config"])) if flags["ds_config"] else None
        )
        run_dir = flags["run_dir"] or _default_run_dir(flags["preset"] or DEFAULT_PRESET, world)
        with watch_peers(world):
            train(
                config,
                world,
                run_dir,
                ds_config=ds_config,
                resume=flags["resume"],
                overwrite=flags["overwrite"],
                init_from=flags["init_from"],
                shared=shared,
                auto_batch=flags["auto_batch"],
            )
        if world.is_main:
            print(f"run folder: {run_dir}")
    finally:
        close_world()


def run_config(flags: dict[str, Any], overrides: dict[str, Any], lms: dict[str, str]) -> Config:
    """Preset plus flags; a resumed run starts from its own settings instead of a preset.

    Raises:
        UserError: the settings are wrong, or --resume goes with --init_from.
    """
    if flags["resume"] and flags["init_from"] is not None:
        raise UserError("--resume and --init_from contradict each other")
    if flags["resume"] and flags["preset"] is None:
        from lw_fast.run_folder import read_config

        saved = to_dict(read_config(flags["run_dir"]))
        config = from_dict({**saved, **overrides, "lm": {**saved["lm"], **lms}})
    else:
        config = build_config(flags["preset"] or DEFAULT_PRESET, overrides, lms)
    warn_idle(config, overrides)
    return config


def find_ds_config(path: Path) -> Path:
    """The file, or the shipped one of that name: `zero2` and `ds_configs/zero2.json` work from any
    folder, in a checkout and installed."""
    if path.exists() or path.parent not in (Path("."), Path("ds_configs")):
        return path
    package = Path(__file__).parent
    places = (package / "ds_configs", package.parent / "ds_configs")
    found = (folder / f"{path.name.removesuffix('.json')}.json" for folder in places)
    return next((file for file in found if file.exists()), path)


def _default_run_dir(preset: str, world: Any) -> Path:
    """runs/PRESET-DATE-TIME; rank 0's clock decides."""
    name = f"{Path(preset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / world.all_gather(name)[0]


# ------------------------------------------------------------------------------- eval


def eval_parser() -> Parser:
    """The flags of launch/eval.py."""
    parser = Parser(
        prog="eval",
        usage="eval --ckpt DIR [--out_dir DIR] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Evaluate a run or a checkpoint: every prompt kind on every LM.\n\n"
            "  python launch/eval.py --ckpt runs/first\n"
            "  python launch/eval.py --ckpt runs/first/epoch2 --kinds text,latent --load_4bit"
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   another source for an LM of the checkpoint",
    )
    parser.add_argument("--ckpt", type=Path, required=True, metavar="DIR", help="run or checkpoint")
    parser.add_argument(
        "--out_dir", type=Path, metavar="DIR", help="(default: eval_CHECKPOINT beside it)"
    )
    parser.add_argument("--load_4bit", action="store_true", help="the same as --backbone_dtype nf4")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to evaluate"
    )
    add_settings(parser, ("data", "eval", "adapter", "backbone"))
    return parser


def eval_main(argv: Sequence[str]) -> None:
    """launch/eval.py: evaluate a checkpoint."""
    argv, lms = split_lm_flags(argv)
    flags = vars(eval_parser().parse_args(argv))
    overrides = {name: value for name, value in flags.items() if name in FIELDS}
    # `--samples` means evaluation questions here, as in the original.
    if "samples" in overrides:
        overrides["eval_samples"] = overrides.pop("samples")
    if flags["load_4bit"]:
        overrides["backbone_dtype"] = "nf4"
    from rich.console import Console

    from lw_fast.engine import init_world
    from lw_fast.evaluate import evaluate, table_rows
    from lw_fast.model import evaluation_examples, load_model
    from lw_fast.progress import print_table
    from lw_fast.run_folder import resolve_checkpoint

    path = resolve_checkpoint(flags["ckpt"])
    out_dir = flags["out_dir"] or path.parent / f"eval_{path.name}"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out_dir}: {error.strerror}") from None
    world = init_world(use_deepspeed=False, device=flags["device"])
    model = load_model(path, world.device, overrides, lms, park=True)
    warn_idle(model.config, overrides)
    metrics = evaluate(model, evaluation_examples(model.config), out_dir)
    print_table(Console(), str(path), table_rows(metrics, list(model.lms)))
    print(f"written to {out_dir}")


Command = Callable[[Sequence[str]], None]


def main_of(module: str) -> Command:
    """The `main(argv)` of a module that stands on this one, loaded when it is called."""
    return lambda argv: importlib.import_module(module).main(argv)


COMMANDS: dict[str, Command] = {
    "train": train_main,
    "eval": eval_main,
    "sweep": main_of("lw_fast.sweep"),
    "pipeline": main_of("lw_fast.pipeline"),
    "ablate": main_of("lw_fast.ablate"),
    "report": main_of("lw_fast.report.report_main"),
    "demo": main_of("lw_fast.demo"),
    "plan": main_of("lw_fast.plan"),
}


def main() -> None:
    """The `lw-fast` command."""
    names = "|".join(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: lw-fast {names} ...   (each has --help)", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else EXIT_USER_ERROR)
    sys.exit(run(COMMANDS[sys.argv[1]], sys.argv[2:]))
