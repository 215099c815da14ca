"""Cached outputs of frozen layers against running them at every step."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.build import Encoder
from recsys.content.encoders.image_encoders import ModuleEncoder
from recsys.data.batch import ContentInput
from recsys.data.items.content_store import ContentStore
from recsys.data.items.ragged_array import RaggedWriter, stored_hashes
from recsys.distributed.ranks import Ranks
from tests.recsys.content.cache.frozen_outputs import (
    assert_same_outputs,
    encoder_of,
    modality_of,
    outputs,
    store_of,
)


def cache_folder(store: ContentStore, encoder: Encoder, ranks: Ranks, name: str = "text") -> str:
    cache_frozen_outputs(store, name, encoder, ranks)
    return store.folders[name].name


def test_a_second_run_reuses_the_cache_whatever_its_adapters(dataset: Path, ranks: Ranks) -> None:
    modality = modality_of("text", "lora")
    first = cache_folder(store_of(dataset, "text", modality), encoder_of("text", modality), ranks)
    encoder = encoder_of("text", modality, seed=2)

    def refuse(content: ContentInput) -> ContentInput:
        raise AssertionError("encoded again")

    encoder.frozen = refuse  # type: ignore[method-assign]
    assert cache_folder(store_of(dataset, "text", modality), encoder, ranks) == first


def test_other_weights_split_or_configuration_make_another_cache(
    dataset: Path, ranks: Ranks
) -> None:
    folders = []
    for change in ("none", "weights", "heads"):
        modality = modality_of("text", "frozen")
        encoder = encoder_of("text", modality)
        if change == "weights":
            with torch.no_grad():
                encoder.model.encoder.layer[0].output.dense.bias[0] += 1e-3
        if change == "heads":
            encoder.config.num_attention_heads = 4
        folders.append(cache_folder(store_of(dataset, "text", modality), encoder, ranks))
    for training, pooling in (("frozen", "cls"), ("frozen", "none"), ("lora", "mean")):
        modality = modality_of("text", training, pooling)
        store = store_of(dataset, "text", modality)
        encoder = encoder_of("text", modality)
        folders.append(cache_folder(store, encoder, ranks))
        dtype = "float16" if (training, pooling) == ("frozen", "none") else "float32"
        metadata = json.loads((store.folders["text"] / "about.json").read_text())
        assert metadata["dtype"] == store.arrays["text"].values.dtype == dtype
    assert len(set(folders)) == 6


class Brightness(nn.Module):
    """A module without weights, told apart by its settings alone."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def extra_repr(self) -> str:
        return f"power={self.power}"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels**self.power).mean(dim=(2, 3))


def test_a_frozen_module_is_cached_and_another_one_has_another_cache(
    dataset: Path, ranks: Ranks
) -> None:
    modality = modality_of("poster", "frozen")
    folders = []
    for power in (1, 2):
        store = store_of(dataset, "poster", modality)
        encoder = ModuleEncoder(Brightness(power), trained=False, image_size=32)
        expected = outputs(store, "poster", encoder)
        folders.append(cache_folder(store, encoder, ranks, "poster"))
        assert_same_outputs(outputs(store, "poster", encoder), expected)
    assert len(set(folders)) == 2


@pytest.mark.parametrize(("training", "pooling"), [("lora", "none"), ("frozen", "mean")])
def test_a_text_of_one_token_does_not_pass_for_a_pooled_one_nor_the_reverse(
    dataset: Path, ranks: Ranks, training: str, pooling: str
) -> None:
    modality = modality_of("text", training, pooling)
    store = store_of(dataset, "text", modality)
    folder = dataset.parent / "cache" / "text-by-hand"
    lengths = np.array([1, 4, 0, 2, 1, 3, 1, 1, 5, 2])
    with closing(RaggedWriter(folder, (), "int64")) as writer:
        writer.add(lengths, np.arange(lengths.sum()) + 5)
    store.use("text", folder)
    store.hashes["text"] = stored_hashes(folder)
    encoder = encoder_of("text", modality)
    expected = outputs(store, "text", encoder)
    cache_frozen_outputs(store, "text", encoder, ranks)
    expected_lengths = lengths if pooling == "none" else lengths.clip(max=1)
    assert store.arrays["text"].lengths.tolist() == expected_lengths.tolist()
    assert_same_outputs(outputs(store, "text", encoder), expected)
