"""Packed and padded batches are the same batch."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lw_kernels import short_attention

from lw_fast import frozen_lm
from lw_fast.batches import IGNORE, AnswerTable
from lw_fast.bridge import frame_prefix, frozen_lm_loss, supervised_scores
from lw_fast.config import BackboneConfig
from lw_fast.errors import UserError
from lw_fast.frozen_lm import load_frozen_lm
from lw_fast.packed_attention import _masked, _short, packed_attention
from lw_fast.packing import GROWTH, ROW_MULTIPLE, PackedSizes

NUM = 7
ALL = np.arange(NUM)


@pytest.fixture(scope="module")
def models():
    """The same tiny LMs, for packed and for padded batches."""
    padded = tiny.latent_model()
    packed = tiny.latent_model()
    for lm in packed.lms.values():
        lm.packed = True
    return padded, packed


@pytest.fixture
def first_steps(monkeypatch):
    """Compiled layers without a compiler: the graphs are traced, then run as they are."""
    compile_ = torch.nn.Module.compile
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def traced(module, **options):
        compile_(module, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    return graphs


def both(models, name):
    """(lm, answers) of the padded and of the packed model."""
    for model in models:
        yield model.lms[name], model.tables(tiny.examples(NUM)).answers[name].batch(ALL)


# ------------------------------------------------------------------------------- the layout


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 12)
)
def test_the_layout_holds_every_row(lengths, prefix_len, batch):
    length_N = np.array(lengths)
    sizes = PackedSizes.of(length_N, prefix_len)
    index = np.arange(batch) % len(length_N)
    length_B = length_N[index]
    rows = sizes.num_rows(length_B)
    cu = sizes.cu_seqlens(length_B, rows)
    real = batch * prefix_len + length_B.sum()
    assert real <= rows <= batch * sizes.max_len
    assert cu[0] == 0 and cu[-1] == rows
    assert np.diff(cu)[:batch].tolist() == (prefix_len + length_B).tolist()
    assert (np.diff(cu) >= 0).all() and np.diff(cu).max() <= sizes.max_len
    assert sizes.num_targets(batch, rows) >= (length_B + 1).sum()


def test_nearly_every_batch_has_the_same_shape():
    """Also the number of spare sequences: shapes depend on R alone."""
    generator = np.random.default_rng(0)
    length_N = generator.geometric(0.25, 10_000).clip(max=24)
    sizes = PackedSizes.of(length_N, 34)
    shapes = []
    for _ in range(500):
        length_B = generator.choice(length_N, 64)
        rows = sizes.num_rows(length_B)
        shapes.append((rows, len(sizes.cu_seqlens(length_B, rows))))
    usual, count = max(((shape, shapes.count(shape)) for shape in set(shapes)), key=lambda x: x[1])
    assert count >= 485 and len(set(shapes)) <= 3
    assert usual[0] % ROW_MULTIPLE == 0
    assert usual[0] < 1.06 * 64 * (34 + length_N.mean())
    assert all(rows % GROWTH == usual[0] % GROWTH for rows, _ in shapes)


# ------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("groups", [1, 3])
def test_attention_stays_within_a_sequence(groups):
    torch.manual_seed(0)
    lengths, heads = [3, 1, 5, 0, 2], 2
    rows = sum(lengths)
    q = torch.randn(1, heads * groups, rows, 4)
    k, v = torch.randn(2, 1, heads, rows, 4)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out, _ = packed_attention(
        None, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, max_length_q=max(lengths)
    )
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if start == end:
            continue
        part = [t[:, :, start:end] for t in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[:, start:end], alone.transpose(1, 2))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_kernel_for_short_sequences_traces_and_agrees(impl, monkeypatch):
    """What a GPU would run, here through PyTorch and through Triton's interpreter."""
    monkeypatch.setattr(
        "lw_fast.packed_attention.short_attention", functools.partial(short_attention, impl=impl)
    )
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 12, 16).transpose(1, 2)[0] for heads in (4, 2, 2)]
    cu = torch.tensor([0, 7, 7, 12], dtype=torch.int32)
    results = []
    for attend in (_masked, _short, torch.compile(_short, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = attend(*leaves, cu, 7, 0.3)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        for ours, want in zip(other, results[0], strict=True):
            assert (ours - want).norm() <= 1e-5 * want.norm()


# ------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_packed_and_padded_agree(models, name):
    """Loss, statistics and the gradient of the prefix; spare rows change nothing."""
    results = []
    for lm, answers in both(models, name):
        torch.manual_seed(1)
        leaf = (0.3 * torch.randn(NUM, 6, lm.d_model)).requires_grad_()
        loss, stats = frozen_lm_loss(lm, leaf, answers, row_weight=0.3, first_weight=0.2)
        loss.backward()
        results.append((loss.detach(), stats, leaf.grad))
    for padded, packed in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm()


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_packed_rows_hold_what_padded_rows_hold(models, name):
    (lm, padded), (_, packed) = both(models, name)
    assert packed.packing is not None and padded.packing is None
    prefix = torch.randn(NUM, 6, lm.d_model)
    wide = frame_prefix(lm, prefix, padded).embeds
    framed = frame_prefix(lm, prefix, packed)
    starts = packed.packing.cu_seqlens[: NUM + 1].tolist()
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        assert torch.equal(framed.embeds[start:end], wide[b, : end - start])
        assert framed.position_ids[start:end].tolist() == list(range(end - start))
    assert starts[NUM] <= packed.packing.num_rows
    kept = packed.target_N != IGNORE
    assert packed.target_N[kept].tolist() == padded.target_N.tolist()
    assert packed.first_N.sum() == NUM and not packed.first_N[~kept].any()


def test_an_example_does_not_see_its_neighbour(models):
    (lm, answers) = list(both(models, "qwen"))[1]
    torch.manual_seed(0)
    prefix = torch.randn(NUM, 6, lm.d_model)
    before = supervised_scores(lm, prefix, answers).nll
    changed = prefix.clone()
    changed[2] += 1
    after = supervised_scores(lm, changed, answers).nll
    row = torch.searchsorted(answers.packing.cu_seqlens, answers.position_N, right=True) - 1
    moved = (before - after).abs() > 1e-6
    assert moved.any() and set(row[moved].tolist()) == {2}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_choice_of_kernels_reaches_attention(models, monkeypatch, kernels):
    """kernels=torch asks for no kernel of ours, in attention too."""
    seen = []

    def watched(*args, kernels, **options):
        seen.append(kernels)
        return packed_attention(*args, **options)

    monkeypatch.setattr(frozen_lm, "packed_attention", watched)
    frozen_lm._register_packed_attention.cache_clear()
    lm, answers = list(both(models, "qwen"))[1]
    lm = dataclasses.replace(lm, kernels=kernels)
    supervised_scores(lm, torch.randn(NUM, 6, lm.d_model), answers)
    frozen_lm._register_packed_attention.cache_clear()
    assert set(seen) == {kernels}


# ------------------------------------------------------------------------------- compiled layers


@pytest.mark.parametrize("source", ["nano:llama", "nano:qwen"])
def test_one_graph_serves_all_layers_and_steps(source, first_steps):
    """Traced once, whatever is evaluated in between, and with the numbers of the plain layers."""
    torch._dynamo.reset()
    config = BackboneConfig(layout="packed", compile="yes")
    lm = load_frozen_lm("lm", source, config, tiny.CPU)
    plain = lm.rerun(BackboneConfig(layout="packed"))
    assert lm.compiled and lm.packed and plain.packed and not plain.compiled
    answers = ["Paris", "a small green bicycle", "1066", "in the old town"] * 4
    table = AnswerTable(lm, answers, tiny.config())
    torch.manual_seed(0)
    for step in range(3):
        index = np.random.default_rng(step).permutation(len(answers))[:8]
        batch = table.batch(index)
        prefix = torch.randn(8, 6, lm.d_model)
        losses = []
        for runner in (lm, plain):
            leaf = prefix.clone().requires_grad_()
            loss, _ = frozen_lm_loss(runner, leaf, batch, row_weight=1.0, first_weight=0.0)
            loss.backward()
            losses.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        lm.hidden(torch.randn(2, 5 + step, lm.d_model))
        lm.states(torch.ones(1, 3 + step, dtype=torch.int64), [0, 1])
    assert len(first_steps) == 1


# ------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(layout="packed", attn_implementation="eager"), "attn_implementation"),
        (dict(layout="padded", compile="yes"), "needs layout=packed"),
    ],
)
def test_contradictions(wrong, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**wrong)
