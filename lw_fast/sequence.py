"""The one place that says which position of an LM's input predicts which token.

Per example the frozen LM reads

    [head] [prefix_1 .. prefix_M] [anchor] [answer_1 .. answer_n] [padding]

where `head` is the BOS token for tokenizers whose own encode() adds one, the prefix is the latent
(or, for text prompts, the embedded text), and the anchor ends in BOS if the policy says so.
The last position before the answer predicts answer_1, answer_i predicts answer_(i+1) and answer_n
predicts EOS. EOS is a target only: no target follows it, so it is never an input. Padding stands
on the right, where causal attention cannot see it: no attention mask is needed, and padding is
told by length, never by token id (pad == eos is common).

Targets are explicit (row, token) pairs. The `labels=` of a Hugging Face model, which shift once
more on their own, are never used: that was the original experiment's first fault.

`compat` repeats what the original did instead, for ablations only (Layout, docs/protocol.md).

Letters in names: B examples, M latents, H head tokens, A anchor tokens, L answer tokens of the
longest example, S = H + M + A + L positions, N supervised rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lw_fast.chat import assistant_header
from lw_fast.config import EvalConfig, SequenceConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """The constant tokens around the prefix, for one LM."""

    head: tuple[int, ...]
    """BOS, or nothing."""
    anchor: tuple[int, ...]
    """Tokens between prefix and answer."""
    eos: int
    """The target that ends an answer."""
    anchor_text: str = ""
    """What answers are tokenised behind."""
    chat: bool = False
    """The prompt ends in a chat header: the answer follows without a space."""


@dataclass(frozen=True)
class SupervisedRows:
    """(position -> token) pairs of one batch; numpy int64 arrays of length N.

    `position` indexes the flattened [B * S] positions; `example` the batch; `answer` and `first`
    say (as bool) which terms of the loss a row belongs to: that of the whole answer, that of its
    first token, or both.
    """

    position: np.ndarray
    target: np.ndarray
    example: np.ndarray
    first: np.ndarray
    answer: np.ndarray


def head_ids(tokenizer) -> tuple[int, ...]:
    """(BOS,) if the tokenizer's own encode() puts it in front, else ()."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and ids and ids[0] == bos else ()


def anchor_ids(tokenizer, text: str, append_bos: str) -> tuple[int, ...]:
    """Anchor tokens, plus BOS under policy `append_bos` (yes, no, auto: only without an anchor).

    A trailing space is dropped: the answer brings its own (`Answer:` + ` Denver`). BOS asked for
    where the tokenizer has none is a logged no-op.
    """
    text = text.rstrip()
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()
    return _append_bos(tokenizer, ids, append_bos)


def _append_bos(tokenizer, ids: tuple[int, ...], policy: str) -> tuple[int, ...]:
    if policy == "no" or (policy == "auto" and ids):
        return ids
    if tokenizer.bos_token_id is None:
        logger.warning("BOS after the prefix (%s) has no effect: this tokenizer has none", policy)
        return ids
    return (*ids, tokenizer.bos_token_id)


def make_frame(tokenizer, config: SequenceConfig) -> Frame:
    """The frame of one LM in training."""
    text = config.warm_anchor_text
    return Frame(
        head=head_ids(tokenizer),
        anchor=anchor_ids(tokenizer, text, config.train_append_bos_after_prefix),
        eos=tokenizer.eos_token_id,
        anchor_text=text,
    )


def latent_frame(tokenizer, training: SequenceConfig, decoding: EvalConfig) -> Frame:
    """What stands around the latents at decode time: as in training unless told otherwise."""
    trained, mode = training.warm_anchor_text, decoding.latent_anchor_mode
    text = {"auto": trained, "text": decoding.latent_anchor_text or trained}.get(mode, "")
    policy = decoding.append_bos_after_prefix
    policy = training.train_append_bos_after_prefix if policy == "train" else policy
    if mode == "chat":
        anchor = _append_bos(tokenizer, assistant_header(tokenizer), policy)
    else:
        anchor = anchor_ids(tokenizer, text, policy)
    return Frame(head_ids(tokenizer), anchor, tokenizer.eos_token_id, text, chat=mode == "chat")


