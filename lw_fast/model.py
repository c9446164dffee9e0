"""Puts the parts of a configuration together: frozen LMs, reader, bridge and tables."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lw_fast import checkpoint
from lw_fast.alignment import Alignment
from lw_fast.batches import AnswerTable, SourceTable, Tables
from lw_fast.bridge import LatentBridge
from lw_fast.config import Config, from_dict, to_dict
from lw_fast.data import Example, channel_examples, eval_spec, load_examples
from lw_fast.engine import World
from lw_fast.errors import UserError
from lw_fast.frozen_lm import FrozenLM, compute_dtype, load_frozen_lm, outline
from lw_fast.placement import Placement
from lw_fast.reader import Reader
from lw_fast.source import Sources, byte_sources, token_sources
from lw_fast.teacher import Teacher


@dataclass(frozen=True)
class LatentModel:
    """The frozen LMs, the reader if there is one, and the trainable bridge between them."""

    config: Config
    lms: Mapping[str, FrozenLM]
    """All of them; of those that another process holds, tokenizer and shape only."""
    reader: Reader | None
    bridge: LatentBridge
    device: torch.device

    @property
    def lms_here(self) -> dict[str, FrozenLM]:
        """The LMs whose weights this process holds."""
        return {name: lm for name, lm in self.lms.items() if lm.is_here}

    def using(self, lm: FrozenLM) -> AbstractContextManager[None]:
        """Inside, the LM is on the device; with sequential_eval it may be elsewhere otherwise."""
        return lm.visit(self.device) if self.config.eval.sequential_eval else nullcontext()

    def sources(self, examples: Sequence[Example]) -> Sources:
        """Examples as the units that this model's encoder reads."""
        encoder = self.config.encoder
        if self.reader is None:
            return byte_sources(examples, encoder.max_bytes)
        return token_sources(examples, self.reader.lm.tokenizer, encoder.max_source_tokens)

    def source_table(self, examples: Sequence[Example], sources: Sources) -> SourceTable:
        """Sources on the device, read by the reader where its states fit."""
        supervise_N = np.array([bool(example.question) for example in examples])
        table = SourceTable(sources, supervise_N, self.device)
        if self.reader is not None:
            self.reader.prepare(table)
        return table

    def tables(self, examples: Sequence[Example], sources: SourceTable | None = None) -> Tables:
        """Everything a training step needs of `examples`, tokenised once; `sources` if they are
        there already."""
        answers = self.answer_tables(examples)
        return Tables(
            sources=sources or self.source_table(examples, self.sources(examples)),
            answers=answers,
            examples=examples,
            teachers=self.teachers(examples, answers),
        )

    def answer_tables(self, examples: Sequence[Example]) -> dict[str, AnswerTable]:
        """The first answer of each example as each LM's targets."""
        answers = [example.answers[0] for example in examples]
        return {name: AnswerTable(lm, answers, self.config) for name, lm in self.lms.items()}

    def teachers(
        self, examples: Sequence[Example], answers: Mapping[str, AnswerTable]
    ) -> dict[str, Teacher]:
        """Each LM behind the full text, if the loss asks for it (kl_weight)."""
        if not self.config.loss.kl_weight:
            return {}
        return {
            name: Teacher(lm, examples, answers[name], self.config)
            for name, lm in self.lms_here.items()
        }

    def batch(self, table: SourceTable, index: np.ndarray, use_gold_B: np.ndarray | None = None):
        """A SourceBatch with reader states where the encoder wants them."""
        batch = table.batch(index, use_gold_B)
        return batch if self.reader is None else self.reader(table, index, batch)


def build_model(
    config: Config,
    device: torch.device,
    lms: Mapping[str, FrozenLM] | None = None,
    placement: Placement | None = None,
) -> LatentModel:
    """Loads every LM and builds a freshly initialised bridge (seeded by `seed`).

    Args:
        lms: LMs that are in memory already, by name (`reader` for one that only reads), for
            several runs over the same weights: they must come from the sources and the
            `backbone_dtype` of `config`; how they run follows `config`. The others are loaded.
        placement: Which LMs this process holds; without it: all. Collective with it.
    """
    if not config.lm:
        raise UserError("no frozen LM is named: give --lm.NAME SOURCE or a preset that has some")
    if taken := [name for name in config.lm if hasattr(torch.nn.ModuleDict, name)]:
        raise UserError(f"lm.{taken[0]}: PyTorch uses this name itself; choose another one")
    known = {name: lm.rerun(config.backbone) for name, lm in (lms or {}).items()}
    here = config.lm if placement is None else placement.lms
    sharding = placement.sharding if placement else None
    lms = {
        name: known.get(name)
        or (
            load_frozen_lm(name, source, config.backbone, device, sharding)
            if name in here
            else outline(name, source, config.backbone, device)
        )
        for name, source in config.lm.items()
    }
    if placement is not None:
        _exchange_loudness(lms, placement.world)
    reader = _reader(config, {**known, **lms}, device)
    bridge = build_bridge(config, lms, reader, device)
    return LatentModel(config, lms, reader, bridge, device)


def _exchange_loudness(lms: Mapping[str, FrozenLM], world: World) -> None:
    """Tells every process the embed_rms of the LMs that it does not hold."""
    mine = {name: lm.embed_rms for name, lm in lms.items() if lm.is_here}
    for told in world.all_gather(mine):
        for name in told.keys() - mine.keys():
            lms[name].embed_rms = told[name]


