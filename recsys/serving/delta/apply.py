"""Makes the newer package of the older one and a delta."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from recsys.data.filesystem import link_or_copy, whole_folder
from recsys.serving.delta.write import (
    BLOCK_BYTES,
    DATA,
    DESCRIPTION,
    FILES,
    FORMAT,
    ROWS,
    Description,
    rows_of,
)
from recsys.serving.new_items.added_items import AddedItems
from recsys.serving.package import MANIFEST, Manifest, read_manifest

logger = logging.getLogger(__name__)


def apply_delta(base: Path, delta: Path, out: Path) -> Manifest:
    """Write the newer package, equal to the one that the delta was made of to the last bit.

    All of its files are compared with their hashes before it appears. Files that did not change are
    hard links to those of `base`, or copies where the file system has none.

    Args:
        base: a package with the files that the delta was made from; a server may have it open.
        delta: what `write_delta` wrote.
        out: folder of the newer package; must not exist.

    Raises:
        ValueError: the delta is damaged, `base` is another package than the delta needs, or `out`
            exists. Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    if not delta.is_file():
        raise ValueError(f"{delta}: no such file; write one by recsys package delta")
    before = read_manifest(base, verify=False)
    try:
        with zipfile.ZipFile(delta) as archive, whole_folder(out) as partial:
            description = _read_description(archive)
            _require_base(base, before, delta, description)
            _write_files(archive, description, base, partial)
            after = _verified(partial, base, out)
    except (zipfile.BadZipFile, KeyError, TypeError, IndexError, EOFError) as error:
        raise ValueError(f"{delta}: is damaged ({error}); copy or write it again") from error
    _warn_of_added(base, before, after)
    return after


def _write_files(
    archive: zipfile.ZipFile, description: Description, base: Path, folder: Path
) -> None:
    """Write the files of the newer package into a folder."""
    manifest = archive.read(MANIFEST)
    (folder / MANIFEST).write_bytes(manifest)
    for name in description.kept:
        link_or_copy(base / name, _made(folder, name))
    for name in description.whole:
        with archive.open(FILES + name) as source, _made(folder, name).open("wb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
    for name, row_bytes in description.patched.items():
        path = _made(folder, name)
        shutil.copyfile(base / name, path)
        os.truncate(path, json.loads(manifest)["files"][name]["bytes"])
        _patch(archive, name, path, row_bytes)


def _verified(folder: Path, base: Path, out: Path) -> Manifest:
    """Compare all files with their hashes and return the manifest."""
    try:
        return read_manifest(folder)
    except ValueError as error:
        raise ValueError(
            f"{out}: would differ from the newer package ({error}); check {base} by recsys package "
            "verify"
        ) from error


def _read_description(archive: zipfile.ZipFile) -> Description:
    """Read the description and check the names in it."""
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


def _require_base(base: Path, before: Manifest, delta: Path, description: Description) -> None:
    """Require the files of the older package that the delta needs, by their hashes."""
    for name, digests in description.base.items():
        if name not in before.files or before.files[name]["sha256"] != digests:
            raise ValueError(
                f"{base}: its {name} is not the file that {delta} was made from; apply the deltas "
                "in their order, or copy the whole package"
            )


def _made(folder: Path, name: str) -> Path:
    """Return the path of a file, whose folder is made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _patch(archive: zipfile.ZipFile, name: str, path: Path, row_bytes: int) -> None:
    """Write the rows that differ into a copy of the older file."""
    with archive.open(ROWS + name) as file:
        numbers = np.load(file, allow_pickle=False)
    rows = rows_of(path, row_bytes, "r+")
    at_once = max(1, BLOCK_BYTES // row_bytes)
    with archive.open(DATA + name) as data:
        for first in range(0, len(numbers), at_once):
            chosen = numbers[first : first + at_once]
            block = np.frombuffer(data.read(len(chosen) * row_bytes), np.uint8)
            rows[chosen] = block.reshape(len(chosen), row_bytes)
    if isinstance(rows, np.memmap):
        rows.flush()


def _warn_of_added(base: Path, before: Manifest, after: Manifest) -> None:
    """Warn of items that `add-items` put into the older package alone."""
    if before.added and before.added != after.added:
        count = len(AddedItems.open(base, before.added).index)
        logger.warning(
            "%s: %s items were added to it after its export; the newer package has those of its "
            "own run alone: add the others again",
            *(base, f"{count:,}"),
        )
