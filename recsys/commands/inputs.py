"""Checks of the folders that a command reads, before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path


def require_schema(data: str) -> None:
    """Refuse a dataset without a valid schema.

    The ranks of a job later read it together, so that all of them end with its error.

    Raises:
        ValueError: `schema.yaml` is missing or invalid.
    """
    from recsys.data.schema import load_schema
    from recsys.storage.location import Location

    if "RANK" not in os.environ:
        load_schema(Location.of(data), with_vocabularies=False)


def require_finished(run: Path) -> Path:
    """Refuse a folder without a finished run; of a continual one, return its newest partition's.

    Raises:
        ValueError: the folder holds none.
    """
    from recsys.checkpoint.partitions import newest_run

    run = newest_run(run)
    if not (run / "metrics.json").is_file():
        raise ValueError(f"{run}: holds no finished run (metrics.json); train it first")
    return run
