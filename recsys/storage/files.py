"""Atomic writes: a file or folder appears completely or not at all, even if the job is killed."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def regular_file(path: Path) -> Path:
    """Return the path of a file to read or replace; a folder, pipe or device is a ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a folder, a pipe or a device instead of a file; replace it")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is a ValueError that names it."""
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable JSON ({error}); bring the file back") from error


def home_expanded(path: str | Path) -> Path:
    """Replace a leading `~` by the home folder; a URL or an unknown home is a ValueError."""
    scheme = (Path(path).parts or ("",))[0]  # pathlib makes "s3:/bucket" of "s3://bucket"
    if len(scheme) > 2 and scheme.endswith(":"):
        url = f"{scheme}//{'/'.join(Path(path).parts[1:])}"
        raise ValueError(
            f"{url}: must be a local path, from or to which you copy the files; only datasets, "
            "rows that are read, and paths of an events.yaml may be URLs"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # for instance in a container, without HOME and passwd entry
        raise ValueError(
            f"{path}: no home folder is known ({error}); set HOME, or name the folder in full"
        ) from error


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary absolute path beside `path`; rename it to `path` if the block succeeds."""
    partial = _partial_path(regular_file(path).absolute())
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file atomically; create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file atomically; create missing folders."""
    atomic_write(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def atomic_folder(path: Path, may_exist: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path`; rename it to `path` if the block succeeds.

    If another process has made `path` meanwhile, its folder stays if `may_exist`, else an OSError.
    """
    partial = _partial_path(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path}: is a broken link; remove it or name another folder")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        problem = f"{path}: cannot be made ({error.strerror})"
        raise ValueError(f"{problem}; name another folder") from error
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
    """Rename a written folder to `path`, replacing an older one; see `recover_folder`."""
    old = _set_aside(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover_folder(path: Path) -> None:
    """Restore the old folder if `replace_folder` was killed between its two renames."""
    if not path.exists() and _set_aside(path).exists():
        _set_aside(path).rename(path)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make a hard link to a file, or a copy if the file system supports no hard links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
