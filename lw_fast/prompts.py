"""The prompt kinds that are compared: what each puts between BOS and the anchor.

text          the whole text prompt
text_tuned    the same behind a soft prompt that was tuned as long as the latent (text_tuned.py)
latent        the calibrated prefix of the example
token_budget  the text prompt, cut to its first k tokens (k = latent_len by default)
span_text     the span that the encoder predicts, as text, with the question
no_context    the question alone
shuffled      the prefix of another example
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lw_fast.bridge import LatentBridge
from lw_fast.chat import chat_ids
from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.frozen_lm import FrozenLM
from lw_fast.sequence import Frame, chat_frame, latent_frame, text_frame

KINDS = ("text", "text_tuned", "latent", "token_budget", "span_text", "no_context", "shuffled")
LATENT_KINDS = ("latent", "shuffled")


def text_prompt(context: str, question: str) -> str:
    """The text that an LM reads in place of the latents; the anchor follows."""
    return f"Context: {context}\nQuestion: {question}\n"


def chat_content(text: str) -> str:
    """A whole text prompt as the user's turn in a chat, worded as in the original."""
    return f"{text}Answer: "


def decode_frame(kind: str, tokenizer, config: Config) -> Frame:
    """What stands around a prompt of one kind at decode time."""
    if kind in LATENT_KINDS:
        return latent_frame(tokenizer, config.sequence, config.eval)
    cut_chat = kind == "token_budget" and config.eval.token_budget_mode == "chat_full"
    if config.eval.text_format == "chat" or cut_chat:
        return chat_frame(tokenizer)
    return text_frame(tokenizer, config.sequence)


@dataclass(frozen=True)
class Latents:
    """What was learned for the evaluation questions."""

    z_NMZ: Tensor
    span_text: Sequence[str] | None
    """The predicted span of every question, as text; None without a span head."""
    soft: Mapping[str, Tensor] = field(default_factory=dict)
    """Per LM, the tuned soft prompt [M, D] of text_tuned, where that kind was asked for."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind for one LM: how long each is, and its embeddings on demand."""

    lengths: Sequence[int]
    embeds: Callable[[Sequence[int]], list[Tensor]]
    """Examples -> the input embeddings [S, D] of each, from BOS to anchor."""


def make_prompts(
    kind: str,
    lm: FrozenLM,
    frame: Frame,
    examples: Sequence[Example],
    latents: Latents,
    bridge: LatentBridge,
    *,
    gain: float,
    token_budget_k: int,
    token_budget_mode: str = "content_only",
) -> Prompts:
    """The prompts of `examples` for one LM, in the chat template where the frame is a chat's;
    `latents` belong to the same examples."""
    if kind in LATENT_KINDS:
        return _latent_prompts(kind, lm, frame, latents, bridge, gain)
    texts = {
        "text": lambda: [text_prompt(e.context, e.question) for e in examples],
        "text_tuned": lambda: [text_prompt(e.context, e.question) for e in examples],
        "token_budget": lambda: [text_prompt(e.context, e.question) for e in examples],
        "span_text": lambda: [
            text_prompt(span, e.question)
            for e, span in zip(examples, latents.span_text or (), strict=True)
        ],
        "no_context": lambda: [f"Question: {e.question}\n" for e in examples],
    }[kind]()
    budget = token_budget_k if kind == "token_budget" else None
    soft_MD = latents.soft[lm.name] if kind == "text_tuned" else None
    return text_prompts(lm, frame, texts, budget, token_budget_mode, soft_MD)


def text_prompts(
    lm: FrozenLM,
    frame: Frame,
    texts: Sequence[str],
    budget: int | None = None,
    budget_mode: str = "content_only",
    soft_MD: Tensor | None = None,
) -> Prompts:
    """Texts in a frame, each cut to `budget` tokens if there is one, behind a soft prompt (after
    BOS) if there is one."""
    ids = _text_ids(lm.tokenizer, texts, frame.chat, budget, budget_mode)
    framed = [[*frame.head, *tokens, *frame.anchor] for tokens in ids]

    def embeds(index: Sequence[int]) -> list[Tensor]:
        flat = [token for i in index for token in framed[i]]
        embeds_RD = lm.embed(torch.tensor(flat, dtype=torch.int64, device=lm.device))
        rows = embeds_RD.split([len(framed[i]) for i in index])
        if soft_MD is None:
            return list(rows)
        bos = [int(framed[i][0] == lm.tokenizer.bos_token_id) for i in index]
        soft = soft_MD.to(embeds_RD.dtype)
        return [torch.cat([row[:n], soft, row[n:]]) for row, n in zip(rows, bos, strict=True)]

    num_soft = 0 if soft_MD is None else len(soft_MD)
    return Prompts(
        lengths=[num_soft + len(tokens) for tokens in framed],
        embeds=embeds,
    )


def _text_ids(
    tokenizer, texts: Sequence[str], chat: bool, budget: int | None, budget_mode: str
) -> list[list[int]]:
    """Token ids of each text prompt, cut to `budget` tokens of the text or of the whole chat."""
    cut_content = budget is not None and budget_mode == "content_only"
    if not chat or cut_content:
        ids = [tokens[:budget] for tokens in tokenizer(texts, add_special_tokens=False).input_ids]
        if not chat:
            return ids
        texts = tokenizer.batch_decode(ids)
    contents = list(texts) if cut_content else [chat_content(text) for text in texts]
    return [tokens[: None if cut_content else budget] for tokens in chat_ids(tokenizer, contents)]


def _latent_prompts(
    kind: str, lm: FrozenLM, frame: Frame, latents: Latents, bridge: LatentBridge, gain: float
) -> Prompts:
    num, latent_len = latents.z_NMZ.shape[:2]
    # Half the (shuffled) set away, so that questions of one context do not swap places.
    shift = num // 2 if kind == "shuffled" else 0
    head_HD = lm.embed(torch.tensor(frame.head, dtype=torch.int64, device=lm.device))
    anchor_AD = lm.embed(torch.tensor(frame.anchor, dtype=torch.int64, device=lm.device))

    def embeds(index: Sequence[int]) -> list[Tensor]:
        z_BMZ = latents.z_NMZ[[(i + shift) % num for i in index]]
        prefix_BMD = bridge.prefix(lm.name, z_BMZ, gain).to(lm.dtype)
        head_BHD, anchor_BAD = (x.expand(len(index), -1, -1) for x in (head_HD, anchor_AD))
        return list(torch.cat([head_BHD, prefix_BMD, anchor_BAD], dim=1))

    length = len(frame.head) + latent_len + len(frame.anchor)
    return Prompts(lengths=[length] * num, embeds=embeds)
