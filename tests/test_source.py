"""Sources: the span's units say the answer, cuts spare the question, arrays fit together."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lw_fast import source
from lw_fast.data import Example
from lw_fast.errors import UserError
from lw_fast.source import Sources, byte_sources, source_head, source_text, token_sources

# Few characters, so that hypothesis often repeats them, of every UTF-8 length; combining marks,
# a joined emoji's parts, and the spaces that tokenizers treat specially.
TEXT = st.text(st.sampled_from("abA1 \n.\u00e9e\u0301\u0939\u093f\u4e2d\U0001f600\u200d\ufe0f"))
ANY_TEXT = TEXT | st.text(max_size=30)
ANSWER = ANY_TEXT.map(str.strip).filter(bool)
CORPUS = [
    "Question: Who won?\nContext: Denver beat Carolina, and the caf\u00e9 won.",
    "A man \U0001f600 in \u4e2d\u56fd drank caf\u00e9 au lait 1989.",
] * 20


@st.composite
def examples(draw) -> Example:
    before, answer, after = draw(ANY_TEXT), draw(ANSWER), draw(ANY_TEXT)
    return Example("0", before + answer + after, draw(ANY_TEXT), (answer,), len(before))


def wrap(tokenizer: Tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(trim_offsets: bool = True, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def metaspace():
    """SentencePiece style: a space belongs to the word after it; unknown text becomes bytes."""
    special = ["<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


TOKENIZERS = {
    "byte_level": byte_level(),
    "untrimmed": byte_level(trim_offsets=False),
    "metaspace": metaspace(),
}


def slice_of(sources: Sources, index: int = 0) -> np.ndarray:
    first, last = sources.span[index]
    return sources[index][first : last + 1]


def test_source_text():
    assert source_text(Example("0", "C", "Q", (), -1)) == "Question: Q\nContext: C"
    assert source_text(Example("0", "C", "", (), -1)) == "Context: C"


# Bytes -------------------------------------------------------------------------------------------


@given(examples())
def test_byte_span_is_exactly_the_answer(example):
    sources = byte_sources([example], 10**6)
    assert bytes(slice_of(sources)).decode() == example.answers[0]
    assert bytes(sources[0]).decode() == source_text(example)
    assert bytes(sources[0][sources.context_start[0] :]).decode() == example.context
    assert (sources.cut, sources.question_cut, sources.span_lost) == (0, 0, 0)


@given(examples(), st.integers(1, 80))
def test_byte_cut(example, limit):
    sources = byte_sources([example], limit)
    kept, full = bytes(sources[0]), source_text(example).encode()
    assert full.startswith(kept) and len(kept) <= limit
    kept.decode()  # raises if a code point was cut in two
    assert len(kept) > limit - 4 or len(kept) == len(full), "more was cut than needed"
    head = len(source_head(example.question).encode())
    assert sources.cut == (len(full) > limit)
    assert sources.question_cut == (head > len(kept))
    assert sources.context_start[0] == min(head, len(kept))
    if sources.span_lost:
        assert tuple(sources.span[0]) == (-1, -1)
    else:
        assert bytes(slice_of(sources)).decode() == example.answers[0]


def test_byte_arrays_of_several_sources():
    cases = [
        Example("a", "caf\u00e9 \U0001f600 x", "q", ("\U0001f600",), 5),
        Example("b", "long " * 9, "q", ("long",), 40),
        Example("c", "none", "?", (), -1),
        Example("d", "span", "", ("span",), 0),
        Example("e", "c", "q" * 90, ("c",), 0),
    ]
    sources = byte_sources(cases, 40)
    assert len(sources) == 5
    assert (sources.ids.dtype, sources.offsets.dtype) == (np.uint8, np.int64)
    assert (sources.span.dtype, sources.context_start.dtype) == (np.int32, np.int32)
    assert (sources.cut, sources.question_cut, sources.span_lost) == (2, 1, 2)
    assert sources.span.tolist() == [[27, 30], [-1, -1], [-1, -1], [9, 12], [-1, -1]]
    assert sources.context_start.tolist() == [21, 21, 21, 9, 40]
    assert sources.offsets[-1] == len(sources.ids) == sources.lengths.sum()
    assert sources.lengths.tolist() == [33, 40, 25, 13, 40]


def test_no_sources_at_all():
    for sources in (byte_sources([], 9), token_sources([], TOKENIZERS["byte_level"], 9)):
        assert len(sources) == 0 and sources.span.shape == (0, 2) and sources.cut == 0


# Tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(example=examples())
def test_token_span_contains_the_answer(name, example):
    tokenizer = TOKENIZERS[name]
    sources = token_sources([example], tokenizer, 10**6)
    assert tokenizer.decode(sources[0]) == source_text(example)
    assert example.answers[0] in tokenizer.decode(slice_of(sources))
    start = len(source_head(example.question)) + example.answer_start
    stop = start + len(example.answers[0])
    offsets = tokenizer(
        source_text(example), add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    touching = [n for n, (begin, end) in enumerate(offsets) if begin < stop and end > start]
    assert sources.span[0].tolist() == [touching[0], touching[-1]], "no more than it needs"
    assert sources.context_start[0] <= touching[0]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(example=examples(), limit=st.integers(1, 40))
def test_token_cut(name, example, limit):
    tokenizer = TOKENIZERS[name]
    whole = token_sources([example], tokenizer, 10**6)
    sources = token_sources([example], tokenizer, limit)
    kept = len(sources[0])
    assert kept <= limit and (sources[0] == whole[0][:kept]).all()
    assert sources.cut == (len(whole[0]) > limit)
    assert sources.question_cut == (whole.context_start[0] > kept)
    assert sources.context_start[0] == min(whole.context_start[0], kept)
    assert sources.span_lost == (whole.span[0, 1] >= kept)
    assert tuple(sources.span[0]) == ((-1, -1) if sources.span_lost else tuple(whole.span[0]))
    if "\ufffd" not in source_text(example):
        assert "\ufffd" not in tokenizer.decode(sources[0]), "a code point was cut in two"


def test_token_span_under_a_normalizer():
    """Offsets point into the text as given, whatever the normalizer makes of it."""
    tokenizer = byte_level(normalizer=normalizers.NFC())
    for context, answer in [
        ("in the cafe\u0301 bar", "cafe\u0301"),
        ("e\u0301e\u0301 one two", "one"),
        ("\U0001f600 e\u0301 \u4e2d\u56fd", "\u4e2d\u56fd"),
    ]:
        example = Example("0", context, "who?", (answer,), context.index(answer))
        text = tokenizer.decode(slice_of(token_sources([example], tokenizer, 99)))
        assert unicodedata.normalize("NFC", answer) in text


def test_tokens_of_several_batches_equal_one(monkeypatch):
    cases = [Example(str(n), f"a{n} Denver " * n, "who?", ("a",), 0) for n in range(1, 9)]
    whole = token_sources(cases, TOKENIZERS["byte_level"], 30)
    monkeypatch.setattr(source, "_TOKENISER_BATCH", 3)
    parts = token_sources(cases, TOKENIZERS["byte_level"], 30)
    for name in ("ids", "offsets", "span", "context_start"):
        assert (getattr(whole, name) == getattr(parts, name)).all()
    assert whole.ids.dtype == np.int32 and 0 < whole.cut == parts.cut


def test_special_tokens_padding_and_truncation_of_the_tokenizer_are_ignored():
    tokenizer = byte_level()
    plain = token_sources([Example("0", CORPUS[0], "q", (), -1)], tokenizer, 500)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=600)
    again = token_sources([Example("0", CORPUS[0], "q", (), -1)], tokenizer, 500)
    assert (plain.ids == again.ids).all()


def test_an_answer_that_leaves_no_token_has_no_span():
    """A tokenizer may drop text altogether; there is then nothing to point at."""
    tokenizer = byte_level(normalizer=normalizers.Replace("#", ""))
    sources = token_sources([Example("0", "a # b", "q", ("#",), 2)], tokenizer, 99)
    assert tuple(sources.span[0]) == (-1, -1)


def test_slow_tokenizers_are_refused():
    with pytest.raises(UserError, match="no fast version"):
        token_sources([], object(), 9)
