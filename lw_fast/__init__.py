"""lw_fast: train one latent prompt that drives several frozen language models."""

from __future__ import annotations

__version__ = "0.1.0"
