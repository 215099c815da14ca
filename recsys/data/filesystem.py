"""Paths that may be local or any fsspec URL (`s3://`, `gs://`, `memory://`), read alike.

pyarrow reads Parquet through the same filesystem object, so no file is copied first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem


@dataclass(frozen=True)
class Location:
    """A path on a filesystem.

    Example::

        root = Location.of("s3://bucket/dataset")
        (root / "schema.yaml").read_bytes()
    """

    filesystem: Any  # an fsspec filesystem
    path: str

    @staticmethod
    def of(url: object) -> Location:
        """From a local path or a URL."""
        filesystem, path = fsspec.core.url_to_fs(str(url))
        return Location(filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fsspec.implementations.local.LocalFileSystem)

    @property
    def arrow(self) -> FileSystem:
        """The same filesystem as pyarrow wants it."""
        if self.is_local:
            return LocalFileSystem()
        return PyFileSystem(FSSpecHandler(self.filesystem))

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        return str(self.filesystem.unstrip_protocol(self.path))

    def exists(self) -> bool:
        return bool(self.filesystem.exists(self.path))

    def read_bytes(self) -> bytes:
        return bytes(self.filesystem.cat_file(self.path))

    def files(self, ending: str) -> list[Location]:
        """Files with that ending in this folder, in order of name; this file itself if it is one.

        As in Spark and Arrow, names that start with a dot or an underscore are not data.

        Raises:
            ValueError: something else has such a name; to leave it out would lose rows unnoticed.
        """
        if self.filesystem.isfile(self.path):
            return [self]
        if not self.filesystem.isdir(self.path):
            return []
        names = [
            str(entry["name"]).rsplit("/", 1)[-1]
            for entry in self.filesystem.ls(self.path, detail=True)
        ]
        found = [
            self / name
            for name in sorted(names)
            if name.endswith(ending) and not name.startswith((".", "_"))
        ]
        for file in found:  # a link to a file is one
            if not self.filesystem.isfile(file.path):
                raise ValueError(
                    f"{file}: not a file, but a folder, a broken link or the like; move the files "
                    f"in it to {self} or remove it"
                )
        return found


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it, so that no reader sees a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
