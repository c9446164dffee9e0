"""Triton kernels of the latent-prompt training step, each with a public PyTorch reference.

Independent of lw_fast. Importing this package imports neither Triton nor CUDA: a kernel is loaded
when it first runs. Every op takes `impl="auto" | "torch" | "triton"` (see `dispatch`).
"""

from lw_kernels.kl_topk import kl_topk, kl_topk_ref
from lw_kernels.linear_masked_ce import linear_masked_ce, linear_masked_ce_ref
from lw_kernels.masked_cross_entropy import (
    CrossEntropyRows,
    masked_cross_entropy,
    masked_cross_entropy_ref,
)
from lw_kernels.prefix_concat import PrefixConcat, prefix_concat, prefix_concat_ref
from lw_kernels.short_attention import short_attention, short_attention_ref

__all__ = [
    "CrossEntropyRows",
    "PrefixConcat",
    "kl_topk",
    "kl_topk_ref",
    "linear_masked_ce",
    "linear_masked_ce_ref",
    "masked_cross_entropy",
    "masked_cross_entropy_ref",
    "prefix_concat",
    "prefix_concat_ref",
    "short_attention",
    "short_attention_ref",
]
