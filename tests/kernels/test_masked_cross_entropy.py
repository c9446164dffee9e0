from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lw_kernels import masked_cross_entropy, masked_cross_entropy_ref
from lw_kernels.masked_cross_entropy import _masked_cross_entropy
from yardstick import assert_within, device, max_error, seeded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def make(num_rows: int, num_vocab: int, dtype: torch.dtype, ignored: float = 0.2, seed: int = 0):
    """Logits with some clear winners (a flat softmax would hide a broken one), labels, weights."""
    on = seeded(seed)
    logits = torch.randn(num_rows, num_vocab, **on) * 2
    labels = torch.randint(0, num_vocab, (num_rows,), **on)
    logits[::2] += 12 * F.one_hot(labels[::2], num_vocab)
    labels[torch.rand(num_rows, **on) < ignored] = -100
    return logits.to(dtype), labels, torch.rand(num_rows, **on) + 0.5


def run(logits, labels, weights=None, fn=masked_cross_entropy, **kwargs):
    """The rows and the gradient of the logits under a different factor for every row."""
    leaf = logits.detach().requires_grad_()
    x = leaf.clone() if kwargs.get("inplace_backward") else leaf
    rows = fn(x, labels, weights_N=weights, **kwargs)
    factors = torch.linspace(0.5, 1.5, labels.shape[0], device=logits.device).to(rows.loss)
    return rows, torch.autograd.grad(rows.loss, leaf, factors)[0]


def check(logits, labels, weights, **kwargs) -> None:
    ours, ours_grad = run(logits, labels, weights, impl="triton", **kwargs)
    same, same_grad = run(logits, labels, weights, masked_cross_entropy_ref, upcast=False)
    wide = None if weights is None else weights.double()
    truth, truth_grad = run(logits.double(), labels, wide, masked_cross_entropy_ref)
    dtype = logits.dtype
    assert ours_grad.dtype == dtype and ours.loss.dtype == torch.float32
    for name in ("loss", "nll", "lse"):
        fields = (getattr(rows, name) for rows in (ours, same, truth))
        assert_within(name, *fields, dtype, 2)
    assert_within("grad", ours_grad, same_grad, truth_grad, dtype, 3)
    assert torch.equal(ours.top1, truth.top1) and torch.equal(ours.top5, truth.top5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(7, 41), (1, 5003), (3, 2048), (4, 1)])
def test_matches_the_reference(shape, dtype):
    logits, labels, weights = make(*shape, dtype)
    check(logits, labels, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(320, 128256), (37, 152064), (1, 128256), (2048, 41)])
def test_matches_the_reference_at_real_shapes(shape, dtype):
    check(*make(*shape, dtype))


@pytest.mark.gpu
def test_offsets_past_2_31_elements():
    num_rows, num_vocab = 16_800, 128_256
    assert num_rows * num_vocab > 2**31
    logits = torch.randn(num_rows, num_vocab, device="cuda", dtype=BF16)
    labels = torch.randint(0, num_vocab, (num_rows,), device="cuda")
    rows, grad = run(logits, labels, impl="triton")
    last = slice(num_rows - 3, num_rows)
    leaf = logits[last].float().requires_grad_()
    want = masked_cross_entropy_ref(leaf, labels[last])
    factors = torch.linspace(0.5, 1.5, num_rows, device="cuda")[last]
    want_grad = torch.autograd.grad(want.loss, leaf, factors)[0]
    assert max_error(rows.loss[last], want.loss) < 1e-4
    assert max_error(grad[last], want_grad) < 1e-2


def test_hostile_layouts():
    """Logits that are a slice or transposed; labels at an odd address."""
    logits, labels, weights = make(6, 123, F32)
    odd = torch.cat([labels[:1], labels])[1:]
    check(logits[:, 3:], odd % 100, weights)
    check(logits.t().contiguous().t(), odd, weights[::1])
    check(logits[::2], labels[::2], torch.rand(12, device=device())[::4])
    check(logits[:1].expand(6, -1), labels, None)


def test_all_rows_ignored_and_empty_batch():
    logits, labels, weights = make(3, 41, BF16)
    logits[0] = float("nan")
    for labels_ in (torch.full_like(labels, -100),):
        rows, grad = run(logits, labels_, weights, impl="triton")
        assert all((field == 0).all() for field in rows) and (grad == 0).all()
    rows, grad = run(logits[:0], labels[:0], weights[:0], impl="triton")
    assert all(field.shape == (0,) for field in rows) and grad.shape == (0, 41)


