"""Scores requests, one at a time in each worker, and refuses those that cannot be scored.

Shapes: N candidates, C labels.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from recsys.config.server import ServerSettings
from recsys.serving.server import metrics
from recsys.serving.server.columns import RankedUser
from recsys.serving.server.protocol.tensors import Tensor
from recsys.serving.server.refusals import (
    Draining,
    NotServed,
    Overloaded,
    Refusal,
    Unauthorized,
)
from recsys.serving.server.served import POLL_SECONDS, CurrentPackage, Served
from recsys.storage.manifest import VerifiedFiles

# Of Linux, which has priorities by thread: a third of the share of the others. The lowest would
# leave the interpreter's lock, which requests wait for, with a thread that other processes hold up.
LOADER_NICENESS = 5


class Engine:
    """A worker's package with its queue of requests.

    A request is scored by one thread, of which torch uses `threads`; more requests at once come
    from more workers.
    """

    def __init__(self, settings: ServerSettings, verified: VerifiedFiles | None = None) -> None:
        """Load the package, of which another process may have compared files with their hashes.

        Raises:
            ValueError: it cannot be loaded.
        """
        self.settings = settings
        torch.set_num_threads(settings.threads)
        self._current = CurrentPackage(Path(settings.package), settings.verify, verified)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        # A thread of its own: without privileges its priority cannot be raised again.
        self._loader = ThreadPoolExecutor(1, "loader", _lower_priority)
        self._waiting = 0
        self.is_draining = False

    @property
    def served(self) -> Served:
        """The package to use for a whole request."""
        return self._current.served

    def require_token(self, header: str) -> None:
        """Require the bearer token, if one is set.

        Raises:
            Unauthorized: the header has another one or none.
        """
        if (token := self.settings.token) is not None and not hmac.compare_digest(
            header.encode(), f"Bearer {token}".encode()
        ):
            raise Unauthorized("authorization: the bearer token is missing or wrong")

    def require_ready(self) -> None:
        """Require that clients may send further requests.

        Raises:
            Draining: the server is about to end.
            Damaged: a file of the package differs from its hash.
        """
        if self.is_draining:
            raise Draining("the server is about to end; send requests to another")
        self.served.require_whole()

    def require_model(self, name: str, version: str | None) -> Served:
        """Return the package to use for a request to a model.

        Raises:
            NotServed: the model or this version of it is not served.
            Damaged: a file of the package differs from its hash.
        """
        served = self.served
        if name != self.settings.name:
            raise NotServed(f"model '{name[:99]}': not served; '{self.settings.name}' is")
        if version and version != served.version:
            raise NotServed(f"version '{version[:99]}': not served; '{served.version}' is")
        served.require_whole()
        return served

    async def score(self, served: Served, request: RankedUser) -> np.ndarray:  # float32 [N, C]
        """Return the predictions of a request.

        Raises:
            Overloaded: too many requests wait.
            Damaged: a file of the package differs from its hash.
            Refusal: names the column that is missing, unknown, too large or unusable.
        """
        if self._waiting >= self.settings.limits.max_waiting:
            raise Overloaded(f"{self._waiting} requests wait already; send it again later")
        served.require_whole()
        served.columns.check(request, self.settings.limits)
        self._waiting += 1
        metrics.WAITING.inc()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._score, served, request)
        except ValueError as error:
            raise Refusal(str(error)) from error
        finally:
            self._waiting -= 1
            metrics.WAITING.dec()

    async def infer(
        self, served: Served, names: list[str], tensors: list[Tensor]
    ) -> dict[str, np.ndarray]:  # float32 [N] by output
        """Return the outputs that a request of the protocol names, or all if it names none.

        Raises:
            Refusal: the model has no such output; or as in `score`.
        """
        labels = served.scorer.labels
        for name in names:
            if name not in labels:
                raise Refusal(f"output '{name[:99]}': is none of {list(labels)}")
        scores = await self.score(served, served.columns.request_of(tensors))
        return {name: scores[:, labels.index(name)] for name in names or labels}

    @staticmethod
    def _score(served: Served, request: RankedUser) -> np.ndarray:  # float32 [N, C]
        scorer = served.scorer
        rows = scorer.read(request.user, request.history, request.candidates)
        metrics.CANDIDATES.observe(len(rows.target))
        for column, count in scorer.read.unknown_ids(rows).items():
            metrics.UNKNOWN_IDS.labels(column).inc(count)
        return scorer.score_rows(rows)

    def count_worker(self) -> None:
        """Count this worker in the metrics, once it answers."""
        metrics.WORKERS.labels(self.served.version).set(1)

    async def watch(self) -> None:
        """Load each new package, for ever."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._current.is_outdated():
                before, loop = self.served.version, asyncio.get_running_loop()
                if await loop.run_in_executor(self._loader, self._current.reload):
                    metrics.WORKERS.labels(before).set(0)
                    self.count_worker()
                else:
                    metrics.RELOAD_FAILURES.inc()


def _lower_priority() -> None:
    """Let the other threads, which answer requests, run before this one where cores are few."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)
