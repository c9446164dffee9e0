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
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lw_fast import checkpoint, quantised, run_folder
from lw_fast.auto_batch import choose
from lw_fast.batches import Order, Tables, micro_slices
from lw_fast.config import Config
from lw_fast.data import Example
from lw_fast.engine import World, build_engine
from lw_fast.errors import UserError
from lw_fast.eval_files import METRICS_FILE
from lw_fast.evaluate import asked_for, check_prompts, evaluate, table_rows
from lw_fast.frozen_lm import FrozenLM
from lw_fast.late import Late
from lw_fast.meters import LMCost, Meter, reset_peak_memory
from lw_fast.model import (
    LatentModel,
    build_bridge,
    build_model,
    evaluation_examples,
    training_examples,
)
from lw_fast.placement import place
from lw_fast.profiling import part, profiled
from lw_fast.progress import Progress
from lw_fast.shared import Shared
from lw_fast.train_log import log_row
from lw_fast.train_step import train_step
from lw_fast.training_run import AfterEvaluation, Run, resume_run, save, start_from

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """The loss or its gradient became NaN or infinite; the weights are those before that step."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM was obeyed: the run is saved."""


def train(
    config: Config,
    world: World,
    run_dir: Path,
    *,
    ds_config: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    on_start: Callable[[Run], None] | None = None,
    after_evaluation: AfterEvaluation | None = None,
    shared: Shared | None = None,
    auto_batch: bool = False,
) -> dict[str, Any] | None:
    """Trains, saves and evaluates; returns the metrics of the last evaluation (rank 0).

    Args:
        on_start: Sees the run on every rank before its next step, where it stands after resuming.
        after_evaluation: See AfterEvaluation.
        auto_batch: Look for the fastest micro-batch that fits first; see auto_batch.py.
        shared: LMs and sources that earlier runs of this process have left.

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
        kept = (shared.lms(config, world.device), shared.tables) if shared else ()
        run = setup_run(config, world, run_dir, ds_config, *kept, auto_batch=auto_batch)
        if auto_batch and world.is_main:  # what resuming reads
            run_folder.write_config(run_dir, run.config)
        run.after_evaluation = after_evaluation
        if resume:
            resume_run(run, start)
        elif start is not None:
            start_from(run, start)
        if on_start is not None:
            on_start(run)
        try:
            with run.saver, _stop_on_signals(run):
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


def setup_run(
    config: Config,
    world: World,
    run_dir: Path,
    ds_config: dict[str, Any] | None,
    lms: Mapping[str, FrozenLM] | None = None,
    tables_of: Callable[[LatentModel, list[Example]], Tables] = LatentModel.tables,
    auto_batch: bool = False,
) -> Run:
    """Data, LMs (`lms`: those in memory already, see build_model), bridge and engine of a run;
    with `auto_batch` its config has the micro-batch that was found to be the fastest."""
    reset_peak_memory(world.device)  # another run of this process may have been larger
    batch_size = config.optim.batch_size
    placement = place(config, world, ds_config)
    if auto_batch and world.size > 1 and _shards_weights(ds_config):
        raise UserError(
            "--auto_batch does not go with ZeRO-3 on several processes: they exchange weights in "
            "every pass, so one that runs out of memory would stop the others; set "
            "--micro_batch_size, or take ds_configs/zero2.json"
        )
    asked_for(config)  # not only after hours of training
    _check_backbone(config, ds_config)
    if config.adapter.calibration == "train_stats":
        raise UserError(
            "calibration=train_stats is for evaluation: training makes those statistics"
        )
    examples, note = training_examples(config)
    eval_examples = evaluation_examples(config)
    if len(examples) < batch_size:
        raise UserError(f"batch_size {batch_size} exceeds the {len(examples)} training examples")
    model = build_model(config, world.device, lms, placement)
    check_prompts(model)
    tables = tables_of(model, examples)
    if auto_batch:
        config = choose(config, world, model, tables, placement.shares)
    accumulation = len(micro_slices(batch_size, 0, placement.shares, config.micro_batch))
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
        placement=placement,
        model=model,
        tables=tables,
        eval_examples=eval_examples,
        engine=engine,
        order=Order(len(examples), batch_size, config.optim.seed),
        meter=Meter(costs, devices=world.size, synchronize=synchronize),
    )


def _check_backbone(config: Config, ds_config: dict[str, Any] | None) -> None:
    kind = config.backbone.backbone_dtype
    if kind in quantised.KINDS and ds_config and ds_config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"backbone_dtype={kind} does not go with ZeRO-3: what bitsandbytes packs into one "
            "tensor cannot be cut into shards; take ds_configs/zero2.json"
        )


def _shards_weights(ds_config: dict[str, Any] | None) -> bool:
    """Whether the trainable weights are spread over the processes."""
    return ds_config is not None and ds_config["zero_optimization"]["stage"] == 3


def _loop(run: Run) -> dict[str, Any] | None:
    config, metrics = run.config, None
    norm: Late | None = None
    profile = config.run.profile if run.world.is_main else 0
    with (
        Progress(run.total_steps, run.global_step, enabled=run.world.is_main) as progress,
        profiled(run.run_dir / "profile", profile) as step_done,
    ):
        if _lacks_evaluation(run):
            metrics = _evaluate(run, progress)
        while run.global_step < run.total_steps and not run.finished:
            previous, norm = norm, Late(train_step(run))
            _check_finite(run, previous)
            run.saver.check()
            run.global_step += 1
            epoch_ends = run.global_step % run.order.steps_per_epoch == 0
            if run.is_logged(run.global_step):
                _check_finite(run, norm)
                with part("log"):
                    progress.update(run.global_step, log_row(run, float(norm)))
            step_done()
            if _must_stop(run):
                _check_finite(run, norm)
                save(run, f"epoch{run.epoch}" if epoch_ends else f"step{run.global_step}")
                run.saver.wait()
                run.world.barrier(patient=True)  # a launcher kills the others once one has ended
                raise Interrupted(f"stopped after step {run.global_step}; --resume continues")
            if epoch_ends:
                _check_finite(run, norm)
                metrics = _end_of_epoch(run, progress) or metrics
            elif config.run.save_every and run.global_step % config.run.save_every == 0:
                _check_finite(run, norm)
                with run.meter.paused():
                    save(run, f"step{run.global_step}")
    return metrics


def _check_finite(run: Run, norm: Late | None) -> None:
    """Every rank sees the same norm, so all stop together."""
    if norm is None or math.isfinite(float(norm)):
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
    """Inside, Ctrl-C acts at once: what was trained is being saved, and --resume evaluates."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_of_epoch(run: Run, progress: Progress) -> dict[str, Any] | None:
    with run.meter.paused():
        save(run, f"epoch{run.epoch}")
        run.rms.clear()
        return _evaluate(run, progress) if _evaluation_is_due(run) else None


