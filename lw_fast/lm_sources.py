"""Where a frozen LM comes from: weights and tokenizer of a source.

A source is a hub name, a local folder, a .gguf file, `nano:llama` / `nano:qwen` (shipped with the
package) or `random:NAME[@TOKENIZER]` (random weights of a known shape, for speed and memory work
without downloads; TOKENIZER is a folder or .gguf file, by default the shipped nano one).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lw_fast import quantised
from lw_fast.errors import UserError

logger = logging.getLogger(__name__)

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6,
        max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    ),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6,
        max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Public shapes (the models' config.json on the Hugging Face hub)."""


def load_tokenizer(name: str, source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone of an LM source."""
    from transformers import AutoTokenizer

    folder = resolve_source(name, source)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # on a damaged file its parsers raise whatever they trip over
        raise UserError(f"lm.{name}: no tokenizer at {source}: {_first_line(error)}") from None


def load_pretrained(name: str, source: str, options: dict, trust: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, source, trust)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            resolve_source(name, source),
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise UserError(f"lm.{name}: {_first_line(error)}") from None
    except Exception as error:  # as above
        raise UserError(f"lm.{name}: cannot load {source}: {_first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
        raise UserError(f"lm.{name}: {source} lacks {len(missing)} weights, such as {missing[0]}")
    return model, tokenizer


def resolve_source(name: str, source: str) -> str:
    """Turns a source into what from_pretrained takes: a folder or a hub name."""
    if source.startswith("nano:"):
        folder = resources.files("lw_fast") / "assets" / "nano" / source.removeprefix("nano:")
        if not Path(str(folder)).is_dir():
            raise UserError(
                f"lm.{name}: there is no shipped LM {source}; try nano:llama, nano:qwen"
            )
        return str(folder)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        return str(_convert_gguf(name, path))
    if path.is_file():
        raise UserError(f"lm.{name}: {source} is a file but not a .gguf model")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not path.is_dir() and "/" in source:
        raise UserError(f"lm.{name}: no such model folder: {source}")
    return str(path) if path.is_dir() else source


def random_model(spec: str, options: dict, device: torch.device) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    config, tokenizer = random_shape(spec)
    with _draws_of(spec.partition("@")[0], device):
        if "quantization_config" in options:
            return quantised.random_lm(config, options, device), tokenizer
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, **options), tokenizer


@contextmanager
def _draws_of(shape_name: str, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of a shape: the same weights in every process. Outside,
    the stream of the run goes on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(shape_name.encode()))
        yield


def random_shape(spec: str) -> tuple[Any, Any]:
    """NAME[@TOKENIZER] -> transformers' configuration and the tokenizer."""
    from transformers import AutoConfig

    shape_name, _, tokenizer_source = spec.partition("@")
    if shape_name not in RANDOM_SHAPES:
        raise UserError(f"random:{shape_name} is unknown; there are {', '.join(RANDOM_SHAPES)}")
    shape = dict(RANDOM_SHAPES[shape_name])
    family = shape.pop("model_type")
    config = AutoConfig.for_model(family, **shape)
    default = "nano:llama" if family == "llama" else "nano:qwen"
    return config, load_tokenizer(shape_name, tokenizer_source or default)


def cache_dir() -> Path:
    """Where converted models are kept: $LW_FAST_CACHE, else ~/.cache/lw_fast."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("LW_FAST_CACHE", Path(base) / "lw_fast"))


def _convert_gguf(name: str, path: Path) -> Path:
    """GGUF -> a folder with bf16 safetensors and tokenizer, once: GGUF metadata parses slowly."""
    if not path.is_file():
        raise UserError(f"lm.{name}: no such file: {path}")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    folder = cache_dir() / "gguf" / f"{path.stem}-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    logger.info("converting %s to safetensors in %s (once)", path, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
    try:
        model, tokenizer = _read_gguf(path)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    except Exception as error:  # as above
        shutil.rmtree(work)
        raise UserError(f"lm.{name}: {path} is not a readable GGUF: {_first_line(error)}") from None
    except BaseException:
        shutil.rmtree(work)
        raise
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return folder


def _read_gguf(path: Path) -> tuple[nn.Module, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer transformers keep GGUF weights "quantised" unless told otherwise, which cannot be saved.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    where = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.bfloat16, **where, **options)
    # A GGUF file with its own output matrix loads untied; saving must keep both matrices.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.config.tie_word_embeddings = tied
    return model, AutoTokenizer.from_pretrained(**where)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
