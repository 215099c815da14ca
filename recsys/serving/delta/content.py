"""Description of a delta, which is its file `delta.json`."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.serving.package import Manifest
from recsys.serving.vector_file import VectorFileShape

FORMAT = 1
DESCRIPTION = "delta.json"
ROWS, DATA, FILES = "rows/", "data/", "files/"  # prefixes of names in the archive


@dataclass(frozen=True)
class Description:
    """Origin of each file of the newer package.

    base: hashes by block of the files of the older package that are needed, by name.
    kept: names of files that are equal in both packages.
    patched: bytes of a row, by name of the files of which some rows differ.
    whole: names of files that the delta has whole.
    """

    base: dict[str, list[str]]
    kept: list[str]
    patched: dict[str, int]
    whole: list[str]
    format: int = FORMAT


def bytes_of_rows(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of a row of each file of vectors, by its name in the package."""
    shapes = {f"tables/{name}.vectors": shape for name, shape in manifest.tables.items()}
    shapes |= {f"content/{name}.vectors": shape for name, shape in manifest.content.items()}
    return {name: VectorFileShape(**shape).row_bytes for name, shape in shapes.items()}
