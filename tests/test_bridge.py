"""The loss that joins bridge and frozen LMs: right value, right gradient, nothing else trained."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from lw_fast.adapter import calibrate
from lw_fast.bridge import STATS, StepCounts, frame_prefix, frozen_lm_loss, step_loss
from lw_fast.engine import World, build_engine
from lw_fast.model import build_bridge

NUM = 8
ALL = np.arange(NUM)
ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)

# Every term of the loss is on, so that none can hide.
SETTINGS = dict(
    first_token_ce_weight=0.5,
    scale_l2=0.3,
    adapter_rms_l2=0.2,
    adapter_freeze_scale=False,
    span_weight=0.7,
    encoder_dropout=0.0,
    max_answer_tokens=6,
)


@pytest.fixture
def model():
    model = tiny.latent_model(**SETTINGS)
    for adapter in model.bridge.adapters.values():
        torch.nn.init.constant_(adapter.scale, 1.2)
    return model


@pytest.fixture
def tables(model):
    return model.tables(tiny.examples(NUM))


def counts_of(tables, index) -> StepCounts:
    return StepCounts(
        examples=len(index),
        spans=tables.sources.num_spans(index),
        rows={name: table.num_targets(index) for name, table in tables.answers.items()},
    )


def loss_of(model, tables, index, counts=None, loss=None):
    """Loss and sums of the examples of `index`, as their share of `counts`."""
    source = model.batch(tables.sources, index)
    answers = {name: table.batch(index) for name, table in tables.answers.items()}
    config = model.config
    return step_loss(
        model.bridge(source), source, answers, model.lms, model.bridge,
        counts or counts_of(tables, index), loss or config.loss, config.encoder.span_weight,
    )  # fmt: skip


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {n: p.grad for n, p in model.bridge.named_parameters() if p.grad is not None}
    model.bridge.zero_grad(set_to_none=True)
    return taken


# ------------------------------------------------------------------------------- value


def original_terms(model, name: str, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's two terms, its way: labels shifted by hand go into a model that shifts labels,
    PAD is masked by -100; then a second pass for the first token."""
    lm, config = model.lms[name], model.config
    tokenizer, ignored = lm.tokenizer, -100
    head = [tokenizer.bos_token_id] if name == "llama" else []
    anchor = tokenizer("Answer:", add_special_tokens=False).input_ids
    source = model.batch(model.tables(examples).sources, np.arange(len(examples)))
    prefixes = model.bridge.prefix(name, model.bridge(source).encoded.z_BMZ)
    inputs, labels, masks, first = [], [], [], []
    for prefix, example in zip(prefixes, examples, strict=True):
        whole = tokenizer(f"Answer: {example.answers[0]}", add_special_tokens=False).input_ids
        y = (head + whole[len(anchor) :])[: config.data.max_answer_tokens]
        before = torch.cat([lm.embed(torch.tensor(head).long()), prefix])
        padding = 12 - len(y)
        ids = torch.tensor([*anchor, *y[:-1], *[0] * padding])
        inputs.append(torch.cat([before, lm.embed(ids)]))
        labels.append([ignored] * (len(before) + len(anchor)) + y[1:] + [ignored] * padding)
        masks.append([1] * (len(inputs[-1]) - padding) + [0] * padding)
        bos = head if config.sequence.train_append_bos_after_prefix == "yes" else []
        context = torch.cat([before, lm.embed(torch.tensor([*anchor, *bos]))])[None]
        logits = lm.model(inputs_embeds=context).logits[0, -1]
        first.append(-logits.log_softmax(0)[y[len(head)]])
    teacher_forced = lm.model(
        inputs_embeds=torch.stack(inputs),
        attention_mask=torch.tensor(masks),
        labels=torch.tensor(labels),
    ).loss
    return teacher_forced, torch.stack(first).mean()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["yes", "no"])
