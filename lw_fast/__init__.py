"""lw_fast: train one latent prompt that drives several frozen language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lw_fast.api import Latent, LatentPrompt

__all__ = ["Latent", "LatentPrompt", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """LatentPrompt and Latent load torch, so they load when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'lw_fast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("lw_fast.api"), name)
