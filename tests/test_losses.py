"""Losses: sums against plain loops, and NaN that never counts as a hit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lw_fast.losses import rms_penalty, scale_penalty, span_loss_sum, token_scores


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(6, 20))
def test_token_scores_equal_a_loop(seed, rows, vocab):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    scores = token_scores(logits, targets)
    for row, target, nll, top1, top5 in zip(
        logits.double(), targets, scores.nll_N, scores.top1_N, scores.top5_N, strict=True
    ):
        log_sum = math.log(sum(math.exp(x) for x in row.tolist()))
        assert float(nll) == pytest.approx(log_sum - float(row[target]), abs=1e-5)
        rank = row.tolist().index(float(row[target]))
        order = sorted(range(len(row)), key=lambda i: -float(row[i]))
        assert bool(top1) == (order[0] == rank)
        assert bool(top5) == (rank in order[:5])


def test_scores_are_fp32_and_their_gradient_is_softmax_minus_one():
    logits = torch.randn(4, 9).bfloat16().requires_grad_()
    targets = torch.tensor([0, 3, 8, 8])
    scores = token_scores(logits, targets)
    assert scores.nll_N.dtype == torch.float32
    scores.nll_N.sum().backward()
    expected = logits.detach().float().softmax(1)
    expected[torch.arange(4), targets] -= 1
    torch.testing.assert_close(logits.grad.float(), expected, atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize("where", ["target", "another", "everywhere", "all but the target"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_never_a_hit(where, bad):
    """NaN compares false with everything, so a diverged LM would seem to be always right."""
    row = torch.tensor([[5.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    index = {
        "target": [0],
        "another": [3],
        "everywhere": range(7),
        "all but the target": [*range(1, 7)],
    }
    row[0, list(index[where])] = bad
    scores = token_scores(row, torch.tensor([0]))
    assert not scores.top1_N.any() and not scores.top5_N.any()


def test_a_finite_row_beside_a_nan_row_still_counts():
    rows = torch.tensor([[5.0, 1.0], [math.nan, 1.0]])
    assert token_scores(rows, torch.tensor([0, 0])).top1_N.tolist() == [True, False]


def test_ties_are_hits():
    """No logit exceeds the target's: which of two equal ones is picked is chance."""
    scores = token_scores(torch.zeros(1, 8), torch.tensor([3]))
    assert scores.top1_N.item() and scores.top5_N.item()


# ------------------------------------------------------------------------------- span loss


def cross_entropy(values: list[float], target: int) -> float:
    return math.log(sum(math.exp(v) for v in values)) - values[target]


def test_span_loss_is_a_sum_over_known_spans():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 2)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    spans = torch.tensor([[1, 3], [2, 2], [-1, -1]])
    expected = 0.0
    for b in (0, 1):
        allowed = mask[b].nonzero()[:, 0].tolist()
        for side in (0, 1):
            values = [float(logits[b, u, side]) for u in allowed]
            expected += 0.5 * cross_entropy(values, allowed.index(int(spans[b, side])))
    assert float(span_loss_sum(logits, spans, mask)) == pytest.approx(expected, rel=1e-5)


def test_span_loss_of_unknown_spans_is_zero_and_has_no_gradient():
    logits = torch.randn(2, 4, 2, requires_grad=True)
    loss = span_loss_sum(logits, torch.full((2, 2), -1), torch.ones(2, 4).bool())
    assert loss.item() == 0
    loss.backward()
    assert not logits.grad.any()


def test_span_loss_does_not_reach_masked_units():
    logits = torch.randn(1, 4, 2, requires_grad=True)
    mask = torch.tensor([[False, True, True, False]])
    span_loss_sum(logits, torch.tensor([[1, 2]]), mask).backward()
    assert not logits.grad[0, [0, 3]].any() and logits.grad[0, [1, 2]].all()


def test_span_loss_adds_up():
    """The sum over a batch is the sum over its parts: no mean hides in it."""
    logits, mask = torch.randn(4, 6, 2), torch.ones(4, 6).bool()
    spans = torch.tensor([[0, 1], [2, 5], [-1, -1], [3, 3]])
    whole = span_loss_sum(logits, spans, mask)
    parts = [span_loss_sum(logits[i : i + 1], spans[i : i + 1], mask[:1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).sum())


# ------------------------------------------------------------------------------- penalties


def test_penalties_written_out():
    scales = [torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([0.0])]
    assert scale_penalty(scales).item() == pytest.approx(0.25 + 1.0)
    assert rms_penalty(torch.tensor([0.5, 2.0]), 1.0).item() == pytest.approx(0.25 + 1.0)