def test_compat_original_is_the_loss_of_the_original(policy):
    """The same value as inputs and labels that are built and passed as the original did."""
    penalties = dict(scale_l2=0.0, adapter_rms_l2=0.0, encoder_type="byte_seed", d_z=8)
    sequence = dict(compat="original", train_append_bos_after_prefix=policy)
    model = tiny.latent_model(**SETTINGS | penalties | sequence)
    model.bridge.eval()
    tables = model.tables(tiny.examples(NUM))
    total, sums = loss_of(model, tables, ALL)
    expected = 0.0
    for name in model.lms:
        teacher_forced, first = original_terms(model, name, tables.examples)
        stats = dict(zip(STATS, sums[name].tolist(), strict=True))
        rows = tables.answers[name].num_targets(ALL)
        assert stats["nll_sum"] / rows == pytest.approx(float(teacher_forced), rel=1e-5)
        assert stats["first_nll_sum"] / NUM == pytest.approx(float(first), rel=1e-5)
        expected += 0.5 * float(teacher_forced + 0.5 * first)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def naive_answer_nll(model, name: str, example) -> tuple[list[float], list[bool]]:
    """NLL and hit of each answer token and EOS: one example, no padding, all logits, one by one."""
    lm, config = model.lms[name], model.config
    tokenizer = lm.tokenizer
    table = model.tables([example])
    encoded = model.bridge(model.batch(table.sources, np.array([0]))).encoded
    prefix = model.bridge.prefix(name, encoded.z_BMZ)[0]
    head = [tokenizer.bos_token_id] if name == "llama" else []
    anchor = tokenizer("Answer:", add_special_tokens=False).input_ids
    whole = tokenizer(f"Answer: {example.answers[0]}", add_special_tokens=False).input_ids
    answer = whole[len(anchor) :]
    targets = answer[: config.data.max_answer_tokens]
    if targets == answer:
        targets = [*answer, tokenizer.eos_token_id]
    embeds = torch.cat([lm.embed(torch.tensor(head, dtype=torch.int64)), prefix])
    nll, hits = [], []
    for position, target in enumerate(targets):
        tail = lm.embed(torch.tensor([*anchor, *targets[:position]]))
        logits = lm.model(inputs_embeds=torch.cat([embeds, tail])[None]).logits[0, -1]
        nll.append(float(-logits.log_softmax(0)[target]))
        hits.append(bool(logits.argmax() == target))
    return nll, hits


@torch.no_grad()
def test_one_pass_equals_a_loop_over_examples_and_tokens(model, tables):
    """The batched loss is that of each example alone, token by token, without padding."""
    model.bridge.eval()
    _, sums = loss_of(model, tables, ALL)
    expected = 0.0
    for name in model.lms:
        rows = [naive_answer_nll(model, name, e) for e in tables.examples]
        nll = [value for values, _ in rows for value in values]
        first = [values[0] for values, _ in rows]
        stats = dict(zip(STATS, sums[name].tolist(), strict=True))
        assert stats["nll_sum"] == pytest.approx(sum(nll), rel=1e-5)
        assert stats["first_nll_sum"] == pytest.approx(sum(first), rel=1e-5)
        assert stats["row_top1_sum"] == sum(hit for _, hits in rows for hit in hits)
        assert stats["first_top1_sum"] == sum(hits[0] for _, hits in rows)
        assert stats["first_top1_sum"] <= stats["first_top5_sum"] <= NUM
        expected += (sum(nll) / len(nll) + 0.5 * sum(first) / NUM) / 2
    cut = [len(naive_answer_nll(model, "llama", e)[0]) for e in tables.examples]
    assert len(set(cut)) > 1 and 6 in cut  # lengths differ, and some answers are cut
    loss = dataclasses.replace(model.config.loss, scale_l2=0.0, adapter_rms_l2=0.0)
    total, sums = loss_of(model, tables, ALL, loss=loss)
    span = 0.7 * sums["span"] / tables.sources.num_spans(ALL)
    align = model.config.loss.align_weight * sums["align"] / NUM
    assert float(total - span - align) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_penalties_are_means_over_the_step(model, tables):
    model.bridge.eval()
    whole, _ = loss_of(model, tables, ALL)
    plain = dataclasses.replace(model.config.loss, scale_l2=0.0, adapter_rms_l2=0.0)
    without, _ = loss_of(model, tables, ALL, loss=plain)
    raw_rms = model.bridge(model.batch(tables.sources, ALL)).raw_rms
    scale = 0.3 * sum((1.2 - 1) ** 2 for _ in model.lms)
    loud = sum(
        0.2 * float((raw_rms[name] - lm.embed_rms).square().mean())
        for name, lm in model.lms.items()
    )
    assert float(whole - without) == pytest.approx(scale + loud, rel=1e-4)


