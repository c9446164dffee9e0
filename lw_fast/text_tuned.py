"""The fair rival of a trained latent: the full text behind a soft prompt that was tuned as long.

Per LM, M = latent_len static vectors stand in front of the text prompt,

    [BOS] [P_1 .. P_M] [text] [anchor] [answer]

and learn the cross-entropy of the training answers, over the same batches, as many optimiser steps
and the same schedule as the latent run. They start as the words of an instruction, in the LM's own
embeddings. A tuned prompt is kept in the cache folder under a key of everything that decides it
and is tuned once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lw_fast.batches import Order, to_device
from lw_fast.chat import SYSTEM
from lw_fast.config import Config, OptimConfig
from lw_fast.data import Example
from lw_fast.errors import UserError
from lw_fast.forcing import batches_by_length, forced_rows
from lw_fast.frozen_lm import FrozenLM
from lw_fast.lm_sources import cache_dir
from lw_fast.model import LatentModel, training_examples
from lw_fast.optim import lr_factor
from lw_fast.prompts import decode_frame, text_prompt, text_prompts
from lw_fast.sequence import Frame, tokenize_answers

POSITIONS = 8192
"""Positions per forward and backward pass, padding included (a batch has as many passes as it
needs): about 40 GiB of activations with an LM of 8B parameters."""
LAST_STEPS = 20
"""Steps over which the training loss that is reported is averaged."""
FORMAT = 1
"""Changes with anything in this file that changes a result."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedPrompt:
    """A soft prompt and what it took."""

    prompt_MD: Tensor
    """fp32, on the LM's device."""
    steps: int
    seconds: float
    """Of tuning, also where it was read from the cache."""
    nll_token: float
    """Mean over the last training batches, EOS included."""


def tuned_prompts(model: LatentModel) -> dict[str, TunedPrompt]:
    """The soft prompt of every LM: from the cache, else tuned now and kept there."""
    examples = [e for e in training_examples(model.config)[0] if e.question]
    tuned = {}
    for name, lm in model.lms_here.items():
        with model.using(lm):
            tuned[name] = _tuned_prompt(lm, examples, model.config)
    return tuned


def _tuned_prompt(lm: FrozenLM, examples: Sequence[Example], config: Config) -> TunedPrompt:
    facts = key_facts(lm, examples, config)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "text_tuned" / f"{lm.name}-{key[:16]}.safetensors"
    tuned = _load(path, key, lm)
    if tuned is None:
        tuned = tune(lm, examples, config)
        _save(path, key, tuned)
    return tuned


