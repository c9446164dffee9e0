"""The training loop, read from top to bottom.

    deepspeed launch/train.py --ds_config ds_configs/zero2.json
    torchrun --nproc_per_node 2 launch/train.py --preset small
    python launch/train.py --preset nano --run_dir runs/first

One optimiser step is one global batch: every rank cuts its share of the same permutation, splits
it into micro-batches, and adds up gradients of a loss that is already divided by the counts of the
whole step. The step that a gradient which is not finite would take is skipped on the device; the
loop sees the norm one step later, without waiting, and stops.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lw_fast import checkpoint, run_folder
from lw_fast.batches import Order, Tables, micro_slices
from lw_fast.bridge import STATS, StepCounts, step_loss
from lw_fast.config import Config, to_dict
from lw_fast.data import Example
from lw_fast.engine import Engine, PlainEngine, World, build_engine
from lw_fast.errors import UserError
from lw_fast.evaluate import asked_for, evaluate, table_rows
from lw_fast.frozen_lm import FrozenLM
from lw_fast.losses import first_token_weight
from lw_fast.meters import LMCost, Meter, max_over_ranks, peak_memory
from lw_fast.model import (
    LatentModel,
    build_bridge,
    build_model,
    evaluation_examples,
    join_state,
    split_state,
    training_examples,
)
from lw_fast.optim import lr_factor, part_norms
from lw_fast.progress import Progress

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """The loss or its gradient became NaN or infinite; the weights are those before that step."""


class Interrupted(Exception):
    """SIGINT or SIGTERM was obeyed: the run is saved."""


AfterEvaluation = Callable[["Run", Mapping[str, Any]], None]
"""Sees the metrics of an epoch on every rank, and may change the run before the next one."""


@dataclass
class Run:
    """Everything the loop holds."""

    config: Config
    run_dir: Path
    world: World
    model: LatentModel
    tables: Tables
    eval_examples: list[Example]
    engine: Engine
    order: Order
    meter: Meter
    global_step: int = 0
    stop_requested: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    """What was logged since the last row, on the device."""
    rms: dict[str, Tensor] = field(default_factory=dict)
    """Per LM: [sum of raw prefix RMS, examples], over the epoch."""
    writer: Any = None
    """TensorBoard's, from the first row on."""
    part_norms: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradient norms of the parts in the step that is logged next."""
    after_evaluation: AfterEvaluation | None = None
    finished: bool = False
    """Set by it to end the run after this epoch."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.order.steps_per_epoch * self.config.optim.epochs

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.global_step // self.order.steps_per_epoch


def train(
    config: Config,
    world: World,
    run_dir: Path,
    *,
    ds_config: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    after_evaluation: AfterEvaluation | None = None,
) -> dict[str, Any] | None:
    """Trains, saves and evaluates; returns the metrics of the last evaluation (rank 0).

    Raises:
        UserError: the settings, the data, a model or the run folder do not allow it.
        Interrupted: a signal asked to stop; the state is saved.
    """
    # Read before the LMs, which takes minutes where they are large.
    start = None
    if init_from is not None:
        start = checkpoint.load(run_folder.resolve_checkpoint(init_from))
    with _run_folder(run_dir, config, world, resume=resume, overwrite=overwrite):
        if resume:
            start = checkpoint.load(checkpoint.latest(run_dir))
        run = setup_run(config, world, run_dir, ds_config)
        run.after_evaluation = after_evaluation
        if resume:
            _resume(run, start)
        elif start is not None:
            _init_from(run, start)
        try:
            with _stop_on_signals(run):
                return _loop(run)
        finally:
            if run.writer is not None:
                run.writer.close()