@torch.no_grad()
def test_input_frame(model, tables):
    """[BOS][prefix][anchor and answer], in the LM's dtype."""
    lm, batch = model.lms["llama"], tables.answers["llama"].batch(ALL)
    prefix = torch.randn(NUM, 6, lm.d_model)
    embeds = frame_prefix(lm, prefix, batch).embeds
    weight = lm.model.get_input_embeddings().weight
    assert embeds.dtype == lm.dtype
    assert torch.equal(embeds[:, 0], weight[lm.tokenizer.bos_token_id].expand(NUM, -1))
    assert torch.equal(embeds[:, 1:7], prefix)
    assert torch.equal(embeds[:, 7:], weight[batch.tail_BT])


@pytest.mark.parametrize("calibration", ["per_slot", "embed_rms", "fixed", "none"])
def test_prefix_has_the_loudness_of_its_lm(calibration):
    model = tiny.latent_model(calibration=calibration, prefix_target_rms=0.5)
    tables = model.tables(tiny.examples(2))
    with torch.no_grad():
        out = model.bridge(model.batch(tables.sources, np.arange(2)))
        for name, lm in model.lms.items():
            prefix = calibrate(out.raw[name], model.bridge.calibration(name))
            loud = prefix.square().mean((1, 2)).sqrt()
            target = {"fixed": torch.full((2,), 0.5), "none": out.raw_rms[name]}
            expected = target.get(calibration, torch.full((2,), lm.embed_rms))
            torch.testing.assert_close(loud, expected)
            again = model.bridge.prefix(name, out.encoded.z_BMZ, gain=2.0)
            torch.testing.assert_close(again, 2 * prefix)