def key_facts(lm: FrozenLM, examples: Sequence[Example], config: Config) -> dict[str, Any]:
    """Everything that decides a tuned prompt, as JSON values."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.context, example.question, example.answers[0]]).encode())
    optim = dataclasses.asdict(_schedule(config, _num_steps(examples, config)))
    return {
        "format": FORMAT,
        "source": lm.source,
        "weights": [lm.d_model, lm.vocab_size, f"{lm.embed_rms:.5g}", str(lm.dtype)],
        "backbone_dtype": config.backbone.backbone_dtype,
        "frame": dataclasses.asdict(decode_frame("text_tuned", lm.tokenizer, config)),
        "start": start_ids(lm, config.encoder.latent_len),
        "steps": _num_steps(examples, config),
        "lr": config.eval.text_tuned_lr,
        "max_answer_tokens": config.data.max_answer_tokens,
        "examples": digest.hexdigest(),
        "optim": {name: optim[name] for name in _OPTIM_FACTS},
    }


_OPTIM_FACTS = ("batch_size", "schedule", "warmup_steps", "min_lr_ratio", "beta1", "beta2", "seed")


def start_ids(lm: FrozenLM, num: int) -> list[int]:
    """`num` token ids of an instruction, repeated as often as it takes."""
    ids = lm.tokenizer(SYSTEM, add_special_tokens=False).input_ids
    return list(itertools.islice(itertools.cycle(ids), num))


def tune(lm: FrozenLM, examples: Sequence[Example], config: Config) -> TunedPrompt:
    """Tunes a soft prompt in front of the text prompts of `examples`.

    Raises:
        UserError: there are fewer examples than a batch, or the loss is not finite.
    """
    frame = decode_frame("text_tuned", lm.tokenizer, config)
    order = Order(len(examples), config.optim.batch_size, config.optim.seed)
    if not order.steps_per_epoch:
        raise UserError(f"text_tuned: {len(examples)} training questions do not fill a batch")
    steps = _num_steps(examples, config)
    schedule = _schedule(config, steps)
    logger.info("text_tuned: %d steps for %s", steps, lm.name)
    started = time.perf_counter()
    ids = torch.tensor(start_ids(lm, config.encoder.latent_len), device=lm.device)
    prompt_MD = lm.embed(ids).float().clone().requires_grad_()
    # In units of the LM's embeddings, so that one learning rate suits every LM.
    peak = config.eval.text_tuned_lr * lm.embed_rms
    betas = (schedule.beta1, schedule.beta2)
    optimizer = torch.optim.Adam([prompt_MD], lr=peak, betas=betas)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * lr_factor(step, steps, schedule)
        batch = [examples[i] for i in order.step(step)]
        losses.append(_backward(lm, frame, batch, prompt_MD, config.data.max_answer_tokens))
        optimizer.step()
        optimizer.zero_grad()
    nll_token = float(torch.stack(losses[-LAST_STEPS:]).mean())
    if not (math.isfinite(nll_token) and bool(prompt_MD.isfinite().all())):
        raise UserError(f"text_tuned: the loss of {lm.name} is not finite; lower text_tuned_lr")
    seconds = time.perf_counter() - started
    logger.info("text_tuned: %s took %.0f s, NLL/token %.3f", lm.name, seconds, nll_token)
    return TunedPrompt(prompt_MD.detach(), steps, seconds, nll_token)


@torch.enable_grad()
def _backward(
    lm: FrozenLM, frame: Frame, batch: Sequence[Example], prompt_MD: Tensor, max_tokens: int
) -> Tensor:
    """Adds the gradient of the batch's NLL per answer token (and EOS); returns that NLL, 0-d."""
    texts = [text_prompt(example.context, example.question) for example in batch]
    prompts = text_prompts(lm, frame, texts, soft_MD=prompt_MD)
    answers, complete_B = tokenize_answers(
        lm.tokenizer, frame.anchor_text, [e.answers[0] for e in batch], max_tokens, chat=frame.chat
    )
    length_B = np.array([len(tokens) for tokens in answers])
    num_rows = int(length_B.sum() + complete_B.sum())
    total = prompt_MD.new_zeros(())
    for part in batches_by_length(prompts.lengths + length_B, POSITIONS):
        hidden_ND, rows = forced_rows(
            lm, prompts.embeds(part), [answers[i] for i in part], complete_B[part], frame.eos
        )
        nll = lm.score(hidden_ND, to_device(rows.target, lm.device)).loss.sum() / num_rows
        nll.backward()
        total += nll.detach()
    return total


def _num_steps(examples: Sequence[Example], config: Config) -> int:
    """Optimiser steps: asked for, or those of the latent run over these questions."""
    run = len(examples) // config.optim.batch_size * config.optim.epochs
    return config.eval.text_tuned_steps or run


def _schedule(config: Config, steps: int) -> OptimConfig:
    """The schedule of the run, whose warm-up takes at most a tenth of a short budget."""
    warmup = min(config.optim.warmup_steps, steps // 10)
    return dataclasses.replace(config.optim, warmup_steps=warmup)


# ------------------------------------------------------------------------------- cache


def _save(path: Path, key: str, tuned: TunedPrompt) -> None:
    """Whole or not at all; where the disk refuses, the prompt is tuned again next time."""
    from safetensors.torch import save

    facts = {name: str(getattr(tuned, name)) for name in ("steps", "seconds", "nll_token")}
    data = save({"prompt": tuned.prompt_MD.cpu()}, metadata={"key": key, **facts})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("text_tuned: cannot keep %s: %s", path, error.strerror or error)


def _load(path: Path, key: str, lm: FrozenLM) -> TunedPrompt | None:
    """The kept prompt, if there is one with this key."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts, prompt_MD = file.metadata(), file.get_tensor("prompt")
    except (OSError, SafetensorError) as error:
        logger.warning("text_tuned: %s is damaged, tuning again: %s", path, error)
        return None
    if facts["key"] != key:
        logger.warning("text_tuned: %s belongs to other settings, tuning again", path)
        return None
    logger.info("text_tuned: %s from %s", lm.name, path)
    return TunedPrompt(
        prompt_MD.to(lm.device),
        int(facts["steps"]),
        float(facts["seconds"]),
        float(facts["nll_token"]),
    )
