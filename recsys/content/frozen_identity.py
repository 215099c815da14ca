"""What decides on the outputs of the frozen part of an encoder: the name of its cache."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from recsys.config import ModalitySettings
from recsys.content.encoders import Encoder, TransformerEncoder
from recsys.content.frozen_groups import ITEMS_PER_GROUP, SHORT_LENGTHS
from recsys.content.frozen_reuse import ABOUT
from recsys.data.item_table import digest_of


def encoder_key(encoder: Encoder) -> str:
    """A hash of frozen weights, settings and the shapes they are run in; not of adapters."""
    shapes = (ITEMS_PER_GROUP, SHORT_LENGTHS, encoder.max_length)
    return digest_of(_weights_digest(encoder), _split_of(encoder), shapes)


def _weights_digest(encoder: Encoder) -> str:
    """A hash of all weights; adapters start anew in each run and belong to no cache."""
    parts: list[Any] = []
    for name, tensor in encoder.state_dict().items():
        if "lora_" not in name:
            # A frozen layer is called base_layer once an adapter stands beside it.
            parts += [name.replace(".base_layer", ""), memoryview(tensor.numpy().tobytes())]
    return digest_of(*parts)


def _split_of(encoder: Encoder) -> Any:
    """What besides the weights decides on the outputs of the frozen part."""
    if isinstance(encoder, TransformerEncoder):
        config = encoder.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        return encoder.first_trained, encoder.training_mode, encoder.pooling, config
    module = getattr(encoder, "module", encoder)
    return f"{type(module).__module__}.{type(module).__qualname__}: {module}"


def write_about(
    folder: Path, key: str, content: str, encoder: Encoder, modality: ModalitySettings, **more: Any
) -> None:
    """`about.json`: for people, and for later caches of the same encoder."""
    layers: Any = "all"
    if isinstance(encoder, TransformerEncoder) and encoder.training_mode == "lora":
        layers = f"embeddings and the lowest {encoder.first_trained}"
    about = {
        "encoder": modality.encoder or modality.module,
        "revision": modality.revision,
        "layers": layers,
        "pooling": modality.pooling if layers == "all" else "none",
        "encoder_key": key,
        "content": content,
        "dtype": "float32",
        **more,
        "device": str(next((part.device for part in encoder.parameters()), "cpu")),
        "versions": {
            "recsys-em3": importlib.metadata.version("recsys-em3"),
            "torch": torch.__version__,
        },
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
