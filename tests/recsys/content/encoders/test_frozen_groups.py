"""The frozen part gives an item the same bits, whatever it is batched with."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import Encoder, build_encoder
from recsys.data.batch import ContentInput

NUM_ITEMS, MAX_LENGTH = 80, 40
LORA = {
    "text": LoraSettings(rank=2, targets=["query", "value"], top_layers=1),
    "image": LoraSettings(rank=2, targets=["q_proj", "v_proj"], top_layers=1),
}


def encoder_of(kind: str, training: str, pooling: str = "mean") -> Encoder:
    settings = ModalitySettings(
        kind=kind,  # type: ignore[arg-type]
        column="column",
        encoder="random:bert" if kind == "text" else "random:vit",
        training=training,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
        lora=LORA[kind],
        **({"max_length": MAX_LENGTH} if kind == "text" else {"image_size": 32}),
    )
    return build_encoder("it", settings, None).eval()


def content_of(kind: str) -> ContentInput:
    """Texts of all lengths, or images; item 5 has neither."""
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        pixels = torch.randint(256, (NUM_ITEMS, 3, 32, 32), generator=generator)
        mask = torch.ones(NUM_ITEMS, 1, dtype=torch.bool)
        mask[5] = False
        return ContentInput(pixels.to(torch.uint8), mask)
    lengths = torch.randint(1, MAX_LENGTH + 1, (NUM_ITEMS,), generator=generator)
    lengths[5] = 0
    mask = torch.arange(MAX_LENGTH) < lengths[:, None]
    ids = torch.randint(5, 60, (NUM_ITEMS, MAX_LENGTH), generator=generator)
    return ContentInput(torch.where(mask, ids, 0), mask)


def subset_of(content: ContentInput, items: Tensor) -> ContentInput:
    """Some items, padded to the longest of them, as a batch has them."""
    mask = content.mask[items]
    longest = max(int(mask.sum(dim=1).max()), 1)
    is_text = content.values.dim() == 2
    values = content.values[items]
    return ContentInput(values[:, :longest] if is_text else values, mask[:, :longest])


@pytest.mark.parametrize("training", ["frozen", "lora"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_output_of_an_item_is_the_same_in_every_batch(kind: str, training: str) -> None:
    encoder, content = encoder_of(kind, training, "none"), content_of(kind)
    full = encoder.frozen_outputs(content)
    random = np.random.default_rng(0)
    for size in (1, 3, 31, 33, NUM_ITEMS):
        items = torch.from_numpy(random.permutation(NUM_ITEMS)[:size])
        subset = encoder.frozen_outputs(subset_of(content, items))
        longest = subset.mask.shape[1]
        assert torch.equal(subset.mask, full.mask[items, :longest])
        assert torch.equal(subset.values, full.values[items, :longest])


def test_autocast_does_not_reach_the_frozen_part() -> None:
    encoder, content = encoder_of("text", "lora"), content_of("text")
    expected = encoder.frozen_outputs(content).values
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder.frozen_outputs(content).values
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
