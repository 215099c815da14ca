"""Chunks of rows, the units in which a split is read, and a fingerprint of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Rows that are read at once.

    place: file, URL or name of the chunk, for messages and the fingerprint.
    first_row: number of its first row at that place.
    num_bytes: size, which limits windows; 0 if unknown.
    digest: hash that changes with the content; empty if unknown.
    """

    place: str
    num_rows: int
    first_row: int = 0
    num_bytes: int = 0
    digest: str = ""


def fingerprint_of(chunks: Sequence[Chunk]) -> str:
    """Return a hash of everything that determines the order of the rows, and one of their content.

    A dash separates them. A change that leaves the digests of the chunks as they are is not
    detected (for Parquet see `footer_digest`). Without any digest, the second hash is missing.
    """
    names = [chunk.place.rsplit("/", 1)[-1] for chunk in chunks]
    sizes = [(chunk.num_rows, chunk.num_bytes) for chunk in chunks]
    digests = [chunk.digest for chunk in chunks]
    parts = [(names, sizes), *([digests] if any(digests) else [])]
    return "-".join(
        hashlib.blake2b(repr(part).encode(), digest_size=16).hexdigest() for part in parts
    )
