"""Partitions of the training rows: Hive folders such as `train/date=2026-11-01/hour=05`.

Values of a level are ordered as numbers if they are digits, else as text. Names that start with a
dot or an underscore are no data, as in Spark: `_SUCCESS` marks a partition that is whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from recsys.data.filesystem import Location, is_partition

SUCCESS = "_SUCCESS"
# Names of folders and files that writers use until a file is whole.
UNFINISHED = ("_temporary", ".partial", ".tmp", ".inprogress", "._COPYING_", ".crdownload")
Key = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Partition:
    """A folder with training rows."""

    name: str  # path below `train/`

    @property
    def folder(self) -> str:
        """Path in the dataset."""
        return f"train/{self.name}"

    @property
    def key(self) -> Key:
        """Place in the order of all partitions."""
        return key_of(self.name)


def key_of(name: str) -> Key:
    """Return the place of a partition in the order."""
    return tuple(_key_of_value(level.partition("=")[2]) for level in name.split("/"))


def key_of_bound(bound: str, like: Key) -> Key:
    """Return the place of a bound such as `2026-11-01/05` among values like those of a partition.

    Digits are text where the partition's value is: the year 2027 lies behind 2026-11-01.
    """
    keys = []
    for level, (kind, *_) in zip(bound.split("/"), like):
        value = level.partition("=")[2] or level
        keys.append((1, 0, unquote(value)) if kind else _key_of_value(value))
    return tuple(keys)


def _key_of_value(value: str) -> tuple[int, int, str]:
    value = unquote(value)
    return (0, int(value), "") if value.isascii() and value.isdigit() else (1, 0, value)


def list_partitions(root: Location) -> list[Partition]:
    """Return all partitions of a dataset in order.

    Raises:
        ValueError: files lie outside of them, or two have the same values.
    """
    train = root / "train"
    found = [Partition(name) for name in _leaves(train, "")]
    found.sort(key=lambda each: each.key)
    levels = [[level.partition("=")[0] for level in each.name.split("/")] for each in found]
    for each, names in zip(found, levels):
        if names != levels[0]:
            raise ValueError(
                f"{train}: {found[0].name} and {each.name} are of different levels; give all "
                "partitions the same"
            )
    for one, two in pairwise(found):
        if one.key == two.key:
            raise ValueError(f"{train}: {one.name} and {two.name} are one value; merge them")
    return found


def _leaves(train: Location, path: str) -> Iterator[str]:
    """Yield the paths of folders that hold no further level."""
    folder = train / path if path else train
    entries = _entries(folder)
    levels = sorted(name for name, is_folder in entries if is_folder and is_partition(name))
    files = [name for name, is_folder in entries if not is_folder and name.endswith(".parquet")]
    if files and (levels or not path):
        raise ValueError(
            f"{folder}/{files[0]}: lies outside of a partition; move it to a folder such as "
            f"{folder}/date=2026-11-01"
        )
    if path and not levels:
        yield path
    for name in levels:
        yield from _leaves(train, f"{path}/{name}" if path else name)


def _entries(folder: Location) -> list[tuple[str, bool]]:
    """Return names in a folder that are data, each with whether it is a folder."""
    if not folder.filesystem.isdir(folder.path):
        return []
    named = [(_name(of), of["type"] == "directory") for of in _details(folder)]
    return [(name, is_folder) for name, is_folder in named if not name.startswith((".", "_"))]


def has_success(root: Location, partition: Partition) -> bool:
    """Return whether a partition is marked as whole."""
    return (root / partition.folder / SUCCESS).exists()


def unfinished_file(root: Location, partition: Partition) -> str | None:
    """Return the name of a file or folder that shows that a partition is being written."""
    folder = root / partition.folder
    return next((n for n in sorted(map(_name, _details(folder))) if n.endswith(UNFINISHED)), None)


def seconds_quiet(root: Location, partition: Partition) -> float:
    """Return the seconds since a file of a partition changed; 0 if it has none."""
    folder = root / partition.folder
    files = [str(of["name"]) for of in _details(folder) if of["type"] == "file"]
    if not files:
        return 0.0
    return time.time() - max(folder.filesystem.modified(file).timestamp() for file in files)


def _name(of: dict[str, Any]) -> str:
    return str(of["name"]).rstrip("/").rsplit("/", 1)[-1]


def _details(folder: Location) -> list[dict[str, Any]]:
    return list(folder.filesystem.ls(folder.path, detail=True))
