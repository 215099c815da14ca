"""A worker's package with its queue of requests: loads, exchanges and scores.

Renaming replaces a package; a request uses one package throughout.
Shapes: N candidates, C labels.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recsys.config.server import ServerSettings
from recsys.distributed.ranks import keep_freed_memory
from recsys.serving.features.source import FeatureSourceError
from recsys.serving.new_items.add import AddedCounts, Item, ItemIntake
from recsys.serving.package import MANIFEST, REQUEST, STATISTICS, digest_of
from recsys.serving.scorer import Scorer
from recsys.serving.server import metrics
from recsys.serving.server.input_columns import InputColumns, ScoreArguments
from recsys.serving.server.protocol import NamedTensor, RequestError
from recsys.storage.manifest import VerifiedFiles

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
LONGEST_PAUSE = 60.0  # seconds between attempts to load a package that cannot be loaded
SWITCH_SECONDS = 1e-4  # between thread switches while a package is loaded; Python has 5 ms
# Linux has priorities by thread. Lowest priority could hold the GIL and starve requests.
LOADER_NICENESS = 5


@dataclass(frozen=True)
class LoadedPackage:
    """A package that answers requests; version: the start of its manifest's hash."""

    scorer: Scorer
    columns: InputColumns
    version: str
    statistics: dict[str, dict[str, float]]  # of training, by column

    @staticmethod
    def load(
        settings: ServerSettings,
        previous: Scorer | None = None,
        verified: VerifiedFiles | None = None,
    ) -> LoadedPackage:
        """Load a package as `Scorer.load` does, with its errors."""
        folder = Path(settings.package).resolve()  # a link may be replaced meanwhile
        scorer = Scorer.load(folder, settings.verify, previous, verified, settings.features)
        example, statistics = (
            json.loads((folder / file).read_text()) for file in (REQUEST, STATISTICS)
        )
        columns, version = InputColumns(scorer, example), digest_of(scorer.manifest)[:12]
        return LoadedPackage(scorer, columns, version, statistics)

    def score(self, arguments: ScoreArguments) -> np.ndarray:  # float32 [N, C]
        scorer = self.scorer
        rows = scorer.read(*arguments)
        metrics.CANDIDATES.observe(len(rows.target))
        metrics.count_values("unknown", scorer.read.unknown_ids(rows))
        metrics.count_values("null", rows.nulls)
        metrics.count_values("out_of_range", metrics.out_of_range(rows.dense, self.statistics))
        return scorer.score_rows(rows)


