"""A number on its way from the device to the host, to be read later without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A 0-d tensor whose copy to the host is queued right behind the work that makes it.

    Reading waits for that work alone. float(tensor) would wait for everything queued since.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
