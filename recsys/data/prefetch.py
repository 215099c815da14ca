"""Run jobs ahead of the use of their results, in threads, in order and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Result(Protocol[T_co]):
    """Result of a job: a `concurrent.futures.Future`, or a `LazyResult`."""

    def result(self) -> T_co:
        """Wait for the result; raise the job's error if it failed."""


class LazyResult(Generic[T]):
    """A job that runs once, in the thread that requests its result."""

    def __init__(self, job: Callable[[], T]) -> None:
        self._job: Callable[[], T] | None = job
        self._result: T

    def result(self) -> T:
        if self._job is not None:
            self._result = self._job()
            self._job = None
        return self._result


class Submit(Protocol):
    """Accepts a job: `LazyResult`, or the `submit` of a pool of threads."""

    def __call__(self, job: Callable[[], T], /) -> Result[T]:
        """Accept a job and return its future result."""


@contextmanager
def threads(count: int, name: str) -> Generator[ThreadPoolExecutor]:
    """Open a pool of threads; on exit, drop jobs that have not begun and wait for the others."""
    pool = ThreadPoolExecutor(count, name, *_on_device())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _on_device() -> tuple[Callable[[int], None], tuple[int]] | tuple[()]:
    """Return an initializer that sets this thread's GPU; new threads would use GPU 0."""
    if not torch.cuda.is_initialized():
        return ()
    return torch.cuda.set_device, (torch.cuda.current_device(),)


def in_order(jobs: Iterable[Callable[[], T]], submit: Submit, ahead: int) -> Generator[T]:
    """Yield the results of jobs in order, or raise their errors; run up to `ahead` more jobs."""
    pending: deque[Result[T]] = deque()
    for job in jobs:
        pending.append(submit(job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
