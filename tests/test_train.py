"""The loop in process: what a run writes, and that stopping, resuming and NaN lose nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lw_fast import checkpoint, train_step
from lw_fast import train as module
from lw_fast.config import build_config
from lw_fast.data import load_examples
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.train import Interrupted, NonFiniteLoss, train
from lw_fast.train_step import gold_span_draws

ONE = World(rank=0, local_rank=0, size=1, device=tiny.CPU)
STEPS_PER_EPOCH = 4
"""32 of the 40 questions, 8 at a time."""
TIMES = {"time", "seconds_per_step", "samples/s", "positions/s", "supervised_tokens/s"}
TIMES |= {"source_bytes/s"}


@pytest.fixture
def settings(lm_dirs, qa_file):
    """Dropout, accumulation, gold spans and every loss term are on: all must survive a resume."""
    files = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=6)
    losses = dict(first_token_ce_weight=0.5, adapter_rms_l2=0.1, scale_l2=0.1)
    return files | losses | dict(lm=lm_dirs, micro_batch_size=4, adapter_freeze_scale=False)


def run(folder: Path, settings, *, resume=False, overwrite=False, init_from=None, **changes):
    config = tiny.config(**settings | changes)
    return train(config, ONE, folder, resume=resume, overwrite=overwrite, init_from=init_from)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def numbers(rows: list[dict]) -> list[dict]:
    """The rows of a log without what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same_checkpoint(a: Path, b: Path) -> bool:
    """Bit-identical weights, moments and statistics."""
    first, second = checkpoint.load(a), checkpoint.load(b)
    tensors = []
    for loaded in (first, second):
        flat = dict(loaded.encoder)
        for name, state in loaded.adapters.items():
            flat |= {f"{name}.{key}": value for key, value in state.items()}
        for name, moments in loaded.optimizer["moments"].items():
            flat |= {f"{name}.{key}": value for key, value in moments.items()}
        tensors.append(flat)
    assert tensors[0].keys() == tensors[1].keys()
    same = all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    return (
        same and first.stats == second.stats and first.optimizer["step"] == second.optimizer["step"]
    )


def interrupt_after(monkeypatch, step: int, number=signal.SIGINT) -> None:
    """Sends this process a signal while it is in a step."""
    step_once = module.train_step

    def stepping(run):
        if run.global_step == step - 1:
            os.kill(os.getpid(), number)
        return step_once(run)

    monkeypatch.setattr(module, "train_step", stepping)


