"""Small encoders and stores whose frozen outputs are cached, and what comes out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import Encoder, TransformerEncoder, build_encoder
from recsys.data.filesystem import Location
from recsys.data.items.content_store import ContentStore, ItemTable
from recsys.data.schema import load_schema

NUM_ITEMS = 10
ALL_ITEMS = np.arange(NUM_ITEMS)
TARGETS = {"text": ["query", "value"], "poster": ["q_proj", "v_proj"]}


def modality_of(name: str, training: str, pooling: str = "mean") -> ModalitySettings:
    return ModalitySettings(
        kind="text" if name == "text" else "image",
        column=name,
        encoder="random:bert" if name == "text" else "random:vit",
        training=training,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
        lora=LoraSettings(rank=2, targets=TARGETS[name], top_layers=1),
        image_size=32,
    )


def store_of(dataset: Path, name: str, modality: ModalitySettings) -> ContentStore:
    root = Location.of(str(dataset))
    table = ItemTable(root, load_schema(root))
    store = ContentStore(table, {name: modality}, dataset.parent / "cache")
    store.build(name)
    return store


def encoder_of(name: str, modality: ModalitySettings, seed: int = 1) -> TransformerEncoder:
    torch.manual_seed(seed)
    encoder = build_encoder(name, modality, None)
    assert isinstance(encoder, TransformerEncoder)
    for key, parameter in encoder.named_parameters():
        if "lora_B" in key:  # zero at first, which would hide much
            nn.init.normal_(parameter)
    return encoder


def outputs(store: ContentStore, name: str, encoder: Encoder) -> dict[str, Any]:
    """Tokens and mask of all items, and the gradients of what trains."""
    output = encoder.encode(store.gather(ALL_ITEMS)[name])
    trained = {key: part for key, part in encoder.named_parameters() if part.requires_grad}
    gradients: dict[str, Any] = {}
    if trained:
        loss = output.values[output.mask].square().sum()
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
    return {"values": output.values.detach(), "mask": output.mask, "gradients": gradients}


def assert_same_outputs(cached: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit."""
    assert torch.equal(cached["mask"], expected["mask"])
    assert torch.equal(cached["values"], expected["values"])
    assert cached["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(cached["gradients"][name], gradient), name
