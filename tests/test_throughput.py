"""benchmarks/throughput.py on the nano pair: every kind of case, and surviving a full card."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny
import torch

from benchmarks import plot_throughput, rivals, steps, throughput
from benchmarks.rows import read_rows
from lw_fast.batches import AnswerTable, Order
from lw_fast.meters import LMCost

SMALL = "--device cpu --steps 2 --warm_up 1 --samples 32 --batch_size 4 --batches 2,4 "
SMALL += "--original_batches 4 --peft_batches 4"


def bench(monkeypatch, out, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", *SMALL.split(), *flags, "--out", str(out)])
    throughput.main()


def by_case(path) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in read_rows(path):
        found.setdefault(row["case"], {})[row["metric"]] = row
    return found


def test_every_kind_of_case(monkeypatch, tmp_path, capsys):
    out = tmp_path / "throughput_nano.csv"
    bench(monkeypatch, out, "--groups", "ladder,batches,fp8,encoders,attention,original,peft")
    found = by_case(out)
    rungs = [case for case in found if "rung=" in case]
    assert [case.split("rung=")[1][0] for case in rungs] == [
        str(n) for n in range(len(throughput.LADDER))
    ]
    assert sum("group=batches" in case for case in found) == 2
    assert {"encoder=lm_cached", "encoder=lm_uncached"} <= {w for c in found for w in c.split()}
    assert sum("impl=original" in case for case in found) == 1
    for case, metrics in found.items():
        assert {"seconds", "samples/s", "positions/s", "first_step_seconds"} <= metrics.keys(), case
        assert metrics["seconds"]["n"] == 2 and metrics["seconds"]["value"] > 0
        assert "mfu" not in metrics and "peak_gib" not in metrics  # unknown on a CPU
    if not rivals.installed("liger_kernel"):
        assert "no row for impl=peft_liger: liger_kernel" in capsys.readouterr().out
    plot_throughput.draw(out, tmp_path / "plot.png")
    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- rows nano -->\nold\n<!-- end -->\nafter\n")
    plot_throughput.put_table(document, "nano", plot_throughput.table(out))
    text = document.read_text()
    assert "old" not in text and "| 1: triton kernels |" in text and text.endswith("after\n")


def test_the_run_survives_a_full_card_and_a_broken_case(monkeypatch, tmp_path, capsys):
    """A case that does not fit says so in a row; one that fails is named at the end."""
    original = rivals.OriginalStep.__call__

    def step(self):
        if self.run.config.optim.batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.run.config.optim.batch_size == 3:
            raise ValueError("broken")
        return original(self)

    monkeypatch.setattr(rivals.OriginalStep, "__call__", step)
    out = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="1 cases failed.*batch=3"):
        bench(monkeypatch, out, "--groups", "original", "--original_batches", "4,3,2")
    full, fine = by_case(out).values()
    assert full.keys() == {"out_of_memory"} and "batch=4" in full["out_of_memory"]["case"]
    assert fine["samples/s"]["value"] > 0 and "batch=2" in fine["samples/s"]["case"]
    assert "broken" in capsys.readouterr().err


def test_lms_stay_in_memory_while_their_weights_fit(monkeypatch, tmp_path):
    loads = []
    monkeypatch.setattr(
        "lw_fast.shared.load_frozen_lm", lambda name, *_: loads.append(name) or tiny.frozen_lm(name)
    )
    bench(monkeypatch, tmp_path / "rows.csv", "--groups", "ladder,batches")
    assert sorted(loads) == ["llama", "qwen"]
    other = {"trust_remote_code": True}  # any setting that loading may depend on
    monkeypatch.setattr(throughput, "LADDER", (*throughput.LADDER, ("other", other)))
    bench(monkeypatch, tmp_path / "rows.csv", "--groups", "ladder")
    assert len(loads) == 6


def test_a_rung_stands_on_those_before(monkeypatch):
    monkeypatch.setattr(throughput, "LADDER", (("a", {"x": 1}), ("b", {"y": 2}), ("c", {"x": 3})))
    assert [dict(case.overrides) for case in throughput.ladder()] == [
        {"x": 1}, {"x": 1, "y": 2}, {"x": 3, "y": 2},
    ]  # fmt: skip
    assert throughput.full() == {"x": 3, "y": 2}


def test_rates_are_medians_of_single_steps():
    work = [steps.Work(4, {"a": 40}, {"a": 8}, 100)] * 3
    timing = steps.Timing(9.0, [1.0, 2.0, 4.0], work, peak_gib=1.5)
    rows = steps.timing_rows("t", "c", timing, {"a": LMCost(10, 2, 5)}, 1000.0, {})
    values = {row["metric"]: (row["value"], row["p20"], row["p80"], row["n"]) for row in rows}
    assert values["seconds"] == (2.0, 1.0, 4.0, 3)
    assert values["samples/s"] == (2.0, 1.0, 4.0, 3)
    assert values["source_bytes/s"][0] == 50
    assert values["mfu"][0] == pytest.approx((4 * 10 * 40 + 4 * 2 * 5 * 8) / 2 / 1000)
    assert values["peak_gib"][0] == 1.5 and values["first_step_seconds"][0] == 9.0


def test_two_lms_in_turn_take_the_sum_of_their_times():
    one = steps.Timing(1.0, [1.0, 2.0], [steps.Work(4, {"a": 40}, {"a": 8})] * 2, 10.0)
    two = steps.Timing(2.0, [3.0, 5.0], [steps.Work(4, {"b": 44}, {"b": 9})] * 2, 12.0)
    both = steps.one_after_the_other([one, two])
    assert both.seconds == [4.0, 7.0] and both.first_seconds == 3.0 and both.peak_gib == 12.0
    assert both.work[0].samples == 4 and both.work[0].positions == {"a": 40, "b": 44}


@pytest.fixture(params=["llama", "qwen"])
def table(request):
    answers = [example.answers[0] for example in tiny.examples(6)]
    return AnswerTable(tiny.frozen_lm(request.param), answers, tiny.config(max_answer_tokens=4))


def test_peft_gets_the_same_targets_as_we_have(table):
    index = np.arange(6)
    ids_BL, mask_BL, labels_BL = rivals.hf_batch(table, index)
    ours = table.batch(index)
    assert (labels_BL != rivals.IGNORED).sum() == table.num_targets(index) == len(ours.target_N)
    # The loss of a Hugging Face model shifts: position t is asked for label t + 1.
    targets = labels_BL[:, 1:][labels_BL[:, 1:] != rivals.IGNORED]
    np.testing.assert_array_equal(targets, ours.target_N.numpy())
    assert ((labels_BL == rivals.IGNORED) | (mask_BL == 1)).all()
    assert len(ids_BL[0]) < 4 + len(table.frame.head) + len(table.frame.anchor) + 2


def test_the_original_trains_the_bridge_through_both_lms():
    model = tiny.latent_model(encoder_type="byte_seed", calibration="embed_rms")

    class FakeRun:
        order, tables = Order(8, 4, 0), model.tables(tiny.examples(8))

    FakeRun.model = model
    seen = []
    for lm in model.lms.values():
        lm.model.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(out.logits.shape[1]), with_kwargs=True
        )
    before = [p.clone() for p in model.bridge.parameters()]
    work = rivals.OriginalStep(FakeRun())()
    after = list(model.bridge.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.requires_grad]
    assert all(moved)
    anchors = {n: len(t.frame.anchor) for n, t in FakeRun.tables.answers.items()}
    m = model.config.encoder.latent_len
    # llama: all positions, padded to 32 answer tokens; then its BOS behind the anchor
    assert seen[:2] == [m + anchors["llama"] + 31, m + anchors["llama"] + 1]
    assert seen[2:] == [m + anchors["qwen"] + 31, m + anchors["qwen"]]
    assert work.samples == 4 and set(work.positions) == {"llama", "qwen"}