# ------------------------------------------------------------------------------- what it writes


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lm_dirs, qa_file):
    """Two epochs, evaluated after each."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    settings = dict(dataset=str(qa_file), eval_dataset=str(qa_file), samples=32, eval_samples=6)
    metrics = run(folder, settings, lm=lm_dirs, eval_every=1)
    return folder, metrics


def test_run_folder(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "environment.json", "log.jsonl", "tensorboard", "latest", "best", ".lock",
        "epoch1", "epoch2", "eval_epoch1", "eval_epoch2",
    }  # fmt: skip
    assert (folder / "latest").read_text().strip() == "epoch2"
    for epoch in ("epoch1", "epoch2"):
        assert {path.name for path in (folder / epoch).iterdir()} == {
            "encoder.pt", "adapter_llama.pt", "adapter_qwen.pt", "state.pt", "config.json",
            "training_stats.json", "manifest.json",
        }  # fmt: skip
        names = {path.name for path in (folder / f"eval_{epoch}").iterdir()}
        assert names == {"metrics.json", "metrics.csv", "predictions.jsonl"}


def test_log_rows(finished):
    folder, _ = finished
    rows = log_of(folder)
    assert [row["step"] for row in rows] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert rows[-1]["epoch"] == 2.0
    per_lm = {"nll_token", "first_nll", "first_token_top1", "first_token_top5"}
    expected = {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "grad_norm/encoder",
        "grad_norm/llama",
        "grad_norm/qwen",
        "lr_factor",
        "span_loss",
        "align_loss",
    } | TIMES
    expected |= {f"{name}/{key}" for name in ("llama", "qwen") for key in per_lm}
    for row in rows:
        assert row.keys() == expected  # no GPU: no memory, no MFU, rather than zeros
        assert all(math.isfinite(value) for value in row.values())
        parts = [row[f"grad_norm/{part}"] for part in ("encoder", "llama", "qwen")]
        assert all(parts) and math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-4)
        assert 0 <= row["llama/first_token_top1"] <= row["llama/first_token_top5"] <= 1


def test_the_last_evaluation_is_returned(finished):
    folder, metrics = finished
    assert metrics == json.loads((folder / "eval_epoch2" / "metrics.json").read_text())
    assert metrics["samples"] == 6


def test_tensorboard_has_the_curves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = [row["loss"] for row in log_of(folder)]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(logged)
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in log_of(folder)]


def test_only_what_is_trained_is_saved(finished):
    folder, _ = finished
    loaded = checkpoint.load(folder / "epoch2")
    model = tiny.latent_model()
    trained = {n.removeprefix("encoder.") for n in model.bridge.state_dict() if n[0] == "e"}
    assert loaded.encoder.keys() == trained
    assert loaded.adapters.keys() == {"llama", "qwen"}
    assert loaded.progress["epoch"] == 2
    assert loaded.progress["global_step"] == loaded.optimizer["step"] == 2 * STEPS_PER_EPOCH
    fresh = model.bridge.state_dict()
    moved = [n for n, t in loaded.encoder.items() if not torch.equal(t, fresh[f"encoder.{n}"])]
    assert len(moved) == len(loaded.encoder)


def test_training_stats_cover_their_epoch(finished):
    folder, _ = finished
    for epoch in (1, 2):
        stats = json.loads((folder / f"epoch{epoch}" / "training_stats.json").read_text())
        for name in ("llama", "qwen"):
            assert stats[name].keys() == {"rms_mean_raw", "rms_mean_cal", "embed_rms", "count"}
            assert stats[name]["count"] == 32
            assert stats[name]["rms_mean_cal"] == stats[name]["embed_rms"]
            assert 0.01 < stats[name]["rms_mean_raw"] < 10


def test_log_rows_are_means_over_their_steps(settings, tmp_path):
    """Every third step logged: the loss is the mean of three, token NLL weighs tokens alike."""
    run(tmp_path / "each", settings)
    run(tmp_path / "third", settings, log_every=3)
    each, third = log_of(tmp_path / "each"), log_of(tmp_path / "third")
    assert [row["step"] for row in third] == [3, 6, 8]
    for row, parts in zip(third, (each[:3], each[3:6], each[6:]), strict=True):
        for key in ("loss", "llama/first_nll", "qwen/first_token_top5"):
            assert row[key] == pytest.approx(np.mean([part[key] for part in parts]), rel=1e-5)
        nll = [part["llama/nll_token"] for part in parts]
        assert min(nll) < row["llama/nll_token"] < max(nll)
        assert row["grad_norm"] == parts[-1]["grad_norm"]


def test_source_bytes_are_bytes(finished):
    """The reader's tokens are no bytes."""
    folder, _ = finished
    examples = tiny.examples(40)
    mean = np.mean([len(f"{e.context}{e.question}".encode()) for e in examples])
    for row in log_of(folder):
        assert mean < row["source_bytes/s"] / row["samples/s"] < mean + 40  # plus the headings


# ------------------------------------------------------------------------------- the same training


