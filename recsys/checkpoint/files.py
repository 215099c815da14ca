"""Checkpoints as folders: each is complete or absent, and damage is detected and named.

A folder is renamed once it is synced and listed, with hashes, in the manifest `checkpoint.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.checkpoint.compatibility import check_equal, differing
from recsys.storage.manifest import differences, read_signed

if TYPE_CHECKING:
    from recsys.distributed.ranks import Ranks  # imports torch

BEST = "best"
MANIFEST = "checkpoint.json"
FORMAT = 3
_STEP = re.compile(r"step-[0-9]+")
# Files that define the meaning of columns, the row of each id, and which items are cold.
_RUN_FILES = ("schema.yaml", "item_counts.npy", "item_counts_before.npy", "vocabulary/*.parquet")


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
    """Return the folders to resume from, first choice first; `best` only if there is no other."""
    best = checkpoints / BEST
    return folders_by_age(checkpoints) or ([best] if best.exists() else [])


def prune(newest: Path, keep: int) -> None:
    """Remove all but the last `keep` folders up to `newest`, and leftovers of killed jobs."""
    checkpoints, step = newest.parent, step_of_folder(newest)
    good = [folder for folder in folders_by_age(checkpoints) if step_of_folder(folder) <= step]
    partial = [*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.old")]
    for folder in good[keep:] + partial:
        shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the folder's manifest; a missing or damaged one is a ValueError."""
    path = folder / MANIFEST
    try:
        return read_signed(path, FORMAT)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: no {MANIFEST}, so it is no whole checkpoint; use another"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); bring it back") from error


def model_of(run: Path) -> str | None:
    """Return a hash of a run's best model, None without one; a damaged manifest is a ValueError."""
    folder = run / "checkpoints" / BEST
    if not (folder / MANIFEST).exists():
        return None
    return f"{zlib.crc32(json.dumps(read_manifest(folder), sort_keys=True).encode()):08x}"


def check_files(folder: Path, manifest: dict[str, Any], rank: int = 0, num_ranks: int = 1) -> None:
    """Raise a ValueError that names the first missing or changed file; each rank checks a share."""
    files = dict(sorted(manifest["files"].items())[rank::num_ranks])
    for difference in differences(folder, files):
        raise ValueError(f"{difference}; bring it back")


def checked_manifest(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Read a manifest and check the files, each rank a share; damage is an error. A collective."""
    with ranks.raise_on_all_ranks():
        manifest = read_manifest(folder)
        check_files(folder, manifest, ranks.rank, ranks.world_size)
    return manifest


def run_file_hashes(run: Path) -> dict[str, str]:
    """Return a hash of each file of a run that its model depends on, by path in its folder."""
    files = sorted(file for pattern in _RUN_FILES for file in run.glob(pattern) if file.is_file())
    return {str(file.relative_to(run)): file_digest(file) for file in files}


def check_run_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise a ValueError if files of the run have changed since the checkpoint was written."""
    run = folder.parents[1]
    for name, stored, current in differing(manifest["kept"], run_file_hashes(run)):
        check_equal(str(run / name), stored, current, str(folder))


def file_digest(file: Path) -> str:
    """Return a hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