@contextmanager
def _run_folder(run_dir: Path, config: Config, world: World, *, resume: bool, overwrite: bool):
    """Rank 0 locks and prepares the folder; a refusal reaches every rank."""
    if not world.is_main:
        (problem,) = set(world.all_gather(None)) - {None} or {None}
        if problem:
            raise UserError(problem)
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = checkpoint.lock_run(run_dir)
        lock.__enter__()
        run_folder.prepare(run_dir, config, resume=resume, overwrite=overwrite)
    except (UserError, OSError) as error:
        world.all_gather(str(error))
        raise UserError(str(error)) from None
    world.all_gather(None)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def setup_run(config: Config, world: World, run_dir: Path, ds_config: dict[str, Any] | None) -> Run:
    batch_size, micro = config.optim.batch_size, config.micro_batch
    if batch_size % world.size:
        raise UserError(f"batch_size {batch_size} cannot be divided among {world.size} devices")
    asked_for(config)  # not only after hours of training
    if config.adapter.calibration == "train_stats":
        raise UserError(
            "calibration=train_stats is for evaluation: training makes those statistics"
        )
    examples, note = training_examples(config)
    eval_examples = evaluation_examples(config)
    if len(examples) < batch_size:
        raise UserError(f"batch_size {batch_size} exceeds the {len(examples)} training examples")
    model = build_model(config, world.device)
    tables = model.tables(examples)
    accumulation = len(micro_slices(batch_size, 0, world.size, micro))
    engine = build_engine(model.bridge, config, world, ds_config, accumulation)
    if world.is_main:
        trainable = sum(t.numel() for t in engine.module_state().values())
        logger.info("data: %s; %d to evaluate", note, len(eval_examples))
        logger.info(
            "%s on %d x %s; %.2f M trainable parameters; LMs: %s",
            type(engine).__name__, world.size, world.device.type, trainable / 1e6,
            ", ".join(f"{name} {lm.dtype}" for name, lm in model.lms.items()),
        )  # fmt: skip
    else:
        engine.module_state()  # collective under ZeRO-3
    costs = {
        name: LMCost(lm.num_layer_parameters, lm.d_model, lm.vocab_size)
        for name, lm in model.lms.items()
    }
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else (lambda: None)
    return Run(
        config=config,
        run_dir=run_dir,
        world=world,
        model=model,
        tables=tables,
        eval_examples=eval_examples,
        engine=engine,
        order=Order(len(examples), batch_size, config.optim.seed),
        meter=Meter(costs, devices=world.size, synchronize=synchronize),
    )


def _loop(run: Run) -> dict[str, Any] | None:
    config, metrics = run.config, None
    norm: Tensor | None = None
    with Progress(run.total_steps, run.global_step, enabled=run.world.is_main) as progress:
        if run.global_step >= run.total_steps:  # resumed where only the evaluation was missing
            return _evaluate(run, progress)
        while run.global_step < run.total_steps and not run.finished:
            previous, norm = norm, train_step(run)
            _check_finite(run, previous)
            run.global_step += 1
            last = run.global_step == run.total_steps
            epoch_ends = run.global_step % run.order.steps_per_epoch == 0
            if _is_logged(run, run.global_step):
                _check_finite(run, norm)
                progress.update(run.global_step, _log(run, norm))
            if _must_stop(run):
                _check_finite(run, norm)
                _save(run, f"epoch{run.epoch}" if epoch_ends else f"step{run.global_step}")
                raise Interrupted(f"stopped after step {run.global_step}; --resume continues")
            if epoch_ends:
                _check_finite(run, norm)
                metrics = _end_of_epoch(run, progress, last) or metrics
            elif config.run.save_every and run.global_step % config.run.save_every == 0:
                _check_finite(run, norm)
                with run.meter.paused():
                    _save(run, f"step{run.global_step}")
    return metrics


