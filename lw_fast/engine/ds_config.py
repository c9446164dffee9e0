"""Reads a DeepSpeed config and refuses, key by key, what is not DeepSpeed's to decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lw_fast.errors import UserError

_ALLOWED = frozenset(
    "zero_optimization communication_data_type comms_logger flops_profiler memory_breakdown "
    "steps_per_print wall_clock_breakdown".split()
)

_PRECISION = "the trainer; set it with --precision"
_SUMMED = "the trainer, which sums gradients over micro-batches and ranks; there is no flag"
_CURVES = "the trainer, which writes log.jsonl and tensorboard/ into --run_dir"
_OWNED = {
    "train_batch_size": "the trainer; set it with --batch_size",
    "train_micro_batch_size_per_gpu": "the trainer; set it with --micro_batch_size",
    "gradient_accumulation_steps": (
        "the trainer; it follows from --batch_size and --micro_batch_size"
    ),
    "gradient_clipping": "the trainer; set it with --max_grad_norm",
    "optimizer": (
        "the trainer (AdamW); set it with --lr, --adapter_lr, --weight_decay, --beta1, --beta2"
    ),
    "scheduler": "the trainer; set it with --schedule, --warmup_steps, --min_lr_ratio",
    **dict.fromkeys(
        ("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), _PRECISION
    ),
    **dict.fromkeys(
        "managed_gradient_accumulation gradient_allreduce_op prescale_gradients "
        "gradient_predivide_factor".split(),
        _SUMMED,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _CURVES),
    "checkpoint": "the trainer; set it with --save_every and --keep_last",
    "zero_allow_untested_optimizer": "the trainer, whose AdamW is tested; there is no flag",
    "zero_force_ds_cpu_optimizer": "the trainer, whose AdamW is torch's; there is no flag",
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed config that holds only what DeepSpeed owns (see ds_configs/README.md).

    Call it after `init_world`, which tells deepspeed the device before its first import.

    Raises:
        UserError: Not readable, not JSON, or a key that is unknown, owned by the trainer or in
            contradiction with another; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read ds_config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"ds_config {path} must hold a JSON object, got {type(values).__name__}")
    for problem in _problems(values):
        raise UserError(f"ds_config {path}: {problem}")
    return values


def _problems(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a ds_config, worst first."""
    for key in values:
        if key in _OWNED:
            yield f"{key} belongs to {_OWNED[key]}"
        elif key not in _ALLOWED:
            yield f"unknown key {key}; there are {', '.join(sorted(_ALLOWED))}"
    if auto := _find_auto(values):
        yield f'{auto} is "auto", which only the Hugging Face Trainer fills in; give a value'
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        yield "zero_optimization must be an object with a stage; without it leave --ds_config out"
    elif isinstance(zero.get("stage"), bool) or zero.get("stage") not in (1, 2, 3):
        yield (
            f"zero_optimization.stage must be 1, 2 or 3, got {zero.get('stage')!r}; for no ZeRO "
            "leave --ds_config out"
        )
    else:
        yield from _zero_problems(zero)


def _find_auto(values: Any, name: str = "") -> str:
    """The dotted name of the first value "auto", or an empty string."""
    if isinstance(values, dict):
        found = (_find_auto(v, f"{name}.{k}".lstrip(".")) for k, v in values.items())
        return next(filter(None, found), "")
    return name if values == "auto" else ""


_STAGE_3_ONLY = frozenset(
    "offload_param sub_group_size zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_nontrainable_weights memory_efficient_linear leaf_module".split()
)
_REFUSED = {
    "zenflow": "changes the optimizer, which belongs to the trainer",
    "cpu_offload": "is an old name; write offload_optimizer",
    "cpu_offload_params": "is an old name; write offload_param",
    "legacy_stage1": "is no longer supported by DeepSpeed",
}


def _zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    for key in zero:
        if key in _REFUSED:
            yield f"zero_optimization.{key} {_REFUSED[key]}"
        if zero["stage"] < 3 and (key in _STAGE_3_ONLY or key.startswith("stage3_")):
            yield f"zero_optimization.{key} needs stage 3, but stage is {zero['stage']}"
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm must stay true: the norm is clipped and logged"
    for key in ("offload_optimizer", "offload_param"):
        target = zero.get(key) or {}
        if isinstance(target, dict) and target.get("device") == "nvme":
            yield f"zero_optimization.{key}.device nvme needs a compiled DeepSpeed op; use cpu"
    yield from _deepspeed_problems(zero)


def _deepspeed_problems(zero: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed itself says about the keys and values of zero_optimization."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        yield f"{name}: {reason}"
