"""A lock on a folder or file, so that only one job at a time writes it.

The kernel frees the lock (`flock`) when its process ends. A file beside the lock names the owner.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock, Timeout

# Seconds that a killed job, its children and a network file system may need to free the lock.
PATIENCE_SECONDS = 120.0
ATTEMPT_SECONDS = 0.2


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    job: str  # empty: no launcher has named it
    host: str
    pid: int
    started: float  # creation time of the process, as pids are reused
    since: str

    @classmethod
    def of_this_process(cls, job: str) -> Self:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        started = psutil.Process().create_time()
        return cls(job, socket.gethostname(), os.getpid(), started, since)

    def is_ending(self, process: Self) -> bool:
        """Return whether the owner has ended, or is an earlier attempt of that process's job."""
        if self.host != process.host:  # processes of another host cannot be inspected
            return bool(self.job) and self.job == process.job
        try:
            same_pid = psutil.Process(self.pid)
            is_other = abs(same_pid.create_time() - self.started) > 1
            return is_other or same_pid.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class JobLock:
    """A lock on `target` in a file, with its owner in a file beside it."""

    def __init__(self, target: Path, file: Path) -> None:
        self.target, self.file = target, file
        self.owner_file = file.with_name(f"{file.name}.json")
        self.lock = FileLock(file)
        self.new_folders = [path for path in file.parents if not path.exists()]

    def acquire(self, job: str) -> None:
        """Lock after earlier attempts of this job end; a ValueError if another job has the lock."""
        process, deadline = Owner.of_this_process(job), time.monotonic() + PATIENCE_SECONDS
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            while not self._is_free():
                owner = self._owner()
                if owner is None or not owner.is_ending(process) or time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.target}: in use by {owner or 'another job'}; wait for it, end it, "
                        f"or choose another --out (if it is gone for good, remove {self.file})"
                    )
            self.owner_file.unlink(missing_ok=True)
            self.owner_file.write_text(json.dumps(asdict(process)) + "\n")
        except OSError as error:
            self.release()
            raise ValueError(f"{self.target}: cannot be locked for writing ({error})") from error

    def release(self) -> None:
        """Free the lock if it is held, and remove the files and empty folders made for it."""
        try:
            if self.lock.is_locked:
                self.owner_file.unlink(missing_ok=True)
                self.file.unlink(missing_ok=True)
        finally:
            self.lock.release()
        with suppress(OSError):  # a folder that holds other files is not removed
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
