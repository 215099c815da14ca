"""Encoders that are no transformer, and encoders on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.config import LoraSettings, ModalitySettings
from recsys.content.encoders.build import build_encoder
from recsys.content.encoders.image_encoders import ModuleEncoder
from recsys.data.batch import ContentInput
from tests.recsys.content.encoders.tiny_transformers import CONFIGS

NUM_IMAGES = 4


def some_images() -> ContentInput:
    """Four images of 8 pixels, of which the third item has none."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (NUM_IMAGES, 3, 8, 8), generator=generator).to(torch.uint8)
    return ContentInput(pixels, torch.tensor([[True], [True], [False], [True]]))


class Convolution(nn.Module):
    """Pixels -> a normalised vector, or four tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.convolution = nn.Conv2d(3, 5, 4, 4)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.norm(self.convolution(pixels)).flatten(2).transpose(1, 2)
        return features if self.tokens else features.mean(1)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_frozen_module_keeps_its_statistics_and_may_be_dropped(tokens: bool) -> None:
    encoder = ModuleEncoder(Convolution(tokens), trained=False, image_size=8).train()
    content = some_images()
    output = encoder.encode(content)
    plain = encoder.module((content.values.float() / 255 - mean_pixel()) / std_pixel())
    assert encoder.output_dim == 5
    assert output.values.shape == (NUM_IMAGES, 4 if tokens else 1, 5)
    is_present = content.mask[:, 0]
    plain = plain.to(torch.float16 if tokens else torch.float32)
    torch.testing.assert_close(output.values[is_present].flatten(1), plain[is_present].flatten(1))
    assert not output.values[~is_present].any()
    assert torch.equal(output.mask, content.mask.expand(-1, output.values.shape[1]))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.module.norm.running_mean.any()  # type: ignore[union-attr, operator]
    saved = encoder.frozen_outputs(content)
    encoder.drop_frozen_layers()
    assert torch.equal(encoder.encode(saved).values, output.values)


def mean_pixel() -> Tensor:
    return torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)


def std_pixel() -> Tensor:
    return torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def test_a_trained_module_gets_gradient() -> None:
    encoder = ModuleEncoder(Convolution(tokens=False), trained=True, image_size=8).train()
    assert not encoder.caches
    encoder.encode(some_images()).values.square().sum().backward()
    assert all(part.grad is not None and part.grad.any() for part in encoder.parameters())


def test_a_module_of_another_output_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv2d .*\[1, 5, 2, 2\]"):
        ModuleEncoder(nn.Conv2d(3, 5, 4, 4), trained=False, image_size=8)


def sizes(modality: ModalitySettings, device: str) -> dict[str, tuple[list[int], bool, str]]:
    """Shape, whether it trains and the device of each parameter."""
    with torch.device(device):
        encoder = build_encoder("x", modality, None)
    return {
        name: (list(parameter.shape), parameter.requires_grad, parameter.device.type)
        for name, parameter in encoder.named_parameters()
    }


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_parameters_are_those_of_a_real_encoder(kind: Any, training: Any) -> None:
    targets = ["query", "value"] if kind == "text" else ["q_proj", "v_proj"]
    modality = ModalitySettings(
        kind,
        "column",
        encoder="random:bert" if kind == "text" else "random:vit",
        training=training,
        lora=LoraSettings(rank=2, targets=targets),
        image_size=32,
    )
    real, meta = sizes(modality, "cpu"), sizes(modality, "meta")

    assert {name: size[:2] for name, size in meta.items()} == {n: s[:2] for n, s in real.items()}
    assert {device for _, _, device in meta.values()} == {"meta"}


def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    CONFIGS["bert"].save_pretrained(tmp_path)
    modality = ModalitySettings("text", "column", encoder=str(tmp_path), max_length=8)

    assert {device for _, _, device in sizes(modality, "meta").values()} == {"meta"}
    with pytest.raises(ValueError, match=str(tmp_path)):
        sizes(modality, "cpu")
