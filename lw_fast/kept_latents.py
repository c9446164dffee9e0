"""Z of the evaluated questions, kept beside an evaluation and reused only where it is the same Z.

    Z.safetensors: z [N, M, d_z] fp32, the predicted spans, and the key

The key covers all that Z depends on: the encoder's weights, its settings, the reader's weights,
precision, batches and every question. Z under another key is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lw_fast import checkpoint
from lw_fast.data import Example
from lw_fast.model import LatentModel
from lw_fast.prompts import Latents

logger = logging.getLogger(__name__)

FILE = "Z.safetensors"


def kept_latents(
    path: Path, model: LatentModel, examples: Sequence[Example], encode: Callable[[], Latents]
) -> Latents:
    """Latents of a file if it was made from the same; else fresh ones, which replace it. Says which
    of the two in the log."""
    key = latents_key(model, examples)
    if path.exists():
        found, latents = _read(path, model.device)
        if found == key and latents is not None:
            logger.info("Z of %d questions comes from %s", len(examples), path)
            return latents
        logger.warning(
            "%s is of another checkpoint, other settings or other questions: encoding anew", path
        )
    latents = encode()
    _write(path, key, latents)
    return latents


def latents_key(model: LatentModel, examples: Sequence[Example]) -> str:
    """SHA-256 over everything that decides the bits of Z."""
    config = model.config
    settings = {
        "encoder": dataclasses.asdict(config.encoder),
        "backbone": dataclasses.asdict(config.backbone),
        "precision": config.optim.precision,
        "chunk_size": config.eval.chunk_size,
        "device": model.device.type,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        digest.update(json.dumps([example.id, example.context, example.question]).encode())
    for name, tensor in sorted(model.bridge.encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    if model.reader is not None:
        digest.update(_fingerprint(model.reader.lm.model.state_dict()))
    return digest.hexdigest()


def _fingerprint(state: Mapping[str, Tensor]) -> bytes:
    """Sums of each tensor, which another reader would not have; its gigabytes are not hashed."""
    names = sorted(state)
    values = [state[name].float() for name in names]
    sums = torch.stack([torch.stack([value.sum(), value.norm()]) for value in values])
    return json.dumps([names, sums.tolist()]).encode()


def _write(path: Path, key: str, latents: Latents) -> None:
    from safetensors.torch import save

    # One entry: safetensors writes several in any order.
    about = {"about": json.dumps({"key": key, "span_text": latents.span_text})}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(path, save({"z": latents.z_NMZ.cpu().contiguous()}, about))


def _read(path: Path, device: torch.device) -> tuple[str, Latents | None]:
    """The key and the latents of a file; ("", None) if it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
            return about["key"], Latents(file.get_tensor("z").to(device), about["span_text"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return "", None
