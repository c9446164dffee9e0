"""Frozen LMs in nf4 and int8 through bitsandbytes: what transformers leaves open.

transformers quantises while it loads a folder. Random LMs are made here, layer by layer, so that
an 8B model never lies in memory in bf16. Embeddings, norms and `lm_head` stay bf16 in both.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lw_fast.errors import UserError

KINDS = ("nf4", "int8")


def quantisation(kind: str) -> Any:
    """The BitsAndBytesConfig of a kind: nf4 with double quantisation and bf16 compute, or int8.

    Raises:
        UserError: bitsandbytes is not installed, or does not load.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns once per int8 matmul
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"backbone_dtype={kind} needs bitsandbytes: pip install 'lw_fast[quant]' ({error})"
        ) from None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def settle(name: str, model: nn.Module, device: torch.device) -> None:
    """Makes a quantised LM compute the same with and without gradients; a no-op on GPUs.

    On CPUs with AVX-512 bitsandbytes (0.50.2) packs a 4-bit weight anew in its first pass without
    gradients, and the next pass with gradients reads the packed bytes as if they were not.

    Raises:
        UserError: on a CPU, a layer of a width for which bitsandbytes dequantises wrongly.
    """
    if device.type != "cpu":
        return
    import bitsandbytes

    for layer in model.modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        layer.support_avx512bf16_for_cpu = False
        # Measured with 0.50.2: errors of 0.2 to 0.4 where a row of vectors ends inside a block.
        if layer.in_features % 64 and not layer.in_features % 16:
            raise UserError(
                f"lm.{name}: bitsandbytes computes nf4 layers of width {layer.in_features} wrongly "
                "on CPUs (widths must be multiples of 64); use int8, bf16 or a GPU"
            )


def random_lm(config: Any, options: dict[str, Any], device: torch.device) -> nn.Module:
    """A randomly initialised causal LM of a transformers config, quantised layer by layer.

    Peak memory is that of the quantised LM and of one bf16 matrix.

    Args:
        options: `dtype`, `attn_implementation` and `quantization_config`, as from_pretrained takes.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import (
        Bnb4bitQuantize,
        Bnb8bitQuantize,
        replace_with_bnb_linear,
    )
    from transformers.quantizers.base import get_keys_to_not_convert

    quantisation = options["quantization_config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=options["dtype"], attn_implementation=options["attn_implementation"]
        )
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantisation)
    quantise = (Bnb4bitQuantize if quantisation.load_in_4bit else Bnb8bitQuantize)(None).convert
    for name, module in model.named_modules():
        if not hasattr(module, "source_cls"):  # how transformers marks what it has replaced
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            continue
        matrix = torch.empty(module.weight.shape, dtype=options["dtype"], device=device)
        matrix.normal_(std=config.initializer_range)
        key = f"{name}.weight"
        module.weight = quantise({key: matrix}, full_layer_name=key, model=model)[key]
        if module.bias is not None:
            zeros = torch.zeros(module.bias.shape, dtype=options["dtype"], device=device)
            module.bias = nn.Parameter(zeros, requires_grad=False)
    model.tie_weights()
    return model
