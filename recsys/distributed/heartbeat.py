"""Heartbeats that the ranks of a job publish while it runs, and findings from them.

Each rank publishes a `Heartbeat` about once a second (`recsys.distributed.watchdog`) with the
progress and the source line of its main thread. The heartbeats of all ranks show which rank the
others wait for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

PLACES = 8  # how many ranks a finding describes
OWN_SOURCE = tuple(str(Path(__file__).parents[2] / part) for part in ("recsys", "embeddings"))


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, published by that rank."""

    number: int
    ended: bool
    stalled_for: float  # seconds without progress while progress is expected
    collectives: int  # number begun so far
    marks: int
    after: str  # the last mark
    place: str  # source line of the main thread

    def to_json(self) -> str:
        """Return the heartbeat as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        """Build the heartbeat from its JSON."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        """Describe the last state as text."""
        how = "ended" if self.ended else "last seen"
        return f"{how} after '{self.after}', in {self.place}"


class Unchanged:
    """Measures how long a value has been the same, counting only while this process was running.

    After a job is suspended as a whole and resumed, no rank counts as silent.
    """

    def __init__(self, longest_lapse: float) -> None:
        """Start at zero; `longest_lapse` limits the seconds counted between two looks."""
        self.longest_lapse = longest_lapse
        self.value: object = None
        self.seconds = 0.0
        self.looked = time.monotonic()

    def look(self, value: object) -> float:
        """Return the seconds since `value` became its present value."""
        now = time.monotonic()
        lapse = min(now - self.looked, self.longest_lapse)
        self.seconds = self.seconds + lapse if value == self.value else 0.0
        self.value, self.looked = value, now
        return self.seconds


def silent_ranks(beats: dict[int, Heartbeat], timeout: float) -> str:
    """Describe the ranks that no longer publish heartbeats."""
    return f"{_named(beats)} stopped answering for {timeout:g} s ({_described(beats)})"


def stalled_ranks(beats: dict[int, Heartbeat], timeout: float) -> str:
    """Describe the ranks that the others wait for, when no rank makes progress.

    Ranks begin the same collectives, so the others wait for the rank that has begun the fewest.
    Among ranks that have begun the same number, marks decide.
    """
    last = min((beat.collectives, beat.marks) for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if (beat.collectives, beat.marks) == last}
    if len(behind) == len(beats):
        return (
            f"no rank has made progress for {timeout:g} s and none is behind the others: a "
            f"collective or a device hangs ({_described(behind)})"
        )
    return (
        f"{_named(behind)} made no progress for {timeout:g} s while the others wait "
        f"({_described(behind)})"
    )


def _named(beats: dict[int, Heartbeat]) -> str:
    numbers = ", ".join(map(str, sorted(beats)))
    return f"rank {numbers} has" if len(beats) == 1 else f"ranks {numbers} have"


def _described(beats: dict[int, Heartbeat]) -> str:
    if len(beats) == 1:
        return str(next(iter(beats.values())))
    return "; ".join(f"rank {rank}: {beats[rank]}" for rank in sorted(beats)[:PLACES])


def place_of_main_thread() -> str:
    """Return `file:line function` of the main thread, and the caller in this product."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "its end"
    caller: FrameType | None = innermost
    while caller is not None and not caller.f_code.co_filename.startswith(OWN_SOURCE):
        caller = caller.f_back
    place = _place(innermost)
    return place if caller in (None, innermost) else f"{place}, called from {_place(caller)}"


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
