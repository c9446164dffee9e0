import logging

import pytest
import torch
from lw_kernels import dispatch, masked_cross_entropy
from lw_kernels.dispatch import choose
from torch.utils._python_dispatch import TorchDispatchMode
from yardstick import device, seeded


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu():
    assert choose("op", "auto", "cpu", (torch.float32,)) == "torch"
    assert choose("op", "auto", "cuda", (torch.bfloat16,)) == "triton"
    assert choose("op", "auto", "cuda", (torch.float64,)) == "torch"


def test_forced_but_impossible_raises(monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        choose("op", "triton", "cuda", (torch.float64,))
    with pytest.raises(ValueError, match="must be one of"):
        choose("op", "cutlass", "cpu", (torch.float32,))
    with pytest.raises(ValueError, match="too wide"):
        choose("op", "triton", "cuda", (torch.float32,), "too wide")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'cpu'"):
        choose("op", "triton", "cpu", (torch.float32,))


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lw_kernels"):
        for _ in range(3):
            choose("op", "auto", "cpu", (torch.float32,))
    assert [r.getMessage() for r in caplog.records] == ["op: impl=auto -> torch on cpu"]


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name())
        return op(*args, **(kwargs or {}))


def test_a_plain_call_and_the_op_agree_and_a_dispatch_mode_sees_the_op():
    logits = torch.randn(3, 50, **seeded(0)).requires_grad_()
    labels = torch.tensor([1, -100, 49], device=device())

    def grad_and_loss():
        loss = masked_cross_entropy(logits, labels, impl="triton").loss
        return torch.autograd.grad(loss.sum(), logits)[0], loss

    plain = grad_and_loss()
    with _Seen() as seen:
        watched = grad_and_loss()
    names = {"lw_kernels::masked_cross_entropy", "lw_kernels::masked_cross_entropy_backward"}
    assert names <= set(seen.ops)
    assert all(torch.equal(x, y) for x, y in zip(plain, watched, strict=True))


def test_double_backward_is_refused():
    logits = torch.randn(3, 50, **seeded(0)).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64, device=device())
    loss = masked_cross_entropy(logits, labels, impl="triton").loss
    scale = torch.ones(3, device=device(), requires_grad=True)
    (grad,) = torch.autograd.grad((loss * scale).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), scale)


def test_no_shortcut_for_subclasses_and_compilers():
    x = torch.ones(2)
    assert dispatch.is_plain(x, torch.nn.Parameter(x))
    assert not dispatch.is_plain(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    compiled = torch.compile(lambda x: x + dispatch.is_plain(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)