def train_step(run: Run) -> Tensor:
    """One optimiser step; returns the gradient norm (0-d, not waited for)."""
    config, step = run.config, run.global_step
    index = run.order.step(step)
    gold = gold_span_draws(config, step, run.total_steps, len(index))
    lms = lms_of_step(config, step, run.model.lms)
    answers = {name: run.tables.answers[name] for name in lms}
    weight = first_token_weight(config.loss, step, run.total_steps)
    loss_config = dataclasses.replace(config.loss, first_token_ce_weight=weight)
    counts = StepCounts(
        examples=len(index),
        spans=run.tables.sources.num_spans(index),
        rows={name: table.num_targets(index) for name, table in answers.items()},
    )
    slices = micro_slices(len(index), run.world.rank, run.world.size, config.micro_batch)
    run.engine.module.train()
    positions = dict.fromkeys(answers, 0)
    for number, part in enumerate(slices):
        torch.manual_seed(_dropout_seed(config, step, run.world.rank, number))
        batches = {name: table.batch(index[part]) for name, table in answers.items()}
        source = run.model.batch(run.tables.sources, index[part], gold[part])
        output = run.engine(source)
        loss, sums = step_loss(
            output, source, batches, lms, run.model.bridge, counts,
            loss_config, config.encoder.span_weight,
        )  # fmt: skip
        run.engine.backward(loss, last=number == len(slices) - 1)
        _accumulate(run, sums, output.raw_rms)
        for name, batch in batches.items():
            positions[name] += batch.num_positions * run.world.size
    run.meter.step(
        samples=len(index),
        source_bytes=int(run.tables.sources.num_bytes_N[index].sum()),
        positions=positions,
        supervised_tokens=dict(counts.rows),
    )
    _add(run.sums, "counts", _counts(counts, list(run.model.lms)))
    if isinstance(run.engine, PlainEngine) and _is_logged(run, step + 1):
        run.part_norms = part_norms(run.engine.module)  # DeepSpeed keeps no gradient to look at
    return run.engine.step(lr_factor(step, run.total_steps, config.optim))


def lms_of_step(config: Config, step: int, lms: Mapping[str, FrozenLM]) -> Mapping[str, FrozenLM]:
    """The LMs that a step trains through: all, or a drawn one. The same on every rank."""
    if config.loss.lms_per_step == "all":
        return lms
    name = np.random.default_rng((config.optim.seed, step, _LM_DRAWS)).choice(list(lms))
    return {str(name): lms[str(name)]}


_LM_DRAWS = 1
"""Tells these draws from those of gold_span_draws."""


def gold_span_draws(config: Config, step: int, total_steps: int, num: int) -> np.ndarray:
    """Which examples of a step get the gold span in their copy slots: a share that falls linearly
    from all to none over the first `gold_span_until` of the run. The same for any world size."""
    until = config.encoder.gold_span_until * total_steps
    share = max(0.0, 1.0 - step / until) if until else 0.0
    return np.random.default_rng((config.optim.seed, step)).random(num) < share


def _dropout_seed(config: Config, step: int, rank: int, micro: int) -> int:
    """Dropout depends on where in the run we are, not on how we got there: resuming is exact."""
    return int(np.random.SeedSequence((config.optim.seed, step, rank, micro)).generate_state(1)[0])


# ------------------------------------------------------------------------------- bookkeeping


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _counts(counts: StepCounts, lms: Sequence[str]) -> Tensor:
    """int64 [2 + 2 * LMs]: examples, spans, then supervised rows and examples of each LM."""
    rows = [counts.rows.get(name, 0) for name in lms]
    examples = [counts.examples * (name in counts.rows) for name in lms]
    return torch.tensor([counts.examples, counts.spans, *rows, *examples])


