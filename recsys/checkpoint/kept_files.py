"""Files of a run that its model depends on: each checkpoint has their hashes.

They define the meaning of columns, the row of each id, and which items are cold. So a file that was
edited, or belongs to another run, would change results silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from recsys.checkpoint.compatibility import check_equal
from recsys.distributed.ranks import Ranks

SCHEMA = "schema.yaml"
KEPT = (SCHEMA, "item_counts.npy", "item_counts_before.npy", "vocabulary/*.parquet")


def kept_digests(run: Path) -> dict[str, str]:
    """Return a hash of each file, by its path in the run's folder."""
    files = sorted(file for pattern in KEPT for file in run.glob(pattern) if file.is_file())
    return {str(file.relative_to(run)): file_digest(file) for file in files}


def check_kept_files(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """Refuse a checkpoint if the run's files have changed since it was written. A collective.

    Raises:
        ValueError: on every rank: a file is missing or was edited, or the checkpoint belongs to
            another run.
    """
    with ranks.raise_on_all_ranks():
        if not ranks.is_first:
            return
        run = folder.parents[1]
        now = kept_digests(run)
        earlier = {SCHEMA: manifest.get("schema")}  # all that earlier versions compared
        stored = manifest.get("kept", earlier)
        for name in sorted(stored if stored is earlier else stored.keys() | now.keys()):
            check_equal(str(run / name), stored.get(name), now.get(name), str(folder))


def file_digest(file: Path) -> str:
    """Return a hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
