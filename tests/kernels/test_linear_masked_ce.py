from __future__ import annotations

import pytest
import torch
from lw_kernels import linear_masked_ce, linear_masked_ce_ref
from lw_kernels.linear_masked_ce import CHUNK_BYTES, _linear_masked_ce, rows_per_chunk
from yardstick import assert_within, device, max_error, seeded

BF16, F32 = torch.bfloat16, torch.float32


def make(num_rows: int, num_vocab: int, dim: int, dtype: torch.dtype, ignored: float = 0.2):
    """Hidden rows, of which every other points at its label's row of the head."""
    on = seeded(0)
    weight = torch.randn(num_vocab, dim, **on) * 0.5
    labels = torch.randint(0, num_vocab, (num_rows,), **on)
    hidden = torch.randn(num_rows, dim, **on) / dim**0.5
    hidden[::2] += weight[labels[::2]] * (40 / dim)
    labels[torch.rand(num_rows, **on) < ignored] = -100
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "labels": labels,
        "bias": torch.randn(num_vocab, **on).to(dtype),
        "weights": torch.rand(num_rows, **on) + 0.5,
    }


def run(x: dict, fn=linear_masked_ce, wide: bool = False, bias: bool = True, **kwargs):
    """The rows and the gradient of the hidden rows under a different factor for every row."""
    cast = (lambda t: t.double()) if wide else (lambda t: t)
    hidden = cast(x["hidden"].detach()).requires_grad_()
    rows = fn(
        hidden,
        cast(x["weight"]),
        x["labels"],
        bias_V=cast(x["bias"]) if bias else None,
        weights_N=cast(x["weights"]),
        **kwargs,
    )
    factors = torch.linspace(0.5, 1.5, hidden.shape[0], device=hidden.device).to(rows.loss)
    return rows, torch.autograd.grad(rows.loss, hidden, factors)[0]


def check(x: dict, wide: bool = True, **kwargs) -> None:
    """`wide` takes fp64 as the truth, else fp32 (where an fp64 head would not fit)."""
    bias = {"bias": kwargs.pop("bias", True)}
    ours, ours_grad = run(x, impl="triton", **bias, **kwargs)
    same, same_grad = run(x, linear_masked_ce_ref, **bias)
    truth, truth_grad = run(x, linear_masked_ce_ref, wide, upcast=True, **bias)
    dtype = x["hidden"].dtype
    assert ours_grad.dtype == dtype
    for name in ("loss", "nll", "lse"):
        fields = (getattr(rows, name) for rows in (ours, same, truth))
        assert_within(name, *fields, dtype, 2)
    assert_within("grad", ours_grad, same_grad, truth_grad, dtype, 3)
    # bf16 logits tie; the flags are those of the logits that both computed.
    agree = (ours.top1 == same.top1) & (ours.top5 == same.top5)
    assert agree.float().mean() >= (1.0 if dtype == F32 else 0.95)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_the_reference(dtype, chunk_rows, bias):
    check(make(8, 41, 123, dtype), chunk_rows=chunk_rows, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(320, 128256, 4096), (77, 152064, 3584), (1, 128256, 4096), (700, 41, 123)]
)
@pytest.mark.parametrize("chunk_rows", [None, 256])
def test_matches_the_reference_at_real_shapes(shape, chunk_rows):
    check(make(*shape, BF16), wide=False, chunk_rows=chunk_rows, bias=shape[0] != 320)


@pytest.mark.gpu
def test_many_rows_hold_few_logits():
    x = make(64, 128256, 1024, BF16)
    num_rows = 17_000
    pick = torch.randint(0, 64, (num_rows,), device="cuda")
    few, few_grad = run(x, bias=False, impl="triton")
    hidden = x["hidden"][pick].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows = linear_masked_ce(hidden, x["weight"], x["labels"][pick], weights_N=x["weights"][pick])
    extra = torch.cuda.max_memory_allocated() - before
    assert max_error(rows.loss, few.loss[pick]) < 1e-2
    assert extra < 0.1 * num_rows * 128256 * 2


def test_row_chunks():
    """Whole rows within the budget, of about equal size, never none."""
    assert rows_per_chunk(320, 128256, 2) == 320
    assert rows_per_chunk(2048, 128256, 2) == 1024
    assert rows_per_chunk(1100, 152064, 2) == 640
    assert rows_per_chunk(0, 128256, 2) == 1
    assert rows_per_chunk(9, 1 << 40, 2) == 1
    for num_rows in (1, 1000, 16384, 123457):
        assert rows_per_chunk(num_rows, 152064, 2) * 152064 * 2 <= CHUNK_BYTES


