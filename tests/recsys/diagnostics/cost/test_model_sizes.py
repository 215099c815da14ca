"""Sizes of encoders against what they make of an image."""

import pytest
import torch
from transformers import AutoModel

from recsys.diagnostics.cost.model_sizes import image_tokens
from tests.recsys.content.encoders.tiny_transformers import CONFIGS, tower_of


@pytest.mark.parametrize("name", ["vit", "clip_image", "siglip_image"])
def test_an_image_becomes_as_many_tokens_as_are_counted(name: str) -> None:
    model = tower_of(name, AutoModel.from_config(CONFIGS[name]))
    pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    assert image_tokens(model) == model(pixels).last_hidden_state.shape[1]
