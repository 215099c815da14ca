"""Writes what differs between two packages into one file.

Shapes: R rows of a file, C rows that differ.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from recsys.data.filesystem import whole_file
from recsys.serving.package import MANIFEST, Manifest, read_manifest
from recsys.serving.vector_file import VectorFileShape

FORMAT = 1
DESCRIPTION = "delta.json"
ROWS, DATA, FILES = "rows/", "data/", "files/"  # prefixes of names in the archive
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Description:
    """Origin of each file of the newer package, which is the delta's `delta.json`.

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


@dataclass(frozen=True)
class DeltaCounts:
    """Contents of a delta: rows that differ by file, files taken whole, and bytes of all."""

    rows: dict[str, int]
    whole: list[str]
    num_bytes: int
    package_bytes: int

    def __str__(self) -> str:
        """Describe the counts in a line."""
        changed = ", ".join(f"{count:,} rows of {name}" for name, count in self.rows.items())
        return (
            f"{self.num_bytes:,} bytes for a package of {self.package_bytes:,}: "
            f"{changed or 'no row'}; {len(self.whole)} other files"
        )


def write_delta(base: Path, new: Path, out: Path) -> DeltaCounts:
    """Compare two packages and write what makes the second of the first.

    Rows of tables and content vectors are compared byte by byte, so that every change counts: of
    training, of evicted and re-used rows, of content that was encoded anew.

    Args:
        base: the older package, which the receiver has.
        new: the newer one, of the same model or of another.
        out: the file to write.

    Raises:
        ValueError: one of them is no package or is damaged.
    """
    before, after = read_manifest(base), read_manifest(new)
    description = _compare(before, after)
    rows = {}
    with whole_file(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.write(new / MANIFEST, MANIFEST)
        archive.writestr(DESCRIPTION, json.dumps(asdict(description)))
        for name in description.whole:
            archive.write(new / name, FILES + name)
        for name, row_bytes in description.patched.items():
            rows[name] = _write_rows(archive, name, (base / name, new / name), row_bytes)
    total = sum(of_file["bytes"] for of_file in after.files.values())
    return DeltaCounts(rows, description.whole, out.stat().st_size, total)


def bytes_of_rows(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of a row of each file of vectors, by its name in the package."""
    shapes = {f"tables/{name}.vectors": shape for name, shape in manifest.tables.items()}
    shapes |= {f"content/{name}.vectors": shape for name, shape in manifest.content.items()}
    return {name: VectorFileShape(**shape).row_bytes for name, shape in shapes.items()}


def _compare(before: Manifest, after: Manifest) -> Description:
    """Decide how each file comes about, by hashes and layouts."""
    old, new = bytes_of_rows(before), bytes_of_rows(after)
    kept, patched, whole = [], {}, []
    for name, of_file in after.files.items():
        if name in before.files and before.files[name]["sha256"] == of_file["sha256"]:
            kept.append(name)
        elif name in before.files and name in new and old.get(name) == new[name]:
            patched[name] = new[name]
        else:
            whole.append(name)
    needed = {name: before.files[name]["sha256"] for name in (*kept, *patched)}
    return Description(needed, kept, patched, whole)


def _write_rows(
    archive: zipfile.ZipFile, name: str, files: tuple[Path, Path], row_bytes: int
) -> int:
    """Write the rows of a file that differ, and return their number."""
    numbers = []
    with archive.open(DATA + name, "w", force_zip64=True) as data:
        for first, differs, block in _blocks(*files, row_bytes):
            numbers.append(first + np.flatnonzero(differs))
            data.write(block[differs].tobytes())
    changed = np.concatenate([np.zeros(0, np.int64), *numbers])
    with archive.open(ROWS + name, "w", force_zip64=True) as file:
        np.save(file, changed, allow_pickle=False)
    return len(changed)


def _blocks(
    old: Path, new: Path, row_bytes: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:  # int, bool [rows], uint8 [rows, row_bytes]
    """Yield the first row of each block of the newer file, which rows differ, and the block."""
    before, after = (rows_of(path, row_bytes) for path in (old, new))
    at_once = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, len(after), at_once):
        block = np.asarray(after[first : first + at_once])
        known = before[first : first + len(block)]
        differs = np.ones(len(block), bool)
        differs[: len(known)] = (known != block[: len(known)]).any(axis=1)
        yield first, differs, block


def rows_of(path: Path, row_bytes: int, mode: str = "r") -> np.ndarray:  # uint8 [R, row_bytes]
    """Map a file's rows to memory; `r+` writes to the file."""
    num_rows = path.stat().st_size // row_bytes
    if not num_rows:
        return np.zeros((0, row_bytes), np.uint8)
    return np.memmap(path, np.uint8, mode, shape=(num_rows, row_bytes))  # type: ignore[call-overload,no-any-return]