def test_two_runs_are_equal(settings, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        run(tmp_path / name, settings)
        torch.rand(7)
    assert numbers(log_of(tmp_path / "a")) == numbers(log_of(tmp_path / "b"))
    assert same_checkpoint(tmp_path / "a" / "epoch2", tmp_path / "b" / "epoch2")
    run(tmp_path / "c", settings, seed=1)
    assert numbers(log_of(tmp_path / "c")) != numbers(log_of(tmp_path / "a"))


@pytest.mark.parametrize("encoder_type", ["byte_seed", "byte", "lm"])
def test_accumulation_does_not_change_a_run(settings, tmp_path, encoder_type):
    """8 equals 4 x 2 over whole runs (without dropout, whose draws are per micro-batch)."""
    common = dict(encoder_dropout=0.0, encoder_type=encoder_type, epochs=1)
    for micro in (0, 2):
        run(tmp_path / str(micro), settings, micro_batch_size=micro, **common)
    for a, b in zip(log_of(tmp_path / "0"), log_of(tmp_path / "2"), strict=True):
        for key in ("loss", "grad_norm", "llama/nll_token", "qwen/nll_token"):
            assert a[key] == pytest.approx(b[key], rel=2e-5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def whole(uninterrupted, settings):
    """One run to compare with, logged every other step so that a row can span a stop."""
    if not uninterrupted.exists():
        run(uninterrupted, settings, log_every=2)
    return uninterrupted


def test_resume_from_an_epoch_is_exact(whole, settings, tmp_path):
    """As after a crash in the second epoch: losses and weights to the last bit."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "epoch2")
    shutil.rmtree(folder / "eval_epoch2")
    run(folder, settings, log_every=2, resume=True)
    assert numbers(log_of(folder)) == numbers(log_of(whole))
    assert same_checkpoint(folder / "epoch2", whole / "epoch2")
    predictions = [f / "eval_epoch2" / "predictions.jsonl" for f in (folder, whole)]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()


@pytest.mark.parametrize(
    ("stop", "number"),
    [(1, signal.SIGINT), (3, signal.SIGINT), (6, signal.SIGINT), (7, signal.SIGTERM)],
)
def test_resume_after_a_signal_is_exact(whole, settings, tmp_path, monkeypatch, stop, number):
    """Stopped in the middle of an epoch and of a row of the log; the statistics go on too."""
    folder, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop, number)
        with pytest.raises(Interrupted, match=f"stopped after step {stop}; --resume continues"):
            run(folder, settings, log_every=2)
    assert signal.getsignal(number) is before
    assert checkpoint.latest(folder) == folder / f"step{stop}"
    run(folder, settings, log_every=2, resume=True)
    assert numbers(log_of(folder)) == numbers(log_of(whole))
    assert same_checkpoint(folder / "epoch2", whole / "epoch2")


def test_extra_checkpoints_and_pruning(settings, tmp_path):
    run(tmp_path / "all", settings, save_every=3)
    assert {p.parent.name for p in (tmp_path / "all").glob("*/state.pt")} == {
        "step3", "epoch1", "step6", "epoch2",
    }  # fmt: skip
    run(tmp_path / "two", settings, save_every=3, keep_last=2)
    assert {p.parent.name for p in (tmp_path / "two").glob("*/state.pt")} == {"step6", "epoch2"}


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 4]), (False, [4])])
def test_the_best_checkpoint_stays(settings, tmp_path, monkeypatch, keep_best, kept):
    """By the mean of the LMs' F1, over a resume too; `best` names it."""
    scores = iter([(0.5, 0.5), (0.4, 0.8), (0.9, 0.1), (0.6, 0.6)])

    def evaluating(model, examples, out_dir, world):
        metrics = evaluate_once(model, examples, out_dir, world)
        for row, f1 in zip(metrics["latent"].values(), next(scores), strict=True):
            row["f1"] = f1
        (out_dir / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    evaluate_once = module.evaluate
    monkeypatch.setattr(module, "evaluate", evaluating)
    options = dict(eval_every=1, keep_last=1, keep_best=keep_best, kinds="latent")
    run(tmp_path / "run", settings, epochs=3, **options)
    run(tmp_path / "run", settings, epochs=4, resume=True, **options)
    folders = {path.parent.name for path in (tmp_path / "run").glob("*/state.pt")}
    assert folders == {f"epoch{number}" for number in kept}
    if keep_best:
        assert (tmp_path / "run" / "best").read_text() == "epoch2\n"


def test_a_save_holds_the_weights_of_its_step(whole, settings, tmp_path, monkeypatch):
    """Though it reaches the disk while the training goes on."""
    disk, write, step_once = threading.Event(), checkpoint._write_synced, module.train_step

    def slow(path, data):
        assert threading.current_thread() is threading.main_thread() or disk.wait(20)
        write(path, data)

    def stepping(run):
        norm = step_once(run)
        if run.global_step == 2 * STEPS_PER_EPOCH - 1:
            assert not (run.run_dir / "epoch1").exists()
            disk.set()
        return norm

    monkeypatch.setattr(checkpoint, "_write_synced", slow)
    monkeypatch.setattr(module, "train_step", stepping)
    run(tmp_path / "run", settings, log_every=2)
    for epoch in ("epoch1", "epoch2"):
        assert same_checkpoint(tmp_path / "run" / epoch, whole / epoch)


def test_a_failed_save_ends_the_run_after_the_next_step(settings, tmp_path, monkeypatch):
    """What was there stays, and resuming goes on from it."""
    step_once, write, taken = module.train_step, checkpoint._write_synced, []

    def full(path, data):
        if "step4" in str(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    def stepping(run):
        taken.append(run.global_step)
        if run.global_step == 4:
            futures.wait([run.saver._pending])
        return step_once(run)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_synced", full)
        patch.setattr(module, "train_step", stepping)
        with pytest.raises(UserError, match="could not save checkpoint .*No space left"):
            run(tmp_path / "run", settings, batch_size=4, save_every=2)
    assert taken[-1] == 4
    assert checkpoint.latest(tmp_path / "run").name == "step2"
    run(tmp_path / "run", settings, batch_size=4, save_every=2, resume=True)
    assert checkpoint.latest(tmp_path / "run").name == "epoch2"


def test_a_stop_in_the_last_step_leaves_only_the_evaluation(whole, settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 * STEPS_PER_EPOCH)
        with pytest.raises(Interrupted):
            run(tmp_path / "run", settings, log_every=2)
    assert not (tmp_path / "run" / "eval_epoch2").exists()
    assert run(tmp_path / "run", settings, log_every=2, resume=True)["samples"] == 6
    assert numbers(log_of(tmp_path / "run")) == numbers(log_of(whole))
    assert same_checkpoint(tmp_path / "run" / "epoch2", whole / "epoch2")


def test_ctrl_c_during_the_evaluation(settings, tmp_path, monkeypatch):
    """Everything is saved by then: it stops at once, and resuming evaluates."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", settings)
    assert (tmp_path / "run" / "latest").read_text().strip() == "epoch2"
    assert run(tmp_path / "run", settings, resume=True)["samples"] == 6


def test_nothing_to_resume_at_the_end(whole, settings, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(UserError, match="nothing to resume: .*epoch2 is the end; raise --epochs"):
        run(folder, settings, log_every=2, resume=True)
    run(folder, settings, log_every=2, epochs=3, resume=True)
    assert [row["step"] for row in log_of(folder)] == [2, 4, 6, 8, 10, 12]


def test_resume_skips_a_damaged_checkpoint(whole, settings, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    path = folder / "epoch2" / "encoder.pt"
    path.write_bytes(path.read_bytes()[:-10])
    run(folder, settings, log_every=2, resume=True)
    assert same_checkpoint(folder / "epoch2", whole / "epoch2")


# ------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_nan_stops_the_run_before_it_does_harm(settings, tmp_path, monkeypatch, step, log_every):
    """No step is taken with it, the last good checkpoint stays, and it can be resumed."""
    taken, folder = [], tmp_path / "run"
    step_once, loss_once = train_step.train_step, train_step.step_loss

    def stepping(run):
        norm = step_once(run)
        taken.append({n: t.clone() for n, t in run.engine.module_state().items()})
        return norm

    def poisoned(*args):
        loss, sums = loss_once(*args)
        bad = len(taken) == step - 1
        return (loss * math.nan if bad else loss), sums

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", stepping)
        patch.setattr(train_step, "step_loss", poisoned)
        with pytest.raises(NonFiniteLoss, match="not finite near step .* --resume") as error:
            run(folder, settings, log_every=log_every)
    assert "\n" not in str(error.value)
    if step > 1:
        before, after = taken[step - 2 : step]
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(taken) <= step + 1
    assert all(t.isfinite().all() for state in taken for t in state.values())
    kept = {path.parent.name for path in folder.glob("*/state.pt")}
    assert kept == ({"epoch1"} if step > STEPS_PER_EPOCH else set())
    rows = log_of(folder) if (folder / "log.jsonl").exists() else []
    assert len(rows) == (step - 1 if log_every == 1 else 0)
    assert all(math.isfinite(row["loss"]) for row in rows)
    if kept:
        run(folder, settings, log_every=log_every, resume=True)
        assert checkpoint.latest(folder).name == "epoch2"


# ------------------------------------------------------------------------------- starting


def test_init_from_takes_weights_and_nothing_else(finished, settings, tmp_path, monkeypatch):
    """A fresh optimizer, schedule and order, from another run's encoder and adapters."""
    seen = {}
    loop = module._loop
    monkeypatch.setattr(
        module,
        "_loop",
        lambda run: (
            seen.update(
                weights=run.engine.module_state(),
                step=run.global_step,
                moments=run.engine.optimizer_state(),
            )
            or loop(run)
        ),
    )
    run(tmp_path / "new", settings, init_from=finished[0], lr=1e-3)
    loaded = checkpoint.load(finished[0] / "epoch2")
    assert all(torch.equal(seen["weights"][f"encoder.{n}"], t) for n, t in loaded.encoder.items())
    for name, state in loaded.adapters.items():
        assert all(
            torch.equal(seen["weights"][f"adapters.{name}.{n}"], t) for n, t in state.items()
        )
    assert seen["step"] == 0 and seen["moments"] == {"step": 0, "moments": {}}
    assert len(log_of(tmp_path / "new")) == 2 * STEPS_PER_EPOCH


def test_init_from_for_another_lm_leaves_its_adapter_fresh(
    finished, settings, tmp_path, monkeypatch, lm_dirs
):
    seen = {}
    monkeypatch.setattr(module, "_loop", lambda run: seen.update(run.engine.module_state()))
    lms = {"third": lm_dirs["llama"], "qwen": lm_dirs["qwen"]}
    run(tmp_path / "new", settings | {"lm": lms}, init_from=finished[0] / "epoch1")
    loaded = checkpoint.load(finished[0] / "epoch1")
    key = "net.1.weight"
    assert torch.equal(seen[f"adapters.qwen.{key}"], loaded.adapters["qwen"][key])
    assert not torch.equal(seen[f"adapters.third.{key}"], loaded.adapters["llama"][key])


@pytest.mark.parametrize(
    "changes",
    [{"d_z": 24}, {"encoder_layers": 2}, {"encoder_type": "byte"}, {"adapter_type": "linear"}],
)
def test_init_from_that_does_not_fit(finished, settings, tmp_path, changes):
    """Also where weights are only missing: half a start would go unnoticed."""
    with pytest.raises(UserError, match="checkpoint does not fit this model: "):
        run(tmp_path / "new", settings, init_from=finished[0], **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 33}, "batch_size 33 exceeds the 32 training examples"),
        ({"kinds": "tekst"}, "kinds must name some of"),
        ({"protocol": "x"}, "protocol must name some of"),
        ({"reader": "./none"}, "no such model folder"),
        ({"dataset": "none.json"}, "no such data file"),
    ],
)
def test_mistakes_are_found_before_training(settings, tmp_path, changes, message):
    """And they do not block the folder for the next try."""
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", settings, **changes)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    run(tmp_path / "run", settings, epochs=1)


def test_batch_size_must_divide_among_devices(settings, tmp_path):
    world = World(rank=0, local_rank=0, size=3, device=tiny.CPU)
    with pytest.raises(UserError, match="batch_size 8 cannot be divided among 3 devices"):
        module.setup_run(tiny.config(**settings), world, tmp_path, None)


def test_a_run_in_use_is_refused(settings, tmp_path):
    with checkpoint.lock_run(tmp_path / "run"):
        with pytest.raises(UserError, match="is in use by another process"):
            run(tmp_path / "run", settings)
    run(tmp_path / "run", settings, epochs=1)  # the lock is free again
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path / "run", settings)
    run(tmp_path / "run", settings, epochs=1, overwrite=True)