def test_bf16_autocast_leaves_weights_and_prefix_in_fp32():
    model = tiny.latent_model(precision="bf16")
    tables = model.tables(tiny.examples(2))
    out = model.bridge(model.batch(tables.sources, np.arange(2)))
    assert out.encoded.z_BMZ.dtype == torch.bfloat16
    prefix = calibrate(out.raw["llama"], model.bridge.calibration("llama"))
    assert prefix.dtype == torch.float32
    assert {p.dtype for p in model.bridge.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_memory_saving_loss_has_the_gradient_of_plain_autograd(model, tables, name):
    """Also where the result is scaled before backward, as engines do."""
    lm, answers = model.lms[name], tables.answers[name].batch(ALL)
    weights = dict(row_weight=0.3, first_weight=0.2)
    prefix = 0.3 * torch.randn(NUM, 6, lm.d_model)

    leaf = prefix.clone().requires_grad_()
    loss, stats = frozen_lm_loss(lm, leaf, answers, **weights)
    (loss * 3).backward()

    plain = prefix.clone().requires_grad_()
    embeds = frame_prefix(lm, plain, answers).embeds
    logits = lm.model(inputs_embeds=embeds).logits.flatten(0, 1)[answers.position_N]
    nll = torch.nn.functional.cross_entropy(logits, answers.target_N, reduction="none")
    expected = 0.3 * nll.sum() + 0.2 * nll[answers.first_N].sum()
    (expected * 3).backward()

    torch.testing.assert_close(loss, expected.detach())
    assert (leaf.grad - plain.grad).abs().max() <= 1e-6 * plain.grad.norm()
    assert plain.grad.norm(dim=-1).min() > 1e-3  # every latent of every example counts
    assert not stats.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(frozen_lm_loss(lm, prefix, answers, **weights)[0], loss.detach())


def test_gradients_reach_the_encoder_and_every_adapter(model, tables):
    """Through each LM alone: its own adapter and the encoder learn, the other adapter does not."""
    source = model.batch(tables.sources, ALL)
    reached = {}
    for name, lm in model.lms.items():
        output = model.bridge(source)
        answers = tables.answers[name].batch(ALL)
        loss, _ = frozen_lm_loss(lm, output.raw[name], answers, row_weight=1.0, first_weight=0.0)
        loss.backward()
        reached[name] = {n for n, g in gradients(model).items() if g.abs().max() > 1e-9}
    for name, other in (("llama", "qwen"), ("qwen", "llama")):
        adapter = {
            n
            for n, _ in model.bridge.named_parameters()
            if n.startswith(f"adapters.{name}.") and not n.endswith("scale")
        }
        assert adapter <= reached[name]
        assert not {n for n in reached[name] if n.startswith(f"adapters.{other}.")}
        encoder = {n for n, _ in model.bridge.named_parameters() if n.startswith("encoder.")}
        deaf = encoder - reached[name]
        assert deaf == {"encoder.span.weight"}  # taught by the span loss


def test_the_whole_loss_leaves_no_parameter_without_gradient(model, tables):
    loss_of(model, tables, ALL)[0].backward()
    taken = gradients(model)
    assert taken.keys() == dict(model.bridge.named_parameters()).keys()
    # A bias before the per-slot calibration still turns the prefix; nothing may be stuck at zero.
    assert not [n for n, g in taken.items() if not g.any()]


@pytest.mark.parametrize("encoder_type", ["byte_seed", "byte", "lm"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_accumulation_does_not_change_the_step(encoder_type, micro):
    """Batch 8 equals 4 x 2, whatever the micro-batches' own lengths, spans and row counts."""
    model = tiny.latent_model(**SETTINGS, encoder_type=encoder_type)
    tables = model.tables(tiny.examples(NUM))
    whole, _ = loss_of(model, tables, ALL)
    whole.backward()
    expected = gradients(model)
    counts, total = counts_of(tables, ALL), 0.0
    for part in np.split(ALL, range(micro, NUM, micro)):
        loss, _ = loss_of(model, tables, part, counts)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    got = gradients(model)
    assert got.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-6 * norm, name


def test_a_mean_of_means_would_be_seen(model, tables):
    """Negative control: dividing each part by its own counts gives another loss."""
    whole, parts = loss_of(model, tables, ALL)[0].item(), (ALL[:1], ALL[1:])
    mean_of_means = sum(loss_of(model, tables, part)[0].item() for part in parts) / 2
    assert abs(mean_of_means - whole) > 1e-3 * whole


# ------------------------------------------------------------------------------- frozen


def test_frozen_lms_stay_as_they_were(model, tables):
    """Bit-identical and without gradients after training steps that do change the bridge."""
    lm_states = {
        (name, key): tensor.clone()
        for name, lm in model.lms.items()
        for key, tensor in lm.model.state_dict().items()
    }
    engine = build_engine(model.bridge, model.config, ONE, None, 1)
    before = engine.module_state()
    losses = []
    for _ in range(5):
        loss, _ = loss_of(model, tables, ALL)
        losses.append(loss.item())
        engine.backward(loss, last=True)
        engine.step(1.0)
    after = engine.module_state()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[n], after[n]) for n in before)
    for name, lm in model.lms.items():
        assert not lm.model.training
        for key, tensor in lm.model.state_dict().items():
            assert torch.equal(tensor, lm_states[name, key])
        for parameter in lm.model.parameters():
            assert parameter.grad is None and not parameter.requires_grad


def test_nan_in_an_lm_is_a_nan_loss_and_no_hit(model, tables):
    """A diverged bridge shows as a loss that is not finite, never as a perfect score."""
    with torch.no_grad():
        model.bridge.adapters["llama"].net[1].weight.fill_(float("nan"))
        loss, sums = loss_of(model, tables, ALL)
    assert not torch.isfinite(loss)
    stats = dict(zip(STATS, sums["llama"].tolist(), strict=True))
    assert stats["first_top1_sum"] == stats["first_top5_sum"] == stats["row_top1_sum"] == 0
    assert torch.isfinite(sums["qwen"]).all()


def test_a_step_without_any_span_has_no_span_loss():
    """Spans to repeat have no question: only the LM losses remain, and no division by zero."""
    model = tiny.latent_model(**SETTINGS)
    repeat = [dataclasses.replace(e, question="") for e in tiny.examples(NUM)]
    loss, sums = loss_of(model, model.tables(repeat), ALL)
    assert torch.isfinite(loss) and sums["span"] == 0


def test_a_step_of_cut_one_token_answers_has_no_double_shift_target():
    """The ablation's corner: nothing is supervised, and nothing divides by zero."""
    changes = dict(max_answer_tokens=1, first_token_ce_weight=0.0, compat="double_shift")
    model = tiny.latent_model(**SETTINGS | changes)
    two_words = [e for e in tiny.examples(40) if " " in e.answers[0]][:NUM]
    tables = model.tables(two_words)
    assert counts_of(tables, ALL).rows == {"llama": 0, "qwen": 0}
    loss, _ = loss_of(model, tables, ALL)
    assert torch.isfinite(loss)


def test_bridges_of_one_seed_are_equal():
    model = tiny.latent_model(seed=3)
    torch.manual_seed(99)
    again = build_bridge(model.config, model.lms, model.reader, tiny.CPU).state_dict()
    other = tiny.latent_model(seed=4).bridge.state_dict()
    assert all(torch.equal(t, again[n]) for n, t in model.bridge.state_dict().items())
    assert any(not torch.equal(t, other[n]) for n, t in model.bridge.state_dict().items())
