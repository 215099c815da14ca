"""Local paths and fsspec URLs (`s3://`, `gs://`, `memory://`), read in the same way."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocalFileSystem

from recsys.storage.files import regular_file

SPELLINGS = {".parquet": (".parquet", ".parq", ".pq")}  # variants of an ending, in any case
SEARCH_DEPTH = 4  # levels of folders that are searched for data files that would not be read


@dataclass(frozen=True)
class Location:
    """A path on a filesystem, as from `Location.of("s3://bucket/dataset")`; `/` joins names."""

    filesystem: Any  # an fsspec filesystem
    path: str

    @classmethod
    def of(cls, url: object) -> Self:
        """Make a location of a local path or a URL; an unknown kind of URL is a ValueError."""
        if "://" not in str(url):  # fsspec would interpret `::` or `:` in a local path
            path = os.path.abspath(os.path.expanduser(str(url)))
            return cls(LocalFileSystem(), path.rstrip("/"))
        try:
            filesystem, path = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"{url}: cannot be opened ({error})") from error
        return cls(filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def arrow(self) -> FileSystem:
        if self.is_local:
            return ArrowLocalFileSystem()
        return PyFileSystem(FSSpecHandler(self.filesystem))

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))

    def exists(self) -> bool:
        return bool(self.filesystem.exists(self.path))

    def read_bytes(self) -> bytes:
        """Read the whole file; a folder, a pipe or a device is a ValueError."""
        if self.is_local:
            regular_file(Path(self.path))
        return bytes(self.filesystem.cat_file(self.path))

    def files(self, ending: str) -> list[Self]:
        """Return the folder's files with this ending, sorted by name; a file returns itself.

        Includes files in Hive partitions such as `date=2026-11-01`, but no names that begin with
        `.` or `_`. Raises a ValueError for a data file with another spelling or in another folder.
        """
        if self.filesystem.isfile(self.path):
            return [self]
        if not self.filesystem.isdir(self.path):
            return []
        names = [path.rsplit("/", 1)[-1] for path in self.filesystem.ls(self.path, detail=False)]
        entries = [self / name for name in sorted(names) if not name.startswith((".", "_"))]
        in_partitions: list[Self] = []
        for entry in entries:
            name = entry.path.rsplit("/", 1)[-1]
            if is_partition(name) and self.filesystem.isdir(entry.path):
                in_partitions += entry.files(ending)
            else:
                self._refuse_unread(entry, name, ending)
        matching = [entry for entry in entries if entry.path.endswith(ending)]
        if matching and in_partitions:
            raise ValueError(
                f"{in_partitions[0]}: lies in a partition, and {matching[0]} beside the "
                "partitions; move it into one"
            )
        return matching or in_partitions

    def _refuse_unread(self, entry: Self, name: str, ending: str) -> None:
        """Raise a ValueError for an entry that looks like data but would not be read."""
        if self.filesystem.isfile(entry.path):  # a link to a file counts as a file
            is_spelling = name.lower().endswith(SPELLINGS.get(ending, ending))
            if is_spelling and not name.endswith(ending):
                raise ValueError(f"{entry}: would be left out; rename it to end with {ending}")
            return
        inside = self.filesystem.find(entry.path, maxdepth=SEARCH_DEPTH)
        if name.endswith(ending) or any(path.endswith(ending) for path in inside):
            raise ValueError(
                f"{entry}: not a file, but a folder, a broken link or the like; move the files "
                f"in it to {self} or remove it"
            )


@contextmanager
def errors_at(location: object, *others: type[Exception]) -> Iterator[None]:
    """Turn a ValueError, or one of `others`, in the block into one that names `location`."""
    kinds: tuple[type[Exception], ...] = (ValueError, *others)
    try:
        yield
    except kinds as error:
        raise ValueError(f"{location}: {error}") from error


def is_partition(name: str) -> bool:
    """Return whether a folder's name has the form of a Hive partition, `date=2026-11-01`."""
    key, _, value = name.partition("=")
    return bool(key and value)
