"""`recsys prepare events --follow SECONDS`: write partitions while new files arrive.

At each check with a new file, `prepare_days` runs up to the last day or hour that has ended. So a
killed command leaves no partial files, and the same command continues.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recsys.data.events.daily import NoEvents
from recsys.data.events.times import Calendar, now

Report = dict[str, Any]
logger = logging.getLogger(__name__)


def follow_files(
    calendar: Calendar,
    seconds: float,
    prepare: Callable[..., Report | None],  # `prepare_days` without its last arguments
    show: Callable[[Report], None],
    until: str | None = None,
) -> None:
    """Look for new files until SIGTERM, SIGINT, or the end of the period `until`."""
    if not seconds > 0:
        raise ValueError(f"--follow {seconds}: set seconds above 0")
    last = None if until is None else calendar.end_of(until)
    logger.info("looks for new files every %g seconds, until SIGTERM", seconds)
    with _stop_at_signals() as signals:
        while not signals:  # a library may swallow the exception that a signal raises
            is_over = last is not None and now() >= last
            period = until if is_over else calendar.last_ended(now())
            try:
                report = prepare(day=period, after_new_files=not is_over)
            except NoEvents:
                if is_over:
                    raise
                report = None  # events of the first files belong to a period that has not ended
            if report is not None:
                show(report)
            if is_over:
                return
            time.sleep(seconds)


@contextmanager
def _stop_at_signals() -> Iterator[list[int]]:
    """End the block without an error at SIGTERM and SIGINT.

    Yields a list that gets the first signal that arrives.
    """
    signals: list[int] = []  # no Event, as the interrupted code may hold the Event's lock

    def end(number: int, _: object) -> None:
        if not signals:
            signals.append(number)
            raise KeyboardInterrupt

    numbers = signal.SIGTERM, signal.SIGINT
    handlers = [signal.signal(number, end) for number in numbers]
    try:
        yield signals
    except BaseException:  # DuckDB and Spark turn KeyboardInterrupt into other errors
        if not signals:
            raise
        logger.info("asked to end; the same command goes on")
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
