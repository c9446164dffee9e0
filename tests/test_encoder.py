"""Encoders: padding changes nothing, the span head finds the best span, slots carry its units."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lw_fast.encoder import SourceBatch, build_encoder, copied_span, slot_positions
from lw_fast.latent_head import best_span

TYPES = ("byte_seed", "byte", "lm")
WITH_HEAD = ("byte", "lm")
READER_DIM, NUM_STATES = 12, 2


def make(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(
        tiny.config(encoder_type=kind, **changes), reader_dim=READER_DIM, num_states=NUM_STATES
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):  # biases that start at zero could not leak
            torch.nn.init.normal_(parameter)
    return encoder.eval()


def sources(lengths: list[int], width: int = 0, seed: int = 1) -> SourceBatch:
    """Random sources, right-padded to `width`; the same ones whatever the width."""
    rng = np.random.default_rng(seed)
    width = max(width, *lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    states = torch.zeros(len(lengths), width, READER_DIM * NUM_STATES)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
        ids[row, :length] = torch.from_numpy(rng.integers(1, 255, length))
        noise = rng.standard_normal((length, states.shape[2]), dtype=np.float32)
        states[row, :length] = torch.from_numpy(noise)
    context = mask & (torch.arange(width) >= 3)
    span = torch.tensor([[4, min(5, length - 1)] for length in lengths])
    flags = torch.ones(len(lengths), dtype=torch.bool)
    return SourceBatch(ids, mask, context, span, flags, ~flags, states)


def replace(source: SourceBatch, **changes) -> SourceBatch:
    return dataclasses.replace(source, **changes)


# ------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("extra", [1, 2, 3, 4, 37])
@pytest.mark.parametrize("kind", TYPES)
def test_padding_changes_nothing(kind, extra):
    """A source gives the same Z and span however far its batch is padded."""
    encoder, lengths = make(kind), [6, 9, 17, 20]
    with torch.no_grad():
        tight, wide = encoder(sources(lengths)), encoder(sources(lengths, 20 + extra))
    torch.testing.assert_close(tight.z_BMZ, wide.z_BMZ, atol=1e-5, rtol=1e-5)
    if kind in WITH_HEAD:
        assert torch.equal(tight.predicted_B2, wide.predicted_B2)
        torch.testing.assert_close(
            tight.span_logits_BU2[0, :6], wide.span_logits_BU2[0, :6], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", TYPES)
def test_what_stands_in_the_padding_changes_nothing(kind):
    encoder, source = make(kind), sources([6, 9, 17, 20], 24)
    noise = torch.randint(1, 255, source.ids_BU.shape)
    dirty = replace(
        source,
        ids_BU=torch.where(source.mask_BU, source.ids_BU, noise),
        states_BUF=torch.where(source.mask_BU[..., None], source.states_BUF, 9.0),
    )
    with torch.no_grad():
        clean, soiled = encoder(source), encoder(dirty)
    torch.testing.assert_close(clean.z_BMZ, soiled.z_BMZ, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_a_batch_equals_its_examples_alone(kind):
    encoder, lengths = make(kind), [6, 9, 17, 20]
    batch = sources(lengths)
    with torch.no_grad():
        together = encoder(batch).z_BMZ
        for i, length in enumerate(lengths):
            fields = dataclasses.fields(batch)
            alone = {f.name: getattr(batch, f.name)[i : i + 1] for f in fields}
            for name in ("ids_BU", "mask_BU", "context_BU", "states_BUF"):
                alone[name] = alone[name][:, :length]
            z = encoder(SourceBatch(**alone)).z_BMZ
            torch.testing.assert_close(together[i : i + 1], z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_the_source_does_change_z(kind):
    """Negative control: one other unit in the middle is seen."""
    encoder, source = make(kind), sources([12])
    ids, states = source.ids_BU.clone(), source.states_BUF.clone()
    ids[0, 7] = (ids[0, 7] + 1) % 255
    states[0, 7] = -states[0, 7]
    with torch.no_grad():
        z = encoder(source).z_BMZ
        other = encoder(replace(source, ids_BU=ids, states_BUF=states)).z_BMZ
    assert (z - other).abs().max() > 1e-4


# ------------------------------------------------------------------------------- shapes and slots


@pytest.mark.parametrize("latent_len", [1, 2, 6])
@pytest.mark.parametrize("kind", TYPES)
def test_shapes(kind, latent_len):
    out = make(kind, latent_len=latent_len, d_z=24)(sources([5, 11]))
    assert out.z_BMZ.shape == (2, latent_len, 24)
    assert (out.span_logits_BU2 is not None) == (kind in WITH_HEAD)
    if kind in WITH_HEAD:
        assert out.span_logits_BU2.shape[0] == 2 and out.span_logits_BU2.shape[1] >= 11
        assert out.predicted_B2.dtype == torch.int64


@pytest.mark.parametrize("changes", [{"copy_slots": 0}, {"span_head": False}, {"copy_slots": 6}])
@pytest.mark.parametrize("kind", WITH_HEAD)
def test_without_copy_or_global_slots(kind, changes):
    """0 copy slots: all latents are free queries; as many as latents: there are none."""
    encoder = make(kind, **changes)
    out = encoder(sources([5, 11]))
    assert out.z_BMZ.shape == (2, 6, 16)
    assert (out.predicted_B2 is None) == ("span_head" in changes)
    copies = changes.get("copy_slots", 0)
    assert hasattr(encoder.head, "unit") == (copies > 0)
    assert hasattr(encoder.head, "read") == (copies < 6)
    out.z_BMZ.sum().backward()
    unused = {n.split(".")[0] for n, p in encoder.named_parameters() if p.grad is None}
    assert unused <= {"span", "up"} or copies == 6  # up feeds the span head alone


def copying(kind: str, span: list[int], gold: bool, encoder) -> torch.Tensor:
    source = sources([20])
    flags = torch.tensor([gold])
    source = replace(source, span_B2=torch.tensor([span]), use_gold_B=flags)
    with torch.no_grad():
        return encoder(source).z_BMZ


@pytest.mark.parametrize("kind", WITH_HEAD)
def test_gold_or_predicted_span(kind):
    """Gold is copied only where asked for and known; else what the span head picks."""
    encoder = make(kind)
    with torch.no_grad():
        predicted = encoder(sources([20])).predicted_B2[0].tolist()
    other = [8, 9] if predicted != [8, 9] else [10, 12]
    as_predicted = copying(kind, other, False, encoder)
    assert torch.equal(as_predicted, copying(kind, predicted, True, encoder))
    assert torch.equal(as_predicted, copying(kind, [-1, -1], True, encoder))
    assert not torch.allclose(as_predicted, copying(kind, other, True, encoder), atol=1e-4)


def test_copied_span_is_chosen_per_example():
    source = replace(
        sources([9, 9, 9]),
        span_B2=torch.tensor([[1, 2], [3, 4], [-1, -1]]),
        use_gold_B=torch.tensor([True, False, True]),
    )
    predicted = torch.tensor([[5, 5], [6, 6], [7, 7]])
    assert copied_span(source, predicted).tolist() == [[1, 2], [6, 6], [7, 7]]


def test_slot_positions_written_out():
    position, valid = slot_positions(torch.tensor([[4, 6], [2, 2]]), num_slots=2, stride=2)
    assert position.tolist() == [[[4, 5], [6, 7]], [[2, 3], [4, 5]]]
    assert valid.tolist() == [[[True, True], [True, False]], [[True, False], [False, False]]]


@pytest.mark.parametrize("kind", WITH_HEAD)
def test_a_copy_slot_carries_its_unit_and_no_other(kind, monkeypatch):
    """Slot k sees the k-th unit of the span; slots past its end see none."""
    encoder, seen = make(kind, latent_len=6, copy_slots=4, copy_bytes=2), {}
    head = encoder.head.forward
    monkeypatch.setattr(
        encoder.head,
        "forward",
        lambda x, mask, units, valid: (
            seen.update(units=units, valid=valid) or head(x, mask, units, valid)
        ),
    )
    source = replace(sources([20]), span_B2=torch.tensor([[5, 7]]), use_gold_B=torch.tensor([True]))
    with torch.no_grad():
        encoder(source)
    if kind == "lm":
        layer0 = source.states_BUF[..., :READER_DIM]
        torch.testing.assert_close(seen["units"][0, :3], layer0[0, 5:8])
        assert seen["valid"].tolist() == [[True, True, True, False]]
    else:  # bytes 5 and 6 in the first slot, byte 7 alone in the second
        bytes_UL = encoder.byte_emb(source.ids_BU[0])
        torch.testing.assert_close(seen["units"][0, 0], bytes_UL[5:7].flatten())
        torch.testing.assert_close(seen["units"][0, 1, :8], bytes_UL[7])
        assert not seen["units"][0, 1, 8:].any()
        assert seen["valid"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("kind", WITH_HEAD)
def test_equal_answers_give_equal_units(kind, monkeypatch):
    """Wherever a span stands, on the patch grid or off it, its slots carry the same."""
    encoder, seen = make(kind, copy_slots=3), []
    head = encoder.head.forward
    monkeypatch.setattr(
        encoder.head,
        "forward",
        lambda x, mask, units, valid: seen.append(units[valid]) or head(x, mask, units, valid),
    )
    source = sources([20])
    ids, states = source.ids_BU.clone(), source.states_BUF.clone()
    ids[0, 11:13], states[0, 11:13] = ids[0, 4:6], states[0, 4:6]
    for span in ([4, 5], [11, 12]):
        gold = dict(span_B2=torch.tensor([span]), use_gold_B=torch.tensor([True]))
        with torch.no_grad():
            encoder(replace(source, ids_BU=ids, states_BUF=states, **gold))
    assert len(seen[0]) and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", WITH_HEAD)
def test_a_source_without_context_still_encodes(kind):
    """Where the whole context was cut away there is no span to find, and no NaN."""
    source = sources([6, 9])
    source = replace(source, context_BU=torch.zeros_like(source.context_BU))
    out = make(kind)(source)
    assert torch.isfinite(out.z_BMZ).all()
    assert (out.predicted_B2 >= 0).all()


@pytest.mark.parametrize("span_head", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_learns(kind, span_head):
    """With span loss and Z in the loss, no parameter is left without a gradient."""
    encoder = make(kind, span_head=span_head)
    out = encoder(replace(sources([8, 20]), use_gold_B=torch.tensor([True, True])))
    loss = (out.z_BMZ * torch.randn_like(out.z_BMZ)).sum()
    if out.span_logits_BU2 is not None:
        loss = loss + (out.span_logits_BU2 * torch.randn_like(out.span_logits_BU2)).sum()
    loss.backward()
    dead = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


# ------------------------------------------------------------------------------- best span


def brute_force(logits: torch.Tensor, mask: torch.Tensor, max_len: int) -> float:
    """Highest start + end over all allowed spans."""
    best = -float("inf")
    for i in range(len(mask)):
        for j in range(i, min(i + max_len, len(mask))):
            if mask[i] and mask[j]:
                best = max(best, float(logits[i, 0] + logits[j, 1]))
    return best


@st.composite
def span_cases(draw):
    num = draw(st.integers(1, 10))
    value = st.integers(-50, 50).map(float)
    logits = draw(st.lists(st.tuples(value, value), min_size=num, max_size=num))
    mask = draw(st.lists(st.booleans(), min_size=num, max_size=num).filter(any))
    return torch.tensor(logits), torch.tensor(mask), draw(st.integers(1, 12))


@settings(max_examples=300, deadline=None)
@given(span_cases())
def test_best_span_equals_brute_force(case):
    logits, mask, max_len = case
    first, last = best_span(logits[None], mask[None], max_len)[0].tolist()
    assert mask[first] and mask[last] and 0 <= last - first < max_len
    assert float(logits[first, 0] + logits[last, 1]) == brute_force(logits, mask, max_len)


def test_best_span_of_a_batch():
    """Rows do not mix, and an end before its start is never picked."""
    logits = torch.zeros(2, 6, 2)
    logits[0, 4, 0], logits[0, 1, 1] = 9, 9  # the best end lies before the best start
    logits[1, 2, 0], logits[1, 3, 1] = 5, 5
    mask = torch.ones(2, 6, dtype=torch.bool)
    (first, last), second = best_span(logits, mask, 4).tolist()
    assert first <= last
    assert second == [2, 3]


# ------------------------------------------------------------------------------- names


def test_state_dict_names_of_byte_seed():
    """The original's encoder.pt names, so that its checkpoints can be read."""
    d_z = 16
    names = {n: tuple(t.shape) for n, t in make("byte_seed").state_dict().items()}
    layer = {
        "self_attn.in_proj_weight": (3 * d_z, d_z),
        "self_attn.in_proj_bias": (3 * d_z,),
        "self_attn.out_proj.weight": (d_z, d_z),
        "self_attn.out_proj.bias": (d_z,),
        "linear1.weight": (4 * d_z, d_z),
        "linear1.bias": (4 * d_z,),
        "linear2.weight": (d_z, 4 * d_z),
        "linear2.bias": (d_z,),
        "norm1.weight": (d_z,),
        "norm1.bias": (d_z,),
        "norm2.weight": (d_z,),
        "norm2.bias": (d_z,),
    }
    expected = {"backbone.byte_emb.weight": (256, d_z)}
    for number in (0, 1):
        expected |= {f"backbone.encoder.layers.{number}.{n}": s for n, s in layer.items()}
    expected |= {"backbone.ln.weight": (d_z,), "backbone.ln.bias": (d_z,)}
    expected |= {
        "pooler.latent": (6, d_z),
        "pooler.cross_attn.in_proj_weight": (3 * d_z, d_z),
        "pooler.cross_attn.in_proj_bias": (3 * d_z,),
        "pooler.cross_attn.out_proj.weight": (d_z, d_z),
        "pooler.cross_attn.out_proj.bias": (d_z,),
        "pooler.ff.0.weight": (d_z,),
        "pooler.ff.0.bias": (d_z,),
        "pooler.ff.1.weight": (2 * d_z, d_z),
        "pooler.ff.1.bias": (2 * d_z,),
        "pooler.ff.3.weight": (d_z, 2 * d_z),
        "pooler.ff.3.bias": (d_z,),
    }
    assert names == expected


def test_byte_seed_has_the_original_size():
    """2.180 M parameters at d_z 256 and M 32, as in the seed's run."""
    config = tiny.config(encoder_type="byte_seed", d_z=256, latent_len=32)
    size = sum(p.numel() for p in build_encoder(config).parameters())
    assert size == pytest.approx(2.180e6, abs=500)


@pytest.mark.parametrize("kind", TYPES)
def test_dropout_only_in_training(kind):
    encoder, source = make(kind, encoder_dropout=0.5), sources([9])
    with torch.no_grad():
        assert torch.equal(encoder(source).z_BMZ, encoder(source).z_BMZ)
        encoder.train()
        assert not torch.equal(encoder(source).z_BMZ, encoder(source).z_BMZ)
