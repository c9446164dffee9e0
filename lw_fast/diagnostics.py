"""When the scores are bad: is Z alive, is the prefix loud enough, what comes first?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lw_fast.adapter import rms
from lw_fast.data import Example
from lw_fast.frozen_lm import FrozenLM
from lw_fast.model import LatentModel
from lw_fast.prompts import KINDS, Latents, decode_frame, make_prompts
from lw_fast.scoring import ANSWER_ALARM

COLLAPSE_ALARM = 0.95
"""Mean pairwise cosine of Z above which the latents say nothing about their source."""
COSINE_EXAMPLES = 256


@torch.no_grad()
def diagnose(model: LatentModel, latents: Latents) -> dict[str, Any]:
    """Spread of Z and, per LM, the loudness of its prefix before and after calibration."""
    z_NMZ = latents.z_NMZ[:COSINE_EXAMPLES]
    per_lm = {}
    for name, lm in model.lms_here.items():
        adapter = model.bridge.adapters[name]
        prefix_BMD = model.bridge.prefix(name, z_NMZ, model.config.adapter.prefix_gain)
        with model.bridge.precision(z_NMZ.device):
            raw_BMD = adapter(z_NMZ)
        per_lm[name] = {
            "prefix_std": prefix_BMD.std().item(),
            "embed_rms": lm.embed_rms,
            "adapter_scale": adapter.scale.item(),
            "raw_rms": rms(raw_BMD, (-2, -1)).mean().item(),
        }
    return {"z_std": z_NMZ.std().item(), **_pairwise_cosine(z_NMZ), "prefix": per_lm}


def _pairwise_cosine(z_NMZ: Tensor) -> dict[str, Any]:
    flat = torch.nn.functional.normalize(z_NMZ.flatten(1), dim=1)
    num = len(flat)
    if num < 2:
        return {}
    cosine = float(((flat @ flat.T).sum() - num) / (num * (num - 1)))
    return {"z_cosine": cosine, "z_collapsed": cosine > COLLAPSE_ALARM}


def alarms(metrics: Mapping[str, Any]) -> list[str]:
    """One line per sign of collapse in the metrics of an evaluation (`z_collapsed` and
    `answers_collapsed` there)."""
    lines = []
    diagnostics = metrics["diagnostics"]
    if diagnostics.get("z_collapsed"):
        lines.append(
            f"the latents of different questions are alike: mean cosine "
            f"{diagnostics['z_cosine']:.3f} > {COLLAPSE_ALARM}"
        )
    for prefix, table in (("", metrics), ("seed_", metrics.get("seed", {}))):
        lines += [
            f"{prefix}{kind} {lm}: one wrong answer to more than {ANSWER_ALARM:.0%} of questions"
            for kind in KINDS
            for lm, scores in table.get(kind, {}).items()
            if scores["answers_collapsed"]
        ]
    return lines


def peeks(
    model: LatentModel,
    examples: Sequence[Example],
    latents: Latents,
    predictions: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The first latent answers per LM, for the eye, and what the LM's first step weighed."""
    num, k = model.config.eval.debug_print_first, model.config.eval.debug_topk
    golds = [example.answers[0] if example.answers else "" for example in examples[:num]]
    return {
        name: {
            "first_generations": [
                {"gold": gold, "answer": answer}
                for gold, answer in zip(golds, predictions[name], strict=False)
            ],
            "first_step": first_steps(model, lm, examples[:num], latents, k) if k else [],
        }
        for name, lm in model.lms_here.items()
    }


@torch.no_grad()
def first_steps(
    model: LatentModel, lm: FrozenLM, examples: Sequence[Example], latents: Latents, k: int
) -> list[list[dict[str, Any]]]:
    """The k likeliest first tokens behind each example's latents, with their probabilities."""
    if not examples:
        return []
    with model.using(lm):
        return _first_steps(model, lm, examples, latents, k)


def _first_steps(
    model: LatentModel, lm: FrozenLM, examples: Sequence[Example], latents: Latents, k: int
) -> list[list[dict[str, Any]]]:
    frame = decode_frame("latent", lm.tokenizer, model.config)
    prompts = make_prompts(
        "latent", lm, frame, examples, latents, model.bridge,
        gain=model.config.adapter.prefix_gain, token_budget_k=0,
    )  # fmt: skip
    embeds_BSD = torch.stack(prompts.embeds(range(len(examples))))
    probs_BV = lm.logits(lm.hidden(embeds_BSD)[:, -1]).float().softmax(-1)
    top = probs_BV.topk(min(k, probs_BV.shape[1]))
    return [
        [
            {"token": lm.tokenizer.decode([token]), "p": p}
            for token, p in zip(ids, probs, strict=True)
        ]
        for ids, probs in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
