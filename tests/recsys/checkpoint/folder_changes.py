"""What this process changes under a folder, one change after the other, to cut it off at any."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Killed(BaseException):
    """Raised at each change after a job's last, so that its folder stays as after a SIGKILL."""


# DCP and the writer's thread turn it into errors of theirs.
ENDED = (Killed, ValueError)


CHANGING = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


class _Changes:
    """Watches what this process changes under a folder; from one change on it can do no more."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.names: list[str] = []
        self.kill_index: int | None = None
        self.at_change: Callable[[str], None] | None = None
        sys.addaudithook(self._hook)  # for good: Python knows no way to remove one

    @contextmanager
    def watched(
        self,
        folder: Path,
        kill_index: int | None = None,
        at_change: Callable[[str], None] | None = None,
    ) -> Iterator[list[str]]:
        self.folder, self.names, self.kill_index, self.at_change = folder, [], kill_index, at_change
        try:
            yield self.names
        finally:
            self.folder = None

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event not in CHANGING:
            return
        path = args[0]
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(path, str) or not path.startswith(f"{self.folder}/"):
            return
        if ".lock" in path:  # held by the process, so gone with it
            return
        self.names.append(f"{event} {path.removeprefix(f'{self.folder}/')}")
        if self.at_change is not None:
            folder, self.folder = self.folder, None
            try:
                self.at_change(self.names[-1])
            finally:
                self.folder = folder
        if self.kill_index is not None and len(self.names) > self.kill_index:
            raise Killed


CHANGES = _Changes()
