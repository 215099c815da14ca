"""Encoders that are no transformer."""

import pytest
import torch
from torch import Tensor, nn

from recsys.content.encoders.image_encoders import ModuleEncoder
from recsys.data.batch import ContentInput

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
    assert all(weight.grad is not None and weight.grad.any() for weight in encoder.parameters())


def test_a_module_of_another_output_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv2d .*\[1, 5, 2, 2\]"):
        ModuleEncoder(nn.Conv2d(3, 5, 4, 4), trained=False, image_size=8)
