"""Which position predicts which token: proved on an LM whose next token is a known function."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lw_fast.batches import AnswerTable
from lw_fast.bridge import supervised_scores
from lw_fast.config import SequenceConfig
from lw_fast.frozen_lm import FrozenLM
from lw_fast.lm_sources import load_tokenizer
from lw_fast.sequence import anchor_ids, head_ids, make_frame, pair_targets, tokenize_answers

# ------------------------------------------------------------------------------- the toy LM

EOS, BOS, ANSWER, COLON, WORDS = 0, 1, 2, 3, 60
ANSWERS = ["w19", "w27 w28 w29", "w38 w39", "w45 w46 w47 w48 w49"]
"""Word n is followed by word n + 1; a word that ends in 9 is the last one."""


class ToyLM(torch.nn.Module):
    """Says the word that the first latent names, then counts on to the next word in 9, then EOS."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = torch.nn.Embedding.from_pretrained(torch.eye(WORDS))
        self.outputs = torch.nn.Linear(WORDS, WORDS, bias=False).requires_grad_(False)
        torch.nn.init.eye_(self.outputs.weight)
        self.config = SimpleNamespace(vocab_size=WORDS)
        self.base_model = self._states

    def get_input_embeddings(self):
        return self.inputs

    def get_output_embeddings(self):
        return self.outputs

    def _states(self, inputs_embeds, use_cache):
        ids = inputs_embeds.argmax(-1)
        named = ids[:, 1:2]  # after BOS
        following = torch.where(ids % 10 == 9, EOS, (ids + 1) % WORDS)
        following = torch.where(ids == COLON, named, following)
        return SimpleNamespace(last_hidden_state=20 * self.inputs(following))


def word_tokenizer(*, bos: str | None = "<bos>", added: bool = True):
    """One id per word; whether there is BOS, and whether encode() puts it in front."""
    from transformers import PreTrainedTokenizerFast

    special = {"<eos>": EOS, "<bos>": BOS, "Answer": ANSWER, ":": COLON}
    vocab = special | {f"w{n}": n for n in range(4, WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos and added:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<eos>", pad_token="<eos>"
    )


def toy_scores(compat: str, answers=ANSWERS):
    lm = FrozenLM("toy", ToyLM(), word_tokenizer(), stop_ids=frozenset({EOS}))
    table = AnswerTable(lm, answers, tiny.config(compat=compat, latent_len=2))
    batch = table.batch(np.arange(len(answers)))
    first = torch.tensor([int(answer.split()[0][1:]) for answer in answers])
    prefix_BMD = torch.eye(WORDS)[first][:, None].repeat(1, 2, 1)
    return batch, supervised_scores(lm, prefix_BMD, batch)


def assert_every_token_is_foreseen(compat: str) -> None:
    batch, scores = toy_scores(compat)
    assert len(batch.target_N) > len(ANSWERS)
    assert scores.nll.max() < 1e-3
    assert scores.top1.all()


def test_each_position_predicts_its_next_token():
    """The toy foresees every answer token and EOS: the first from the anchor, no pair is off."""
    assert_every_token_is_foreseen("none")


def test_the_double_shift_twin_fails_the_same_test():
    """The original's fault, targets shifted twice, is caught: not one pair is right."""
    with pytest.raises(AssertionError):
        assert_every_token_is_foreseen("double_shift")
    _, scores = toy_scores("double_shift")
    assert not scores.top1.any()


def test_every_answer_token_and_eos_is_a_target_once():
    batch, _ = toy_scores("none")
    words = sorted(int(word[1:]) for answer in ANSWERS for word in answer.split())
    assert sorted(batch.target_N.tolist()) == [EOS] * len(ANSWERS) + words
    firsts = [int(answer.split()[0][1:]) for answer in ANSWERS]
    assert batch.target_N[batch.first_N].tolist() == firsts


def test_padding_is_no_target_though_pad_is_eos():
    """Alone or beside a longer answer, an example has the same targets."""
    for i, answer in enumerate(ANSWERS):
        alone, _ = toy_scores("none", [answer])
        together, _ = toy_scores("none")
        width = together.tail_BT.shape[1] + 3  # BOS and two latents
        mine = together.position_N // width == i
        assert together.target_N[mine].tolist() == alone.target_N.tolist()
        assert (together.position_N[mine] % width).tolist() == alone.position_N.tolist()


# ------------------------------------------------------------------------------- pairs, exactly


def test_pairs_written_out():
    """Two latents, one anchor token: position 2 is the last one before the answer."""
    rows = pair_targets(
        np.array([[7, 8, 9], [5, 99, 99]]),
        np.array([3, 1]),
        np.array([True, True]),
        prefix_len=3,
        seq_len=6,
        eos=1,
    )
    assert rows.position.tolist() == [2, 3, 4, 5, 8, 9]
    assert rows.target.tolist() == [7, 8, 9, 1, 5, 1]
    assert rows.example.tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.first.tolist() == [True, False, False, False, True, False]


@st.composite
def batches(draw):
    num, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, width), min_size=num, max_size=num))
    flags = draw(st.lists(st.booleans(), min_size=num, max_size=num))
    prefix = draw(st.lists(st.integers(1, 4), min_size=num, max_size=num))
    answers = np.arange(100, 100 + num * width).reshape(num, width)
    return answers, np.array(lengths), np.array(flags), np.array(prefix)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_pairs_equal_a_loop(batch):
    """Any lengths, cut answers and prefixes of different length, against a plain loop."""
    answers, lengths, complete, prefix = batch
    seq_len = int((prefix + answers.shape[1]).max())
    rows = pair_targets(answers, lengths, complete, prefix_len=prefix, seq_len=seq_len, eos=1)
    expected = []
    for b, answer in enumerate(answers):
        tokens = answer[: lengths[b]].tolist() + [1] * int(complete[b])
        for step, token in enumerate(tokens):
            expected.append((b * seq_len + prefix[b] - 1 + step, token, b, step == 0))
    got = zip(rows.position, rows.target, rows.example, rows.first, strict=True)
    assert [tuple(row) for row in got] == expected


