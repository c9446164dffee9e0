"""The frozen reader LM of encoder_type=lm: hidden states of sources, cached where they fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from lw_fast.batches import SourceTable, to_device
from lw_fast.encoder import SourceBatch
from lw_fast.frozen_lm import FrozenLM
from lw_fast.profiling import part

CACHE_SHARE_GPU = 0.4
"""Share of the free GPU memory that the cache may take under reader_cache=auto."""
CACHE_BYTES_CPU = 2**30
"""The same on a CPU, in bytes."""


class Reader:
    """Adds reader states to source batches."""

    def __init__(self, lm: FrozenLM, layer_spec: str, cache: str) -> None:
        self.lm, self.cache = lm, cache
        self.layers = lm.resolve_layers(layer_spec)

    @property
    def num_states(self) -> int:
        """Layers read."""
        return len(self.layers)

    def prepare(self, table: SourceTable, batch_size: int = 64) -> None:
        """Reads the whole table once if its states fit (or reader_cache=on)."""
        width = self.lm.d_model * self.num_states
        size = len(table.flat_ids) * width * self.lm.dtype.itemsize
        if self.cache == "off":
            return
        if self.cache == "auto" and not self.lm.everywhere(size <= self._room()):
            return
        flat = torch.empty(
            len(table.flat_ids), width, dtype=self.lm.dtype, device=self.lm.device
        ).zero_()
        # Neighbours in length share a batch, so little padding is read.
        distinct = np.array(table.distinct)
        order = distinct[np.argsort(table.length_N[distinct], kind="stable")]
        for index in np.array_split(order, max(1, -(-len(order) // batch_size))):
            batch = table.batch(index)
            states_BUF = self.lm.states(batch.ids_BU, self.layers)
            for row, offset, length in zip(
                states_BUF, table.start_N[index], table.length_N[index], strict=True
            ):
                flat[offset : offset + length] = row[:length]
        table.states = flat

    @part("reader")
    def __call__(self, table: SourceTable, index: np.ndarray, batch: SourceBatch) -> SourceBatch:
        """The batch with its states [B, U, F]: from the cache, else read now."""
        flat = table.states
        if flat is None:
            states_BUF = self.lm.states(batch.ids_BU, self.layers)
        else:
            offset_B = to_device(table.start_N[index], flat.device)
            unit_U = torch.arange(batch.ids_BU.shape[1], device=flat.device)
            states_BUF = flat[offset_B[:, None] + unit_U]
        return dataclasses.replace(batch, states_BUF=states_BUF)

    def _room(self) -> float:
        if self.lm.device.type != "cuda":
            return CACHE_BYTES_CPU
        return CACHE_SHARE_GPU * torch.cuda.mem_get_info(self.lm.device)[0]
