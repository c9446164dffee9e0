"""Losses: sums against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from lw_fast.losses import rms_penalty, scale_penalty, span_loss_sum


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
