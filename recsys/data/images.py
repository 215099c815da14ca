"""Encoded images -> square pixels, whatever their mode and shape; what is none is refused.

Only formats whose decoders read pixels and nothing else are tried (PostScript, for one, would be
run by an interpreter), and an image's size is looked at before it is decoded.
"""

from __future__ import annotations

import warnings
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
BITS_16 = ("I;16", "I;16B", "I;16L", "I;16N")


def decode_image(encoded: bytes, size: int, where: str = "") -> np.ndarray:
    """Encoded image bytes -> uint8 [3, size, size]: the centre square, resized.

    The first frame of an animation; 16 bits become 8.

    Raises:
        ValueError: the bytes are not an image that can be read; `where`, if given, is said first.
    """
    try:
        image = _open(encoded)
    # Decoders of damaged bytes raise whatever their format's parser stumbles over.
    except Exception as error:
        cause, mend = _cause_and_mend(error)
        place = f"{where}: " if where else ""
        raise ValueError(f"{place}not a readable image ({cause}); {mend}") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def _open(encoded: bytes) -> Image.Image:
    """The decoded image in RGB."""
    with warnings.catch_warnings():
        # Above MAX_IMAGE_PIXELS Pillow warns, and refuses only twice as many.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(BytesIO(encoded), formats=_formats())
    if image.mode in BITS_16:  # which Pillow would clip to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _cause_and_mend(error: Exception) -> tuple[str, str]:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return str(error), "scale it down"
    # Pillow's own words name an object in memory.
    cause = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return cause, "write JPEG or PNG bytes, or null for an item without an image"


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
