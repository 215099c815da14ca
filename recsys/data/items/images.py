"""Encoded images -> square pixels, for any mode and shape; other bytes are refused.

Only formats whose decoders merely read pixels are accepted (PostScript, for example, needs an
interpreter that runs it), and an image's size is checked before it is decoded.

Shapes: S side of the square.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
LONGEST_PATH = 260
BITS_16 = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class ImagePreparation:
    """Treatment of an image before its encoder; the default is that of ImageNet encoders.

    Attributes:
        mean, std: statistics of red, green and blue, on the scale 0 to 1, that normalise pixels.
        resampling: Pillow's number of a filter (2 bilinear, 3 bicubic).
        keeps_aspect: crop the centre square; else squeeze the whole image into a square.
        share: visible share of that square's side, or of both sides.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resampling: int = 2
    keeps_aspect: bool = True
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check colours, share and filter."""
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"mean {self.mean} and std {self.std}; images have three colours")
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.share} of an image cannot be cut out")
        Image.Resampling(self.resampling)


def decode_image(
    encoded: bytes, size: int, where: str = "", preparation: ImagePreparation | None = None
) -> np.ndarray:  # [3, S, S]
    """Decode image bytes to uint8 pixels: the visible part, resized to a square.

    An animation gives its first frame; 16 bits become 8.

    Args:
        encoded: bytes of the file.
        size: S.
        where: prefix of the error message; may be empty.
        preparation: of the encoder; None for that of ImageNet encoders.

    Raises:
        ValueError: the bytes are not a readable image.
    """
    try:
        image = open_image(encoded)
    # A decoder may raise an error of any class for damaged bytes.
    except Exception as error:
        cause, fix = _cause_and_fix(error, encoded)
        place = f"{where}: " if where else ""
        raise ValueError(f"{place}not a readable image ({cause}); {fix}") from error
    preparation = preparation or ImagePreparation()
    width, height = image.size
    seen = (min(width, height),) * 2 if preparation.keeps_aspect else (width, height)
    across, down = (side * preparation.share for side in seen)
    left, top = (width - across) / 2, (height - down) / 2
    box = (left, top, left + across, top + down)
    image = image.resize((size, size), Image.Resampling(preparation.resampling), box=box)
    return np.asarray(image).transpose(2, 0, 1)


def open_image(encoded: bytes) -> Image.Image:
    """Return the decoded image in RGB; raise any error of its decoder."""
    with warnings.catch_warnings():
        # Above MAX_IMAGE_PIXELS Pillow warns, and refuses only twice as many.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(BytesIO(encoded), formats=_formats())
    if image.mode in BITS_16:  # Pillow would clip these to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _cause_and_fix(error: Exception, encoded: bytes) -> tuple[str, str]:
    """Return the cause of a decoding error and its fix, as text for users."""
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return str(error), "scale it down"
    # Pillow's own message names an object in memory.
    cause = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    if 0 < len(encoded) <= LONGEST_PATH and encoded.isascii() and encoded.decode().isprintable():
        cause = f"of no known format, but the text '{encoded.decode()}'"
    return cause, "write JPEG or PNG bytes, or null for an item without an image"


@cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this build of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
