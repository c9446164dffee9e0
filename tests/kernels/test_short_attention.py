from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lw_kernels import short_attention, short_attention_ref
from lw_kernels.short_attention import _short_attention
from yardstick import assert_within, device, max_error, seeded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("out", "dq", "dk", "dv")


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device())


def make(lengths, heads=2, groups=1, width=16, dtype=F32, spare=0, seed=0):
    """q, k, v, the gradient of the output, and where sequences start."""
    rows, on = sum(lengths) + spare, seeded(seed)
    q, k, v, grad = (torch.randn(rows, n, width, **on) for n in (heads, groups, groups, heads))
    # Scores that differ, so that neither softmax nor its gradient is flat.
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype), starts(lengths)


def run(q, k, v, grad, cu, fn=short_attention, max_len=None, **kwargs):
    """out, dq, dk, dv; `fn` gets the leaves themselves."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    max_len = max_len or max(int(cu.diff().max()), 1)
    out = fn(*leaves, cu, max_len, **kwargs)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))


def check(q, k, v, grad, cu, max_len=None, scale=None) -> None:
    settings_ = {"max_len": max_len, "scale": scale}
    wide = (x.double() for x in (q, k, v))
    ours = run(q, k, v, grad, cu, impl="triton", **settings_)
    same = run(q, k, v, grad, cu, short_attention_ref, upcast=False, **settings_)
    truth = run(*wide, grad, cu, short_attention_ref, **settings_)
    assert all(x.dtype == q.dtype for x in ours)
    for i, name in enumerate(NAMES):
        assert_within(name, ours[i], same[i], truth[i], q.dtype, 3 if i else 2)


def alone(q, k, v, grad, cu):
    """out, dq, dk, dv of torch's SDPA on each sequence by itself."""
    groups, parts = q.shape[1] // k.shape[1], []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        leaves = [x[start:end].detach().requires_grad_() for x in (q, k, v)]
        heads = [
            x.transpose(0, 1).repeat_interleave(n, 0)
            for x, n in zip(leaves, (1, groups, groups), strict=True)
        ]
        out = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1)
        parts.append((out.detach(), *torch.autograd.grad(out, leaves, grad[start:end])))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("fn", [short_attention, short_attention_ref])
def test_is_sdpa_of_each_sequence(fn):
    inputs = make([3, 1, 17, 9], heads=6, groups=2)
    kwargs = {"impl": "triton"} if fn is short_attention else {}
    for ours, want in zip(run(*inputs, fn, **kwargs), alone(*inputs), strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "lengths, heads, groups, width",
    [
        ([5, 0, 16, 17], 3, 1, 16),
        ([33, 1], 4, 2, 24),
        ([70, 0, 64, 65], 2, 1, 32),
        ([130], 1, 1, 8),
        ([0, 2, 0], 2, 2, 80),
        ([7], 1, 1, 1),
    ],
)
def test_matches_the_reference(lengths, heads, groups, width, dtype):
    check(*make(lengths, heads, groups, width, dtype, spare=3))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 60),
)
def test_any_layout(lengths, group, groups, width, spare, slack):
    """Whatever the lengths, and whatever bound on them is given."""
    inputs = make(lengths, group * groups, groups, width, spare=spare)
    check(*inputs, max_len=max(1, *lengths) + slack)


REAL = [(512, 9, 3, 64), (64, 32, 8, 128), (64, 28, 4, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("batch, heads, groups, width", REAL)
@pytest.mark.parametrize("longest", [60, 70, 128])
def test_matches_the_reference_at_real_shapes(batch, heads, groups, width, longest, dtype):
    lengths = torch.randint(30, longest + 1, (batch,), generator=torch.manual_seed(0)).tolist()
    check(*make([*lengths, longest, 0], heads, groups, width, dtype, spare=40))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 32, 80, 96])
def test_matches_the_reference_at_other_widths(width):
    check(*make([40, 0, 500, 64, 1], 6, 2, width, BF16, spare=5))


@pytest.mark.gpu
def test_offsets_past_2_31_elements():
    """The last sequences of a tensor that int32 offsets do not reach."""
    lengths, heads, width = [50] * 5600, 64, 128
    assert sum(lengths) * heads * width > 2**31
    cu = starts(lengths)
    q = torch.randn(sum(lengths), heads, width, device="cuda", dtype=BF16)
    k, v = torch.randn(2, sum(lengths), 1, width, device="cuda", dtype=BF16)
    ours = run(q, k, v, q, cu, impl="triton")
    last = slice(-100, None)
    want = run(q[last], k[last], v[last], q[last], starts([50, 50]), short_attention_ref)
    for x, y in zip(ours, want, strict=True):
        assert max_error(x[last], y) < 1e-2 * float(y.abs().max())


