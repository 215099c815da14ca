"""The manifest of a checkpoint: a description of its state, and size and checksum of each file.

It has a checksum of its own, so that a changed number in it is detected as damage.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from recsys.checkpoint.progress import Progress
from recsys.data.filesystem import regular_file

MANIFEST = "checkpoint.json"
FORMAT = 2  # 1: without checksum of the manifest
_KINDS: dict[str, type] = {
    "step": int,
    "progress": dict,
    "world_size": int,
    "config": dict,
    "data": str,
    "frozen_weights": str,
    "files": dict,
}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint whose files are in the folder."""
    content = {"format": FORMAT, **content}
    with (folder / MANIFEST).open("w") as file:
        json.dump({**content, "checksum": _checksum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the folder's manifest.

    Raises:
        ValueError: it is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(regular_file(path).read_text())
        _check(manifest)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: no {MANIFEST}, so it is no whole checkpoint; use another"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); bring it back") from error
    return manifest


def model_of(run: Path) -> str | None:
    """Return the checksum of the manifest of a run's best model, which identifies the model.

    None if the run no longer keeps that checkpoint.

    Raises:
        ValueError: the manifest is damaged.
    """
    folder = run / "checkpoints" / "best"
    if not (folder / MANIFEST).exists():
        return None
    return f"{_checksum(read_manifest(folder)):08x}"


def best_step(run: Path) -> int:
    """Return the step of a run's best model.

    Raises:
        ValueError: its manifest is missing or damaged.
    """
    return int(read_manifest(run / "checkpoints" / "best")["step"])


def _check(manifest: Any) -> None:
    """Check a manifest after reading.

    Raises:
        ValueError: it has another format, differs from its checksum, or an entry is missing or
            has a wrong type.
    """
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if number not in (1, FORMAT):
        raise ValueError(f"format {number}, not 1 or {FORMAT}; use the version that wrote it")
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    has_checksum = number == FORMAT or "checksum" in manifest
    if has_checksum and manifest.get("checksum") != _checksum(content):
        raise ValueError("its content differs from its checksum")
    for name, kind in _KINDS.items():
        if type(manifest.get(name)) is not kind:
            raise ValueError(f"'{name}' is missing or no {kind.__name__}")
    for name, number in [
        ("world_size", manifest["world_size"]),
        ("config.batch_size", manifest["config"].get("batch_size")),
    ]:
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} is {number}")
    for name, entry in manifest["files"].items():
        is_pair = isinstance(entry, list) and [type(part) for part in entry] == [int, int]
        if "/" in name or not is_pair:
            raise ValueError(f"'files' has an entry '{name}': {entry}")
    if ".metadata" not in manifest["files"]:
        raise ValueError("'files' lacks .metadata")
    if not isinstance(manifest.get("items"), str | None):
        raise ValueError(f"'items' is {manifest['items']!r}, no hash")
    Progress.from_json(manifest["progress"])


def _checksum(content: dict[str, Any]) -> int:
    """Compute the CRC-32 of a manifest's content, whatever the order and layout of its text."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
