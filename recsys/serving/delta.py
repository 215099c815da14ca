"""Deltas between packages: written from two packages, a delta turns the first into the second.

A delta is a zip archive without compression: `manifest.json` of the newer package, `delta.json`,
numbers (`rows/`) and bytes (`data/`) of rows that differ, and whole `files/`.
Shapes: R rows of a file, C rows that differ.
"""

import json
import logging
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from recsys.serving.new_items.added_items import AddedItems
from recsys.serving.package import MANIFEST, Manifest, read_manifest
from recsys.serving.vector_file import VectorFileShape
from recsys.storage.files import atomic_file, atomic_folder, link_or_copy

logger = logging.getLogger(__name__)

FORMAT = 1
DESCRIPTION = "delta.json"
ROWS, DATA, FILES = "rows/", "data/", "files/"  # prefixes of names in the archive
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Description:
    """Origin of each file of the newer package, in `delta.json`."""

    base: dict[str, list[str]]  # hashes by block of the older package's files that are needed
    kept: list[str]
    patched: dict[str, int]  # bytes of a row, by name of the files of which some rows differ
    whole: list[str]
    format: int = FORMAT


@dataclass(frozen=True)
class DeltaCounts:
    """Contents of a delta: rows that differ by file, files taken whole, and bytes of all."""

    rows: dict[str, int]
    full_files: list[str]
    num_bytes: int
    package_bytes: int

    def __str__(self) -> str:
        changed = ", ".join(f"{count:,} rows of {name}" for name, count in self.rows.items())
        return (
            f"{self.num_bytes:,} bytes for a package of {self.package_bytes:,}: "
            f"{changed or 'no row'}; {len(self.full_files)} other files"
        )


