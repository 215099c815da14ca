"""Local paths and fsspec URLs (`s3://`, `gs://`, `memory://`), read in the same way.

pyarrow reads Parquet through the same filesystem object, so no file is copied first.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

ALIKE = {".parquet": (".parquet", ".parq", ".pq")}  # other spellings of an ending
NESTED = 4  # levels of folders that are searched for files that would be left out


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
        """Make a location from a local path or a URL.

        Raises:
            ValueError: no installed filesystem opens a URL of this kind.
        """
        if "://" not in str(url):  # a local name, even with `::` or `:`, which fsspec interprets
            local = fsspec.implementations.local.LocalFileSystem()
            return Location(local, os.path.abspath(os.path.expanduser(str(url))).rstrip("/"))
        try:
            filesystem, path = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"{url}: cannot be opened ({error})") from error
        return Location(filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the path is on the local file system."""
        return isinstance(self.filesystem, fsspec.implementations.local.LocalFileSystem)

    @property
    def arrow(self) -> FileSystem:
        """The same filesystem as an object of pyarrow."""
        if self.is_local:
            return LocalFileSystem()
        return PyFileSystem(FSSpecHandler(self.filesystem))

    def __truediv__(self, name: str) -> Location:
        """Return the location of `name` inside this folder."""
        return Location(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        """Return the local path, or the URL."""
        if self.is_local:
            return self.path
        return str(self.filesystem.unstrip_protocol(self.path))

    def exists(self) -> bool:
        """Return whether a file or folder exists at this path."""
        return bool(self.filesystem.exists(self.path))

    def read_bytes(self) -> bytes:
        """Read the whole file.

        Raises:
            ValueError: it is a folder, a pipe or a device.
        """
        if self.is_local:
            regular_file(Path(self.path))
        return bytes(self.filesystem.cat_file(self.path))

    def files(self, ending: str) -> list[Location]:
        """Return the files with this ending in the folder, by name; this file if it is one.

        As in Spark and Arrow, names that start with a dot or an underscore are not data, and the
        files of folders such as `date=2026-11-01` (Hive partitions) are those of the folder.

        Raises:
            ValueError: an entry with this ending is no file, a folder holds such files, or a file
                has the ending in another spelling; to skip them would lose rows silently.
        """
        if self.filesystem.isfile(self.path):
            return [self]
        if not self.filesystem.isdir(self.path):
            return []
        names = [path.rsplit("/", 1)[-1] for path in self.filesystem.ls(self.path, detail=False)]
        entries = [self / name for name in sorted(names) if not name.startswith((".", "_"))]
        inside: list[Location] = []
        for entry in entries:
            name = entry.path.rsplit("/", 1)[-1]
            if is_partition(name) and self.filesystem.isdir(entry.path):
                inside += entry.files(ending)
            else:
                self._refuse_left_out(entry, ending)
        found = [entry for entry in entries if entry.path.endswith(ending)]
        if found and inside:
            raise ValueError(
                f"{inside[0]}: lies in a partition, and {found[0]} beside the partitions; move it "
                "into one"
            )
        return found or inside

    def _refuse_left_out(self, entry: Location, ending: str) -> None:
        """Raise a ValueError for an entry that looks like data but would not be read."""
        name, is_file = entry.path.rsplit("/", 1)[-1], self.filesystem.isfile(entry.path)
        is_alike = name.lower().endswith(ALIKE.get(ending, ending))
        if is_file and is_alike and not name.endswith(ending):
            raise ValueError(f"{entry}: would be left out; rename it to end with {ending}")
        inside = [] if is_file else self.filesystem.find(entry.path, maxdepth=NESTED)
        if not is_file and (name.endswith(ending) or any(each.endswith(ending) for each in inside)):
            raise ValueError(  # a link to a file counts as a file
                f"{entry}: not a file, but a folder, a broken link or the like; move the files "
                f"in it to {self} or remove it"
            )


def is_partition(name: str) -> bool:
    """Return whether a folder's name is that of a Hive partition, such as `date=2026-11-01`."""
    key, sign, value = name.partition("=")
    return bool(key and sign and value)


def regular_file(path: Path) -> Path:
    """Return the path of a file to read or replace; if it exists, it must be a regular file.

    Opening a pipe may block for ever, and root can replace a device by a file.

    Raises:
        ValueError: it is a folder, a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a folder, a pipe or a device instead of a file; replace it")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is missing, no file, or not JSON; names it.
    """
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable JSON ({error}); bring the file back") from error


def home_expanded(path: str) -> Path:
    """Return a path with a leading `~` replaced by the home folder.

    Raises:
        ValueError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # such as a container's user without HOME and passwd entry
        raise ValueError(
            f"{path}: no home folder is known ({error}); set HOME, or name the folder in full"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` when the block succeeds.

    At any moment `path` holds the whole old file or the whole new one, even if the job is
    killed. The folder must exist. The temporary path is absolute, since pyarrow reads a relative
    path with a colon as a URL.

    Raises:
        ValueError: `path` is a folder, a pipe or a device, which the new file would replace.

    Example::

        with whole_file(folder / "scores.parquet") as partial:
            pq.write_table(table, partial)
    """
    regular_file(path)
    partial = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all; create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path, may_exist: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, renamed to `path` when the block succeeds.

    Args:
        path: a folder that does not exist, or is empty.
        may_exist: if another process has created an equal folder meanwhile, keep that one.

    Raises:
        OSError: the folder exists meanwhile, and `may_exist` is false.
        ValueError: the folder cannot be created.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path}: is a broken link; remove it or name another folder")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be made ({error.strerror}); name another folder"
        ) from error
    try:
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not (may_exist and path.exists()):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a written folder to `path`; remove an older folder of that name.

    If the job is killed between the two renames, `recover_folder` undoes the first.
    """
    old = _set_aside(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Restore the old folder if `replace_folder` was killed between its two renames."""
    if not path.exists() and _set_aside(path).exists():
        _set_aside(path).rename(path)


def _set_aside(path: Path) -> Path:
    """Return the name that an old folder has while it is being replaced."""
    return path.with_name(f".{path.name}.old")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make a hard link to a file, or a copy where the file system has no links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
