"""lw-fast plan: will a training fit, and what fills the card? No LM is loaded.

What is counted from shapes is exact; activations are an estimate from what PyTorch keeps for the
backward pass of a Llama or Qwen2 layer, eager or compiled. The plan is for training on GPUs;
evaluation is not part of it: it generates in chunks (`chunk_size`) with a cache of keys and values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lw_kernels.linear_masked_ce import rows_per_chunk

from lw_fast.bridge import LatentBridge
from lw_fast.cli import Parser, add_settings, split_lm_flags
from lw_fast.config import DEFAULT_PRESET, FIELDS, Config, build_config
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.frozen_lm import compiles
from lw_fast.lm_sources import RANDOM_SHAPES
from lw_fast.placement import Placement, place

GIB = 2**30
RESERVE = 1.5 * GIB
"""CUDA context, communication and what the allocator cannot use; an assumption."""
LAYER_BYTES = {"bf16": 2.0, "fp32": 4.0, "fp8": 2.0, "int8": 1.0, "nf4": 4.127 / 8}
"""Per weight of a decoder layer; embedding and head stay in bf16 (or fp32). fp8 keeps a second copy
for the backward pass (fp8.py)."""
BUCKETS = 2 * 64 * 2**20
"""DeepSpeed's communication buckets with the shipped ds_configs."""
LIVE_WEIGHTS = 10**9
"""DeepSpeed's stage3_max_live_parameters: weights of sharded layers that are whole at a time."""
GPU = torch.device("cuda")
FRAME = 4
"""Positions around latents and answer: BOS and the anchor `Answer:`."""
NOTHING_FITS = (
    "no micro-batch size does; try --backbone_dtype nf4, or on several GPUs --lm_parallel true or "
    "ds_configs/zero3.json"
)


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a Llama or Qwen2."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    bias: bool

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers."""
        rows = self.head_dim * (self.heads + 2 * self.kv_heads)
        attention = self.width * (rows + self.head_dim * self.heads) + rows * self.bias
        return self.layers * (attention + 3 * self.width * self.inner + 2 * self.width)

    @property
    def other_weights(self) -> int:
        """Embedding, head (unless tied) and the last norm."""
        return self.vocab * self.width * (1 if self.tied else 2) + self.width

    def kept_per_position(self, *, compiled: bool = False, recomputed: bool = False) -> int:
        """bf16 values that all layers keep per position for the backward pass to the prefix.

        A frozen linear layer keeps nothing. Two norms keep their input, in fp32; attention keeps
        q, k, v and its output; the MLP keeps gate, silu(gate) and up. Compiled layers keep the
        norms' inputs in bf16 and compute silu(gate) again. Where layers are recomputed
        (grad_ckpt), each keeps its input, and one layer at a time the rest.
        """
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        norms, mlp = (2, 2) if compiled else (4, 3)
        layer = norms * self.width + attention + mlp * self.inner
        return self.layers * self.width + layer if recomputed else self.layers * layer


@dataclass(frozen=True)
class Term:
    """One line of a plan."""

    name: str
    bytes: float
    exact: bool
    note: str = ""


@dataclass(frozen=True)
class Job:
    """What is planned beside the settings."""

    gpus: int = 1
    card_gib: float = 80.0
    zero_stage: int = 0
    offload: frozenset[str] = frozenset()
    """What waits in CPU memory: optimizer, param."""
    answer_len: int = 0
    """Tokens of an answer, the longest of a batch (layout padded) or the mean (packed); 0:
    max_answer_tokens."""
    source_len: int = 0
    """Units (reader tokens or bytes) of the longest source of a batch; 0: the limit."""
    cached_tokens: int = 0
    """Source tokens whose reader states are kept; 0: none."""


# ------------------------------------------------------------------------------- shapes


def read_shape(name: str, source: str) -> Shape:
    """The shape of an LM source; of a hub name only where it is a well-known one."""
    values = _known_shape(source) or _read_config(source)
    if values is None:
        raise UserError(
            f"lm.{name}: the shape of {source} is not known here; give a model folder or one of "
            f"{', '.join(RANDOM_SHAPES)}"
        )
    family = values.get("model_type")
    if family not in ("llama", "qwen2"):
        raise UserError(f"lm.{name}: plan knows Llama and Qwen2, not model_type {family!r}")
    try:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        return Shape(
            layers=values["num_hidden_layers"],
            width=width,
            inner=values["intermediate_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or width // heads,
            vocab=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings")),
            bias=family == "qwen2",
        )
    except KeyError as error:
        raise UserError(f"lm.{name}: config.json of {source} lacks {error.args[0]}") from None


def _known_shape(source: str) -> dict[str, Any] | None:
    spec = source.removeprefix("random:").partition("@")[0].lower()
    if spec in RANDOM_SHAPES:
        return RANDOM_SHAPES[spec]
    if Path(source).exists():
        return None
    stem = spec.replace("-coder", "")  # the same shape
    return next((shape for name, shape in RANDOM_SHAPES.items() if name in stem), None)


def _read_config(source: str) -> dict[str, Any] | None:
    folder = Path(source).expanduser()
    if source.startswith("nano:"):
        assets = resources.files("lw_fast") / "assets" / "nano"
        folder = Path(str(assets / source.removeprefix("nano:")))
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None
    return values if isinstance(values, dict) else None


# ------------------------------------------------------------------------------- terms


def plan(config: Config, job: Job) -> list[Term]:
    """What one rank holds at the peak of a training step; with lm_parallel the fullest rank.

    Raises:
        UserError: a shape is not known, or so many GPUs cannot train with these settings.
    """
    if not config.lm:
        raise UserError("no frozen LM is named: give --lm.NAME SOURCE or a preset that has some")
    shapes = {name: read_shape(name, source) for name, source in config.lm.items()}
    reader = _reader_shape(config, shapes)
    trained = _trained(count_trainable(config, shapes, reader), job)
    reserve = Term("reserve", RESERVE, False, "CUDA context, fragmentation: assumed")
    plans = []
    for rank in range(job.gpus):
        placement = placed(config, job, rank)
        here = {name: shapes[name] for name in placement.lms}
        terms = [*_frozen(config, placement, here, reader), trained]
        terms += [*_activations(config, job, placement, here, reader), reserve]
        plans.append(terms)
    return max(plans, key=lambda terms: sum(term.bytes for term in terms))


def placed(config: Config, job: Job, rank: int = 0) -> Placement:
    """Where the training would put the LMs."""
    ds_config = {"zero_optimization": {"stage": job.zero_stage}} if job.zero_stage else None
    return place(config, World(rank, 0, job.gpus, GPU), ds_config)


def _frozen(
    config: Config, placement: Placement, here: Mapping[str, Shape], reader: Shape | None
) -> list[Term]:
    """Weights of the LMs on a rank, and of a reader that is none of them."""
    cut = placement.sharding is not None
    parts = placement.world.size if cut else 1
    note = f"layers cut among {parts}, ends whole" if cut else "whole on this rank"
    terms = [
        Term(f"frozen weights of {name}", _weight_bytes(config, shape, parts), True, note)
        for name, shape in here.items()
    ]
    if cut:
        live = min(LIVE_WEIGHTS, max(shape.layer_weights for shape in here.values()))
        whole = live * LAYER_BYTES[_dtype(config)]
        terms.append(Term("gathered layers", whole, False, "whole while they run"))
    if reader is not None and config.encoder.reader not in here:
        terms.append(
            Term("frozen weights of reader", _weight_bytes(config, reader), True, "whole, too")
        )
    return terms


def _reader_shape(config: Config, shapes: Mapping[str, Shape]) -> Shape | None:
    if config.encoder.encoder_type != "lm":
        return None
    name = config.encoder.reader
    if not name:
        raise UserError("encoder_type=lm needs --reader: the name of an LM, or a source")
    return shapes.get(name) or read_shape("reader", name)


def _weight_bytes(config: Config, shape: Shape, parts: int = 1) -> float:
    """Of one rank, where the layers are cut into `parts`."""
    dtype = _dtype(config)
    rest = LAYER_BYTES["fp32" if dtype == "fp32" else "bf16"]
    return shape.layer_weights * LAYER_BYTES[dtype] / parts + shape.other_weights * rest


def _dtype(config: Config) -> str:
    choice = config.backbone.backbone_dtype
    return "bf16" if choice == "auto" else choice


def count_trainable(config: Config, shapes: Mapping[str, Shape], reader: Shape | None) -> int:
    """Parameters of encoder and adapters, from a bridge without storage."""
    with torch.device("meta"):
        bridge = LatentBridge(
            config,
            d_model={name: shape.width for name, shape in shapes.items()},
            embed_rms=dict.fromkeys(shapes, 1.0),
            reader_dim=reader.width if reader else 0,
            num_states=_num_states(config) if reader else 0,
        )
    return sum(p.numel() for p in bridge.parameters())


def _num_states(config: Config) -> int:
    return len(config.encoder.reader_layers.split(","))


def _trained(count: int, job: Job) -> Term:
    """Weights, gradients and AdamW's two moments in fp32; DeepSpeed updates a copy of its own."""
    weights, grads, copy, moments = 4.0, 4.0, 4.0 if job.zero_stage else 0.0, 8.0
    if job.zero_stage >= 1:
        copy, moments = copy / job.gpus, moments / job.gpus
    if job.zero_stage >= 2:
        grads /= job.gpus
    if job.zero_stage >= 3:
        weights /= job.gpus
    if "optimizer" in job.offload:
        copy = moments = 0.0
    if "param" in job.offload:
        weights = 0.0
    total = count * (weights + grads + copy + moments) + (BUCKETS if job.zero_stage else 0)
    how = f"ZeRO-{job.zero_stage} on {job.gpus}" if job.zero_stage else "fp32 and AdamW"
    return Term("trained part", total, True, f"{count / 1e6:.1f} M parameters, {how}")


