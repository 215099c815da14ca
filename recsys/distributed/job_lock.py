"""A lock on a folder or file, so that one job at a time writes it; it ends with its owner.

It is a lock of the kernel (`flock`), so no crash leaves it behind. On network file systems it works
between hosts if their locks do; the server frees the lock of a lost host. A file beside the lock
describes its owner.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from recsys.distributed.job import JobName
from recsys.distributed.ranks import Ranks

# Seconds that a killed job may need to disappear: its children hold its files, or the server of a
# network file system has not noticed yet.
PATIENCE_SECONDS = 120.0
ATTEMPT_SECONDS = 0.2


@dataclass(frozen=True)
class Owner:
    """The job that holds a lock, described by its rank 0."""

    job: str  # empty: no launcher has named it
    host: str
    pid: int
    started: float  # creation time of the process, as pids are reused
    since: str

    @staticmethod
    def of_this_process() -> Owner:
        """Describe this process as an owner."""
        return Owner(
            str(JobName.of_environment()),
            socket.gethostname(),
            os.getpid(),
            psutil.Process().create_time(),
            datetime.now().astimezone().isoformat(" ", "seconds"),
        )

    def is_ending(self, own: Owner) -> bool:
        """Return whether the owner has ended, or is an ending earlier attempt of this job."""
        if self.host != own.host:  # where its processes cannot be seen
            return bool(self.job) and self.job == own.job
        try:
            process = psutil.Process(self.pid)
            is_other = abs(process.create_time() - self.started) > 1
            return is_other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        """Describe the owner in messages."""
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


@contextmanager
def sole_job(target: Path, ranks: Ranks, lock_file: Path) -> Iterator[None]:
    """Let no other job write `target` inside the block. A collective; rank 0 holds the lock.

    Folders created for the lock are removed at the end if they are empty.

    Raises:
        ValueError: on every rank; another job holds it, or the file cannot be written.
    """
    lock = _JobLock(target, lock_file)
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _JobLock:
    """A lock with its owner in a file beside it."""

    def __init__(self, target: Path, file: Path) -> None:
        self.target, self.file = target, file
        self.owner_file = file.with_name(f"{file.name}.json")
        self.lock = FileLock(file)
        self.new_folders = [path for path in file.parents if not path.exists()]

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: another job holds it, or the file cannot be written.
        """
        own, deadline = Owner.of_this_process(), time.monotonic() + PATIENCE_SECONDS
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._is_free():
                owner = self._owner()
                if owner is None or not owner.is_ending(own) or time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.target}: in use by {owner or 'another job'}; wait for it, end it, "
                        f"or choose another --out (if it is gone for good, remove {self.file})"
                    )
            self.owner_file.unlink(missing_ok=True)
            self.owner_file.write_text(json.dumps(asdict(own)) + "\n")
        except OSError as error:
            self.release()
            raise ValueError(f"{self.target}: cannot be locked for writing ({error})") from error

    def release(self) -> None:
        """Free the lock if it is held, and remove the files and folders made for it."""
        try:
            if self.lock.is_locked:
                self.owner_file.unlink(missing_ok=True)
                self.file.unlink(missing_ok=True)  # waiting jobs then see that it is gone
        finally:
            self.lock.release()
        with suppress(OSError):  # folders with other files stay
            for folder in self.new_folders:
                folder.rmdir()

    def _is_free(self) -> bool:
        with suppress(Timeout):
            self.lock.acquire(timeout=ATTEMPT_SECONDS)
        return self.lock.is_locked

    def _owner(self) -> Owner | None:
        try:
            return Owner(**json.loads(self.owner_file.read_text()))
        except (OSError, ValueError, TypeError):  # the owner has just begun or ended
            return None