def test_another_ignore_index():
    logits, labels, _ = make(5, 41, F32, ignored=0)
    rows, _ = run(logits, labels, ignore_index=int(labels[2]), impl="triton")
    assert rows.loss[2] == 0 and (rows.loss[labels != labels[2]] != 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_propagate(value):
    logits, labels, _ = make(4, 3000, F32, ignored=0)
    logits[1, 2500] = value
    for impl in ("torch", "triton"):
        rows, grad = run(logits, labels, impl=impl)
        assert rows.loss.isfinite().tolist() == [True, False, True, True]
        assert not grad[1].isfinite().all() and grad[[0, 2, 3]].isfinite().all()
        assert not rows.top1[1] and not rows.top5[1]


def test_banned_tokens():
    """-inf logits: a whole first block, and the label itself."""
    logits, labels, _ = make(3, 5000, F32, ignored=0)
    labels[:] = torch.tensor([4999, 4000, 7])
    logits[0, :4096] = float("-inf")
    logits[1, 10:20] = float("-inf")
    check(logits[:2], labels[:2], None)
    logits[2, 7] = float("-inf")
    rows, grad = run(logits, labels, impl="triton")
    assert rows.nll[2] == float("inf") and rows.lse[2].isfinite() and not rows.top5[2]
    assert grad.isfinite().all()
    logits[2] = float("-inf")
    assert run(logits, labels, impl="triton")[0].nll[2].isnan()


def test_top_flags_count_ties_as_hits():
    logits = torch.zeros(3, 10, device=device())
    logits[1, :4], logits[2, :5] = 1.0, 1.0
    labels = torch.full((3,), 9, device=device())
    rows = masked_cross_entropy(logits, labels, impl="triton")
    assert rows.top1.tolist() == [True, False, False]
    assert rows.top5.tolist() == [True, True, False]


def test_label_outside_the_vocabulary_is_loud():
    logits, labels, _ = make(3, 41, F32, ignored=0)
    labels[0], labels[1] = 41, -3
    rows, grad = run(logits, labels, impl="triton")
    assert rows.loss.isnan().tolist() == [True, True, False]


def test_inplace_backward_agrees_and_works_once():
    logits, labels, weights = make(5, 300, BF16)
    check(logits, labels, weights, inplace_backward=True)
    x = logits.clone().requires_grad_() * 1
    loss = masked_cross_entropy(x, labels, inplace_backward=True, impl="triton").loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_backward_leaves_the_logits_alone():
    logits, labels, weights = make(5, 300, BF16)
    before, x = logits.clone(), logits.requires_grad_()
    loss = masked_cross_entropy(x, labels, weights_N=weights, impl="triton").loss.sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    assert torch.equal(x, before) and torch.equal(first, second)


def test_user_errors():
    logits, labels, weights = make(3, 41, F32)
    with pytest.raises(ValueError, match="logits"):
        masked_cross_entropy(logits, labels[1:])
    with pytest.raises(ValueError, match="int64"):
        masked_cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match="detach"):
        masked_cross_entropy(logits, labels, weights_N=weights.requires_grad_())
    with pytest.raises(ValueError, match="inplace_backward"):
        masked_cross_entropy(logits, labels, inplace_backward=True, impl="torch")
    with pytest.raises(ValueError, match="strided"):
        masked_cross_entropy(
            torch.zeros(41, 3, device=device()).t(), labels, inplace_backward=True, impl="triton"
        )


def test_opcheck():
    logits, labels, weights = make(3, 41, F32)
    args = (logits.requires_grad_(), labels, weights, -100, False)
    torch.library.opcheck(_masked_cross_entropy, args)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break(impl):
    logits, labels, weights = make(3, 41, F32)
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="aot_eager")
    ours, grad = run(logits, labels, weights, compiled, impl=impl)
    want, want_grad = run(logits, labels, weights, impl=impl)
    assert torch.equal(ours.loss, want.loss) and torch.equal(grad, want_grad)


def test_negative_control():
    """Labels shifted by one position must not pass."""
    logits, labels, _ = make(6, 41, F32, ignored=0)
    wrong, wrong_grad = run(logits, labels.roll(1), impl="triton")
    same, same_grad = run(logits, labels, fn=masked_cross_entropy_ref, upcast=False)
    truth, truth_grad = run(logits.double(), labels, fn=masked_cross_entropy_ref)
    assert_within("lse", wrong.lse, same.lse, truth.lse, F32, 2)
    with pytest.raises(AssertionError, match="nll"):
        assert_within("nll", wrong.nll, same.nll, truth.nll, F32, 2)
    with pytest.raises(AssertionError, match="grad"):
        assert_within("grad", wrong_grad, same_grad, truth_grad, F32, 3)
