"""Small encoders and stores whose frozen outputs are cached; fills that count and fail."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.content.encoders.transformer import TransformerEncoder
from recsys.data.batch import ContentInput
from recsys.data.items.content_store import ContentStore, ItemTable
from recsys.data.schema import load_schema
from recsys.distributed.ranks import Ranks
from recsys.storage.location import Location

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
        **({} if name == "text" else {"image_size": 32}),
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
    trained = {key: weight for key, weight in encoder.named_parameters() if weight.requires_grad}
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


WITH_TEXT = NUM_ITEMS - 2
TEXT = modality_of("text", "lora")
CALLS = 4  # of two items each


class Interrupted(Exception):
    pass


class Watched:
    """Counts what an encoder encodes; fails at a call."""

    def __init__(self, encoder: Encoder, failing_call: int | None = None) -> None:
        self.items = self.calls = 0
        self._encode, self._fail_at = encoder.frozen_outputs, failing_call
        encoder.frozen_outputs = self  # type: ignore[method-assign, assignment]

    def __call__(self, content: ContentInput) -> ContentInput:
        if self.calls == self._fail_at:
            raise Interrupted("on purpose")
        self.calls += 1
        self.items += len(content.mask)
        return self._encode(content)


def expected_outputs(dataset: Path) -> dict[str, Any]:
    return outputs(store_of(dataset, "text", TEXT), "text", encoder_of("text", TEXT))


def fill(
    dataset: Path, ranks: Ranks, failing_call: int | None = None
) -> tuple[ContentStore, Encoder, Watched]:
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    watched = Watched(encoder, failing_call)
    cache_frozen_outputs(store, "text", encoder, ranks)
    return store, encoder, watched


def files_in(dataset: Path) -> list[Path]:
    return sorted((dataset.parent / "cache").glob(".frozen-text-*.parts/*.npz"))


def failures_in(dataset: Path) -> list[Path]:
    """The marks of ranks that failed."""
    return list((dataset.parent / "cache").glob(".frozen-text-*.parts/.failed-*"))


def assert_nothing_else_is_left(dataset: Path) -> None:
    names = sorted(path.name.split("-")[0] for path in (dataset.parent / "cache").iterdir())
    assert names == ["frozen", "text"]
