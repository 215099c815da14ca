"""Images of items -> pixels: one image, or a list of images or frames, per row.

Shapes: n rows of a chunk, S side of an image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from recsys.data.items.images import ImagePreparation, decode_image
from recsys.data.parquet.bad_rows import Report
from recsys.data.parquet.values import is_list, list_lengths


def decoded_images(
    chunk: pa.Array,
    size: int,
    chosen: Callable[[int], list[int]],
    preparation: ImagePreparation,
    where: str,
    report: Report,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Decode the chosen images of each row; an unreadable one is reported and left out.

    Args:
        chunk: encoded images, one or a list of them per row; null is none.
        size: side of the square, S.
        chosen: maps a row's number of images to the positions of those to use, in order.
        preparation: preparation of images for the encoder.
        where: file and column, for messages.
        report: reports rows with an unreadable image.

    Returns:
        number of images of each row [n], their pixels uint8 [sum, 3, S, S], and the number of rows
        with images that were not taken.

    Raises:
        ValueError: the column has another type.
    """
    several = is_list(chunk.type)
    lengths = np.zeros(len(chunk), np.int64)
    most = sum(len(chosen(count)) for count in num_images(chunk, where).tolist())
    pixels = np.empty((most, 3, size, size), np.uint8)
    causes: dict[int, list[str]] = defaultdict(list)
    cut = 0
    for row, value in enumerate(chunk):
        images = (value.values if several else [value]) if value.is_valid else []
        encoded = [image for image in images if image.is_valid]
        places = chosen(len(encoded))
        cut += len(places) < len(encoded)
        for place in places:
            which = f"image {place} of its {len(encoded)}" if several else ""
            try:
                image = encoded[place].as_py()
                pixels[lengths.sum()] = decode_image(image, size, which, preparation)
                lengths[row] += 1
            except ValueError as error:
                causes[row].append(str(error))
    bad = np.isin(np.arange(len(chunk)), list(causes))
    report(bad, "unreadable image", lambda row: "; ".join(causes[row]))
    return lengths, pixels[: lengths.sum()], cut


def check_first_image(chunks: Iterable[tuple[pa.Array, str]], decodes: bool = True) -> None:
    """Decode the first image of a column, so that wrong content ends the job before long work.

    Without `decodes`, the type alone is checked, as where unreadable images are skipped.

    Raises:
        ValueError: the column has another type, or its first image cannot be read.
    """
    for chunk, where in chunks:
        num_images(chunk, where)
        images = chunk.flatten() if is_list(chunk.type) else chunk
        for image in images.drop_null().slice(0, 1):
            if decodes:
                decode_image(image.as_py(), 1, f"{where}, first image")
            return


def num_images(chunk: pa.Array, where: str) -> np.ndarray:  # [n]
    """Return the number of images of each row, including null ones in a list.

    Raises:
        ValueError: the column has another type.
    """
    kind = chunk.type
    image = kind.value_type if is_list(kind) else kind
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise ValueError(
            f"{where} has type {kind}, expected binary or list<binary>; write the bytes of images"
        )
    if is_list(kind):
        return list_lengths(chunk)
    return chunk.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