def text_frame(tokenizer, training: SequenceConfig) -> Frame:
    """What stands around a plain text prompt: the anchor of training, never a second BOS."""
    text = training.warm_anchor_text
    anchor = anchor_ids(tokenizer, text, "no")
    return Frame(head_ids(tokenizer), anchor, tokenizer.eos_token_id, text)


def chat_frame(tokenizer) -> Frame:
    """Nothing: a chat template brings its own BOS and header."""
    return Frame((), (), tokenizer.eos_token_id, chat=True)


def tokenize_answers(
    tokenizer, anchor_text: str, answers: Sequence[str], max_tokens: int, *, chat: bool = False
) -> tuple[list[list[int]], np.ndarray]:
    """Answers as they are tokenised right behind the anchor, or (`chat`) behind a chat header,
    where no space stands before them.

    Returns the token ids of each answer, at most `max_tokens`, and a bool array [N] that is False
    where the answer was cut: a cut answer does not end, so its EOS is not supervised.
    """
    anchor_text = anchor_text.rstrip()
    anchor = tokenizer(anchor_text, add_special_tokens=False).input_ids if anchor_text else []
    space = "" if chat else " "
    joint = tokenizer(
        [f"{anchor_text}{space}{answer}" for answer in answers], add_special_tokens=False
    ).input_ids
    ids = []
    for answer, tokens in zip(answers, joint, strict=True):
        if tokens[: len(anchor)] != anchor:  # the tokenizer merged across the border
            tokens = anchor + tokenizer(f"{space}{answer}", add_special_tokens=False).input_ids
        ids.append(tokens[len(anchor) :])
    complete = np.array([len(tokens) <= max_tokens for tokens in ids], dtype=bool)
    return [tokens[:max_tokens] for tokens in ids], complete


def pair_targets(
    answers_BL: np.ndarray,
    lengths_B: np.ndarray,
    complete_B: np.ndarray,
    *,
    prefix_len: int | np.ndarray,
    seq_len: int,
    eos: int,
    shift: int = 0,
) -> SupervisedRows:
    """Pairs positions with tokens for a right-padded batch.

    Args:
        answers_BL: answer token ids, right-padded with anything.
        lengths_B: real answer lengths, 1..L.
        complete_B: bool; whether EOS follows the answer.
        prefix_len: positions before the answer, H + M + A; one number, or one per example.
        seq_len: positions S of the padded batch.
        eos: the token that ends an answer.
        shift: 1 is the original's fault, kept for `compat`: every position is paired with the
            token after its next one.
    """
    num, width = answers_BL.shape
    prefix_len_B = np.broadcast_to(prefix_len, num)
    tokens_BT = np.full((num, width + 1), eos, dtype=np.int64)
    tokens_BT[:, :width] = answers_BL
    tokens_BT[np.arange(num), lengths_B] = eos
    num_targets_B = lengths_B + complete_B.astype(np.int64)
    steps_T = np.arange(width + 1)
    example, step = np.nonzero(steps_T[None, :] < (num_targets_B - shift)[:, None])
    return SupervisedRows(
        position=example * seq_len + prefix_len_B[example] - 1 + step,
        target=tokens_BT[example, step + shift],
        example=example,
        first=step == 0,
        answer=np.ones(len(step), dtype=bool),
    )


def training_answers(
    tokenizer, config: SequenceConfig, answers: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], np.ndarray]:
    """`tokenize_answers` for training; with compat=original BOS comes first, as the original's
    encode() put it there, and no answer ends."""
    ids, complete = tokenize_answers(tokenizer, config.warm_anchor_text, answers, max_tokens)
    if config.compat != "original":
        return ids, complete
    bos = list(head_ids(tokenizer))
    return [(bos + tokens)[:max_tokens] for tokens in ids], np.zeros_like(complete)


