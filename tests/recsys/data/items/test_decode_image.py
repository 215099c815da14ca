"""Encoded images of every mode and shape become square pixels, or are refused."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from recsys.data.items.images import decode_image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_an_image_keeps_its_centre_square() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2], pixels[:, 6:] = 255, 255  # outside of the centre
    pixels[:, 2:6] = np.arange(4 * 4 * 3).reshape(4, 4, 3)
    decoded = decode_image(encoded(Image.fromarray(pixels)), 4, "")
    assert np.array_equal(decoded, pixels[:, 2:6].transpose(2, 0, 1))
    upright = decode_image(encoded(Image.fromarray(pixels.transpose(1, 0, 2))), 4, "")
    assert np.array_equal(upright, pixels[:, 2:6].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_images_of_every_mode_become_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode)
    decoded = decode_image(encoded(image, kind), 6, "")
    assert (decoded.shape, decoded.dtype) == ((3, 6, 6), np.uint8)
    assert (decoded >= 254).all()


def test_a_very_long_image_is_not_blown_up() -> None:
    image = Image.new("RGB", (60_000, 1), (9, 9, 9))
    assert (decode_image(encoded(image), 64, "") == 9).all()
