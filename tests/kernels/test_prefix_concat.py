from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from lw_kernels import PrefixConcat, prefix_concat, prefix_concat_ref
from lw_kernels.prefix_concat import _prefix_concat
from yardstick import assert_within, device, max_error, seeded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    batch: int = 3
    slots: int = 5
    dim: int = 24
    head: int = 1
    tail: int = 4
    vocab: int = 50
    raw: torch.dtype = F32
    embed: torch.dtype = F32
    calibration: str = "per_slot"
    bound: float = 0.0
    packed: bool = False
    gain: float = 1.5

    def inputs(self, seed: int = 0) -> dict:
        on = seeded(seed)
        ids = torch.randint(0, self.vocab, (self.batch, self.tail + self.head), **on)
        return {
            "raw": torch.randn(self.batch, self.slots, self.dim, **on).to(self.raw) * 2,
            "embed": torch.randn(self.vocab, self.dim, **on).to(self.embed),
            "tail_ids": ids[:, self.head :],
            "lengths": torch.randint(0, self.tail + 1, (self.batch,), **on),
            "head_ids": ids[0, : self.head] if self.batch else ids.new_zeros(self.head),
        }

    @property
    def settings(self) -> dict:
        return {
            "calibration": self.calibration,
            "target_rms": 0.3,
            "gain": self.gain,
            "bound": self.bound,
        }


def run(case: Case, inputs: dict, fn=prefix_concat, wide: bool = False, **kwargs):
    """Outputs and the gradient of raw; `wide` computes in fp64."""
    raw, embed = inputs["raw"].detach(), inputs["embed"]
    if wide:
        raw, embed = raw.double(), embed.double()
    raw.requires_grad_()
    real = inputs["lengths"].clamp(0, inputs["tail_ids"].shape[1]).sum().item()
    rows = real + case.batch * (case.head + case.slots) if case.packed else None
    out = fn(
        raw,
        embed,
        inputs["tail_ids"],
        inputs["lengths"],
        head_ids_H=inputs["head_ids"],
        packed_rows=rows,
        **case.settings,
        **kwargs,
    )
    weights = torch.randn(out.embeds.shape, **seeded(9))
    weights = weights.to(inputs["embed"]).to(out.embeds)
    (grad,) = torch.autograd.grad(out.embeds, raw, weights)
    return out, grad


