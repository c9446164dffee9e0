"""What fewer bits per weight of the frozen LMs cost and save: memory and latency, and accuracy.

    python benchmarks/quantised.py memory --pair 8b --preset 8b --eval_dataset squad_dev.json.gz \\
        --lm.llama random:llama-3.1-8b --lm.qwen random:qwen2.5-7b
    python benchmarks/quantised.py accuracy --pair small --ckpt runs/small --eval_samples 512

Writes benchmarks/results/quantised_memory_PAIR.csv or quantised_accuracy_PAIR.csv, and prints it.
Each dtype of --dtypes (default: bf16 and whatever this version can quantise to) is one value of
--backbone_dtype; the first one is what accuracy is compared with.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

# ruff: noqa: E402  (this folder must not shadow the Hugging Face package `kernels`)
import torch
from torch import Tensor

from benchmarks.rows import case_words, measured, write_rows
from lw_fast.cli import Parser, add_settings, run, split_lm_flags
from lw_fast.config import FIELDS, Config, build_config, to_dict
from lw_fast.data import Example
from lw_fast.engine import init_world
from lw_fast.errors import UserError
from lw_fast.evaluate import encode, evaluate, golds_of, run_kind
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import LatentModel, build_model, evaluation_examples, load_model
from lw_fast.run_folder import resolve_checkpoint
from lw_fast.scoring import mean, paired_bootstrap, score

BATCHES = (1, 64)
TEXT_TOKENS = 200
NEW_TOKENS = 6
"""Timed tokens behind each prompt."""
SCORES = ("f1", "em", "first_token_top1")
KINDS = ("text", "latent")
REPEATS = range(3, 20)
"""Fewest and most repeats of a timing; between them it ends with --seconds."""

Rows = Iterator[dict[str, Any]]


def main(argv: Sequence[str]) -> None:
    """Command line."""
    argv, lms = split_lm_flags(argv)
    flags = vars(parser().parse_args(argv))
    settings = {name: value for name, value in flags.items() if name in FIELDS}
    dtypes = dtypes_of(flags["dtypes"])
    device = init_world(use_deepspeed=False, device=flags["device"]).device
    what = flags["what"]
    if what == "memory":
        configs = [
            build_config(flags["preset"], settings | {"backbone_dtype": dtype}, lms)
            for dtype in dtypes
        ]
        found = [r for c in configs for r in memory_rows(c, flags["pair"], device, flags)]
    else:
        path = resolve_checkpoint(flags["ckpt"])
        found = list(accuracy_rows(path, settings, lms, dtypes, flags["pair"], device))
    command = shlex.join(["python", "benchmarks/quantised.py", *_portable(argv, lms)])
    for row in found:
        row["config"] = {"command": command, **row["config"]}
    out = flags["out"] or Path(f"benchmarks/results/quantised_{what}_{flags['pair']}.csv")
    write_rows(out, found)
    for case, rows in itertools.groupby(found, key=lambda row: row["case"]):
        print(case, *(f"{row['metric']} {row['value']:.4g}" for row in rows), sep="  ")
    print(f"{len(found)} rows in {out}")


def parser() -> Parser:
    """The flags."""
    made = Parser(prog="quantised", formatter_class=argparse.RawDescriptionHelpFormatter,
                  description=__doc__)  # fmt: skip
    add = made.add_argument
    add("what", choices=("memory", "accuracy"), help="what to measure")
    add("--pair", required=True, help="name of the pair of LMs: nano, small, 8b")
    add("--dtypes", default="", metavar="A,B", help="values of --backbone_dtype")
    add("--preset", default="nano", help="memory: the settings to start from")
    add("--ckpt", type=Path, metavar="DIR", help="accuracy: a run or checkpoint")
    add("--seconds", type=float, default=1.0, metavar="X", help="memory: longest time per timing")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to measure")
    add("--out", type=Path, metavar="CSV", help="file to write")
    add_settings(made, ("data", "eval", "encoder"))
    return made


def dtypes_of(text: str) -> list[str]:
    """The dtypes asked for, by default all but those that only CPUs need."""
    choices = FIELDS["backbone_dtype"][1].metadata["choices"]
    dtypes = [word for word in text.split(",") if word]
    dtypes = dtypes or [dtype for dtype in choices if dtype not in ("auto", "fp32")]
    if unknown := set(dtypes) - set(choices):
        raise UserError(f"--dtypes: {', '.join(sorted(unknown))} not among {', '.join(choices)}")
    return dtypes


def _portable(argv: Sequence[str], lms: dict[str, str]) -> Iterator[str]:
    """The command line with file names in place of paths."""
    for word in (*argv, *(f"--lm.{name}={source}" for name, source in lms.items())):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        yield f"{flag}{equals}{value.rsplit('/', 1)[-1]}"


# ------------------------------------------------------------------------------- memory, latency


def memory_rows(config: Config, pair: str, device: torch.device, flags: dict[str, Any]) -> Rows:
    """Loading, a small evaluation and the latency of each LM under one dtype."""
    words, about = {"pair": pair, "dtype": config.backbone.backbone_dtype}, _settings(config)

    def phase(name: str, seconds: float) -> Rows:
        case = case_words(**words, phase=name)
        yield measured("quantised", case, "seconds", seconds, "s", config=about)
        if device.type == "cuda":
            for metric, value in (
                ("peak_gib", torch.cuda.max_memory_allocated(device)),
                ("after_gib", torch.cuda.memory_allocated(device)),
            ):
                yield measured("quantised", case, metric, value / 2**30, "GiB", config=about)

    examples = evaluation_examples(config)
    _reset(device)
    started = time.perf_counter()
    model = build_model(config, device)
    yield from phase("load", time.perf_counter() - started)
    _reset(device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluate(model, examples, Path(folder))
    yield from phase("evaluate", time.perf_counter() - started)
    for name, lm in model.lms.items():
        for batch in BATCHES:
            yield from _latency_rows(lm, {**words, "lm": name}, batch, model, about, flags)


def _latency_rows(
    lm: FrozenLM, words: dict, batch: int, model: LatentModel, about: dict, flags: dict
) -> Rows:
    """Prefill from a latent prefix and from a text prompt, and each token behind the former."""
    sizes = {"latent": model.config.encoder.latent_len, "text": TEXT_TOKENS}
    for kind, positions in sizes.items():
        embeds = lm.embed(torch.arange(positions, device=lm.device)).expand(batch, -1, -1)
        times = timed(lambda embeds=embeds: continue_(lm, embeds), flags["seconds"])
        phases = {"prefill": times[0]} | ({"token": times[1]} if kind == "latent" else {})
        for phase, seconds in phases.items():
            ordered = sorted(seconds)
            case = case_words(
                pair=words["pair"], lm=words["lm"], kind=kind, dtype=words["dtype"],
                phase=phase, batch=batch, positions=positions,
            )  # fmt: skip
            yield measured(
                "quantised", case, "seconds", statistics.median(ordered), "s", n=len(ordered),
                p20=ordered[len(ordered) // 5], p80=ordered[-1 - len(ordered) // 5], config=about,
            )  # fmt: skip


def timed(function: Callable[[], tuple[float, float]], budget: float) -> tuple[list, list]:
    """Repeats a function that returns two times, first once without counting it."""
    function()
    found, started = [], time.perf_counter()
    while len(found) < REPEATS.stop and (
        len(found) < REPEATS.start or time.perf_counter() - started < budget
    ):
        found.append(function())
    first, second = zip(*found, strict=True)
    return list(first), list(second)


@torch.no_grad()
def continue_(lm: FrozenLM, embeds_BSD: Tensor) -> tuple[float, float]:
    """Seconds to the first token behind a prompt, and per further token, greedily."""
    from transformers import DynamicCache

    cache, marks = DynamicCache(config=lm.model.config), [_now(lm.device)]
    for _ in range(1 + NEW_TOKENS):
        output = lm.backbone(inputs_embeds=embeds_BSD, past_key_values=cache, use_cache=True)
        token_B = lm.logits(output.last_hidden_state[:, -1]).argmax(-1)
        embeds_BSD = lm.embed(token_B[:, None])
        if len(marks) == 1:
            marks.append(_now(lm.device))
    marks.append(_now(lm.device))
    return marks[1] - marks[0], (marks[2] - marks[1]) / NEW_TOKENS


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset(device: torch.device) -> None:
    """Gives back what the last model held, and starts a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _settings(config: Config) -> dict[str, Any]:
    """What the command line leaves open; sources by name, since folders are this machine's own."""
    lms = {name: source.rsplit("/", 1)[-1] for name, source in config.lm.items()}
    values = to_dict(config)
    return {"lm": lms} | {name: values[name] for name in _TOLD}