def test_hostile_rows():
    x = make(5, 41, 16, F32)
    strided = dict(x, hidden=torch.randn(16, 5, device=device()).t())
    check(strided)
    check(dict(x, weight=torch.randn(16, 41, device=device()).t()), chunk_rows=2)
    ignored = dict(x, labels=torch.full_like(x["labels"], -100))
    rows, grad = run(ignored, impl="triton")
    assert all((field == 0).all() for field in rows) and (grad == 0).all()
    empty = {k: v if k in ("weight", "bias") else v[:0] for k, v in x.items()}
    rows, grad = run(empty, impl="triton")
    assert rows.loss.shape == (0,) and grad.shape == (0, 16)
    x["hidden"][1, 3] = float("nan")
    x["labels"][1] = 5
    rows, grad = run(x, impl="triton")
    assert rows.loss[1].isnan() and grad[1].isnan().all() and grad[0].isfinite().all()


def test_tied_head_gets_no_gradient():
    x = make(5, 41, 16, F32)
    table = torch.nn.Embedding.from_pretrained(x["weight"], freeze=True)
    hidden = (table(x["labels"].clamp_min(0)) + x["hidden"]).requires_grad_()
    linear_masked_ce(hidden, table.weight, x["labels"], impl="triton").loss.sum().backward()
    assert table.weight.grad is None and hidden.grad is not None


def test_no_gradient_without_need():
    x = make(5, 41, 16, F32)
    with torch.no_grad():
        rows = linear_masked_ce(x["hidden"], x["weight"], x["labels"], impl="triton")
    assert not rows.loss.requires_grad
    rows = linear_masked_ce(x["hidden"].requires_grad_(), x["weight"], x["labels"], impl="triton")
    assert rows.loss.requires_grad and not rows.nll.requires_grad


def test_second_backward_repeats_the_first():
    x = make(5, 41, 16, F32)
    hidden = x["hidden"].requires_grad_()
    loss = linear_masked_ce(hidden, x["weight"], x["labels"], impl="triton").loss.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_user_errors():
    x = make(5, 41, 16, F32)
    with pytest.raises(ValueError, match="frozen"):
        linear_masked_ce(x["hidden"], x["weight"].clone().requires_grad_(), x["labels"])
    with pytest.raises(ValueError, match="one dtype"):
        linear_masked_ce(x["hidden"], x["weight"].bfloat16(), x["labels"])
    with pytest.raises(ValueError, match="do not fit"):
        linear_masked_ce(x["hidden"][:, 1:], x["weight"], x["labels"])
    with pytest.raises(ValueError, match="bias"):
        linear_masked_ce(x["hidden"], x["weight"], x["labels"], bias_V=x["bias"][1:])


@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(need_grad):
    x = make(5, 41, 16, F32)
    hidden = x["hidden"].requires_grad_(need_grad)
    args = (hidden, x["weight"], x["bias"], x["labels"], x["weights"], -100, 2, need_grad)
    torch.library.opcheck(_linear_masked_ce, args)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break(impl):
    x = make(5, 41, 16, F32)
    compiled = torch.compile(linear_masked_ce, fullgraph=True, backend="aot_eager")
    ours, grad = run(x, compiled, impl=impl)
    want, want_grad = run(x, impl=impl)
    assert torch.equal(ours.loss, want.loss) and torch.equal(grad, want_grad)


def test_negative_control():
    """A row weight that is applied twice must not pass."""
    x = make(6, 41, 16, F32, ignored=0)
    wrong = run(dict(x, weights=x["weights"] ** 2), impl="triton")
    same, truth = run(x, linear_masked_ce_ref), run(x, linear_masked_ce_ref, wide=True)
    assert_within("nll", wrong[0].nll, same[0].nll, truth[0].nll, F32, 2)
    with pytest.raises(AssertionError, match="loss"):
        assert_within("loss", wrong[0].loss, same[0].loss, truth[0].loss, F32, 2)
    with pytest.raises(AssertionError, match="grad"):
        assert_within("grad", wrong[1], same[1], truth[1], F32, 3)