@torch.no_grad()
def _accumulate(run: Run, sums: Mapping[str, Tensor], raw_rms: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        _add(run.sums, name, value)
    for name, rms_B in raw_rms.items():
        _add(run.rms, name, torch.stack([rms_B.sum(), rms_B.new_tensor(float(len(rms_B)))]))


def _is_logged(run: Run, step: int) -> bool:
    return step % run.config.run.log_every == 0 or step == run.total_steps


def _log(run: Run, norm: Tensor) -> dict[str, Any]:
    """One row for log.jsonl and TensorBoard, from what was summed since the last one."""
    examples, spans, *per_lm = run.sums.pop("counts").tolist()
    num_lms = len(run.model.lms)
    sums = {name: run.world.all_reduce(value).tolist() for name, value in run.sums.items()}
    run.sums.clear()
    rates = run.meter.report()
    memory = max_over_ranks(peak_memory(run.world.device), run.world.device)
    steps = examples / run.config.optim.batch_size
    row: dict[str, Any] = {
        "step": run.global_step,
        "epoch": run.global_step / run.order.steps_per_epoch,
        "loss": sums["loss"] / steps,
        "grad_norm": float(norm),
        "lr_factor": lr_factor(run.global_step - 1, run.total_steps, run.config.optim),
    }
    row |= {f"grad_norm/{part}": float(value) for part, value in run.part_norms.items()}
    for name, rows, seen in zip(run.model.lms, per_lm[:num_lms], per_lm[num_lms:], strict=True):
        if not seen:  # lms_per_step=one: not drawn since the last row
            continue
        stats = dict(zip(STATS, sums[name], strict=True))
        row[f"{name}/nll_token"] = stats["nll_sum"] / max(rows, 1)
        row[f"{name}/first_nll"] = stats["first_nll_sum"] / seen
        row[f"{name}/first_token_top1"] = stats["first_top1_sum"] / seen
        row[f"{name}/first_token_top5"] = stats["first_top5_sum"] / seen
    if "align" in sums:
        row["align_loss"] = sums["align"] / examples
    if "span" in sums:
        row["span_loss"] = sums["span"] / max(spans, 1)
    row |= {key: value for key, value in (rates | memory).items() if value is not None}
    if run.world.is_main:
        run_folder.append_row(run.run_dir, row | {"time": time.time()})
        _tensorboard(run, row)
    return row


def _tensorboard(run: Run, row: Mapping[str, Any]) -> None:
    if run.writer is None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run logs some steps again.
        folder = str(run.run_dir / "tensorboard")
        run.writer = SummaryWriter(folder, purge_step=run.global_step)
    for name, value in row.items():
        if name not in ("step", "time"):
            run.writer.add_scalar(name, value, run.global_step)


def _check_finite(run: Run, norm: Tensor | None) -> None:
    """Every rank sees the same norm, so all stop together."""
    if norm is None or math.isfinite(norm):
        return
    raise NonFiniteLoss(
        f"the loss or its gradient is not finite near step {run.global_step + 1}; the step was not "
        f"taken. The newest checkpoint is in {run.run_dir}; try a lower --lr, then --resume"
    )


def _must_stop(run: Run) -> bool:
    """Whether any rank was asked to stop; ranks compare notes only now and then."""
    if run.world.size == 1:
        return run.stop_requested
    if run.global_step % run.config.run.log_every:
        return False
    return any(run.world.all_gather(run.stop_requested))


@contextmanager
def _stop_on_signals(run: Run):
    """SIGINT and SIGTERM end the run after the current step, saved."""

    def request(_signum, _frame) -> None:
        run.stop_requested = True

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _interruptible():
    """Inside, Ctrl-C acts at once: everything is saved, and --resume evaluates."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# ------------------------------------------------------------------------------- checkpoints


def _end_of_epoch(run: Run, progress: Progress, last: bool) -> dict[str, Any] | None:
    with run.meter.paused():
        _save(run, f"epoch{run.epoch}")
        run.rms.clear()
        every = run.config.run.eval_every
        if not (last or (every and run.epoch % every == 0)):
            return None
        metrics = _evaluate(run, progress)
        if run.after_evaluation is not None:
            run.after_evaluation(run, run.world.all_gather(metrics)[0])
        return metrics


def _evaluate(run: Run, progress: Progress) -> dict[str, Any] | None:
    """Rank 0 evaluates a plain copy of the bridge, so that any engine and ZeRO stage will do."""
    state = run.engine.module_state()
    metrics = None
    if run.world.is_main:
        model = run.model
        bridge = build_bridge(run.config, model.lms, model.reader, model.device)
        bridge.load_state_dict(state)
        last = run.global_step >= run.total_steps
        questions = run.eval_examples[: None if last else run.config.run.smoke_samples or None]
        progress.note(f"evaluating {len(questions)} questions")
        with _interruptible():
            metrics = evaluate(dataclasses.replace(model, bridge=bridge), questions, _eval_dir(run))
        progress.table(f"epoch {run.epoch}", table_rows(metrics, list(model.lms)))
        for name, peek in metrics.get("debug", {}).items():
            answers = [row["answer"] for row in peek["first_generations"]]
            progress.note(f"{name} answers: {' | '.join(map(repr, answers))}")
    run.world.barrier(patient=True)
    return metrics


def _eval_dir(run: Run) -> Path:
    return run.run_dir / f"eval_epoch{run.epoch}"


def _save(run: Run, name: str) -> None:
    state, optimizer = run.engine.module_state(), run.engine.optimizer_state()
    rms, sums = _totals(run, run.rms), _totals(run, run.sums)
    if run.world.is_main:
        encoder, adapters = split_state(state)
        checkpoint.save(
            run.run_dir,
            name,
            encoder=encoder,
            adapters=adapters,
            optimizer=optimizer,
            progress={
                "epoch": run.epoch,
                "global_step": run.global_step,
                "rms": rms,
                "sums": sums,
            },
            config=to_dict(run.config),
            stats=_training_stats(run, rms),
            keep_last=run.config.run.keep_last,
        )
    run.world.barrier()


def _totals(run: Run, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks, on the CPU; `counts` are those of all ranks already. Collective."""
    return {
        name: (value if name == "counts" else run.world.all_reduce(value.clone())).cpu()
        for name, value in sums.items()
    }


def _training_stats(run: Run, rms: Mapping[str, Tensor]) -> dict[str, Any]:
    """Per LM: mean RMS of the raw prefix over the epoch, its calibrated value, the LM's own."""
    stats = {}
    for name, lm in run.model.lms.items():
        total, count = rms[name].tolist()
        raw = total / count
        mode = run.config.adapter.calibration
        fixed = run.config.adapter.prefix_target_rms
        calibrated = {"none": raw, "fixed": fixed}.get(mode, lm.embed_rms)
        stats[name] = {
            "rms_mean_raw": raw,
            "rms_mean_cal": calibrated,
            "embed_rms": lm.embed_rms,
            "count": int(count),
        }
    return stats


def _init_from(run: Run, loaded: checkpoint.Checkpoint) -> None:
    """Starts from another run's weights; adapters of LMs that it did not have stay fresh."""
    known = {name: state for name, state in loaded.adapters.items() if name in run.model.lms}
    _, own = split_state(run.engine.module_state())
    run.engine.load_module_state(join_state(loaded.encoder, {**own, **known}))
    logger.info("started from the weights of %s", loaded.path)


def _resume(run: Run, loaded: checkpoint.Checkpoint) -> None:
    run.engine.load_module_state(join_state(loaded.encoder, loaded.adapters))
    run.engine.load_optimizer_state(loaded.optimizer)
    run.global_step = loaded.progress["global_step"]
    if run.world.is_main:  # the saved sums are those of all ranks
        device, saved = run.world.device, loaded.progress
        run.sums = {k: v if k == "counts" else v.to(device) for k, v in saved["sums"].items()}
        if run.global_step % run.order.steps_per_epoch:
            run.rms = {k: v.to(device) for k, v in saved["rms"].items()}
    if run.world.is_main:
        run_folder.drop_rows_after(run.run_dir, run.global_step)
    logger.info("resumed %s at step %d", loaded.path, run.global_step)
    evaluated = (_eval_dir(run) / "metrics.json").exists()
    if any(run.world.all_gather(run.global_step >= run.total_steps and evaluated)):
        raise UserError(f"nothing to resume: {loaded.path} is the end; raise --epochs to go on")
