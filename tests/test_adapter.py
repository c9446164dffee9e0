"""Adapters: the original's formula, and calibration that sets the loudness it promises."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lw_fast.adapter import Adapter, Calibration, calibrate, rms

TARGET = 0.0137


def adapter(**changes) -> Adapter:
    torch.manual_seed(0)
    return Adapter(8, 12, tiny.config(**changes).adapter)


def test_linear_adapter_is_the_original():
    """tanh((W LN(Z) + b) * scale / 3) * 3, under the original's names."""
    module = adapter(adapter_type="linear", adapter_bound=3.0)
    torch.nn.init.constant_(module.scale, 5.0)
    z = 10 * torch.randn(2, 3, 8)
    normed = (z - z.mean(-1, keepdim=True)) / (
        z.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    raw = normed @ module.net[1].weight.T + module.net[1].bias
    torch.testing.assert_close(module(z), torch.tanh(raw * 5.0 / 3) * 3)
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == {
        "net.0.weight": (8,),
        "net.0.bias": (8,),
        "net.1.weight": (12, 8),
        "net.1.bias": (12,),
        "scale": (1,),
    }


def test_mlp_is_added_to_the_linear_map():
    z, both, linear = torch.randn(2, 3, 8), adapter(), adapter(adapter_type="linear")
    linear.load_state_dict({k: v for k, v in both.state_dict().items() if "mlp" not in k})
    extra = both.mlp(both.net[0](z))
    assert extra.abs().max() > 1e-3
    torch.testing.assert_close(both(z), linear(z) + extra)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_bound(bound):
    out = adapter(adapter_bound=bound)(100 * torch.randn(2, 3, 8))
    assert (out.abs().max() <= 0.5) == bool(bound)


@pytest.mark.parametrize("freeze", [True, False])
def test_scale_is_trained_only_when_asked(freeze):
    module = adapter(adapter_freeze_scale=freeze)
    module(torch.randn(2, 3, 8)).square().sum().backward()
    assert (module.scale.grad is None) == freeze
    assert all(p.grad.any() for n, p in module.named_parameters() if n != "scale")


# ------------------------------------------------------------------------------- calibration

PREFIXES = st.builds(
    lambda seed, loud: (
        torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(seed)) * 10.0**loud
    ),
    st.integers(0, 10**6),
    st.integers(-3, 3),
)


@settings(max_examples=50, deadline=None)
@given(PREFIXES, st.sampled_from([0.5, 1.0, 2.0]))
def test_calibrated_rms(raw, gain):
    """per_slot: every latent has the target RMS; the other modes: every example has it."""
    slots = rms(calibrate(raw, Calibration("per_slot", TARGET, gain)), (-1,))
    torch.testing.assert_close(slots, torch.full((3, 4), TARGET * gain))
    for mode in ("embed_rms", "fixed"):
        out = calibrate(raw, Calibration(mode, TARGET, gain))
        torch.testing.assert_close(rms(out, (-2, -1)), torch.full((3,), TARGET * gain))
        ratio = out / raw  # one factor per example: latents keep their proportions
        torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(calibrate(raw, Calibration("none", TARGET, gain)), raw * gain)


@settings(max_examples=30, deadline=None)
@given(PREFIXES, st.floats(0.01, 100))
def test_calibration_cancels_loudness(raw, factor):
    """Which is why adapter.scale says nothing under it; without it, it does."""
    for mode in ("per_slot", "embed_rms"):
        torch.testing.assert_close(
            calibrate(raw * factor, Calibration(mode, TARGET)),
            calibrate(raw, Calibration(mode, TARGET)),
            rtol=1e-4,
            atol=1e-7,
        )
    loud = calibrate(raw * factor, Calibration("none", TARGET))
    torch.testing.assert_close(loud, raw * factor)


def test_per_slot_differs_from_per_example():
    """Negative control: a loud and a faint latent tell the two apart."""
    raw = torch.ones(1, 2, 4) * torch.tensor([[[1.0], [9.0]]])
    assert rms(calibrate(raw, Calibration("embed_rms", TARGET)), (-1,))[
        0
    ].tolist() == pytest.approx([TARGET / 41**0.5, TARGET * 9 / 41**0.5])
    assert rms(calibrate(raw, Calibration("per_slot", TARGET)), (-1,))[0].tolist() == pytest.approx(
        [TARGET] * 2
    )


@pytest.mark.parametrize("mode", ["per_slot", "embed_rms"])
def test_a_silent_prefix_gives_no_nan(mode):
    raw = torch.zeros(1, 2, 4, requires_grad=True)
    out = calibrate(raw, Calibration(mode, TARGET))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(raw.grad).all()


def test_calibration_computes_in_fp32():
    """bf16 squares would lose the target by a percent."""
    raw = torch.randn(2, 3, 64).bfloat16()
    out = calibrate(raw, Calibration("per_slot", TARGET))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, calibrate(raw.float(), Calibration("per_slot", TARGET)))


def test_gradient_of_calibration():
    """Orthogonal to the latent itself: its loudness has no influence left."""
    raw = torch.randn(2, 3, 16, dtype=torch.float32, requires_grad=True)
    (calibrate(raw, Calibration("per_slot", TARGET)) * torch.randn(2, 3, 16)).sum().backward()
    assert raw.grad.abs().max() > 1e-4
    along = (raw.grad * raw).sum(-1)
    torch.testing.assert_close(along, torch.zeros(2, 3), atol=1e-6, rtol=0)