_TOLD = (
    "encoder_type latent_len d_z kinds max_new_tokens chunk_size text_format attn_implementation"
).split()


# ------------------------------------------------------------------------------- accuracy


def accuracy_rows(
    path: Path,
    settings: dict[str, Any],
    lms: dict[str, str],
    dtypes: Sequence[str],
    pair: str,
    device: torch.device,
) -> Rows:
    """Scores of a checkpoint under each dtype, and their change against the first one."""
    base: dict[tuple[str, str], dict[str, list[float]]] = {}
    for dtype in dtypes:
        _reset(device)
        model = load_model(path, device, settings | {"backbone_dtype": dtype}, lms)
        about, seed, scored = _settings(model.config), model.config.data.eval_seed, scores_of(model)
        del model  # before the next one is loaded
        for (name, kind), values in scored.items():
            case = case_words(pair=pair, lm=name, kind=kind, dtype=dtype)
            first = base.setdefault((name, kind), values)
            for metric in SCORES:
                shown = dict(n=len(values[metric]), config=about)
                yield measured("quantised", case, metric, mean(values[metric]), "1", **shown)
                if dtype == dtypes[0]:
                    continue
                change = paired_bootstrap(values[metric], first[metric], seed)
                for suffix, value in (
                    ("", change.difference), ("_lo", change.lo), ("_hi", change.hi)
                ):  # fmt: skip
                    against = f"{metric}_change{suffix}"
                    yield measured("quantised", case, against, value, "1", **shown)


def scores_of(model: LatentModel) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Per LM and kind, the scores of every question in the same order."""
    examples: list[Example] = evaluation_examples(model.config)
    model.bridge.eval()
    latents, found = encode(model, examples), {}
    for name, lm in model.lms.items():
        for kind in KINDS:
            result = run_kind(kind, "clean", lm, model, examples, latents)
            scored = score(result.predictions, golds_of(examples))
            found[name, kind] = {
                "f1": scored.f1,
                "em": scored.em,
                "first_token_top1": result.scores.first_top1.tolist(),
            }
    return found


if __name__ == "__main__":
    sys.exit(run(main))
