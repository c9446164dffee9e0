"""Tables and the batches cut from them; which example is trained on when, and on which rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lw_fast.batches import (
    MIN_GROUP,
    AnswerTable,
    Order,
    SourceTable,
    length_groups,
    micro_slices,
)
from lw_fast.encoder import join_sources
from lw_fast.losses import span_loss_sum
from lw_fast.source import byte_sources, token_sources


def source_table(num: int = 7, supervise=None) -> tuple[SourceTable, object]:
    sources = byte_sources(tiny.examples(num), 60)
    supervise = np.ones(num, bool) if supervise is None else supervise
    return SourceTable(sources, supervise, tiny.CPU), sources


# ------------------------------------------------------------------------------- sources


def test_source_batches_equal_the_sources():
    """Right units, padded with zeros on the right only as far as the batch needs."""
    table, sources = source_table()
    index = np.array([5, 0, 3, 6])  # the last one ends the table: nothing lies behind it
    batch = table.batch(index)
    assert batch.ids_BU.shape[1] == sources.lengths[index].max()
    for row, mask, context, i in zip(
        batch.ids_BU, batch.mask_BU, batch.context_BU, index, strict=True
    ):
        length, start = sources.lengths[i], sources.context_start[i]
        assert row[:length].tolist() == sources[i].tolist()
        assert not row[length:].any() and mask.sum() == length and mask[:length].all()
        assert context.nonzero()[:, 0].tolist() == list(range(start, length))
    assert batch.span_B2.tolist() == sources.span[index].tolist()
    assert batch.states_BUF is None


def test_the_answer_lies_in_its_span_of_the_batch():
    table, _ = source_table()
    batch = table.batch(np.arange(7))
    for row, (first, last), example in zip(
        batch.ids_BU, batch.span_B2.tolist(), tiny.examples(7), strict=True
    ):
        if first >= 0:
            assert bytes(row[first : last + 1].tolist()).decode() == example.answers[0]
    assert (batch.span_B2[:, 0] >= 0).sum() >= 3


def test_spans_to_repeat_are_not_supervised_and_always_copy_gold():
    supervise = np.array([True, False, True, False, True, True, True])
    table, sources = source_table(supervise=supervise)
    wanted = np.array([False, False, True, True])
    batch = table.batch(np.arange(4), wanted)
    assert batch.span_loss_B.tolist() == [True, False, True, False]
    assert batch.use_gold_B.tolist() == [False, True, True, True]
    known = sources.span[:4, 0] >= 0
    assert table.num_spans(np.arange(4)) == (known & supervise[:4]).sum() > 0
    assert not table.batch(np.array([0, 2])).use_gold_B.any()


def test_lost_spans_are_not_counted():
    sources = byte_sources(tiny.examples(4), 30)  # cut within the context
    assert sources.span_lost == 4
    table = SourceTable(sources, np.ones(4, bool), tiny.CPU)
    assert table.num_spans(np.arange(4)) == 0
    assert (table.batch(np.arange(4)).span_B2 == -1).all()


@pytest.mark.parametrize("limit", [9, 20, 500])
def test_bytes_are_counted_whatever_the_unit(limit):
    """UTF-8 bytes of the text that was kept: what `source_bytes/s` counts."""
    examples = [dataclasses.replace(e, context=f"\u00e9 {e.context}") for e in tiny.examples(5)]
    as_bytes = byte_sources(examples, limit)
    assert as_bytes.num_bytes.tolist() == as_bytes.lengths.tolist()
    tokenizer = tiny.tokenizer()
    as_tokens = token_sources(examples, tokenizer, limit)
    kept = [tokenizer.decode(as_tokens[i]).encode() for i in range(5)]
    assert as_tokens.num_bytes.tolist() == [len(text) for text in kept]


# ------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_answer_batches_hold_anchor_and_answer(name):
    lm = tiny.frozen_lm(name)
    answers = [example.answers[0] for example in tiny.examples(6)]
    table = AnswerTable(lm, answers, tiny.config(latent_len=6))
    index = np.array([4, 1, 1])
    batch = table.batch(index)
    anchor = lm.tokenizer("Answer:", add_special_tokens=False).input_ids
    real = 0
    for row, i in zip(batch.tail_BT.tolist(), index, strict=True):
        whole = lm.tokenizer(f"Answer: {answers[i]}", add_special_tokens=False).input_ids
        assert row[: len(whole)] == whole
        real += len(whole)
    assert batch.head_H.tolist() == ([lm.tokenizer.bos_token_id] if name == "llama" else [])
    assert batch.tail_BT.shape[1] == len(anchor) + table.length_N[index].max()
    # Padding is no work: it is not counted.
    assert table.num_positions(index) == real + len(index) * (6 + len(batch.head_H))


# ------------------------------------------------------------------------------- order


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_takes_every_example_at_most_once(num, batch_size, epoch):
    batch_size = min(batch_size, num)
    order = Order(num, batch_size, seed=1)
    first = epoch * order.steps_per_epoch
    taken = np.concatenate([order.step(first + i) for i in range(order.steps_per_epoch)])
    assert len(np.unique(taken)) == len(taken) == num // batch_size * batch_size
    assert taken.max() < num


def test_order_differs_by_epoch_and_seed_only():
    def epoch_of(order, epoch):
        return np.concatenate([order.step(epoch * 5 + i) for i in range(5)]).tolist()

    order = Order(20, 4, seed=1)
    assert epoch_of(order, 1) == epoch_of(Order(20, 4, seed=1), 1)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(Order(20, 4, seed=2), 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 9))
def test_ranks_and_micro_batches_share_a_batch_out(per_rank, world, micro):
    """Together they cover the batch once; each rank makes the same number of passes."""
    size = per_rank * world
    parts = [micro_slices(size, rank, world, micro) for rank in range(world)]
    covered = [i for rank in parts for part in rank for i in range(size)[part]]
    assert covered == list(range(size))
    assert len({len(rank) for rank in parts}) == 1
    assert all(part.stop - part.start <= micro for rank in parts for part in rank)


# ------------------------------------------------------------------------------- reader


def read_table(model, num: int) -> SourceTable:
    return model.tables(tiny.examples(num)).sources


def test_the_reader_cache_does_not_change_states():
    """Cached states equal those read for this batch; what lies behind a source does not matter."""
    index = np.array([8, 2, 5])
    batches = []
    for cache in ("on", "off"):
        model = tiny.latent_model(reader_cache=cache)
        batches.append(model.batch(read_table(model, 9), index))
    cached, fresh = batches
    assert cached.states_BUF.shape == (3, cached.ids_BU.shape[1], 2 * 24)
    real = fresh.mask_BU
    torch.testing.assert_close(cached.states_BUF[real], fresh.states_BUF[real])


def test_reader_cache_off_and_auto(monkeypatch):
    """auto keeps states where they fit; they belong to their table, and go with it."""
    assert read_table(tiny.latent_model(reader_cache="off"), 3).states is None
    assert read_table(tiny.latent_model(reader_cache="auto"), 3).states is not None
    monkeypatch.setattr("lw_fast.reader.CACHE_BYTES_CPU", 100)
    assert read_table(tiny.latent_model(reader_cache="auto"), 3).states is None


def test_equal_sources_are_read_once(monkeypatch):
    """Spans to repeat share their context: it is stored and read once, and each finds its own."""
    model = tiny.latent_model(reader_cache="on")
    examples = tiny.examples(3)
    again = [examples[1], *examples, examples[0]]
    units = []
    states = model.reader.lm.states
    monkeypatch.setattr(
        type(model.reader.lm),
        "states",
        lambda lm, ids, layers: units.append(len(ids)) or states(ids, layers),
    )
    table = model.tables(again).sources
    assert sum(units) == 3
    batch = model.batch(table, np.arange(5))
    expected = model.batch(model.tables(examples).sources, np.array([1, 0, 1, 2, 0]))
    assert torch.equal(batch.ids_BU, expected.ids_BU)
    real = batch.mask_BU
    torch.testing.assert_close(batch.states_BUF[real], expected.states_BUF[real])


def test_reader_states_are_hidden_states_of_the_lm():
    """Layer 0 is the embedding, the last one what the LM's own head reads; each standardised."""
    model = tiny.latent_model()
    batch = model.batch(read_table(model, 2), np.arange(2))
    embedded, last = batch.states_BUF.split(24, dim=-1)
    output = model.reader.lm.model(input_ids=batch.ids_BU, output_hidden_states=True)
    real = batch.mask_BU
    for states, hidden in ((embedded, output.hidden_states[0]), (last, output.hidden_states[2])):
        centred = hidden - hidden.mean(-1, keepdim=True)
        expected = centred / centred.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(states[real], expected[real], atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------- groups


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=300))
def test_length_groups_cut_a_batch_whole(lengths):
    length_B = np.sort(np.array(lengths))
    groups = length_groups(length_B)
    assert np.concatenate([length_B[group] for group in groups]).tolist() == length_B.tolist()
    sizes = [len(length_B[group]) for group in groups]
    assert len(groups) == 1 or min(sizes[:-1]) >= MIN_GROUP
    assert max(sizes) - min(sizes[:-1] or sizes) <= 0