@dataclass(frozen=True)
class Layout:
    """How one LM's answers are laid out in training, and what each position is asked for.

    Right (compat=none): one sequence per example, in the frame of decoding, serves every term.
    compat=double_shift: the same, each position asked for the token after its next one.
    compat=original: two sequences per example that see different things. Teacher-forced, behind the
    bare anchor: BOS where encode() adds one, then the answer, shifted twice and without EOS. First
    token: the frame of decoding, BOS by policy, asked for the first answer token.
    """

    frame: Frame
    """Around the latents as at decode time."""
    bare_anchor: tuple[int, ...]
    """The anchor without BOS."""
    latent_len: int
    compat: str

    @property
    def prefix_len(self) -> int:
        """Positions before the answer, as at decode time."""
        return len(self.frame.head) + self.latent_len + len(self.frame.anchor)

    @property
    def shift(self) -> int:
        """Of the teacher-forced targets, as in `pair_targets`."""
        return int(self.compat != "none")

    def num_targets(self, lengths_B: np.ndarray, complete_B: np.ndarray) -> int:
        """Rows of the answer term."""
        return int((lengths_B + complete_B - self.shift).clip(min=0).sum())

    def rows(
        self, answers_BL: np.ndarray, lengths_B: np.ndarray, complete_B: np.ndarray
    ) -> tuple[np.ndarray, SupervisedRows]:
        """What stands behind the latents (int64 [B, T], anchor and answer; with compat=original
        [2B, T], teacher-forced before first-token sequences) and the targets of those sequences.

        Arguments as `training_answers` returns them, right-padded; no answer is empty.
        """
        if self.compat != "original":
            return self._teacher_forced(self.frame.anchor, answers_BL, lengths_B, complete_B)
        tails_BT, rows = self._teacher_forced(self.bare_anchor, answers_BL, lengths_B, complete_B)
        first_BT, first_rows = self._first_token(tails_BT, answers_BL, lengths_B)
        rows = dataclasses.replace(rows, first=np.zeros_like(rows.first))
        return np.concatenate([tails_BT, first_BT]), _join(rows, first_rows)

    def num_positions(self, lengths_B: np.ndarray) -> int:
        """Real (not padded) positions of all sequences."""
        before, num = len(self.frame.head) + self.latent_len, len(lengths_B)
        decoded = (before + len(self.frame.anchor)) * num
        if self.compat != "original":
            return int(decoded + lengths_B.sum())
        return int(decoded + (before + len(self.bare_anchor)) * num + lengths_B.sum())

    def _teacher_forced(
        self,
        anchor: tuple[int, ...],
        answers_BL: np.ndarray,
        lengths_B: np.ndarray,
        complete_B: np.ndarray,
    ) -> tuple[np.ndarray, SupervisedRows]:
        anchor_BA = np.tile(np.array(anchor, dtype=np.int64), (len(answers_BL), 1))
        prefix_len = len(self.frame.head) + self.latent_len + len(anchor)
        rows = pair_targets(
            answers_BL,
            lengths_B,
            complete_B,
            prefix_len=prefix_len,
            seq_len=prefix_len + answers_BL.shape[1],
            eos=self.frame.eos,
            shift=self.shift,
        )
        return np.concatenate([anchor_BA, answers_BL], axis=1), rows

    def _first_token(
        self, tails_BT: np.ndarray, answers_BL: np.ndarray, lengths_B: np.ndarray
    ) -> tuple[np.ndarray, SupervisedRows]:
        """The sequences that follow those of `tails_BT`, as wide as they are."""
        first_BT = np.zeros_like(tails_BT)
        first_BT[:, : len(self.frame.anchor)] = self.frame.anchor
        before, num_bos = len(self.frame.head) + self.latent_len, len(self.frame.head)
        asked = np.flatnonzero(lengths_B > num_bos)
        start = (len(tails_BT) + asked) * (before + tails_BT.shape[1])
        return first_BT, SupervisedRows(
            position=start + before + len(self.frame.anchor) - 1,
            target=answers_BL[asked, num_bos],
            example=asked,
            first=np.ones(len(asked), dtype=bool),
            answer=np.zeros(len(asked), dtype=bool),
        )


def _join(*parts: SupervisedRows) -> SupervisedRows:
    columns = [field.name for field in dataclasses.fields(SupervisedRows)]
    return SupervisedRows(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
    )


def make_layout(tokenizer, config: SequenceConfig, latent_len: int) -> Layout:
    """The layout of one LM in training."""
    return Layout(
        frame=make_frame(tokenizer, config),
        bare_anchor=anchor_ids(tokenizer, config.warm_anchor_text, "no"),
        latent_len=latent_len,
        compat=config.compat,
    )
