"""Decode images of items of any mode and shape to square pixels; other bytes are a ValueError.

Only formats whose decoders merely read pixels are accepted. Shapes: n rows of a chunk, S side.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from recsys.data.parquet.bad_rows import Report
from recsys.data.parquet.values import is_list, list_lengths

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
LONGEST_PATH = 260  # bytes; a shorter printable text in place of an image may be a path
BITS_16 = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class ImagePreparation:
    """Preparation of an image for its encoder; the defaults are those of ImageNet encoders."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of red, green and blue, from 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resampling: int = 2  # Pillow's number of a filter (2 bilinear, 3 bicubic)
    keeps_aspect: bool = True  # crop the central square; False: squeeze the image into a square
    share: float = 1.0  # visible share of the sides, cropped around the centre

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"mean {self.mean} and std {self.std}; images have three colours")
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.share} of an image cannot be cut out")
        Image.Resampling(self.resampling)


def decode_image(
    encoded: bytes, size: int, where: str = "", preparation: ImagePreparation | None = None
) -> np.ndarray:  # uint8 [3, S, S]
    """Decode the visible part as a square of side `size`; errors name the image by `where`."""
    try:
        image = open_image(encoded)
    # A decoder may raise an error of any class for damaged bytes.
    except Exception as error:
        cause, fix = _cause_and_fix(error, encoded)
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}not a readable image ({cause}); {fix}") from error
    preparation = preparation or ImagePreparation()
    width, height = image.size
    visible = (min(width, height),) * 2 if preparation.keeps_aspect else (width, height)
    across, down = (side * preparation.share for side in visible)
    x, y = (width - across) / 2, (height - down) / 2
    resampling = Image.Resampling(preparation.resampling)
    image = image.resize((size, size), resampling, box=(x, y, x + across, y + down))
    return np.asarray(image).transpose(2, 0, 1)


def open_image(encoded: bytes) -> Image.Image:
    """Return the decoded image in RGB, upright; raise any error of its decoder."""
    with warnings.catch_warnings():
        # Above MAX_IMAGE_PIXELS Pillow only warns; it raises above twice as many pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(BytesIO(encoded), formats=_formats())
    if image.mode in BITS_16:  # Pillow would clip these to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of any class, for damaged EXIF data, which are ignored
        orientation = 1
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    return upright.convert("RGB")


def _cause_and_fix(error: Exception, encoded: bytes) -> tuple[str, str]:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return str(error), "scale it down"
    cause = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    if 0 < len(encoded) <= LONGEST_PATH and encoded.isascii() and encoded.decode().isprintable():
        cause = f"of no known format, but the text '{encoded.decode()}'"
    return cause, "write JPEG or PNG bytes, or null for an item without an image"


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decoded_images(
    chunk: pa.Array,
    size: int,
    select: Callable[[int], list[int]],
    preparation: ImagePreparation,
    where: str,
    report: Report,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Decode the images of each row, one or a list; report unreadable images and leave them out.

    `select` maps a row's number of images to the positions to use, in order. Returns the numbers of
    images by row [n], pixels uint8 [sum, 3, S, S], and the number of rows with unselected images.
    """
    has_lists = is_list(chunk.type)
    lengths = np.zeros(len(chunk), np.int64)
    max_images = sum(len(select(count)) for count in num_images(chunk, where).tolist())
    pixels = np.empty((max_images, 3, size, size), np.uint8)
    causes: dict[int, list[str]] = defaultdict(list)
    cut = 0
    for row, value in enumerate(chunk):
        images = (value.values if has_lists else [value]) if value.is_valid else []
        encoded = [image for image in images if image.is_valid]
        positions = select(len(encoded))
        cut += len(positions) < len(encoded)
        for position in positions:
            which_image = f"image {position} of its {len(encoded)}" if has_lists else ""
            try:
                image = encoded[position].as_py()
                pixels[lengths.sum()] = decode_image(image, size, which_image, preparation)
                lengths[row] += 1
            except ValueError as error:
                causes[row].append(str(error))
    bad = np.isin(np.arange(len(chunk)), list(causes))
    report(bad, "unreadable image", lambda row: "; ".join(causes[row]))
    return lengths, pixels[: lengths.sum()], cut


def check_first_image(chunks: Iterable[tuple[pa.Array, str]], decodes: bool = True) -> None:
    """Raise a ValueError for a wrong column type and, with `decodes`, an unreadable first image."""
    for chunk, where in chunks:
        num_images(chunk, where)
        images = chunk.flatten() if is_list(chunk.type) else chunk
        for image in images.drop_null().slice(0, 1):
            if decodes:
                decode_image(image.as_py(), 1, f"{where}, first image")
            return


def num_images(chunk: pa.Array, where: str) -> np.ndarray:  # [n]
    """Return the number of images of each row, including nulls in a list."""
    kind = chunk.type
    image = kind.value_type if is_list(kind) else kind
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise ValueError(
            f"{where} has type {kind}, expected binary or list<binary>; write the bytes of images"
        )
    if is_list(kind):
        return list_lengths(chunk)
    return chunk.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
