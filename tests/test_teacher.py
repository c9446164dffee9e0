"""KL to the text-prompted teacher: the right rows, value and gradient, and nothing else changed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch

from lw_fast.batches import AnswerTable
from lw_fast.bridge import STATS, StepCounts, frozen_lm_loss, step_loss, supervised_states
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.losses import TeacherRows, teacher_kl_sum
from lw_fast.prompts import text_prompt
from lw_fast.teacher import Teacher
from lw_fast.train import train

NUM = 8
ALL = np.arange(NUM)
WHOLE = 10_000  # more tokens than any tiny vocabulary has
NAMES = ("llama", "qwen")
ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)


def teacher_of(name: str, examples=None, lm=None, **changes) -> tuple[Teacher, AnswerTable]:
    """A teacher of tiny examples and the student's table."""
    lm, examples = lm or tiny.frozen_lm(name), examples or tiny.examples(NUM)
    config = tiny.config(**{"kl_weight": 1.0, "kl_top_k": WHOLE} | changes)
    answers = AnswerTable(lm, [example.answers[0] for example in examples], config)
    return Teacher(lm, examples, answers, config), answers


def as_logits(rows: TeacherRows, vocab: int) -> torch.Tensor:
    """Log-probabilities [N, V] from rows that hold the whole vocabulary."""
    return torch.empty(len(rows.ids_NK), vocab).scatter_(1, rows.ids_NK, rows.log_probs_NK)


# ------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_are_what_the_lm_expects_behind_the_text_token_by_token(name):
    """One example at a time, one position at a time, without padding, through `lm.model`."""
    examples = tiny.examples(NUM)
    teacher, answers = teacher_of(name, examples, max_answer_tokens=6)
    lm, tok = teacher.lm, teacher.lm.tokenizer
    got = as_logits(teacher(ALL), lm.vocab_size)
    expected, targets = [], []
    for example in examples:
        text = text_prompt(example.context, example.question)
        head = [tok.bos_token_id] if name == "llama" else []
        prompt = [*head, *tok(text, add_special_tokens=False).input_ids]
        anchor = tok("Answer:", add_special_tokens=False).input_ids
        whole = tok(f"Answer: {example.answers[0]}", add_special_tokens=False).input_ids
        answer = whole[len(anchor) :]
        wanted = [*answer, tok.eos_token_id] if len(answer) <= 6 else answer[:6]
        for step in range(len(wanted)):
            ids = torch.tensor([[*prompt, *anchor, *answer[:step]]])
            expected.append(lm.model(input_ids=ids).logits[0, -1].log_softmax(-1))
        targets.extend(wanted)
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-5, rtol=1e-4)
    assert answers.batch(ALL).target_N.tolist() == targets  # the student's rows are the same ones
    assert len(set(answers.complete_N.tolist())) == 2  # some answers are cut, and have no EOS row


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_student_that_reads_the_text_has_no_divergence(name):
    """Through the path of training: the prefix is the embedded text. The off-by-one twin fails."""
    lm = tiny.frozen_lm(name)
    for example in tiny.examples(4):
        text = text_prompt(example.context, example.question)
        ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False).input_ids)
        teacher, answers = teacher_of(name, [example], latent_len=len(ids))
        rows, batch = teacher(np.array([0])), answers.batch(np.array([0]))
        states_ND = supervised_states(lm, lm.embed(ids)[None], batch)
        assert len(rows.ids_NK) == len(states_ND) >= 3
        per_row = teacher_kl_sum(lm.logits(states_ND), rows) / len(states_ND)
        assert abs(float(per_row)) < 1e-5
        late = dataclasses.replace(
            rows, ids_NK=rows.ids_NK.roll(1, 0), log_probs_NK=rows.log_probs_NK.roll(1, 0)
        )
        assert float(teacher_kl_sum(lm.logits(states_ND), late)) / len(states_ND) > 0.1


def test_rows_of_an_example_do_not_depend_on_its_batch():
    teacher, answers = teacher_of("llama")
    some = np.array([5, 0, 3])
    got, at = as_logits(teacher(some), teacher.lm.vocab_size), 0
    for i in some:
        alone = teacher(np.array([i]))
        num = answers.num_targets(np.array([i]))
        torch.testing.assert_close(got[at : at + num], as_logits(alone, teacher.lm.vocab_size))
        at += num
    assert at == len(got) == answers.num_targets(some)


# ------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_uncached(name, monkeypatch):
    """Also where the table is read in several batches and blocks."""
    monkeypatch.setattr("lw_fast.teacher.POSITIONS", 100)
    monkeypatch.setattr("lw_fast.teacher.BLOCK", 3)
    kept, _ = teacher_of(name, teacher_cache="on", kl_top_k=5)
    fresh, _ = teacher_of(name, teacher_cache="off", kl_top_k=5)
    assert kept.table is not None and fresh.table is None
    for index in (ALL, np.array([6, 1]), ALL[::-1]):
        a, b = kept(index), fresh(index)
        assert a.ids_NK.shape == (a.log_probs_NK.shape) and a.ids_NK.shape[1] == 5
        assert torch.equal(a.ids_NK, b.ids_NK)
        torch.testing.assert_close(a.log_probs_NK, b.log_probs_NK)


