from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lw_kernels import kl_topk, kl_topk_ref
from lw_kernels.kl_topk import _kl_topk
from yardstick import assert_within, device, seeded

BF16, F32 = torch.bfloat16, torch.float32


def make(num_rows: int, num_vocab: int, num_top: int, dtype: torch.dtype) -> tuple:
    on = seeded(0)
    logits = torch.randn(num_rows, num_vocab, **on) * 2
    teacher, ids = (logits + torch.randn(logits.shape, **on)).topk(num_top)
    return logits.to(dtype), teacher.to(dtype), ids, torch.rand(num_rows, **on) + 0.5


def run(logits, teacher, ids, weights=None, fn=kl_topk, **kwargs):
    leaf = logits.detach().requires_grad_()
    loss = fn(leaf, teacher, ids, weights_N=weights, **kwargs)
    factors = torch.linspace(0.5, 1.5, loss.shape[0], device=loss.device).to(loss)
    return loss, torch.autograd.grad(loss, leaf, factors)[0]


def check(logits, teacher, ids, weights) -> None:
    ours = run(logits, teacher, ids, weights, impl="triton")
    same = run(logits, teacher, ids, weights, kl_topk_ref, upcast=False)
    truth = run(logits.double(), teacher.double(), ids, weights.double(), kl_topk_ref)
    assert_within("loss", ours[0], same[0], truth[0], logits.dtype, 2)
    assert_within("grad", ours[1], same[1], truth[1], logits.dtype, 3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(5, 41, 4), (1, 3001, 16), (3, 7, 1), (0, 41, 4)])
def test_matches_the_reference(shape, dtype):
    check(*make(*shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(320, 128256, 64), (37, 152064, 100)])
def test_matches_the_reference_at_real_shapes(shape):
    check(*make(*shape, BF16))


def test_full_k_is_the_plain_divergence_and_zero_at_the_teacher():
    logits, _, _, _ = make(4, 41, 1, F32)
    ids = torch.arange(41, device=device()).expand(4, -1)
    teacher = torch.randn(4, 41, device=device())
    want = F.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl_topk(logits, teacher, ids, impl="triton"), want)
    loss, grad = run(logits, logits, ids, impl="triton")
    assert loss.abs().max() < 1e-5 and grad.abs().max() < 1e-6


def test_opcheck_and_compile():
    logits, teacher, ids, weights = make(3, 41, 4, F32)
    torch.library.opcheck(_kl_topk, (logits.requires_grad_(), teacher, ids, weights))
    for impl in ("torch", "triton"):
        compiled = torch.compile(kl_topk, fullgraph=True, backend="aot_eager")
        ours = run(logits, teacher, ids, weights, compiled, impl=impl)
        want = run(logits, teacher, ids, weights, impl=impl)
        assert torch.equal(ours[0], want[0]) and torch.equal(ours[1], want[1])


def test_user_errors():
    logits, teacher, ids, weights = make(3, 41, 4, F32)
    with pytest.raises(ValueError, match="int64"):
        kl_topk(logits, teacher, ids.int())
    with pytest.raises(ValueError, match="detach"):
        kl_topk(logits, teacher.requires_grad_(), ids)
    with pytest.raises(ValueError, match="needs logits"):
        kl_topk(logits[1:], teacher.detach(), ids)


def test_negative_control():
    """A teacher at another temperature must not pass."""
    logits, teacher, ids, _ = make(4, 41, 4, F32)
    wrong = run(logits, teacher * 1.01, ids, impl="triton")
    truth = run(logits.double(), teacher.double(), ids, fn=kl_topk_ref)
    with pytest.raises(AssertionError, match="grad"):
        assert_within("grad", wrong[1], truth[1], truth[1], F32, 3)