def check(case: Case, inputs: dict) -> None:
    ours, ours_grad = run(case, inputs, impl="triton")
    same, same_grad = run(case, inputs, prefix_concat_ref, upcast=False)
    truth, truth_grad = run(case, inputs, prefix_concat_ref, wide=True)
    assert ours.embeds.dtype == inputs["embed"].dtype and ours_grad.dtype == inputs["raw"].dtype
    assert_within("embeds", ours.embeds, same.embeds, truth.embeds, case.embed, 2)
    dtype = max(case.raw, case.embed, key=lambda d: torch.finfo(d).eps)
    assert_within("grad", ours_grad, same_grad, truth_grad, dtype, 3)
    for x, y in zip(ours[1:], truth[1:], strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


SMALL = [
    Case(),
    Case(calibration="per_example"),
    Case(calibration="none"),
    Case(bound=3.0),
    Case(bound=0.5, calibration="per_example", packed=True),
    Case(bound=3.0, calibration="none", packed=True),
    Case(packed=True, head=0),
    Case(head=0, tail=0),
    Case(slots=0),
    Case(slots=16, dim=123, batch=1, head=2),
    Case(slots=1, dim=1, tail=1),
    Case(slots=123, dim=7, batch=1, calibration="per_example"),
    Case(raw=BF16, embed=BF16),
    Case(raw=F32, embed=BF16, packed=True),
    Case(raw=F16, embed=F32, calibration="per_example", bound=3.0),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case):
    check(case, case.inputs())


REAL = [
    Case(batch=64, slots=32, dim=4096, tail=8, vocab=128256, raw=BF16, embed=BF16),
    Case(
        batch=64,
        slots=32,
        dim=3584,
        tail=8,
        head=0,
        vocab=9000,
        raw=BF16,
        embed=BF16,
        calibration="per_example",
        packed=True,
    ),
    Case(batch=37, slots=32, dim=4096, tail=9, vocab=9000, raw=F32, embed=BF16, bound=3.0),
    Case(
        batch=33,
        slots=123,
        dim=896,
        tail=5,
        vocab=9000,
        raw=BF16,
        embed=BF16,
        bound=3.0,
        calibration="per_example",
    ),
    Case(
        batch=300,
        slots=77,
        dim=256,
        tail=5,
        vocab=900,
        raw=F32,
        embed=F32,
        calibration="per_example",
        packed=True,
    ),
    Case(batch=3, slots=600, dim=64, tail=3, vocab=90, calibration="per_example"),
    Case(batch=9, slots=1, dim=64, tail=3, vocab=90, calibration="per_example"),
    Case(batch=5, slots=1, dim=123, tail=3, vocab=9000, raw=F32, embed=F32, packed=True),
    Case(batch=1500, slots=4, dim=64, tail=3, vocab=900, raw=F32, embed=F32, packed=True),
    Case(batch=2, slots=3, dim=20000, tail=3, vocab=90, raw=F16, embed=F16, calibration="none"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_matches_the_reference_at_real_shapes(case):
    check(case, case.inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("calibration", ["per_slot", "per_example"])
def test_offsets_past_2_31_elements(calibration):
    batch, slots, dim = 16_500, 32, 4096
    raw = torch.randn(batch, slots, dim, device="cuda", dtype=BF16).requires_grad_()
    embed = torch.randn(100, dim, device="cuda", dtype=BF16)
    ids = torch.randint(0, 100, (batch, 4), device="cuda")
    lengths = torch.full((batch,), 4, device="cuda")
    assert raw.numel() > 2**31
    settings = {"calibration": calibration, "target_rms": 0.3}
    out = prefix_concat(raw, embed, ids, lengths, impl="triton", **settings).embeds
    (grad,) = torch.autograd.grad(out, raw, out.detach())
    last = raw.detach()[-2:].clone().requires_grad_()
    want = prefix_concat_ref(last, embed, ids[-2:], lengths[-2:], **settings).embeds
    (want_grad,) = torch.autograd.grad(want, last, out.detach()[-2:])
    assert max_error(out[-2:], want) < 1e-2
    assert max_error(grad[-2:], want_grad) < 1e-2


def test_hostile_layouts():
    """Strided raw, ids at an odd address, short and overlong lengths of another integer type."""
    case = Case(batch=4, calibration="per_example", packed=True)
    inputs = case.inputs()
    inputs["raw"] = inputs["raw"].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.randint(0, case.vocab, (4, case.tail + 3), device=device())
    inputs["tail_ids"] = wide[:, 3:]
    inputs["lengths"] = torch.tensor([-1, 0, 2, 99], dtype=torch.int32, device=device())
    check(case, inputs)
    inputs["raw"] = torch.randn(4, case.dim, case.slots, device=device()).transpose(1, 2)
    check(case, inputs)


def test_padding_ids_are_never_read():
    case = Case()
    inputs = case.inputs()
    inputs["lengths"].fill_(2)
    inputs["tail_ids"] = inputs["tail_ids"].clone()
    inputs["tail_ids"][:, 2:] = -100
    for impl in ("torch", "triton"):
        embeds = run(case, inputs, impl=impl)[0].embeds
        assert embeds.isfinite().all() and (embeds[:, -2:] == 0).all()


def test_empty_batch():
    for packed in (False, True):
        case = Case(batch=0, packed=packed)
        for impl in ("torch", "triton"):
            out, grad = run(case, case.inputs(), impl=impl)
            assert out.embeds.numel() == 0 and grad.shape == (0, 5, 24)
            assert not packed or out.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("calibration", ["per_slot", "per_example", "none"])
def test_non_finite_values_propagate_and_stay_in_their_example(value, calibration):
    case = Case(calibration=calibration)
    inputs = case.inputs()
    inputs["raw"][1, 2, 3] = value
    out, grad = run(case, inputs, impl="triton")
    embeds = out.embeds[:, case.head : case.head + case.slots]
    assert not embeds[1, 2, 3].isfinite()
    assert embeds[0].isfinite().all() and grad[0].isfinite().all() and grad[2].isfinite().all()
    assert calibration == "none" or not grad[1, 2].isfinite().all()


def test_zero_prefix_has_a_finite_gradient():
    case = Case()
    inputs = case.inputs()
    inputs["raw"].zero_()
    out, grad = run(case, inputs, impl="triton")
    assert out.embeds.isfinite().all() and grad.isfinite().all()


def test_spare_packed_rows_are_zero_and_missing_ones_are_loud():
    case = Case(batch=2)
    inputs = case.inputs()
    inputs["lengths"] = torch.tensor([1, 3], device=device())

    def packed(rows: int, impl: str) -> PrefixConcat:
        return prefix_concat(
            inputs["raw"],
            inputs["embed"],
            inputs["tail_ids"],
            inputs["lengths"],
            head_ids_H=inputs["head_ids"],
            packed_rows=rows,
            impl=impl,
            **case.settings,
        )

    exact = packed(16, "triton")
    for impl in ("torch", "triton"):
        roomy = packed(19, impl)
        torch.testing.assert_close(roomy.embeds[:16], exact.embeds)
        assert (roomy.embeds[16:] == 0).all() and (roomy.position_ids[16:] == 0).all()
        assert torch.equal(roomy.cu_seqlens, exact.cu_seqlens)
    assert packed(15, "triton").embeds.isnan().all()
    if device() == "cpu":  # on a GPU the assertion ends the process' context
        with pytest.raises(RuntimeError, match="packed_rows"):
            packed(15, "torch")


def test_unknown_token_id_gives_nan():
    case = Case(head=0)
    inputs = case.inputs()
    inputs["lengths"].fill_(4)
    inputs["tail_ids"] = inputs["tail_ids"].clone()
    inputs["tail_ids"][0, 0], inputs["tail_ids"][1, 1] = case.vocab, -1
    bad = run(case, inputs, impl="triton")[0].embeds.isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, case.slots], [1, case.slots + 1]]


def test_packed_and_padded_agree():
    case = Case(batch=4)
    inputs = case.inputs()
    padded = run(case, inputs, impl="triton")[0]
    packed = run(replace(case, packed=True), inputs, impl="triton")[0]
    assert torch.equal(padded.embeds[padded.attention_mask], packed.embeds)
    assert torch.equal(padded.position_ids[padded.attention_mask], packed.position_ids)


def test_second_backward_repeats_the_first():
    case = Case(calibration="per_example")
    inputs = case.inputs()
    raw = inputs["raw"].requires_grad_()
    out = prefix_concat(
        raw, inputs["embed"], inputs["tail_ids"], inputs["lengths"], impl="triton"
    ).embeds
    first = torch.autograd.grad(out.square().sum(), raw, retain_graph=True)[0]
    second = torch.autograd.grad(out.square().sum(), raw)[0]
    assert torch.equal(first, second) and inputs["embed"].grad is None


def test_user_errors():
    x = Case().inputs()
    args = (x["raw"], x["embed"], x["tail_ids"], x["lengths"])
    with pytest.raises(ValueError, match="frozen"):
        prefix_concat(x["raw"], x["embed"].clone().requires_grad_(), *args[2:])
    with pytest.raises(ValueError, match="calibration"):
        prefix_concat(*args, calibration="layer")
    with pytest.raises(ValueError, match="do not fit"):
        prefix_concat(x["raw"][..., 1:], *args[1:])
    with pytest.raises(ValueError, match="batch size"):
        prefix_concat(*args[:3], x["lengths"][1:])
    with pytest.raises(ValueError, match="int64"):
        prefix_concat(*args[:2], x["tail_ids"].int(), x["lengths"])
    with pytest.raises(ValueError, match="packed_rows"):
        prefix_concat(*args, packed_rows=10_000)
    with pytest.raises(ValueError, match="float64"):
        prefix_concat(x["raw"].double(), *args[1:], impl="triton")


@pytest.mark.parametrize("packed_rows", [-1, 30])
def test_opcheck(packed_rows):
    x = Case().inputs()
    args = (
        x["raw"].requires_grad_(),
        x["embed"],
        x["head_ids"],
        x["tail_ids"],
        x["lengths"],
        "per_slot",
        0.3,
        3.0,
        1e-12,
        packed_rows,
    )
    torch.library.opcheck(_prefix_concat, args)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(impl, packed):
    case = Case(packed=packed, calibration="per_example")
    inputs = case.inputs()
    compiled = torch.compile(prefix_concat, fullgraph=True, backend="aot_eager")
    ours, grad = run(case, inputs, compiled, impl=impl)
    want, want_grad = run(case, inputs, impl=impl)
    assert torch.equal(ours.embeds, want.embeds) and torch.equal(grad, want_grad)


def test_negative_control():
    """A gradient that forgets the term through the RMS must not pass."""
    case = Case()
    inputs = case.inputs()
    truth_grad = run(case, inputs, prefix_concat_ref, wide=True)[1]
    same_grad = run(case, inputs, prefix_concat_ref, upcast=False)[1]

    def wrong(raw, *args, **kwargs):
        rms = raw.detach().square().mean(-1, keepdim=True).sqrt()
        kwargs.update(calibration="none", gain=1.0)
        return prefix_concat(raw * (0.3 * case.gain / rms), *args, impl="triton", **kwargs)

    wrong_out, wrong_grad = run(case, inputs, wrong)
    truth = run(case, inputs, prefix_concat_ref, wide=True)[0]
    assert_within("embeds", wrong_out.embeds, truth.embeds, truth.embeds, F32, 2)
    with pytest.raises(AssertionError, match="grad"):
        assert_within("grad", wrong_grad, same_grad, truth_grad, F32, 3)
