"""Sizes of encoders against what they make of an image or a text."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from recsys.config import ModalitySettings
from recsys.content.encoders.image_transformer import ImageTransformer
from recsys.content.encoders.module_encoder import ModuleEncoder
from recsys.diagnostics.cost.model_sizes import ModalitySizes
from tests.recsys.content.encoders.tiny_transformers import CONFIGS, tower_of


@pytest.mark.parametrize("name", ["vit", "clip_image", "siglip_image"])
def test_an_image_becomes_as_many_tokens_as_are_counted(name: str) -> None:
    model = tower_of(name, AutoModel.from_config(CONFIGS[name]))
    settings = ModalitySettings(
        "image", "photo", encoder="x", training="full", pooling="none", image_size=8
    )
    encoder = ImageTransformer(model, settings, "photo")
    found = ModalitySizes.of("photo", encoder, nn.Linear(16, 4), settings)

    pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    assert found.fixed_tokens == model(pixels).last_hidden_state.shape[1]
    forward, backward = found.encoder.on(items=10, tokens=0)
    layer = 2 * (4 * 16 * 16 + 2 * 16 * 24)  # FLOPs of its products, per token
    assert forward.products >= 10 * found.fixed_tokens * 3 * layer
    assert backward.products > 1.5 * forward.products


def test_a_module_of_the_users_is_counted_too_and_one_that_needs_numbers_is_named() -> None:
    class Choosing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if float(x.sum()) > -1e9 else x.sum((2, 3))

    settings = ModalitySettings("image", "photo", encoder="x", image_size=8)
    convolution = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())
    counted, unknown = (
        ModalitySizes.of("photo", ModuleEncoder(module, True, 8), nn.Linear(width, 4), settings)
        for module, width in ((convolution, 5), (Choosing(), 3))
    )

    assert counted.is_known and not unknown.is_known
    assert counted.encoder.on(1, 0)[0].others == 2 * 5 * 3 * 8 * 8
