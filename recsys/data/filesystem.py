"""Paths that may be local or any fsspec URL (`s3://`, `gs://`, `memory://`), read alike.

pyarrow reads Parquet through the same filesystem object, so no file is copied first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fsspec
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
    def arrow(self) -> FileSystem:
        """The same filesystem as pyarrow wants it."""
        if self.filesystem.protocol == "file" or "file" in self.filesystem.protocol:
            return LocalFileSystem()
        return PyFileSystem(FSSpecHandler(self.filesystem))

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return bool(self.filesystem.exists(self.path))

    def read_bytes(self) -> bytes:
        return bytes(self.filesystem.cat_file(self.path))

    def files(self, ending: str) -> list[Location]:
        """Files with that ending in this folder, in order of name; this file itself if it is one."""
        if self.filesystem.isfile(self.path):
            return [self]
        found = self.filesystem.glob(f"{self.path}/*{ending}")
        return [Location(self.filesystem, str(path)) for path in sorted(found)]