def test_auto_keeps_what_fits(monkeypatch):
    rows = teacher_of("qwen", kl_top_k=4)[0].num_N.sum()
    for room, kept in ((8 * 4 * rows, True), (8 * 4 * rows - 1, False)):
        monkeypatch.setattr("lw_fast.teacher.CACHE_BYTES_CPU", room)
        assert (teacher_of("qwen", kl_top_k=4)[0].table is not None) == kept


def test_a_cached_teacher_reads_nothing_in_a_step(monkeypatch):
    kept, _ = teacher_of("qwen", teacher_cache="on")
    monkeypatch.setattr(kept.lm.model, "forward", None)
    monkeypatch.setattr(kept.lm.model.base_model, "forward", None)
    kept(ALL)


# ------------------------------------------------------------------------------- value, gradient


def written_out(logits_NV, rows: TeacherRows) -> torch.Tensor:
    """The divergence from its definition, over the teacher's tokens, in fp64."""
    heat = rows.temperature
    p_NK = (rows.log_probs_NK.double() / heat).softmax(-1)
    q_NK = (logits_NV.double() / heat).log_softmax(-1).gather(1, rows.ids_NK)
    return heat**2 * (p_NK * (p_NK.log() - q_NK)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, WHOLE])
def test_value_of_the_divergence(k, temperature):
    teacher, _ = teacher_of("llama", kl_top_k=k, kl_temperature=temperature)
    rows = teacher(ALL)
    logits = torch.randn(len(rows.ids_NK), teacher.lm.vocab_size)
    expected = written_out(logits, rows)
    torch.testing.assert_close(teacher_kl_sum(logits, rows).double(), expected, rtol=1e-5, atol=0)
    assert expected > 0.1


