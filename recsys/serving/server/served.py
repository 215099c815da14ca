"""The package that is served now, exchanged for a newer one while requests are answered.

A package is replaced by renaming: its folder, a link to it, or its manifest after files were
added. A request uses one package from its first to its last line, whatever is loaded meanwhile.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.serving.package import MANIFEST, REQUEST, digest_of
from recsys.serving.scorer import Scorer
from recsys.serving.server.columns import Columns
from recsys.serving.server.refusals import Damaged
from recsys.storage.manifest import VerifiedFiles

logger = logging.getLogger(__name__)

Verify = bool | Literal["later"]

POLL_SECONDS = 0.25
LONGEST_PAUSE = 60.0  # seconds between attempts to load a package that cannot be loaded
TURN_SECONDS = 1e-4  # of a thread while a package is loaded; Python's own turns take 5 ms


@dataclass(frozen=True)
class Served:
    """A loaded package; version: the start of the hash of its manifest."""

    scorer: Scorer
    columns: Columns
    version: str

    @staticmethod
    def load(
        folder: Path,
        verify: Verify,
        before: Scorer | None = None,
        verified: VerifiedFiles | None = None,
    ) -> Served:
        """Load a package as `Scorer.load` does.

        Raises:
            ValueError: the folder is no package, or a file of it differs.
        """
        folder = folder.resolve()  # of a link, which may be exchanged meanwhile
        scorer = Scorer.load(folder, verify=verify, before=before, verified=verified)
        example = json.loads((folder / REQUEST).read_text())
        return Served(scorer, Columns(scorer, example), digest_of(scorer.manifest)[:12])

    def require_whole(self) -> None:
        """Require that no file was seen to differ since the package was loaded.

        Raises:
            Damaged: names the file that differs.
        """
        check = self.scorer.check
        if check is not None and check.difference is not None:
            raise Damaged(f"{check.difference}; nothing is answered until the package is replaced")


class CurrentPackage:
    """Holds the package that is served, and loads the next one when the manifest is exchanged.

    Args:
        folder: the package, or a link to it.
        verify: how to compare files with their hashes.
        verified: files that another process has compared.

    Raises:
        ValueError: the folder is no package, or a file of it differs.
    """

    def __init__(self, folder: Path, verify: Verify, verified: VerifiedFiles | None = None) -> None:
        """Load the package."""
        self._folder, self._verify = folder, verify
        self._signature = self._read_signature()
        self.served = Served.load(folder, verify, verified=verified)
        self.failures, self._next = 0, 0.0

    def _read_signature(self) -> tuple[int, ...] | None:
        try:
            of_file = (self._folder / MANIFEST).stat()
        except OSError:
            return None  # between two renames
        return of_file.st_dev, of_file.st_ino, of_file.st_mtime_ns, of_file.st_size

    def is_outdated(self) -> bool:
        """Return whether the manifest is another file now, and it is time to load it."""
        signature = self._read_signature()
        return signature not in (None, self._signature) and time.monotonic() >= self._next

    def reload(self) -> bool:
        """Load the package of the folder and serve it; keep the old one if that fails."""
        signature = self._read_signature()
        try:
            with _short_turns():
                self.served = Served.load(self._folder, self._verify, self.served.scorer)
        except (ValueError, OSError) as error:
            self.failures += 1
            self._next = time.monotonic() + min(2.0**self.failures, LONGEST_PAUSE)
            logger.error(
                "the new package is not served, version %s still is: %s", self.served.version, error
            )
            return False
        self._signature, self.failures, self._next = signature, 0, 0.0
        logger.info("serving version %s", self.served.version)
        return True


@contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads take short turns: a request waits for a turn of the loading thread at each step.

    A graph has hundreds of steps, at each of which another thread may run.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