def _evaluation_is_due(run: Run) -> bool:
    every = run.config.run.eval_every
    return run.global_step >= run.total_steps or (every > 0 and run.epoch % every == 0)


def _lacks_evaluation(run: Run) -> bool:
    """Whether the run was resumed at the end of an epoch whose evaluation never came to its end."""
    if not run.global_step or run.global_step % run.order.steps_per_epoch:
        return False
    there = run.world.all_gather((run.eval_dir / METRICS_FILE).exists())[0]
    return _evaluation_is_due(run) and not there


def _evaluate(run: Run, progress: Progress) -> dict[str, Any] | None:
    """Rank 0 evaluates a plain copy of the bridge, so that any engine and ZeRO stage will do; with
    the other ranks, where it does not hold all the LMs. Then `after_evaluation` sees the metrics.
    """
    model, metrics = run.model, None
    together = run.placement.evaluates_together
    state = run.engine.module_state()
    if run.world.is_main or together:
        bridge = build_bridge(run.config, model.lms, model.reader, model.device)
        bridge.load_state_dict(state)
        last = run.global_step >= run.total_steps
        questions = run.eval_examples[: None if last else run.config.run.smoke_samples or None]
        if run.world.is_main:
            progress.note(f"evaluating {len(questions)} questions")
        evaluated = dataclasses.replace(model, bridge=bridge)
        with _interruptible():
            metrics = evaluate(evaluated, questions, run.eval_dir, run.world if together else None)
    if run.world.is_main:
        run.saver.wait()  # long done
        run_folder.mark_best(run.run_dir)
        progress.table(f"epoch {run.epoch}", table_rows(metrics, list(model.lms)))
        for name, peek in metrics.get("debug", {}).items():
            answers = [row["answer"] for row in peek["first_generations"]]
            progress.note(f"{name} answers: {' | '.join(map(repr, answers))}")
    run.world.barrier(patient=True)
    if run.after_evaluation is not None:
        run.after_evaluation(run, run.world.all_gather(metrics)[0])
    return metrics if run.world.is_main else None