class ScoringService:
    """Scores a worker's requests, one at a time, and exchanges its package.

    `verified` are files that another process has compared with their hashes.
    """

    def __init__(self, settings: ServerSettings, verified: VerifiedFiles | None = None) -> None:
        self.settings, self.is_draining = settings, False
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        self._folder = Path(settings.package)
        self._manifest_identity = self._identify_manifest()
        self.package = LoadedPackage.load(settings, verified=verified)
        self._failures, self._retry_at = 0, 0.0
        self._scorer_thread = ThreadPoolExecutor(1, "scorer")
        # A separate thread: without privileges its priority cannot be raised again. 0: the loader.
        priority = os.PRIO_PROCESS, 0, LOADER_NICENESS
        self._loader_thread = ThreadPoolExecutor(1, "loader", os.setpriority, priority)
        self._waiting = Counter[str]()  # requests and additions
        self._item_thread = ThreadPoolExecutor(1, "items")
        self._intake = ItemIntake(self._folder) if settings.encoders else None
        if self._intake is not None:
            self._item_thread.submit(self._intake.warm_up)

    def require_token(self, header: str) -> None:
        """Require the bearer token, if one is set; a RequestError has status 401."""
        if (token := self.settings.token) is not None and not hmac.compare_digest(
            header.encode(), f"Bearer {token}".encode()
        ):
            raise RequestError("authorization: the bearer token is missing or wrong", 401)

    def require_ready(self) -> None:
        """Raise a RequestError of status 503 if the server is about to end."""
        if self.is_draining:
            raise RequestError("the server is about to end; send requests to another", 503)

    def require_model(self, name: str, version: str | None) -> LoadedPackage:
        """Return the package for a request to a model; another one is a RequestError of 404."""
        package = self.package
        if name != self.settings.name:
            raise RequestError(f"model '{name[:99]}': not served; '{self.settings.name}' is", 404)
        if version and version != package.version:
            raise RequestError(f"version '{version[:99]}': not served; '{package.version}' is", 404)
        return package

    async def score(
        self, package: LoadedPackage, arguments: ScoreArguments
    ) -> np.ndarray:  # float32 [N, C]
        """Return the predictions of a request; errors name a column, or say that too many wait."""
        with self._queued("requests"), metrics.WAITING.track_inprogress():
            package.columns.check(arguments, self.settings)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._scorer_thread, package.score, arguments)

    async def infer(
        self, package: LoadedPackage, labels: list[str], tensors: list[NamedTensor]
    ) -> dict[str, np.ndarray]:  # float32 [N] by label
        """Return the scores of these labels, or of all if there are none; errors as `score`."""
        outputs = package.scorer.labels
        for label in labels:
            if label not in outputs:
                raise RequestError(f"output '{label[:99]}': is none of {list(outputs)}")
        scores = await self.score(package, package.columns.arguments(tensors))
        return {label: scores[:, outputs.index(label)] for label in labels or outputs}

    async def add_items(self, items: Sequence[Item]) -> tuple[AddedCounts, str]:
        """Add items to the package; return their numbers and the version that now answers."""
        limit = self.settings.max_items
        if self._intake is None:
            raise RequestError("items: are not taken; start the server with --encoders true", 404)
        if not 1 <= len(items) <= limit:
            raise RequestError(f"items: are {len(items)}; give 1 to {limit}")
        with self._queued("additions"):
            loop = asyncio.get_running_loop()
            counts = await loop.run_in_executor(self._item_thread, self._intake.add, items)
            if not await self._take_newest():
                raise RuntimeError("the package with the new items cannot be loaded")
            return counts, self.package.version

    @contextmanager
    def _queued(self, kind: str) -> Iterator[None]:
        """Count waiting requests or additions up to a limit; turn errors into RequestErrors."""
        number = self._waiting[kind]
        if number >= self.settings.max_waiting:
            raise RequestError(f"{number} {kind} wait already; send it again", 503)
        self._waiting[kind] += 1
        try:
            yield
        except ValueError as error:
            raise RequestError(str(error)) from error
        except FeatureSourceError as error:
            raise RequestError(str(error), 503) from error
        finally:
            self._waiting[kind] -= 1

    def count_worker(self) -> None:
        metrics.WORKERS.labels(self.package.version).set(1)
        for column, shares in self.package.statistics.items():
            for kind in shares.keys() & {"unknown", "null"}:  # no training row is out of range
                metrics.TRAINING_SHARE.labels(column, kind).set(shares[kind])

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if time.monotonic() >= self._retry_at:
                await self._take_newest()

    async def _take_newest(self) -> bool:
        """Load the package anew if it was exchanged; return whether the newest is served."""
        identity = self._identify_manifest()
        if identity in (None, self._manifest_identity):
            return identity is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader_thread, self._reload, identity)

    def _identify_manifest(self) -> tuple[int, ...] | None:
        try:
            status = (self._folder / MANIFEST).stat()
        except OSError:
            return None  # between two renames
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

    def _reload(self, identity: tuple[int, ...] | None) -> bool:
        if identity == self._manifest_identity:  # loaded by another call
            return True
        try:
            with _short_switches():
                package = LoadedPackage.load(self.settings, self.package.scorer)
        except (ValueError, OSError) as error:
            newest = self._identify_manifest()
            if newest not in (None, identity):  # later additions removed files of this one
                return self._reload(newest)
            metrics.RELOAD_FAILURES.inc()
            self._failures += 1
            self._retry_at = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE)
            version = self.package.version
            logger.error(f"the new package is not served, version {version} still is: {error}")
            return False
        metrics.WORKERS.labels(self.package.version).set(0)
        self.package = package
        self.count_worker()
        self._manifest_identity, self._failures, self._retry_at = identity, 0, 0.0
        logger.info("serving version %s", self.package.version)
        return True


@contextmanager
def _short_switches() -> Iterator[None]:
    """Switch threads often, as each step of a request may wait for the loading thread."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
