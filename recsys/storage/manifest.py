"""Hashes, and manifests of folders: size and hashes of each file, with a hash of the manifest."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from recsys.storage.files import atomic_file, flush, regular_file

BLOCK_BYTES = 2**24
READ_BYTES = 2**20  # read at once, a small amount, as checkpoints are hashed during training
THREADS = 4

Files = Mapping[str, Any]  # file name -> {"bytes": size, "sha256": hashes of its blocks}


def digest_of(*values: Any) -> str:
    """Return a hash of bytes-like and printable values."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(value if isinstance(value, bytes | memoryview) else repr(value).encode())
    return digest.hexdigest()


def content_digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON content; key order and layout of the text do not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON content with its hash atomically, and flush it to the disk before the rename."""
    signed = {**content, "sha256": content_digest(content)}
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(signed, indent=1) + "\n")
        flush(partial)


def read_signed(path: Path, format_: int) -> dict[str, Any]:
    """Return the content that `write_signed` wrote, without its hash; a ValueError if damaged."""
    try:
        content = json.loads(regular_file(path).read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from error
    number = content.get("format") if isinstance(content, dict) else None
    if number != format_:
        raise ValueError(f"format {number}, but this version reads {format_}")
    if content.pop("sha256", None) != content_digest(content):
        raise ValueError("its content differs from its hash")
    return dict(content)


class VerifiedFiles:
    """Files that were compared with their hashes; those of `previous` are not read again."""

    def __init__(self, previous: Self | None = None) -> None:
        self._previous = set() if previous is None else previous.identities
        self.identities: set[tuple[Any, ...]] = set()

    def have(self, path: Path, digests: list[str]) -> bool:
        """Return whether a file has these hashes; read it only if it changed since a comparison."""
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        identity = status.st_dev, status.st_ino, status.st_size, *times, *digests
        is_known = identity in self.identities or identity in self._previous
        if not is_known and _digests(path) != digests:
            return False
        self.identities.add(identity)
        return True


def describe(path: Path) -> dict[str, Any]:
    """Return a file's size and hashes, the form of a manifest's entry."""
    return {"bytes": path.stat().st_size, "sha256": _digests(path)}


def describe_all(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return sizes and hashes of files by their names in the folder."""
    return {str(path.relative_to(folder)): describe(path) for path in files}


def differences(
    folder: Path, files: Files, verify: bool = True, verified: VerifiedFiles | None = None
) -> Iterator[str]:
    """Yield a description of each file of a manifest that is missing or differs.

    `verify` compares hashes, too. It skips files in `verified`, and adds files that match to it.
    """
    verified = VerifiedFiles() if verified is None else verified
    for name, entry in files.items():
        path, size, digests = folder / name, entry["bytes"], entry["sha256"]
        if not path.is_file():
            yield f"{path}: no such file"
        elif path.stat().st_size != size:
            yield f"{path}: {path.stat().st_size:,} bytes instead of {size:,}"
        elif len(digests) != _num_blocks(size):
            yield f"{path}: the manifest has {len(digests)} hashes for {size:,} bytes"
        elif verify and not verified.have(path, digests):
            yield f"{path}: its content differs from the manifest"


def _num_blocks(size: int) -> int:
    return max(1, -(-size // BLOCK_BYTES))


def _digests(path: Path) -> list[str]:
    with ThreadPoolExecutor(THREADS) as threads:
        blocks = range(_num_blocks(path.stat().st_size))
        return list(threads.map(lambda block: _digest(path, block), blocks))


def _digest(path: Path, block: int) -> str:
    digest, start = hashlib.sha256(), block * BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        for offset in range(start, start + BLOCK_BYTES, READ_BYTES):
            digest.update(os.pread(file.fileno(), READ_BYTES, offset))
    return digest.hexdigest()
