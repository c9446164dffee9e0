"""Settings: frozen dataclasses that hold every default, grouped by the part that reads them.

Field names are unique over all groups, so one flat name is at once the command-line flag
(`--latent_len 16`), the preset key (`latent_len = 16`), the key in a run's `config.json` and the
axis of a sweep. The frozen LMs are the one exception: a table name -> source (`--lm.llama DIR`).
Presets (presets/*.toml) pick values; they never define settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from lw_fast.errors import UserError

DEFAULT_PRESET = "nano"


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the help text and the choices that `--help` shows."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which questions, and how much of each."""

    dataset: str = setting(
        "nano",
        "nano | squad | squad_v2 | hotpot, or SQuAD-layout .json/.json.gz files to train on, "
        "separated by commas",
    )
    eval_dataset: str = setting("", "the same for evaluation; empty: the data set's own split")
    samples: int = setting(0, "training questions, a seeded subset; 0 takes all")
    eval_samples: int = setting(0, "evaluation questions, a seeded subset; 0 takes all")
    data_seed: int = setting(42, "seed of the training subset")
    eval_seed: int = setting(12345, "seed of the evaluation subset and of sampled first tokens")
    max_answer_tokens: int = setting(32, "longer training answers are cut (and lose their EOS)")
    max_answer_chars: int = setting(
        0, "training questions with a longer first answer are left out; 0 keeps all"
    )
    channel_spans: int = setting(
        0, "random spans per training context that the LMs must repeat (trains the channel)"
    )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Source text -> Z [M, d_z]."""

    encoder_type: str = setting(
        "lm",
        "byte_seed: the original's; byte: from scratch; lm: states of a frozen reader LM",
        choices=("byte_seed", "byte", "lm"),
    )
    latent_len: int = setting(32, "M, the number of latent vectors")
    d_z: int = setting(256, "width of a latent vector")
    max_bytes: int = setting(2048, "longer sources are cut (context first), in UTF-8 bytes")
    max_source_tokens: int = setting(640, "the same for encoder_type=lm, in reader tokens")
    copy_slots: int = setting(
        -1, "latents that carry the units of the selected span; -1: min(12, 3M/4); 0: none"
    )
    span_head: bool = setting(True, "train an answer-span head (needed by copy slots)")
    span_weight: float = setting(1.0, "weight of the span loss")
    gold_span_until: float = setting(
        0.5, "share of training over which the gold span in the copy slots anneals to none"
    )
    encoder_dim: int = setting(512, "width inside the encoder")
    encoder_layers: int = setting(2, "self-attention blocks over the source")
    encoder_heads: int = setting(8, "attention heads inside the encoder")
    encoder_dropout: float = setting(0.1, "dropout inside the encoder")
    copy_bytes: int = setting(4, "bytes that one copy slot carries (encoder_type=byte)")
    reader: str = setting("", "encoder_type=lm: the name of the LM that reads, or a source")
    reader_layers: str = setting(
        "0,0.6,0.9", "hidden layers to read: 0 is the embedding, fractions count from the depth"
    )
    reader_cache: str = setting(
        "auto", "keep reader states on the device", choices=("auto", "on", "off")
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Z -> prefix embeddings, one adapter per LM."""

    adapter_type: str = setting(
        "mlp", "linear: the original's; mlp: a hidden layer beside it", choices=("linear", "mlp")
    )
    adapter_dim: int = setting(1024, "hidden width of the mlp adapter")
    adapter_bound: float = setting(0.0, "tanh bound of the raw prefix (original: 3); 0: none")
    adapter_freeze_scale: bool = setting(True, "do not train adapter.scale")
    calibration: str = setting(
        "per_slot",
        "how the prefix gets the LM's embedding RMS: per slot, per example (embed_rms), a fixed "
        "target (fixed), the mean of training (train_stats, for evaluation), or not at all",
        choices=("per_slot", "embed_rms", "fixed", "train_stats", "none"),
    )
    prefix_target_rms: float = setting(0.015, "target RMS of calibration=fixed")
    prefix_gain: float = setting(1.0, "factor on the calibrated prefix at decode time")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """What stands around the latents in the LM's input."""

    warm_anchor_text: str = setting("Answer:", "text between the latents and the answer")
    train_append_bos_after_prefix: str = setting(
        "no",
        "BOS between anchor and answer in training; auto: only without an anchor",
        choices=("auto", "yes", "no"),
    )
    compat: str = setting(
        "none",
        "repeat the original's targets, for ablations: its double shift alone, or all of its "
        "pairing (original: double shift, EOS never, BOS on one path only)",
        choices=("none", "double_shift", "original"),
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised; the span loss belongs to the encoder's settings."""

    first_token_ce_weight: float = setting(0.0, "extra weight of the first answer token's CE")
    first_token_ce_schedule: str = setting(
        "constant",
        "that weight over the run: constant, or falling to 0 along a line",
        choices=("constant", "linear"),
    )
    supervise_first_k: int = setting(
        0, "train on the first K answer tokens only; 0: all of them, and EOS"
    )
    lms_per_step: str = setting(
        "all",
        "every step trains through all LMs, or through one that is drawn (seeded)",
        choices=("all", "one"),
    )
    kl_weight: float = setting(
        0.0,
        "pull of every answer row towards the same LM behind the full text, KL(text || latent)",
    )
    kl_temperature: float = setting(1.0, "temperature of both sides of that KL")
    kl_top_k: int = setting(64, "tokens kept of each row behind the text")
    teacher_cache: str = setting(
        "auto",
        "keep those rows on the device, read once before training; off: read them in every step",
        choices=("auto", "on", "off"),
    )
    scale_l2: float = setting(0.0, "pull of adapter.scale towards 1")
    adapter_rms_l2: float = setting(0.0, "pull of the raw prefix RMS towards the LM's")
    align_weight: float = setting(
        1.0, "encoder_type=lm: pull of copy slots towards the LM's embedding of the same token"
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and batch."""

    epochs: int = setting(4, "passes over the training questions")
    batch_size: int = setting(64, "questions per optimiser step, over all devices")
    micro_batch_size: int = setting(0, "questions per device and pass; 0: no accumulation")
    lr: float = setting(5e-4, "peak learning rate of the encoder")
    adapter_lr: float = setting(1e-3, "peak learning rate of the adapters; 0: the same as lr")
    schedule: str = setting("cosine", "after the warm-up", choices=("cosine", "constant"))
    warmup_steps: int = setting(100, "steps of linear warm-up")
    min_lr_ratio: float = setting(0.05, "final learning rate over the peak (cosine)")
    weight_decay: float = setting(0.01, "AdamW weight decay, on matrices only")
    beta1: float = setting(0.9, "AdamW beta 1")
    beta2: float = setting(0.95, "AdamW beta 2")
    max_grad_norm: float = setting(1.0, "gradient clipping; 0: none")
    seed: int = setting(42, "seed of weights, data order and dropout")
    precision: str = setting(
        "auto",
        "trainable part: bf16 autocast over fp32 weights, or fp32; auto: bf16 on GPUs",
        choices=("auto", "bf16", "fp32"),
    )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """How the frozen LMs are loaded."""

    backbone_dtype: str = setting(
        "auto",
        "auto: bf16 on GPUs, fp32 on CPUs; fp8: the layers' matmuls in e4m3 (Hopper or newer)",
        choices=("auto", "bf16", "fp32", "fp8", "nf4", "int8"),
    )
    attn_implementation: str = setting(
        "auto",
        "auto: flash_attention_2 where installed on a GPU, else sdpa",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    layout: str = setting(
        "auto",
        "answers of a training batch: packed end to end without padding (auto: on GPUs), or padded",
        choices=("auto", "packed", "padded"),
    )
    compile: str = setting(
        "auto",
        "compile the LMs' layers for training (auto: on GPUs, with layout packed)",
        choices=("auto", "yes", "no"),
    )
    grad_ckpt: bool = setting(
        False, "recompute the LMs' layers in the backward pass: less memory, a third more time"
    )
    kernels: str = setting(
        "auto",
        "fused operations: Triton on GPUs, PyTorch elsewhere (auto), or one of them",
        choices=("auto", "torch", "triton"),
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with a model")


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Where the frozen LMs lie when several processes train."""

    lm_parallel: bool = setting(
        False, "one LM per process, several processes on the same questions; else data parallel"
    )
    shard_lms: str = setting(
        "auto",
        "cut the layers of the frozen LMs among the processes (ZeRO-3); auto: with a ds_config of "
        "stage 3 and several processes",
        choices=("auto", "yes", "no"),
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How answers are generated and scored."""

    kinds: str = setting(
        "text,latent,token_budget,no_context,shuffled",
        "prompt kinds to evaluate: text, text_tuned (behind a soft prompt that is tuned first, and "
        "kept), latent, token_budget, span_text, no_context, shuffled",
    )
    text_tuned_steps: int = setting(
        0, "optimiser steps of text_tuned's soft prompt; 0: as many as the latent run has"
    )
    text_tuned_lr: float = setting(
        0.05, "peak learning rate of that prompt, in units of the LM's embedding RMS"
    )
    protocol: str = setting(
        "clean",
        "clean: no EOS ban; seed: min_new_tokens and eos_ban_steps apply; or both, as clean,seed",
    )
    max_new_tokens: int = setting(24, "longest generated answer")
    chunk_size: int = setting(
        64,
        "questions per evaluation batch, as text prompts of 256 tokens; more if they are shorter",
    )
    min_new_tokens: int = setting(3, "protocol=seed: EOS is banned before this many tokens")
    eos_ban_steps: int = setting(6, "protocol=seed: EOS is banned for this many steps")
    latent_anchor_mode: str = setting(
        "auto",
        "between latents and answer at decode time: the anchor of training (auto), a text, the "
        "chat template's assistant header, or nothing",
        choices=("auto", "text", "chat", "none"),
    )
    latent_anchor_text: str = setting(
        "", "latent_anchor_mode=text: the text; empty: the anchor of training"
    )
    append_bos_after_prefix: str = setting(
        "train",
        "BOS behind that anchor at decode time: as in training, only without an anchor (auto), "
        "yes or no",
        choices=("train", "auto", "yes", "no"),
    )
    first_token_top_p: float = setting(1.0, "nucleus of a sampled first token (latent kinds)")
    first_token_temperature: float = setting(
        0.0, "temperature of the first token (latent kinds); 0: greedy"
    )
    text_format: str = setting(
        "plain",
        "text prompts: plain, or in the LM's chat template with the original's system prompt",
        choices=("plain", "chat"),
    )
    token_budget_k: int = setting(0, "tokens kept of the text in token_budget; 0: latent_len")
    token_budget_mode: str = setting(
        "content_only",
        "token_budget keeps the first tokens of the text, or of the whole chat prompt (chat_full)",
        choices=("content_only", "chat_full"),
    )
    debug_print_first: int = setting(3, "latent answers shown and kept for the eye")
    debug_topk: int = setting(5, "first-step candidates kept for those questions; 0: none")
    fresh_eval: bool = setting(
        True,
        "encode the questions anew; false: keep Z beside the evaluation, and reuse it while "
        "checkpoint, encoder settings and questions are the same",
    )
    sequential_eval: bool = setting(
        False, "each LM is on the device only while it is used (not with nf4 or int8)"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Logging, saving and evaluating during a run."""

    log_every: int = setting(10, "steps between rows of log.jsonl")
    eval_every: int = setting(0, "epochs between evaluations; 0: only after the last")
    smoke_samples: int = setting(
        0, "questions of the evaluations before the last; 0: eval_samples as for the last"
    )
    save_every: int = setting(0, "steps between extra checkpoints; 0: only after an epoch")
    keep_last: int = setting(0, "checkpoints kept (the newest ones); 0 keeps all")
    keep_best: bool = setting(
        True,
        "with keep_last: the checkpoint with the best evaluation (F1 of latent prompts, mean over "
        "the LMs) stays as well",
    )
    profile: int = setting(
        0, "steps to profile after the first five: trace and table in RUN_DIR/profile; 0: none"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. Groups are read by the modules of the same name."""

    lm: Mapping[str, str] = field(default_factory=dict)
    """Frozen LMs: name -> hub name, folder, .gguf file or random:NAME[@TOKENIZER]."""
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_copy_slots(self) -> int:
        """Copy slots after resolving -1 (the default rule) and a missing span head."""
        if not self.encoder.span_head or self.encoder.encoder_type == "byte_seed":
            return 0
        m = self.encoder.latent_len
        return min(12, 3 * m // 4) if self.encoder.copy_slots < 0 else self.encoder.copy_slots

    @property
    def micro_batch(self) -> int:
        """Questions per device and pass as asked for (before dividing by the world size)."""
        return self.optim.micro_batch_size or self.optim.batch_size


GROUPS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)
}
"""Group name -> dataclass, in the order of `Config`."""

FIELDS: dict[str, tuple[str, dataclasses.Field]] = {
    f.name: (group, f) for group, kind in GROUPS.items() for f in dataclasses.fields(kind)
}
"""Flat setting name -> (group, field)."""

# A resumed run may change these: they do not alter what a training step computes.
RESUMABLE_CHANGES = frozenset(
    {"epochs", "eval_dataset", "eval_samples", "eval_seed"}
    | {
        f.name
        for kind in (EvalConfig, PlacementConfig, RunConfig)
        for f in dataclasses.fields(kind)
    }
)

_POSITIVE = (
    "latent_len d_z max_bytes max_source_tokens encoder_dim encoder_layers encoder_heads "
    "copy_bytes adapter_dim epochs batch_size max_answer_tokens max_new_tokens chunk_size "
    "log_every kl_temperature kl_top_k text_tuned_lr"
).split()
_NOT_NEGATIVE = (
    "samples eval_samples max_answer_chars channel_spans span_weight gold_span_until "
    "adapter_bound prefix_target_rms prefix_gain first_token_ce_weight align_weight scale_l2 "
    "adapter_rms_l2 micro_batch_size lr adapter_lr warmup_steps min_lr_ratio weight_decay "
    "max_grad_norm min_new_tokens eos_ban_steps token_budget_k eval_every save_every keep_last "
    "smoke_samples profile supervise_first_k kl_weight first_token_temperature "
    "debug_print_first debug_topk text_tuned_steps"
).split()
_BELOW_ONE = ("encoder_dropout", "beta1", "beta2")
_NOT_LM_NAMES = ("loss", "span", "align", "counts", "encoder")
"""What else is summed or logged beside the LMs' statistics in a training step."""


def _validate(config: Config) -> None:
    values = to_flat(config)
    for name in _POSITIVE:
        if not values[name] > 0:
            raise UserError(f"{name} must be greater than 0, got {values[name]}")
    for name in _NOT_NEGATIVE:
        if not values[name] >= 0:
            raise UserError(f"{name} must not be negative, got {values[name]}")
    for name in _BELOW_ONE:
        if not 0 <= values[name] < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {values[name]}")
    for name, (_, spec) in FIELDS.items():
        choices = spec.metadata["choices"]
        if choices and values[name] not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}; got {values[name]!r}")
    if config.num_copy_slots > config.encoder.latent_len:
        raise UserError(
            f"copy_slots ({config.num_copy_slots}) must not exceed latent_len "
            f"({config.encoder.latent_len})"
        )
    if config.encoder.copy_slots > 0 and config.num_copy_slots == 0:
        raise UserError("copy_slots needs span_head=true and encoder_type byte or lm")
    if not 0 < config.eval.first_token_top_p <= 1:
        raise UserError(
            f"first_token_top_p must be above 0 and at most 1, got {config.eval.first_token_top_p}"
        )
    if config.eval.first_token_top_p < 1 and config.eval.first_token_temperature == 0:
        raise UserError(
            "first_token_top_p below 1 needs first_token_temperature above 0: temperature 0 is "
            "greedy, whatever the nucleus"
        )
    if "seed" in config.eval.protocol and config.eval.min_new_tokens > config.eval.max_new_tokens:
        raise UserError(
            f"min_new_tokens ({config.eval.min_new_tokens}) must not exceed max_new_tokens "
            f"({config.eval.max_new_tokens})"
        )
    if config.eval.latent_anchor_text and config.eval.latent_anchor_mode != "text":
        raise UserError("latent_anchor_text needs latent_anchor_mode=text")
    if config.eval.latent_anchor_mode == "text" and not (
        config.eval.latent_anchor_text or config.sequence.warm_anchor_text
    ):
        raise UserError(
            "latent_anchor_mode=text needs latent_anchor_text: there is no warm_anchor_text"
        )
    _validate_compat(config)
    if config.loss.kl_weight and config.data.channel_spans:
        raise UserError("kl_weight needs channel_spans=0: no text prompt asks to repeat a span")
    if config.backbone.layout == "packed" and config.backbone.attn_implementation == "eager":
        raise UserError("layout=packed needs attn_implementation other than eager")
    if config.backbone.layout == "padded" and config.backbone.compile == "yes":
        raise UserError("compile=yes needs layout=packed: padded batches change shape")
    if config.eval.sequential_eval and config.backbone.backbone_dtype in ("nf4", "int8"):
        raise UserError(
            f"sequential_eval cannot move LMs with backbone_dtype={config.backbone.backbone_dtype}"
        )
    if config.encoder.encoder_dim % config.encoder.encoder_heads:
        raise UserError("encoder_dim must be a multiple of encoder_heads")
    if config.encoder.encoder_type == "byte_seed" and config.encoder.d_z % 8:
        raise UserError("d_z must be a multiple of 8 with encoder_type=byte_seed (its 8 heads)")
    for name in config.lm:
        if not name.isidentifier() or name in _NOT_LM_NAMES:
            raise UserError(f"lm.{name}: an LM cannot have this name; use letters and digits")


def _validate_compat(config: Config) -> None:
    compat, loss = config.sequence.compat, config.loss
    if compat == "double_shift" and loss.first_token_ce_weight:
        raise UserError(
            "compat=double_shift never asks for the first answer token: first_token_ce_weight "
            "must be 0 (compat=original asks for it on a path of its own)"
        )
    if compat == "original" and loss.supervise_first_k:
        raise UserError("compat=original chooses its targets itself: supervise_first_k must be 0")
    if compat == "original" and config.data.max_answer_tokens < 2:
        raise UserError("compat=original counts BOS among max_answer_tokens: it must be at least 2")
    if compat != "none" and loss.kl_weight:
        raise UserError(f"compat={compat} needs kl_weight=0: the text predicts the next token")


def to_flat(config: Config) -> dict[str, Any]:
    """All settings under their flat names (the LM table is not among them)."""
    return {name: getattr(getattr(config, group), name) for name, (group, _) in FIELDS.items()}


def from_flat(values: Mapping[str, Any], lm: Mapping[str, str]) -> Config:
    """Builds a Config from flat names; absent ones keep their defaults. Unknown names raise."""
    grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        if name not in FIELDS:
            raise UserError(f"unknown setting {name!r}{_did_you_mean(name, FIELDS)}")
        group, spec = FIELDS[name]
        grouped[group][name] = _coerce(name, value, type(spec.default))
    return Config(lm=dict(lm), **{g: GROUPS[g](**kwargs) for g, kwargs in grouped.items()})


def _coerce(name: str, value: Any, kind: type) -> Any:
    """Accepts what TOML, JSON and the command line deliver; raises on anything else."""
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    # int(8.5) would be 8, and str() takes anything.
    lossy = isinstance(value, float) and kind is int
    if isinstance(value, bool) != (kind is bool) or lossy or not isinstance(value, _SCALARS):
        raise UserError(f"{name} must be a {kind.__name__}, got {value!r}")
    try:
        result = kind(value)
    except ValueError:
        raise UserError(f"{name} must be a {kind.__name__}, got {value!r}") from None
    if kind is float and math.isinf(result):
        raise UserError(f"{name} must be finite, got {value}")
    return result


_SCALARS = (bool, int, float, str)


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def preset_names() -> list[str]:
    """The names of the shipped presets."""
    folder = resources.files("lw_fast") / "presets"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith("toml"))


def load_preset(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Flat settings and the LM table of a shipped preset or of a .toml file."""
    values = _read_preset(name)
    values.pop("guardrails", None)
    lms = values.pop("lm", {})
    if not isinstance(lms, dict) or not all(isinstance(source, str) for source in lms.values()):
        raise UserError(f"preset {name}: lm must be a table of names and sources")
    return values, lms


def load_guardrails(name: str) -> dict[str, Any]:
    """The [guardrails] table of a preset (guardrails.py), empty if it has none."""
    table = _read_preset(name).get("guardrails", {})
    if not isinstance(table, dict):
        raise UserError(f"preset {name}: guardrails must be a table")
    return table


def _read_preset(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else None
    if path is None and name not in preset_names():
        raise UserError(f"unknown preset {name!r}; there are {', '.join(preset_names())}")
    try:
        text = (
            path.read_text()
            if path
            else (resources.files("lw_fast") / "presets" / f"{name}.toml").read_text()
        )
        return tomllib.loads(text)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"preset {name}: {error}") from None


def build_config(
    preset: str = DEFAULT_PRESET,
    overrides: Mapping[str, Any] | None = None,
    lm: Mapping[str, str] | None = None,
) -> Config:
    """A preset with some settings changed. `lm` entries replace the preset's table when they name
    other LMs, and its entries when they name the same ones."""
    values, lms = load_preset(preset)
    if lm:
        lms = {**lms, **lm} if set(lm) <= set(lms) else dict(lm)
    return from_flat({**values, **(overrides or {})}, lms)


def to_dict(config: Config) -> dict[str, Any]:
    """What config.json holds: the flat settings plus the LM table under `lm`."""
    return {"lm": dict(config.lm), **to_flat(config)}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`."""
    values = dict(values)
    return from_flat(values, values.pop("lm", {}))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by flat name: (old value, new value)."""
    a, b = to_dict(old), to_dict(new)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def config_hash(config: Config) -> str:
    """12 hex digits that identify the settings, whatever order they were given in."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
