"""Items with several images: each is encoded by itself, their tokens stand side by side."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.cache import fill as frozen_cache
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.data.items.content_store import ContentStore
from recsys.data.items.item_table import ItemTable
from recsys.data.schema import load_schema
from recsys.distributed.log import configure_logging
from recsys.distributed.ranks import joined_ranks
from recsys.storage.location import Location
from tests.datasets import png, write_dataset
from tests.recsys.data.items.item_content import rewrite

NUM_ITEMS = 6
COUNTS = [2, 1, 0, 3, 1, 4]  # images of each item; 4 are more than the settings below allow
MAX_IMAGES = 3


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Posters in lists; item 2 has none, and one of item 3's is null."""
    dataset = write_dataset(tmp_path / "data", {}, num_items=NUM_ITEMS)
    rng = np.random.default_rng(1)
    images = {item: [png(rng) for _ in range(count)] for item, count in enumerate(COUNTS)}

    def with_lists(table: pa.Table) -> pa.Table:
        lists = [images[item] for item in table["item"].to_pylist()]
        lists = [[*row[:1], None, *row[1:]] if len(row) == 3 else row or None for row in lists]
        index = table.column_names.index("poster")
        return table.set_column(index, "poster", pa.array(lists, pa.list_(pa.binary())))

    rewrite(dataset, with_lists)
    return dataset


def modality_of(training: Any = "frozen", pooling: Any = "mean") -> ModalitySettings:
    return ModalitySettings(
        kind="image",
        column="poster",
        encoder="random:vit",
        training=training,
        pooling=pooling,
        lora=LoraSettings(rank=2, targets=["q_proj", "v_proj"], top_layers=2),
        image_size=32,
        max_images=MAX_IMAGES,
    )


def store_of(dataset: Path, modality: ModalitySettings, on_bad_row: Any = "error") -> ContentStore:
    root = Location.of(dataset)
    table = ItemTable(root, load_schema(root), on_bad_row)
    store = ContentStore(table, {"it": modality}, dataset.parent / "cache")
    store.build("it")
    return store


def encoder_of(modality: ModalitySettings) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder("it", modality, None)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return encoder.train()


def single(modality: ModalitySettings) -> ModalitySettings:
    return ModalitySettings(**{**vars(modality), "max_images": 1})


def by_hand(dataset: Path, modality: ModalitySettings, encoder: Encoder) -> dict[int, Tensor]:
    """The tokens of each item's images, encoded one by one: [T, D]."""
    store = store_of(dataset, modality)
    pixels = store.gather(np.arange(NUM_ITEMS))["it"]
    tokens = {}
    for item in range(NUM_ITEMS):
        images = pixels.values[item][pixels.mask[item]]
        outputs = []
        for image in images:
            content = type(pixels)(image[None], torch.ones(1, 1, dtype=torch.bool))
            outputs.append(encoder.encode(content).values[0])
        tokens[item] = torch.cat(outputs) if outputs else torch.zeros(0, encoder.output_dim)
    return tokens


def test_the_first_images_of_each_item_are_kept_and_the_others_told(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    content = store_of(dataset, modality_of()).gather(np.arange(NUM_ITEMS))["it"]
    assert content.values.shape == (NUM_ITEMS, MAX_IMAGES, 3, 32, 32)
    assert content.mask.sum(dim=1).tolist() == [min(count, MAX_IMAGES) for count in COUNTS]
    message = "column 'poster': 1 items have more than max_images 3 images; the first 3"
    assert message in capsys.readouterr().out
    one = store_of(dataset, single(modality_of())).gather(np.arange(NUM_ITEMS))["it"]
    assert one.values.shape == (NUM_ITEMS, 3, 32, 32)
    assert torch.equal(one.values, content.values[:, 0])


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_each_image_is_encoded_by_itself(dataset: Path, training: str, pooling: str) -> None:
    modality = modality_of(training, pooling)
    encoder = encoder_of(modality)
    content = store_of(dataset, modality).gather(np.arange(NUM_ITEMS))["it"]
    output = encoder.encode(content)
    expected = by_hand(dataset, modality, encoder_of(single(modality)))
    size = 5 if pooling == "none" else 1
    assert output.mask.sum(dim=1).tolist() == [min(count, MAX_IMAGES) * size for count in COUNTS]
    for item, tokens in expected.items():
        item_tokens = output.values[item][output.mask[item]]
        dtype = torch.float16 if (training, pooling) == ("frozen", "none") else torch.float32
        assert item_tokens.dtype == dtype
        rounding = 2**-10 if dtype == torch.float16 else 0  # of both
        torch.testing.assert_close(
            item_tokens.float(), tokens.float(), atol=1e-5, rtol=1e-5 + rounding
        )
    if training != "frozen":
        output.values[output.mask].square().sum().backward()
        trained = [weight for weight in encoder.parameters() if weight.requires_grad]
        assert trained and all(weight.grad is not None for weight in trained)


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_the_cache_is_by_item_and_gives_the_same_bits(
    dataset: Path, training: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_cache, "ITEMS_PER_CALL", 2)
    modality = modality_of(training, pooling)
    store, encoder = store_of(dataset, modality), encoder_of(modality)
    expected = encoder.encode(store.gather(np.arange(NUM_ITEMS))["it"])
    with joined_ranks("cpu") as ranks:
        report = cache_frozen_outputs(store, "it", encoder, ranks)
    assert report.items == report.encoded == 5
    output = encoder.encode(store.gather(np.arange(NUM_ITEMS))["it"])
    assert torch.equal(output.mask, expected.mask)
    assert torch.equal(output.values, expected.values)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_batch_without_any_image_still_gives_gradient(
    dataset: Path, training: str, is_cached: bool
) -> None:
    modality = modality_of(training)
    store, encoder = store_of(dataset, modality), encoder_of(modality)
    if is_cached and training == "lora":
        with joined_ranks("cpu") as ranks:
            cache_frozen_outputs(store, "it", encoder, ranks)
    output = encoder.encode(store.gather(np.array([2]))["it"])
    assert not output.mask.any()
    output.values.sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters() if weight.requires_grad)
