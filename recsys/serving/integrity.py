"""Hashes of a package's files by block: all are compared, or some at the start and the rest later.

A file of 4 GB takes seconds to read, which a server may spend answering: it compares the first,
the last and a few other blocks before its first answer, and the rest in a thread. A file that is
cut short or exchanged for another differs at once; a damage within the rest ends the answers when
the thread reaches it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**24
SAMPLED_BLOCKS = 8  # of a file
THREADS = 4

Verify = bool | Literal["sample"]  # all blocks, none, or some of each file
Files = Mapping[str, dict[str, Any]]  # by name: bytes, and sha256 of each block in hexadecimals


class VerifiedFiles:
    """Files of which all blocks were compared with their hashes, as they were on the disk before.

    A file is known by device, inode, size, times and hashes, so that one that was written or
    exchanged since is compared again. A package to which items are added has the other files still.

    Args:
        before: those of the package before this one.
    """

    def __init__(self, before: VerifiedFiles | None = None) -> None:
        """Begin with no files of this package."""
        self._before = set() if before is None else before.found
        self.found: set[tuple[Any, ...]] = set()

    def known(self, path: Path, digests: list[str]) -> tuple[bool, tuple[Any, ...]]:
        """Return whether a file was compared before, and what it is known by."""
        now = path.stat()
        times = now.st_mtime_ns, now.st_ctime_ns
        identity = now.st_dev, now.st_ino, now.st_size, *times, *digests
        if identity in self._before:
            self.found.add(identity)
        return identity in self.found, identity


def describe(path: Path) -> dict[str, Any]:
    """Return size and hashes of a file."""
    size = path.stat().st_size
    with ThreadPoolExecutor(THREADS) as threads:
        blocks = range(_num_blocks(size))
        return {"bytes": size, "sha256": list(threads.map(lambda at: _digest(path, at), blocks))}


def differences(
    folder: Path, files: Files, verify: Verify = True, verified: VerifiedFiles | None = None
) -> Iterator[str]:
    """Yield a description of each file that is missing or differs.

    Args:
        folder: the package.
        files: of its manifest.
        verify: compare the hashes of all blocks; False: sizes alone; sample: those of
            `SAMPLED_BLOCKS` blocks of each file, among them the first and the last.
        verified: files that need not be read again; those that are read whole are added.
    """
    verified = VerifiedFiles() if verified is None else verified
    for name, of_file in files.items():
        path, size = folder / name, of_file["bytes"]
        if not path.is_file():
            yield f"{path}: no such file"
        elif path.stat().st_size != size:
            yield f"{path}: {path.stat().st_size:,} bytes instead of {size:,}"
        elif len(of_file["sha256"]) != _num_blocks(size):
            yield f"{path}: the manifest has {len(of_file['sha256'])} hashes for {size:,} bytes"
        elif verify:
            is_known, identity = verified.known(path, of_file["sha256"])
            if is_known:
                continue
            if not _equal(path, of_file["sha256"], verify):
                yield f"{path}: its content differs from the manifest"
            elif verify is True:
                verified.found.add(identity)


def _equal(path: Path, digests: list[str], verify: Verify) -> bool:
    chosen = list(range(len(digests)))
    if verify == "sample" and len(chosen) > SAMPLED_BLOCKS:
        chosen = [0, *random.sample(chosen[1:-1], SAMPLED_BLOCKS - 2), chosen[-1]]
    with ThreadPoolExecutor(THREADS) as threads:
        return all(threads.map(lambda at: _digest(path, at) == digests[at], chosen))


def _num_blocks(size: int) -> int:
    return max(1, -(-size // BLOCK_BYTES))


def _digest(path: Path, block: int) -> str:
    with path.open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES)
    return hashlib.sha256(content).hexdigest()


class BackgroundCheck:
    """Compares all blocks of files in a thread.

    Attributes:
        difference: description of the first file that differs; None as long as none does.
    """

    def __init__(self, folder: Path, files: Files, verified: VerifiedFiles | None = None) -> None:
        """Start the thread."""
        self.difference: str | None = None
        self._folder, self._files, self._verified = folder, files, verified
        self._thread = threading.Thread(target=self._run, name="package check", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until all files are compared."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.difference = next(
                differences(self._folder, self._files, True, self._verified), None
            )
        except OSError as error:
            self.difference = f"{self._folder}: {error}"
        if self.difference is not None:
            logger.error("%s; requests are refused; export the run again", self.difference)