@settings(max_examples=100, deadline=None)
@given(batches())
def test_double_shift_is_the_next_pair_one_later(batch):
    answers, lengths, complete, prefix = batch
    where = dict(prefix_len=prefix, seq_len=int((prefix + answers.shape[1]).max()), eos=1)
    right = pair_targets(answers, lengths, complete, **where)
    twin = pair_targets(answers, lengths, complete, shift=1, **where)
    meant = dict(zip(right.position.tolist(), right.target.tolist(), strict=True))
    assert all(meant[p + 1] == t for p, t in zip(twin.position, twin.target, strict=True))
    assert len(twin.target) == (lengths + complete - 1).clip(min=0).sum()


@pytest.mark.parametrize(
    ("bos", "added", "policy", "tails", "answer_pairs", "first_pairs"),
    [
        # Llama, Stage A. Positions: BOS Z Z Answer : BOS w27 w28 w29, nine to a sequence; two
        # teacher-forced sequences, then two of the first token. The colon predicts the first
        # word, the BOS behind it the second one, the first word the third one.
        (
            "<bos>", True, "yes",
            [[2, 3, 1, 27, 28, 29], [2, 3, 1, 19, 0, 0], [2, 3, 1, 0, 0, 0], [2, 3, 1, 0, 0, 0]],
            [(4, 27), (5, 28), (6, 29), (13, 19)],
            [(18 + 5, 27), (27 + 5, 19)],
        ),
        # Llama, Stage B: the first token is asked of the colon; the other path keeps its BOS.
        (
            "<bos>", True, "no",
            [[2, 3, 1, 27, 28, 29], [2, 3, 1, 19, 0, 0], [2, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0]],
            [(4, 27), (5, 28), (6, 29), (13, 19)],
            [(18 + 4, 27), (27 + 4, 19)],
        ),
        # Qwen has no BOS: Z Z Answer : w27 w28 w29. The colon is asked for the second word by one
        # term and for the first by the other; an answer of one word has no target in the first.
        (
            None, False, "yes",
            [[2, 3, 27, 28, 29], [2, 3, 19, 0, 0], [2, 3, 0, 0, 0], [2, 3, 0, 0, 0]],
            [(3, 28), (4, 29)],
            [(14 + 3, 27), (21 + 3, 19)],
        ),
        # SmolLM2 has a BOS that encode() does not add: it is on the first-token path only.
        (
            "<bos>", False, "yes",
            [[2, 3, 27, 28, 29], [2, 3, 19, 0, 0], [2, 3, 1, 0, 0], [2, 3, 1, 0, 0]],
            [(3, 28), (4, 29)],
            [(14 + 4, 27), (21 + 4, 19)],
        ),
    ],
    ids=["bos_stage_a", "bos_stage_b", "no_bos", "silent_bos"],
)  # fmt: skip
def test_pairs_of_the_original_written_out(bos, added, policy, tails, answer_pairs, first_pairs):
    """compat=original, as the original's inputs and labels come out of a model that shifts labels
    itself; no EOS (0) is a target anywhere."""
    lm = FrozenLM("toy", ToyLM(), word_tokenizer(bos=bos, added=added))
    settings = dict(compat="original", train_append_bos_after_prefix=policy, latent_len=2)
    table = AnswerTable(lm, ["w27 w28 w29", "w19"], tiny.config(**settings))
    batch = table.batch(np.arange(2))
    assert batch.tail_BT.tolist() == tails
    pairs = list(zip(batch.position_N.tolist(), batch.target_N.tolist(), strict=True))
    for flags_N, expected in ((batch.answer_N, answer_pairs), (batch.first_N, first_pairs)):
        assert [pair for pair, flag in zip(pairs, flags_N, strict=True) if flag] == expected
    assert not (batch.answer_N & batch.first_N).any()
    real = sum(len(batch.head_H) + 2 + np.count_nonzero(tail) for tail in tails)
    assert table.num_positions(np.arange(2)) == real