def build_bridge(
    config: Config, lms: Mapping[str, FrozenLM], reader: Reader | None, device: torch.device
) -> LatentBridge:
    """A freshly initialised bridge, the same for the same seed."""
    torch.manual_seed(config.optim.seed)
    bridge = LatentBridge(
        config,
        d_model={name: lm.d_model for name, lm in lms.items()},
        embed_rms={name: lm.embed_rms for name, lm in lms.items()},
        reader_dim=reader.lm.d_model if reader else 0,
        num_states=reader.num_states if reader else 0,
        autocast=compute_dtype(config.optim.precision, device) == torch.bfloat16,
        alignment=Alignment(reader.lm, lms) if reader else None,
    )
    return bridge.to(device)


def load_model(
    path: Path,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
    lms: Mapping[str, str] | None = None,
    *,
    park: bool = False,
    loaded: Mapping[str, FrozenLM] | None = None,
) -> LatentModel:
    """A trained model from a checkpoint folder, with some settings or LM sources changed.

    Args:
        park: With sequential_eval, leave the LMs in host memory, where `evaluate` fetches them.
        loaded: LMs that are in memory already, as for build_model.
    """
    saved = checkpoint.load(path)
    table = {**saved.config["lm"], **(lms or {})}
    if unknown := table.keys() - saved.adapters.keys():
        raise UserError(f"{path} has no adapter for {', '.join(sorted(unknown))}")
    config = from_dict({**saved.config, **(overrides or {}), "lm": table})
    model = build_model(config, device, _parked_lms(config, device) if park else loaded)
    try:
        model.bridge.load_state_dict(join_state(saved.encoder, saved.adapters))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit these settings: {error}") from None
    stats = saved.stats or {}
    model.bridge.train_rms = {name: stats[name]["rms_mean_cal"] for name in stats}
    _check_train_stats(model)
    return model


def _parked_lms(config: Config, device: torch.device) -> dict[str, FrozenLM]:
    """With sequential_eval, every LM in host memory, loaded by way of the device one by one."""
    lms = {}
    for name, source in config.lm.items() if config.eval.sequential_eval else ():
        lms[name] = load_frozen_lm(name, source, config.backbone, device)
        lms[name].model.to("cpu")
    return lms


def retuned(model: LatentModel, change: Mapping[str, Any]) -> LatentModel:
    """The same weights under other decode-time settings."""
    config = from_dict({**to_dict(model.config), **change})
    bridge = copy.copy(model.bridge)  # shares its parameters
    bridge.config = config.adapter
    tuned = dataclasses.replace(model, config=config, bridge=bridge)
    _check_train_stats(tuned)
    return tuned


def _check_train_stats(model: LatentModel) -> None:
    missing = [name for name in model.lms if name not in model.bridge.train_rms]
    if missing and model.config.adapter.calibration == "train_stats":
        raise UserError(
            "calibration=train_stats: the checkpoint has no training_stats.json for "
            f"{', '.join(missing)}"
        )


def split_state(state: Mapping[str, Tensor]) -> tuple[dict, dict[str, dict]]:
    """A bridge's state dict -> the encoder's and, per LM, the adapter's."""
    encoder: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "encoder":
            encoder[rest] = value
        else:
            name, _, rest = rest.partition(".")
            adapters.setdefault(name, {})[rest] = value
    return encoder, adapters


def join_state(encoder: Mapping[str, Tensor], adapters: Mapping[str, Mapping[str, Tensor]]) -> dict:
    """The inverse of split_state."""
    return {
        **{f"encoder.{key}": value for key, value in encoder.items()},
        **{
            f"adapters.{name}.{key}": value
            for name, state in adapters.items()
            for key, value in state.items()
        },
    }


def _reader(config: Config, lms: Mapping[str, FrozenLM], device: torch.device) -> Reader | None:
    encoder = config.encoder
    if encoder.encoder_type != "lm":
        return None
    if not encoder.reader:
        raise UserError("encoder_type=lm needs --reader: the name of an LM, or a source")
    lm = lms.get(encoder.reader) or lms.get("reader")
    if lm is None or not lm.is_here:
        source = config.lm.get(encoder.reader, encoder.reader)
        lm = load_frozen_lm("reader", source, config.backbone, device)
    return Reader(lm, encoder.reader_layers, encoder.reader_cache)


def training_examples(config: Config) -> tuple[list[Example], str]:
    """The training questions, then the spans to repeat; and one line about them for the log."""
    data = config.data
    loaded = load_examples(
        data.dataset,
        "train",
        samples=data.samples,
        seed=data.data_seed,
        max_answer_chars=data.max_answer_chars,
    )
    spans = channel_examples(loaded.examples, data.channel_spans, data.data_seed)
    return [*loaded.examples, *spans], f"{loaded.summary()}, {len(spans)} spans to repeat"


def evaluation_examples(config: Config) -> list[Example]:
    """The evaluation questions, in their seeded order."""
    data = config.data
    spec = eval_spec(data.dataset, data.eval_dataset)
    return load_examples(spec, "eval", samples=data.eval_samples, seed=data.eval_seed).examples
