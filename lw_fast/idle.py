"""Settings that have no effect under the others: a table, and a warning for those asked for.

What cannot be meant is an error (config.py); what is merely idle is said in one line, so that
nobody compares two runs that differ in nothing. Only what was asked for is reported: presets may
hold settings of parts that a flag switched off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from lw_fast.config import Config

logger = logging.getLogger(__name__)

_LATENT_KINDS = {"latent", "shuffled"}


def _words(text: str) -> set[str]:
    return {word.strip() for word in text.split(",")}


def _encoder(c: Config) -> str:
    return f"encoder_type is {c.encoder.encoder_type}"


IDLE: tuple[tuple[str, Callable[[Config], bool], Callable[[Config], str] | str], ...] = (
    ("max_bytes", lambda c: c.encoder.encoder_type == "lm", _encoder),
    (
        "max_source_tokens reader reader_layers reader_cache align_weight",
        lambda c: c.encoder.encoder_type != "lm",
        _encoder,
    ),
    (
        "encoder_dim encoder_layers encoder_heads span_head span_weight gold_span_until",
        lambda c: c.encoder.encoder_type == "byte_seed",
        _encoder,
    ),
    ("copy_bytes", lambda c: c.encoder.encoder_type != "byte", _encoder),
    ("span_weight", lambda c: not c.encoder.span_head, "span_head is false"),
    ("gold_span_until copy_bytes align_weight", lambda c: not c.num_copy_slots, "no copy slots"),
    ("adapter_dim", lambda c: c.adapter.adapter_type == "linear", "adapter_type is linear"),
    (
        "prefix_target_rms",
        lambda c: c.adapter.calibration != "fixed",
        lambda c: f"calibration is {c.adapter.calibration}",
    ),
    ("scale_l2", lambda c: c.adapter.adapter_freeze_scale, "adapter_freeze_scale is true"),
    (
        "first_token_ce_schedule",
        lambda c: not c.loss.first_token_ce_weight,
        "first_token_ce_weight is 0",
    ),
    (
        "kl_temperature kl_top_k teacher_cache",
        lambda c: not c.loss.kl_weight,
        "kl_weight is 0",
    ),
    ("lms_per_step", lambda c: len(c.lm) < 2, "there is one LM"),
    ("min_lr_ratio", lambda c: c.optim.schedule == "constant", "schedule is constant"),
    ("smoke_samples", lambda c: not c.run.eval_every, "eval_every is 0"),
    (
        "smoke_samples",
        lambda c: 0 < c.data.eval_samples <= c.run.smoke_samples,
        "eval_samples is no larger",
    ),
    ("keep_best", lambda c: not c.run.keep_last, "keep_last is 0"),
    (
        "text_tuned_steps text_tuned_lr",
        lambda c: "text_tuned" not in _words(c.eval.kinds),
        "kinds has no text_tuned",
    ),
    (
        "token_budget_k token_budget_mode",
        lambda c: "token_budget" not in _words(c.eval.kinds),
        "kinds has no token_budget",
    ),
    (
        "text_format",
        lambda c: _words(c.eval.kinds) <= _LATENT_KINDS,
        "kinds has no text",
    ),
    (
        "prefix_gain latent_anchor_mode latent_anchor_text append_bos_after_prefix "
        "first_token_top_p first_token_temperature debug_print_first debug_topk",
        lambda c: not _words(c.eval.kinds) & _LATENT_KINDS,
        "kinds has no latent",
    ),
    (
        "min_new_tokens eos_ban_steps",
        lambda c: "seed" not in _words(c.eval.protocol),
        "protocol has no seed",
    ),
    ("debug_topk", lambda c: not c.eval.debug_print_first, "debug_print_first is 0"),
)
"""(settings, when they are idle, why)."""


def idle(config: Config, asked: Iterable[str]) -> list[str]:
    """One line for each setting of `asked` that changes nothing under `config`."""
    asked, lines = set(asked), {}
    for names, is_idle, reason in IDLE:
        for name in names.split():
            if name in asked and is_idle(config):
                why = reason if isinstance(reason, str) else reason(config)
                lines.setdefault(name, f"{name} has no effect: {why}")
    return list(lines.values())


def warn_idle(config: Config, asked: Iterable[str]) -> None:
    """Logs those lines, once however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        for line in idle(config, asked):
            logger.warning(line)