def test_rows_serve_both_terms_where_nothing_is_repeated():
    """compat=none: every row is in the answer term, the first one of an example in both."""
    batch, _ = toy_scores("none")
    assert batch.answer_N.all() and batch.first_N.sum() == len(ANSWERS)


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, 9))
def test_padding_ids_do_not_matter(batch, pad):
    answers, lengths, complete, prefix = batch
    where = dict(prefix_len=prefix, seq_len=12, eos=1)
    padded = answers.copy()
    padded[np.arange(answers.shape[1]) >= lengths[:, None]] = pad
    a = pair_targets(answers, lengths, complete, **where)
    b = pair_targets(padded, lengths, complete, **where)
    assert a.target.tolist() == b.target.tolist()


# ------------------------------------------------------------------------------- BOS and anchor


def bos_that_encode_does_not_add():
    tokenizer = tiny.tokenizer(bos=True)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return type(tokenizer)(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def test_head_is_bos_only_where_encode_adds_it():
    with_bos, without = tiny.tokenizer(bos=True), tiny.tokenizer()
    assert head_ids(with_bos) == (with_bos.bos_token_id,)
    assert head_ids(without) == ()
    silent = bos_that_encode_does_not_add()
    assert silent.bos_token_id is not None and head_ids(silent) == ()


@pytest.mark.parametrize(
    ("text", "policy", "adds"),
    [
        ("Answer:", "no", False),
        ("Answer:", "auto", False),
        ("Answer:", "yes", True),
        ("", "no", False),
        ("", "auto", True),
        ("", "yes", True),
    ],
)
def test_bos_policy(text, policy, adds, caplog):
    with_bos, without = tiny.tokenizer(bos=True), tiny.tokenizer()
    plain = tuple(with_bos(text, add_special_tokens=False).input_ids) if text else ()
    assert anchor_ids(with_bos, text, policy) == plain + (with_bos.bos_token_id,) * adds
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        plain = tuple(without(text, add_special_tokens=False).input_ids) if text else ()
        assert anchor_ids(without, text, policy) == plain
    assert any("no effect" in r.message for r in caplog.records) == adds


def test_a_trailing_space_of_the_anchor_is_dropped():
    """The original's "Answer: " and "Denver" become "Answer:" and " Denver"."""
    tokenizer = tiny.tokenizer(bos=True)
    assert anchor_ids(tokenizer, "Answer: ", "no") == anchor_ids(tokenizer, "Answer:", "no")
    spaced = tokenize_answers(tokenizer, "Answer: ", ["Oslo"], 9)
    assert spaced[0] == tokenize_answers(tokenizer, "Answer:", ["Oslo"], 9)[0]


def test_frames_of_the_shipped_pair():
    llama, qwen = (load_tokenizer(name, f"nano:{name}") for name in ("llama", "qwen"))
    frames = [make_frame(t, SequenceConfig()) for t in (llama, qwen)]
    assert frames[0].head == (llama.bos_token_id,)
    assert frames[1].head == ()
    assert [frame.eos for frame in frames] == [llama.eos_token_id, qwen.eos_token_id]
    for tokenizer, frame in zip((llama, qwen), frames, strict=True):
        assert tokenizer.decode(frame.anchor) == "Answer:"


# ------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("bos", [True, False])
def test_answers_are_tokenised_behind_their_anchor(bos):
    """Anchor and answer together are the tokens of the natural text, without special ones."""
    tokenizer = tiny.tokenizer(bos=bos)
    answers = ["Paris", "green tea", "7"]
    ids, complete = tokenize_answers(tokenizer, "Answer:", answers, 50)
    for answer, tokens in zip(answers, ids, strict=True):
        text = f"Answer: {answer}"
        anchor = list(anchor_ids(tokenizer, "Answer:", "no"))
        assert anchor + tokens == tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == f" {answer}"
    assert complete.all()


def test_an_answer_without_anchor_keeps_its_space():
    ids, _ = tokenize_answers(tiny.tokenizer(bos=True), "", ["Oslo"], 50)
    assert tiny.tokenizer(bos=True).decode(ids[0]) == " Oslo"


def merging_tokenizer():
    """A BPE without pre-tokeniser that merges the anchor's colon with the space behind it."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("Answer: xyz"))
    vocab = {letter: i for i, letter in enumerate([*letters, ": ", "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " ")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_merge_across_the_border_does_not_move_it():
    """The anchor at decode time must be the tokens seen in training."""
    tokenizer = merging_tokenizer()
    anchor = list(anchor_ids(tokenizer, "Answer:", "no"))
    joint = tokenizer("Answer: xy", add_special_tokens=False).input_ids
    assert joint[: len(anchor)] != anchor  # the case is real
    ids, _ = tokenize_answers(tokenizer, "Answer:", ["xy"], 9)
    assert tokenizer.convert_ids_to_tokens(ids[0]) == [" ", "x", "y"]


def test_cut_answers_lose_their_eos():
    """An answer cut at the limit does not end there; one of just that length does."""
    lm = FrozenLM("toy", ToyLM(), word_tokenizer())
    table = AnswerTable(lm, ANSWERS, tiny.config(max_answer_tokens=2))
    assert table.complete_N.tolist() == [True, False, True, False]
    batch = table.batch(np.arange(4))
    assert (batch.target_N == EOS).sum() == 2
    assert batch.target_N.tolist() == [19, EOS, 27, 28, 38, 39, EOS, 45, 46]


@pytest.mark.parametrize("compat", ["none", "double_shift", "original"])
@pytest.mark.parametrize("limit", [2, 3, 50])
def test_targets_are_counted_before_they_are_made(compat, limit):
    """The loss is divided by this count: it must be the batch's rows of the answer term."""
    lm = FrozenLM("toy", ToyLM(), word_tokenizer())
    table = AnswerTable(lm, ANSWERS, tiny.config(compat=compat, max_answer_tokens=limit))
    for index in (np.arange(4), np.array([2, 0]), np.array([3])):
        assert table.num_targets(index) == table.batch(index).answer_N.sum()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab :\u00e9\U0001f600"), max_size=12), min_size=1))
def test_any_answer_follows_its_anchor(answers):
    """Whatever the text, anchor and answer tokens decode to it, and none is longer than asked."""
    tokenizer = tiny.tokenizer(bos=True)
    ids, complete = tokenize_answers(tokenizer, "Answer:", answers, 8)
    anchor = list(anchor_ids(tokenizer, "Answer:", "no"))
    for answer, tokens, whole in zip(answers, ids, complete, strict=True):
        assert len(tokens) <= 8
        text = tokenizer.decode(anchor + tokens, clean_up_tokenization_spaces=False)
        if whole:
            assert text == f"Answer: {answer}"
