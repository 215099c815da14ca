"""SeveralImages: an image encoder for items with several images, or frames of a video.

Each image is encoded by itself; the tokens of all images of an item are concatenated, and the
fusion reads them with their mask. The encoder's frozen part is cached per item as usual.

Shapes: U unique items, I images of the item with most images, N images to encode, T tokens of an
image, D width of the encoder, H and W pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from recsys.content.encoders.base import Encoder
from recsys.data.items.content_input import ContentInput


class SeveralImages(Encoder):
    """Image encoder over pixels uint8 [U, I, 3, H, W] with mask [U, I] -> tokens [U, I * T, D].

    Images come first: an item with two of four has the mask True, True, False, False.

    Args:
        encoder: encoder of single images, [N, 3, H, W] -> [N, T, D].
    """

    def __init__(self, encoder: Encoder) -> None:
        """Keep the encoder of single images and take over its attributes."""
        super().__init__()
        self.encoder = encoder
        self.output_dim, self.frozen_dim = encoder.output_dim, encoder.frozen_dim
        self.frozen_dtype, self.frozen_tokens = encoder.frozen_dtype, encoder.frozen_tokens
        self.caches, self.identity = encoder.caches, encoder.identity
        self.rewritten = {f"encoder.{name}" for name in encoder.rewritten}
        self.notes = encoder.notes

    @property
    def trained_parts(self) -> list[nn.Module]:
        """Modules of the inner encoder that run in every step."""
        return self.encoder.trained_parts

    @property
    def frozen_layers(self) -> str:
        """Description of the inner encoder's frozen layers."""
        return self.encoder.frozen_layers

    def frozen_settings(self) -> Any:
        """Return the settings that determine the inner encoder's frozen outputs."""
        return self.encoder.frozen_settings()

    def drop_frozen_layers(self) -> None:
        """Free the inner encoder's frozen layers."""
        super().drop_frozen_layers()
        self.encoder.drop_frozen_layers()

    def frozen_outputs(self, content: ContentInput) -> ContentInput:
        """Return the frozen outputs of all images, [U, I * T, D]."""
        there = _there(content.mask)
        return _by_item(self.encoder.frozen_outputs(_images(content, there)), there)

    def forward(self, content: ContentInput) -> ContentInput:
        """Run the layers above the frozen ones on every image; tokens [U, I * T, D]."""
        if not self.trained_parts:
            return content
        if self.caches:  # tokens of all images, concatenated
            size = self.encoder.frozen_tokens
            missing = -content.mask.shape[1] % size  # if no item of a batch has an image
            values = pad(content.values, (0, 0, 0, missing))
            mask = pad(content.mask, (0, missing)).unflatten(1, (-1, size))  # [U, I, T]
            there = _there(mask[:, :, 0])
            images = ContentInput(values.unflatten(1, (-1, size))[there], mask[there])
        else:
            there = _there(content.mask)
            images = _images(content, there)
        return _by_item(self.encoder(images), there)


def _there(mask: Tensor) -> Tensor:  # [U, I] -> [U, I]
    """Return the mask of images to encode; the first of each item is always one of them.

    In a batch without images the encoder would otherwise get no gradient, and other ranks would
    wait for it.
    """
    there = mask.clone()
    there[:, 0] = True
    return there


def _images(content: ContentInput, there: Tensor) -> ContentInput:  # [U, I]
    return ContentInput(content.values[there], content.mask[there].unsqueeze(1))


def _by_item(images: ContentInput, there: Tensor) -> ContentInput:  # [U, I]
    """Arrange tokens [N, T, D] of images as tokens [U, I * T, D] of items."""
    values = images.values.new_zeros(*there.shape, *images.values.shape[1:])
    mask = images.mask.new_zeros(*there.shape, images.mask.shape[1])
    values[there], mask[there] = images.values, images.mask
    return ContentInput(values.flatten(1, 2), mask.flatten(1, 2))