def micro_batch(config: Config, job: Job) -> int:
    """Questions per device and pass."""
    return min(config.micro_batch, config.optim.batch_size // placed(config, job).shares)


def _activations(
    config: Config,
    job: Job,
    placement: Placement,
    shapes: Mapping[str, Shape],
    reader: Shape | None,
) -> list[Term]:
    """Of the LMs on a rank, and of the encoder and the reader."""
    batch, value = micro_batch(config, job), 4 if _dtype(config) == "fp32" else 2
    answer = job.answer_len or config.data.max_answer_tokens
    positions = batch * (FRAME + config.encoder.latent_len + answer)
    backbone = config.backbone
    kept = dict(
        compiled=placement.sharding is None and compiles(backbone, GPU),
        recomputed=backbone.grad_ckpt,
    )
    passes = {
        name: positions * shape.kept_per_position(**kept) * value
        + _logits(shape, batch * (answer + 1), value)
        for name, shape in shapes.items()
    }
    largest = max(passes, key=passes.__getitem__)
    terms = [
        Term(f"activations of {largest}", passes[largest], False, "the largest LM; one at a time")
    ]
    limit = config.encoder.max_source_tokens if reader else config.encoder.max_bytes
    units = batch * (job.source_len or limit)
    terms.append(Term("encoder", units * _unit_bytes(config, reader), False, "its activations"))
    if reader is not None and not job.cached_tokens:
        # Freed before the LMs start: only what exceeds their activations adds to the peak.
        # The states kept, those side by side, and what one layer's MLP holds without gradients.
        per_unit = (2 * _num_states(config) + 4) * reader.width + 3 * reader.inner
        states = units * per_unit * value
        extra = max(0.0, states - passes[largest])
        terms.append(Term("reader", extra, False, "its pass, above the LMs' activations"))
    elif reader is not None:
        cache = job.cached_tokens * _num_states(config) * reader.width * value
        terms.append(Term("reader cache", cache, True, f"{job.cached_tokens} tokens"))
    return terms


def _logits(shape: Shape, rows: int, value: int) -> float:
    """A chunk of logits, and the supervised rows of hidden states with their gradient."""
    chunk = rows_per_chunk(rows, shape.vocab, value) * shape.vocab
    return (chunk + 2 * rows * shape.width) * value


def _unit_bytes(config: Config, reader: Shape | None) -> float:
    """Per source unit: the input of the first layer, and about 20 values of each block's width."""
    encoder = config.encoder
    source = _num_states(config) * reader.width if reader else 0
    return 2 * (source + 20 * encoder.encoder_dim * (encoder.encoder_layers + 1))


# ------------------------------------------------------------------------------- the command


def fits(terms: Sequence[Term], job: Job) -> bool:
    """Whether a card holds it all."""
    return sum(term.bytes for term in terms) <= job.card_gib * GIB


def largest_micro_batch(config: Config, job: Job) -> int:
    """The largest power-of-two share of a batch per device that fits; 0 if not even one does."""
    size = config.optim.batch_size // placed(config, job).shares
    while size:
        optim = replace(config.optim, micro_batch_size=size)
        if fits(plan(replace(config, optim=optim), job), job):
            return size
        size //= 2
    return 0


def report(config: Config, job: Job) -> str:
    """The plan as text."""
    terms = plan(config, job)
    total = sum(term.bytes for term in terms) / GIB
    lines = [f"{micro_batch(config, job)} questions per pass on each of {job.gpus} GPUs", ""]
    for term in terms:
        known = "exact" if term.exact else "estimate"
        lines.append(f"{term.name:28} {term.bytes / GIB:8.2f} GiB  {known:8}  {term.note}")
    verdict = "fits" if fits(terms, job) else "does not fit"
    lines += ["", f"expected {total:.1f} GiB per rank of {job.card_gib:g} GiB: {verdict}"]
    if verdict != "fits":
        largest = largest_micro_batch(config, job)
        lines.append(f"--micro_batch_size {largest} would" if largest else NOTHING_FITS)
    return "\n".join(lines)


def plan_parser() -> Parser:
    """The flags of launch/plan.py."""
    parser = Parser(
        prog="plan",
        usage="plan [--preset NAME] [--gpus N] [--card_gib X] [--ds_config FILE] [--SETTING VALUE]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Say whether a training fits, without loading anything.\n\n"
            "  python launch/plan.py --preset 8b --gpus 2 --card_gib 80\n"
            "  lw-fast plan --lm.llama llama-3.1-8b --lm.qwen qwen2.5-7b --reader qwen"
        ),
        epilog="frozen LMs:\n  --lm.NAME SOURCE   model folder, nano:llama, nano:qwen, or one of\n"
        f"                     {', '.join(RANDOM_SHAPES)}",
    )
    parser.add_argument("--preset", default=DEFAULT_PRESET, metavar="NAME", help="as in training")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--card_gib", type=float, default=80.0, metavar="X", help="memory of a card (default: 80)"
    )
    parser.add_argument("--ds_config", type=Path, metavar="FILE", help="as in training")
    parser.add_argument(
        "--answer_len", type=int, default=0, metavar="N",
        help="tokens of an answer: the mean; with --layout padded the longest of a batch "
        "(default: max_answer_tokens)",
    )  # fmt: skip
    parser.add_argument(
        "--source_len", type=int, default=0, metavar="N",
        help="longest source of a batch (default: max_source_tokens or max_bytes)",
    )  # fmt: skip
    parser.add_argument(
        "--cached_tokens", type=int, default=0, metavar="N",
        help="source tokens whose reader states are kept (default: 0, no cache)",
    )  # fmt: skip
    add_settings(parser, ("data", "encoder", "adapter", "optim", "backbone", "placement"))
    return parser


def main(argv: Sequence[str]) -> None:
    """launch/plan.py: prints the plan."""
    argv, lms = split_lm_flags(argv)
    flags = vars(plan_parser().parse_args(argv))
    settings = {name: value for name, value in flags.items() if name in FIELDS}
    config = build_config(flags["preset"], settings, lms)
    stage, offload = _read_ds_config(flags["ds_config"])
    names = ("gpus", "card_gib", "answer_len", "source_len", "cached_tokens")
    job = Job(**{name: flags[name] for name in names}, zero_stage=stage, offload=offload)
    if job.gpus < 1:
        raise UserError(f"gpus must be at least 1, got {job.gpus}")
    print(report(config, job))


def _read_ds_config(path: Path | None) -> tuple[int, frozenset[str]]:
    """Stage and what is offloaded; the training checks the rest of the file."""
    if path is None:
        return 0, frozenset()
    try:
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        kinds = ("optimizer", "param")
        return int(zero["stage"]), frozenset(k for k in kinds if zero.get(f"offload_{k}"))
    except OSError as error:
        raise UserError(f"cannot read ds_config {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"ds_config {path} has no zero_optimization with a stage") from None
