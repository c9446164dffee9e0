"""What runs that follow one another in one process have in common: LMs, and sources once read.

Loading LMs and reading all training sources with one of them can take longer than a short run.
Both are the same for runs that differ only in what is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lw_fast.batches import SourceTable, Tables
from lw_fast.config import Config, to_dict
from lw_fast.data import Example
from lw_fast.frozen_lm import FrozenLM, load_frozen_lm
from lw_fast.model import LatentModel

_LOADING = ("backbone_dtype", "trust_remote_code")
"""Settings besides its source that decide what an LM in memory is."""
_READING = (
    "dataset samples data_seed max_answer_chars channel_spans encoder_type max_bytes "
    "max_source_tokens reader reader_layers reader_cache attn_implementation"
).split()
"""Settings besides the LMs that decide what a table of sources holds."""


class Shared:
    """Keeps what the newest run used, and nothing older."""

    def __init__(self) -> None:
        self._lms: dict[tuple, FrozenLM] = {}
        self._sources: tuple[tuple, SourceTable] | None = None

    def lms(self, config: Config, device: torch.device) -> Mapping[str, FrozenLM]:
        """The LMs of a run by name, the reader too if it is none of them; loads what is missing."""
        gc.collect()  # what the run before held in cycles
        sources = dict(config.lm)
        reader = config.encoder.reader
        if config.encoder.encoder_type == "lm" and reader and reader not in sources:
            sources["reader"] = reader
        how = _values(config, _LOADING)
        keys = {name: (name, source, *how) for name, source in sources.items()}
        self._lms = {key: lm for key, lm in self._lms.items() if key in keys.values()}
        for name, key in keys.items():
            if key not in self._lms:
                self._sources = None  # its states may be another reader's, and take room
                self._lms[key] = load_frozen_lm(name, sources[name], config.backbone, device)
        return {name: self._lms[key] for name, key in keys.items()}

    def tables(self, model: LatentModel, examples: Sequence[Example]) -> Tables:
        """As LatentModel.tables, for the training examples of the model's settings."""
        key = _values(model.config, _READING)
        if self._sources is None or self._sources[0] != key:
            self._sources = None  # gives its memory back before the next table is made
            self._sources = key, model.source_table(examples, model.sources(examples))
        return model.tables(examples, self._sources[1])


def _values(config: Config, names: Sequence[str]) -> tuple[Any, ...]:
    values = to_dict(config)
    return tuple(values[name] for name in names)
