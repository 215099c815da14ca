"""Names the cache of an encoder's frozen part by everything that determines its outputs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from recsys.config import ModalitySettings
from recsys.content.cache.reuse import ABOUT
from recsys.content.encoders.base import Encoder
from recsys.content.encoders.frozen_groups import ITEMS_PER_GROUP, SHORT_LENGTHS
from recsys.content.encoders.identity import weights_digest
from recsys.data.items.item_table import digest_of


def encoder_key(encoder: Encoder) -> str:
    """Return a hash of frozen weights, settings and batch shapes; adapters are left out."""
    shapes: tuple[Any, ...] = (ITEMS_PER_GROUP, SHORT_LENGTHS, encoder.max_length)
    if encoder.frozen_dtype != torch.float32:
        shapes = (*shapes, dtype_of(encoder))
    weights = weights_digest(encoder, leave_out=encoder.rewritten)
    return digest_of(weights, encoder.frozen_settings(), shapes)


def dtype_of(encoder: Encoder) -> str:
    """Return the name of the type in which an encoder's cache stores its outputs."""
    return str(encoder.frozen_dtype).removeprefix("torch.")


def cache_folder(cache: Path, name: str, content: str, key: str, shares: bool) -> Path:
    """Return the folder of an encoder's cache.

    An array of shared rows has another name than one without, since earlier versions, which may use
    the same folder, cannot read it. A cache that they have filled is used as it is.

    `content` names the folder with the encoder's input; with `shares` items of equal content share
    an output.
    """
    apart = cache / f"frozen-{name}-{digest_of(content, key)}"
    if not shares or apart.exists():
        return apart
    return cache / f"frozen-{name}-{digest_of(content, key, 'shared')}"


def write_about(
    folder: Path,
    key: str,
    content: str,
    encoder: Encoder,
    modality: ModalitySettings,
    counts: dict[str, int],
) -> None:
    """Write `about.json`, for people and for later caches of the same encoder."""
    layers, identity = encoder.frozen_layers, encoder.identity
    about = {
        "encoder": modality.encoder or modality.module,
        "revision": modality.revision if identity is None else identity.revision,
        "layers": layers,
        "pooling": modality.pooling if layers == "all" else "none",
        "encoder_key": key,
        "content": content,
        "dtype": dtype_of(encoder),
        **counts,
        "device": str(next((part.device for part in encoder.parameters()), "cpu")),
        "versions": {
            "recsys-em3": importlib.metadata.version("recsys-em3"),
            "torch": torch.__version__,
        },
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