def write_delta(base: Path, new: Path, out: Path) -> DeltaCounts:
    """Compare two packages byte by byte and write the delta that turns `base` into `new`."""
    older, newer = read_manifest(base), read_manifest(new)
    description, counts = _compare(older, newer), dict[str, int]()
    with atomic_file(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.write(new / MANIFEST, MANIFEST)
        archive.writestr(DESCRIPTION, json.dumps(asdict(description)))
        for name in description.whole:
            archive.write(new / name, FILES + name)
        for name, row_bytes in description.patched.items():
            counts[name] = _write_rows(archive, name, (base / name, new / name), row_bytes)
    total = sum(entry["bytes"] for entry in newer.files.values())
    return DeltaCounts(counts, description.whole, out.stat().st_size, total)


def bytes_of_rows(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of a row of each file of vectors, by its name in the package."""
    shapes = {f"tables/{name}.vectors": shape for name, shape in manifest.tables.items()}
    shapes |= {f"content/{name}.vectors": shape for name, shape in manifest.content.items()}
    return {name: VectorFileShape(**shape).row_bytes for name, shape in shapes.items()}


def _compare(older: Manifest, newer: Manifest) -> Description:
    old_bytes, new_bytes = bytes_of_rows(older), bytes_of_rows(newer)
    equal, patched, full = [], {}, []
    for name, entry in newer.files.items():
        if name in older.files and older.files[name]["sha256"] == entry["sha256"]:
            equal.append(name)
        elif name in older.files and name in new_bytes and old_bytes.get(name) == new_bytes[name]:
            patched[name] = new_bytes[name]
        else:
            full.append(name)
    base = {name: older.files[name]["sha256"] for name in (*equal, *patched)}
    return Description(base, equal, patched, full)


def _write_rows(
    archive: zipfile.ZipFile, name: str, files: tuple[Path, Path], row_bytes: int
) -> int:
    old, new = (_mapped_rows(path, row_bytes) for path in files)
    numbers, height = [np.zeros(0, np.int64)], max(1, BLOCK_BYTES // row_bytes)
    with archive.open(DATA + name, "w", force_zip64=True) as data:
        for first in range(0, len(new), height):
            block = np.asarray(new[first : first + height])
            old_block = old[first : first + len(block)]
            differs = np.ones(len(block), bool)
            differs[: len(old_block)] = (old_block != block[: len(old_block)]).any(axis=1)
            numbers.append(first + np.flatnonzero(differs))
            data.write(block[differs].tobytes())
    changed = np.concatenate(numbers)  # int64 [C]
    with archive.open(ROWS + name, "w", force_zip64=True) as file:
        np.save(file, changed, allow_pickle=False)
    return len(changed)


def _mapped_rows(path: Path, row_bytes: int, mode: str = "r") -> np.ndarray:  # uint8 [R, row_bytes]
    """Map a file's rows to memory; `r+` writes to the file."""
    num_rows = path.stat().st_size // row_bytes
    if not num_rows:
        return np.zeros((0, row_bytes), np.uint8)
    return np.memmap(path, np.uint8, mode, shape=(num_rows, row_bytes))  # type: ignore[call-overload]


def apply_delta(base: Path, delta: Path, out: Path) -> Manifest:
    """Write the newer package, equal bit by bit to the one that the delta was made from.

    Unchanged files are hard links to those of `base`, which a server may have open. A damaged
    delta, another `base` or an `out` that exists is a ValueError; nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    if not delta.is_file():
        raise ValueError(f"{delta}: no such file; write one by recsys package delta")
    older = read_manifest(base, verify=False)
    try:
        with zipfile.ZipFile(delta) as archive, atomic_folder(out) as partial:
            description = _read_description(archive)
            for name, digests in description.base.items():
                if name not in older.files or older.files[name]["sha256"] != digests:
                    raise ValueError(
                        f"{base}: its {name} is not the file that {delta} was made from; apply the "
                        "deltas in their order, or copy the whole package"
                    )
            _write_files(archive, description, base, partial)
            try:
                newer = read_manifest(partial)
            except ValueError as error:
                raise ValueError(
                    f"{out}: would differ from the newer package ({error}); check {base} by recsys "
                    "package verify"
                ) from error
    except (zipfile.BadZipFile, KeyError, TypeError, IndexError, EOFError) as error:
        raise ValueError(f"{delta}: is damaged ({error}); copy or write it again") from error
    if older.added and older.added != newer.added:
        count = len(AddedItems.open(base, older.added).index)
        logger.warning(
            f"{base}: {count:,} items were added to it after its export; the newer package has "
            "those of its own run alone: add the others again"
        )
    return newer


def _read_description(archive: zipfile.ZipFile) -> Description:
    content = json.loads(archive.read(DESCRIPTION))
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{archive.filename}: format {content.get('format')}, but this version reads {FORMAT}; "
            "write the delta again"
        )
    description = Description(**content)
    for name in (*description.kept, *description.whole, *description.patched):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{archive.filename}: names the file {name}; write the delta again")
    return description


def _write_files(
    archive: zipfile.ZipFile, description: Description, base: Path, folder: Path
) -> None:
    manifest = archive.read(MANIFEST)
    (folder / MANIFEST).write_bytes(manifest)
    for name in (*description.kept, *description.whole, *description.patched):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name in description.kept:
        link_or_copy(base / name, folder / name)
    for name in description.whole:
        with archive.open(FILES + name) as source, (folder / name).open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
    for name, row_bytes in description.patched.items():
        shutil.copyfile(base / name, folder / name)
        os.truncate(folder / name, json.loads(manifest)["files"][name]["bytes"])
        _patch(archive, name, folder / name, row_bytes)


def _patch(archive: zipfile.ZipFile, name: str, path: Path, row_bytes: int) -> None:
    with archive.open(ROWS + name) as file:
        numbers = np.load(file, allow_pickle=False)  # int64 [C]
    rows, height = _mapped_rows(path, row_bytes, "r+"), max(1, BLOCK_BYTES // row_bytes)
    with archive.open(DATA + name) as data:
        for first in range(0, len(numbers), height):
            block = numbers[first : first + height]
            content = np.frombuffer(data.read(len(block) * row_bytes), np.uint8)
            rows[block] = content.reshape(len(block), row_bytes)
    if isinstance(rows, np.memmap):
        rows.flush()