def test_what_is_left_of_a_perfect_student_is_the_mass_that_was_cut():
    whole, cut = (teacher_of("qwen", kl_top_k=k)[0] for k in (WHOLE, 3))
    rows = cut(ALL)
    logits = as_logits(whole(ALL), whole.lm.vocab_size)
    left = -rows.log_probs_NK.exp().sum(1).log().sum()
    torch.testing.assert_close(teacher_kl_sum(logits, rows), left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_backward_serves_both_losses(name):
    """The gradient at the prefix is that of plain autograd of CE + weight * KL."""
    teacher, table = teacher_of(name, kl_top_k=9, kl_temperature=1.5)
    lm = teacher.lm
    answers = dataclasses.replace(table.batch(ALL), teacher=teacher(ALL))
    weights = dict(row_weight=0.3, first_weight=0.2)
    prefix = 0.3 * torch.randn(NUM, 6, lm.d_model, generator=torch.Generator().manual_seed(0))

    leaf = prefix.clone().requires_grad_()
    loss, stats = frozen_lm_loss(lm, leaf, answers, **weights, kl_weight=0.7)
    (loss * 3).backward()

    plain = prefix.clone().requires_grad_()
    logits = lm.logits(supervised_states(lm, plain, answers))
    nll = torch.nn.functional.cross_entropy(logits, answers.target_N, reduction="none")
    divergence = written_out(logits, answers.teacher).float()
    expected = 0.3 * nll.sum() + 0.2 * nll[answers.first_N].sum() + 0.7 * divergence
    (expected * 3).backward()

    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(stats[STATS.index("kl_sum")], divergence.detach())
    assert (leaf.grad - plain.grad).abs().max() <= 1e-6 * plain.grad.norm()
    without = prefix.clone().requires_grad_()
    frozen_lm_loss(lm, without, answers, **weights, kl_weight=0.0)[0].backward()
    assert (without.grad * 3 - plain.grad).norm() > 0.1 * plain.grad.norm()


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_have_the_same_teacher(name):
    """Spare rows of a packed batch have none; loss, sums and gradient are those of padded rows."""
    results = []
    for packed in (False, True):
        lm = tiny.frozen_lm(name)
        lm.packed = packed
        teacher, table = teacher_of(name, lm=lm)
        answers = dataclasses.replace(table.batch(ALL), teacher=teacher(ALL))
        assert (len(answers.target_N) > len(answers.teacher.ids_NK)) == packed
        leaf = 0.3 * torch.randn(NUM, 6, lm.d_model, generator=torch.Generator().manual_seed(0))
        leaf.requires_grad_()
        weights = dict(row_weight=0.3, first_weight=0.2, kl_weight=0.7)
        loss, stats = frozen_lm_loss(lm, leaf, answers, **weights)
        loss.backward()
        results.append((loss.detach(), stats, leaf.grad))
    for padded, packed in zip(*results, strict=True):
        assert (packed - padded).norm() <= 1e-5 * padded.norm()


# ------------------------------------------------------------------------------- the step


SETTINGS = dict(first_token_ce_weight=0.5, encoder_dropout=0.0, max_answer_tokens=6, kl_top_k=16)


def step(model, tables, index, counts, loss):
    source = model.batch(tables.sources, index)
    answers = {name: tables.answer_batch(name, index) for name in model.lms}
    return step_loss(
        model.bridge(source), source, answers, model.lms, model.bridge, counts, loss,
        model.config.encoder.span_weight,
    )  # fmt: skip


def counts_of(tables) -> StepCounts:
    rows = {name: table.num_targets(ALL) for name, table in tables.answers.items()}
    return StepCounts(examples=NUM, spans=tables.sources.num_spans(ALL), rows=rows)


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {n: p.grad for n, p in model.bridge.named_parameters() if p.grad is not None}
    model.bridge.zero_grad(set_to_none=True)
    return taken


def test_accumulation_does_not_change_the_step():
    """One batch of 8 equals four of 2, whose rows differ in number."""
    model = tiny.latent_model(**SETTINGS, kl_weight=0.8)
    tables = model.tables(tiny.examples(NUM))
    counts, loss = counts_of(tables), model.config.loss
    whole, sums = step(model, tables, ALL, counts, loss)
    whole.backward()
    expected = gradients(model)
    parts = np.split(ALL, 4)
    assert len({tables.answers["llama"].num_targets(part) for part in parts}) > 1
    total, kl = 0.0, 0.0
    for part in parts:
        share, part_sums = step(model, tables, part, counts, loss)
        share.backward()
        total += share.item()
        kl += part_sums["llama"][STATS.index("kl_sum")]
    assert total == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(kl, sums["llama"][STATS.index("kl_sum")])
    got = gradients(model)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-6 * norm, name


def test_the_weight_changes_the_loss_and_nothing_else():
    model = tiny.latent_model(**SETTINGS, kl_weight=0.8)
    tables = model.tables(tiny.examples(NUM))
    counts, loss = counts_of(tables), model.config.loss
    total, sums = step(model, tables, ALL, counts, loss)
    off = dataclasses.replace(tables, teachers={})
    plain, plain_sums = step(model, off, ALL, counts, dataclasses.replace(loss, kl_weight=0.0))
    kl = sum(float(sums[name][-1]) / counts.rows[name] for name in NAMES) / 2
    assert float((total - plain).detach()) == pytest.approx(0.8 * kl, rel=1e-5) and kl > 0.1
    assert sums.keys() == plain_sums.keys()
    for name in NAMES:
        assert torch.equal(sums[name][:-1], plain_sums[name][:-1])
        assert plain_sums[name][-1] == 0
    assert torch.equal(sums["span"], plain_sums["span"])
    assert torch.equal(sums["align"], plain_sums["align"])


def test_no_weight_no_teacher(monkeypatch):
    """Nothing is read, nothing is kept, and a batch carries no soft targets."""
    monkeypatch.setattr("lw_fast.model.Teacher", None)
    tables = tiny.latent_model().tables(tiny.examples(NUM))
    assert tables.teachers == {} and tables.answer_batch("llama", ALL).teacher is None


# ------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(lm_dirs, qa_file):
    return dict(
        dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=4, lm=lm_dirs,
        kinds="latent", epochs=4, encoder_dropout=0.0,
    )  # fmt: skip


def logged(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").open()]


def test_a_run_logs_the_divergence_and_lowers_it(tmp_path, settings):
    train(tiny.config(**settings, kl_weight=1.0, lr=3e-3), ONE, tmp_path / "kl")
    train(tiny.config(**settings, lr=3e-3), ONE, tmp_path / "plain")
    rows, plain = logged(tmp_path / "kl"), logged(tmp_path / "plain")
    for name in NAMES:
        kl = [row[f"{name}/kl"] for row in rows]
        assert np.mean(kl[-4:]) < 0.9 * np.mean(kl[:4])
        assert not any(f"{name}/kl" in row for row in plain)
        assert rows[0][f"{name}/nll_token"] == plain[0][f"{name}/nll_token"]
    added = sum(rows[0][f"{name}/kl"] for name in NAMES) / 2
    assert rows[0]["loss"] - plain[0]["loss"] == pytest.approx(added, rel=1e-5)


def test_micro_batches_and_the_cache_do_not_change_a_run(tmp_path, settings):
    runs = []
    for i, change in enumerate(({}, {"micro_batch_size": 2}, {"teacher_cache": "off"})):
        config = tiny.config(**settings | dict(kl_weight=0.5, epochs=1) | change)
        train(config, ONE, tmp_path / str(i))
        runs.append(
            [[row["loss"], *(row[f"{n}/kl"] for n in NAMES)] for row in logged(tmp_path / str(i))]
        )
    assert np.allclose(runs[0], runs[1], rtol=1e-4) and np.allclose(runs[0], runs[2], rtol=1e-4)


# ------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_weight": -1.0},
        {"kl_temperature": 0.0},
        {"kl_top_k": 0},
        {"teacher_cache": "maybe"},
        {"kl_weight": 1.0, "compat": "double_shift"},
        {"kl_weight": 1.0, "compat": "original"},
        {"kl_weight": 1.0, "channel_spans": 2},
    ],
)
def test_contradictory_knobs_are_errors(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        tiny.config(**changes)