def test_length_groups_save_padding_only_where_there_is_some():
    assert len(length_groups(np.full(512, 300))) == 1
    skewed = np.sort(np.random.default_rng(0).lognormal(5, 0.6, 512).astype(int) + 1)
    groups = length_groups(skewed)
    padded = sum(skewed[group].max() * len(skewed[group]) for group in groups)
    assert 1 < len(groups) <= 32 and padded < 1.5 * skewed.sum()


@pytest.mark.parametrize("kind", ["lm", "byte", "byte_seed"])
@torch.no_grad()
def test_groups_are_the_batch(kind):
    """Z, span scores and losses do not depend on how a batch is cut."""
    model = tiny.latent_model(encoder_type=kind)
    model.bridge.eval()
    table = model.tables(tiny.examples(12)).sources
    order = np.argsort(table.length_N, kind="stable")
    whole = model.batch(table, order)
    parts = [model.batch(table, order[cut]) for cut in (slice(0, 5), slice(5, 12))]
    one, cut = model.bridge(whole), model.bridge(*parts)
    torch.testing.assert_close(cut.encoded.z_BMZ, one.encoded.z_BMZ, rtol=1e-4, atol=1e-5)
    joined = join_sources(parts)
    for name in ("ids_BU", "mask_BU", "context_BU", "span_B2", "span_loss_B", "use_gold_B"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    if kind == "byte_seed":
        assert cut.encoded.span_logits_BU2 is None and cut.encoded.carried_BM is None
        return
    losses = [
        span_loss_sum(out.encoded.span_logits_BU2[:, : whole.ids_BU.shape[1]], *span)
        for out, span in ((one, (whole.span_B2, whole.context_BU)),
                          (cut, (joined.span_B2, joined.context_BU)))
    ]  # fmt: skip
    torch.testing.assert_close(*losses)
    assert torch.equal(cut.encoded.predicted_B2, one.encoded.predicted_B2)
    if kind == "lm":
        assert torch.equal(cut.encoded.carried_BM, one.encoded.carried_BM)