# ------------------------------------------------------------------------------- schedule of spans


def test_gold_spans_anneal_to_none():
    config = tiny.config(gold_span_until=0.5)
    shares = [gold_span_draws(config, step, 100, 4000).mean() for step in (0, 25, 49, 50, 99)]
    assert shares == pytest.approx([1.0, 0.5, 0.02, 0.0, 0.0], abs=0.03)
    draws = [gold_span_draws(config, 25, 100, 64).tolist() for _ in range(2)]
    assert draws[0] == draws[1] != gold_span_draws(config, 26, 100, 64).tolist()
    assert not gold_span_draws(tiny.config(gold_span_until=0.0), 0, 100, 64).any()


def test_dropout_differs_by_step_rank_and_micro_batch():
    """Everywhere in a run another mask, and the same one whenever that place is reached again."""
    config, other = tiny.config(seed=1), tiny.config(seed=2)
    places = [(c, s, r, m) for c in (config, other) for s in (0, 1) for r in (0, 1) for m in (0, 1)]
    seeds = [train_step._dropout_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [train_step._dropout_seed(*place) for place in places]


# ------------------------------------------------------------------------------- it learns


def test_64_questions_are_learned_by_heart(tmp_path):
    """The shipped pair, encoder_type=lm: F1 of the latents reaches 0.95 on both LMs, and it is
    the latent that tells: another example's gives next to nothing."""
    examples = load_examples("nano", "train", samples=64, seed=1).examples
    path = str(tiny.write_squad(tmp_path / "64.json", examples))
    small = dict(encoder_dim=64, encoder_layers=1, latent_len=8, copy_slots=6, d_z=64)
    schedule = dict(batch_size=32, epochs=100, warmup_steps=10, lr=4e-3, adapter_lr=6e-3)
    config = build_config(
        "nano",
        dict(dataset=path, eval_dataset=path, kinds="latent,shuffled", gold_span_until=0.3)
        | small
        | schedule
        | dict(log_every=100, keep_last=1, max_new_tokens=12),
    )
    metrics = train(config, ONE, tmp_path / "run")
    for name in ("llama", "qwen"):
        assert metrics["latent"][name]["f1"] >= 0.95
        assert metrics["latent"][name]["first_token_top1"] >= 0.95
        assert metrics["shuffled"][name]["f1"] <= 0.3


def test_frozen_settings_reach_the_run(finished):
    """config.json of run and checkpoint agree with what was asked for."""
    folder, _ = finished
    values = json.loads((folder / "config.json").read_text())
    assert values == json.loads((folder / "epoch2" / "config.json").read_text())
    assert (values["epochs"], values["samples"], values["eval_every"]) == (2, 32, 1)
    assert dataclasses.is_dataclass(tiny.config(**values))


# ------------------------------------------------------------------------------- knobs


def test_smoke_samples_shorten_all_evaluations_but_the_last(tmp_path, settings):
    metrics = run(tmp_path / "run", settings, eval_every=1, smoke_samples=2)
    first = json.loads((tmp_path / "run" / "eval_epoch1" / "metrics.json").read_text())
    assert (first["samples"], metrics["samples"]) == (2, 6)


def test_train_stats_cannot_be_trained_with(tmp_path, settings):
    with pytest.raises(UserError, match="train_stats is for evaluation"):
        run(tmp_path / "run", settings, calibration="train_stats")
