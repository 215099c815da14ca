"""Checkpoints as folders: each is complete or absent, and damage is detected and named.

`RUN/checkpoints` holds the last few folders such as `step-00000123`, and `best`. A folder is
written under another name, its files are synced, their sizes and checksums go into
`checkpoint.json`, and then it is renamed. A folder without that file, or whose files differ from
it, is not loaded.
"""

from __future__ import annotations

import logging
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from recsys.checkpoint.manifest import FORMAT, read_manifest
from recsys.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

BEST = "best"
_READ_BYTES = 16 * 2**20
_STEP = re.compile(r"step-[0-9]+")


def folder_of_step(checkpoints: Path, step: int) -> Path:
    """Return the folder of the state after `step` steps."""
    return checkpoints / f"step-{step:08d}"


def folders_by_age(checkpoints: Path) -> list[Path]:
    """Return the folders of steps that are completely written, the newest first."""
    folders = [path for path in checkpoints.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(folders, key=step_of_folder, reverse=True)


def step_of_folder(folder: Path) -> int:
    """Return the number of steps after which the state in the folder was saved."""
    return int(folder.name.removeprefix("step-"))


def folders_to_continue(checkpoints: Path) -> list[Path]:
    """Return the folders from which a run may continue, the first choice first.

    The best model is one only if it is alone: it lacks the state of the optimizers, so any
    other folder is better, however old.
    """
    best = checkpoints / BEST
    return folders_by_age(checkpoints) or ([best] if best.exists() else [])


def checksum(file: Path) -> int:
    """Compute the CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def check_files(folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Compare the files with the manifest; each of several ranks checks a part.

    Raises:
        ValueError: a file is missing, too short or changed; names the first one.
    """
    for name, (size, expected) in sorted(manifest["files"].items())[part::parts]:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; bring it back")
        if file.stat().st_size != size:
            raise ValueError(
                f"{file}: {file.stat().st_size} bytes instead of {size}; bring it back"
            )
        if checksum(file) != expected:
            raise ValueError(f"{file}: its content has changed since it was written; bring it back")


def checked_manifest(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Read a manifest and check the files against it, each rank a share. A collective.

    Raises:
        ValueError: on every rank: the manifest or a file is missing or damaged.
    """
    with ranks.raise_on_all_ranks():
        manifest = read_manifest(folder)
        check_files(folder, manifest, ranks.rank, ranks.world_size)
    if manifest["format"] < FORMAT and ranks.is_first:
        logger.warning(
            "%s: written by an earlier version, whose manifest has no checksum of its own: that "
            "its numbers are unchanged could not be checked",
            folder,
        )
    return manifest


def prune(newest: Path, keep: int) -> None:
    """Remove all but the last `keep` folders up to `newest`, and leftovers of killed jobs.

    Folders of later steps are damaged ones that a resume skipped; they do not count as good.
    """
    checkpoints = newest.parent
    step = step_of_folder(newest)
    whole = [folder for folder in folders_by_age(checkpoints) if step_of_folder(folder) <= step]
    for folder in whole[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for left in [*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.old")]:
        shutil.rmtree(left, ignore_errors=True)
