"""Lists the files of a table, with the values of the folders in which they lie."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from recsys.data.events.files.columns import Parts
from recsys.data.filesystem import Location

ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".dat")
# Files of logs that a folder may hold, too, and that would be left out.
ALIKE = r"\.(parquet|parq|pq|csv|tsv|dat|orc|avro|jsonl?|ndjson|feather|arrow)(\.\w+)?$"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def data_files(name: str, root: Location) -> list[Location]:
    """Return the data files at and under a path, by name.

    Raises:
        ValueError: there is none, or one that would be left out.
    """
    if root.filesystem.isfile(root.path):
        if not root.path.endswith(ENDINGS):
            raise ValueError(f"{root}: none of {', '.join(ENDINGS)}; rename or convert it")
        return [root]
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; correct the path of '{name}'")
    files = _files_under(root, set())
    if not files:
        raise ValueError(f"{root}: no .parquet or .csv files in it; correct the path of '{name}'")
    return sorted(files, key=lambda file: file.path)


def _files_under(folder: Location, seen: set[str]) -> list[Location]:
    """Return the data files in a folder and those in it; links to folders count as folders."""
    own = os.path.realpath(folder.path) if folder.is_local else folder.path
    if own in seen:
        raise ValueError(f"{folder}: a link to a folder that is read already; remove it")
    seen.add(own)
    files = []
    for listed in folder.filesystem.ls(folder.path, detail=True):
        path, kind = listed["name"].rstrip("/"), listed["type"]
        entry, last = Location(folder.filesystem, path), path.rsplit("/", 1)[-1]
        if last.startswith((".", "_")) or path == folder.path:
            continue
        if kind != "file":  # a link, a pipe ...
            kind = "directory" if folder.filesystem.isdir(path) else kind
            kind = "file" if folder.filesystem.isfile(path) or not entry.exists() else kind
        if kind == "directory":
            files += _files_under(entry, seen)
        elif kind == "file" and last.endswith(ENDINGS):
            files.append(entry)
        elif re.search(ALIKE, last, re.IGNORECASE):
            raise ValueError(
                f"{entry}: would be left out; write {', '.join(ENDINGS)}, or remove it"
            )
    return files


def partition_values(roots: list[str], url: str) -> Parts:
    """Return the values of `key=value/` folders between a root and a file, as Hive writes them."""
    root = max((root for root in roots if url.startswith(root)), key=len)
    folders = url[len(root) :].split("/")[:-1]
    texts = dict(part.split("=", 1) for part in folders if "=" in part)
    return {
        unquote(name): None if text in ("", HIVE_NULL) else unquote(text)
        for name, text in texts.items()
    }