def test_hostile_layouts():
    """Views of [1, H, R, K], slices of one tensor, a strided last dimension, expanded gradients."""
    q, k, v, grad, cu = make([5, 18], heads=4, groups=2)
    by_head = [x.transpose(0, 1).contiguous()[None][0].transpose(0, 1) for x in (q, k, v)]
    assert not by_head[0].is_contiguous()
    check(*by_head, grad, cu)
    fused = torch.cat([q, k, v], 1)
    check(
        fused[:, :4], fused[:, 4:6], fused[:, 6:], grad.transpose(0, 1).clone().transpose(0, 1), cu
    )
    check(q.mT.contiguous().mT, k[..., ::2].repeat_interleave(2, -1).flip(-1), v, grad, cu)
    check(q, k[:, :1].expand(-1, 2, -1), v, grad[:1, :1, :1].expand_as(grad), cu)


def test_a_scale_of_its_own():
    check(*make([20, 7], heads=2), scale=0.7)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_spare_rows_are_zero_whatever_they_hold(impl):
    q, k, v, grad, cu = make([4, 30], heads=2, spare=37)
    want = run(q[:34], k[:34], v[:34], grad[:34], cu, impl=impl)
    for x in (q, k, v, grad):
        x[34:] = float("nan")
    for ours, exact in zip(run(q, k, v, grad, cu, impl=impl), want, strict=True):
        assert torch.equal(ours[:34], exact) and (ours[34:] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_to_do(impl):
    for lengths, spare in (([], 0), ([], 5), ([0, 0], 0), ([0, 0], 5)):
        q, k, v, grad, _ = make([], spare=spare)
        results = run(q, k, v, grad, starts(lengths), max_len=8, impl=impl)
        assert all(x.shape[0] == spare and (x == 0).all() for x in results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sequence(value, impl):
    for which in range(4):
        inputs = make([6, 20, 5])
        inputs[which][15] = value
        results = run(*inputs, impl=impl)
        bad = torch.stack([(~x.isfinite()).flatten(1).any(1) for x in results]).any(0)
        assert bad[6:26].any() and not bad[:6].any() and not bad[26:].any()


def test_max_len_that_is_too_small():
    """The kernel does not depend on it; PyTorch, which does, is loud."""
    inputs = make([70, 3])
    exact = run(*inputs, impl="triton")
    for ours, want in zip(run(*inputs, max_len=10, impl="triton"), exact, strict=True):
        torch.testing.assert_close(ours, want)
    if device() == "cpu":  # on a GPU the assertion ends the process' context
        with pytest.raises(RuntimeError, match="max_len"):
            run(*inputs, max_len=69, impl="torch")


def test_second_backward_repeats_the_first():
    *inputs, grad, cu = make([30, 66], heads=4, groups=2, dtype=BF16)
    leaves = [x.requires_grad_() for x in inputs]
    out = short_attention(*leaves, cu, 66, impl="triton")
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_user_errors():
    q, k, v, _, cu = make([4, 3], heads=4, groups=2)
    with pytest.raises(ValueError, match="do not fit"):
        short_attention(q[:, :3], k, v, cu, 4)
    with pytest.raises(ValueError, match="do not fit"):
        short_attention(q, k[..., 1:], v[..., 1:], cu, 4)
    with pytest.raises(ValueError, match="do not fit"):
        short_attention(q, k, v[1:], cu, 4)
    with pytest.raises(ValueError, match="one dtype"):
        short_attention(q, k, v.bfloat16(), cu, 4)
    with pytest.raises(ValueError, match="int32"):
        short_attention(q, k, v, cu.long(), 4)
    with pytest.raises(ValueError, match="positive"):
        short_attention(q, k, v, cu, 0)
    with pytest.raises(ValueError, match="float64"):
        short_attention(q.double(), k.double(), v.double(), cu, 4, impl="triton")
    wide = make([4], width=129)
    with pytest.raises(ValueError, match="K 129 > 128"):
        run(*wide, impl="triton")
    assert run(*wide)[0].shape == (4, 2, 129)


def test_opcheck():
    q, k, v, _, cu = make([4, 3], heads=4, groups=2)
    leaves = [x.transpose(0, 1).clone().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_short_attention, (*leaves, cu, 4, 0.25))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(impl, backend):
    inputs = make([5, 20, 1], heads=4, groups=2)
    compiled = torch.compile(short_attention, fullgraph=True, backend=backend)
    ours, want = run(*inputs, compiled, impl=impl), run(*inputs, impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


def test_negative_control():
    """Sequences that see their neighbours, and heads with another group's keys, must not pass."""
    q, k, v, grad, cu = make([9, 12], heads=4, groups=2)
    same = run(q, k, v, grad, cu, short_attention_ref, upcast=False)
    truth = run(q.double(), k.double(), v.double(), grad, cu, short_attention_ref)
    merged = run(q, k, v, grad, cu[[0, 2]], impl="triton")
    swapped = run(q, k.flip(1), v.flip(1), grad, cu, impl="triton")
    for wrong in (merged, swapped):
        for i, name in enumerate(NAMES):
            with pytest.raises(AssertionError, match=name):
                assert_within(name, wrong[i], same[i], truth[i], F32, 3)
