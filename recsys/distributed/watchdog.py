"""End a job whose ranks wait for one that is stopped, lost or stuck, and name that rank.

Each rank publishes a heartbeat every second. A rank is silent without one for `timeout` seconds;
a job is stalled if no `armed` rank makes progress. Then all ranks exit by `os._exit`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from recsys.distributed.ranks import Ranks

FINDING = "finding"  # key in the store: the finding that ends the job
WATCHED_RANKS = 8  # number of other ranks that each rank watches, unless a machine has more
DESCRIBED_RANKS = 8  # how many ranks a finding describes
LONGEST_JOIN = 30.0  # seconds that the end of a rank waits for a thread of its watchdog
PACKAGE_SOURCE = tuple(str(Path(__file__).parents[2] / name) for name in ("recsys", "embeddings"))


class Watchdog:
    """Watches the ranks of a job from threads beside the main one. Entering it is a collective."""

    def __init__(self, ranks: Ranks, timeout: float | None) -> None:
        self.ranks = ranks
        self.timeout = timeout or 0.0
        self.interval = min(1.0, self.timeout / 8)
        self._is_armed = False
        self._progress_count, self._last_event = 0, "start"
        self._exchanges = 0  # number of exchanges with the store
        self._beats = 0
        self._progress = Unchanged(2 * self.interval)
        self._backends: list[Any] = []
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if not self.timeout or self.ranks.world_size == 1:
            return self
        devices = {torch.device("cpu"), self.ranks.device}
        self._backends = [self.ranks.group._get_backend(device) for device in devices]
        store = dist.PrefixStore("watchdog", cast(Any, _get_default_store()).clone())
        self._publish(store)
        if self.ranks.is_first:
            store.set(FINDING, "")
        self.ranks.gather(None)  # a rank without a beat would look like a silent one
        for target, arguments in ((self._watch, (store,)), (self._watch_store, ())):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching and publish that this rank has ended, so that others expect no beats."""
        self._stopping.set()
        for thread in self._threads:
            # Limited, as the store itself may have stopped. Long enough for a busy machine: a
            # thread within a call of the store at the end of the interpreter aborts the process.
            thread.join(max(4 * self.interval, LONGEST_JOIN))
        self._threads.clear()
        self._backends.clear()

    def record_progress(self, event: str) -> None:
        """Record progress of the main thread; cheap enough for several calls a step."""
        self._progress_count += 1
        self._last_event = event

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Expect progress inside the block; blocks may be nested."""
        previous, self._is_armed = self._is_armed, True
        try:
            yield
        finally:
            self._is_armed = previous
            self._progress_count += 1  # its end is progress

    def _publish(self, store: dist.Store, ended: bool = False) -> Heartbeat:
        self._beats += 1
        collectives = sum(b._get_sequence_number_for_group() for b in self._backends)
        stalled_for = self._progress.look((self._is_armed, self._progress_count, collectives))
        beat = Heartbeat(
            number=self._beats,
            ended=ended,
            stalled_for=stalled_for if self._is_armed else 0.0,
            collectives=collectives,
            marks=self._progress_count,
            last_mark=self._last_event,
            place=main_thread_location(),
        )
        store.set(str(self.ranks.rank), json.dumps(asdict(beat)))
        return beat

    def _watch(self, store: dist.Store) -> None:
        """Exchange beats until this rank ends; the other thread detects a lost store."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        # The ranks before this one, so that a finding names all ranks of a lost machine.
        number = min(max(WATCHED_RANKS, self.ranks.local_world_size), world_size - 1)
        watched = [(rank - distance - 1) % world_size for distance in range(number)]
        unchanged = {peer: Unchanged(2 * self.interval) for peer in watched}
        try:
            while not self._stopping.wait(self.interval):
                local_beat = self._publish(store)
                *texts, finding_bytes = store.multi_get([*map(str, watched), FINDING])
                self._exchanges += 1
                beats = dict(zip(watched, map(Heartbeat.from_json, texts)))
                silence = {peer: unchanged[peer].look(beats[peer].number) for peer in watched}
                finding = finding_bytes.decode() or self._finding(store, local_beat, beats, silence)
                if finding:
                    self._end(finding)
            self._publish(store, ended=True)
        except RuntimeError:  # the connection is lost
            return

    def _finding(
        self,
        store: dist.Store,
        local_beat: Heartbeat,
        beats: dict[int, Heartbeat],
        silence: dict[int, float],
    ) -> str:
        """Return the finding that ends the job; empty if there is none."""
        silence = {rank: seconds for rank, seconds in silence.items() if not beats[rank].ended}
        finding = ""
        if any(seconds >= self.timeout for seconds in silence.values()):
            nearly = self.timeout - self.interval  # ranks of one machine fall silent one by one
            silent = {rank: beats[rank] for rank in silence if silence[rank] >= nearly}
            finding = silent_ranks(silent, self.timeout)
        elif local_beat.stalled_for >= self.timeout:
            texts = store.multi_get([str(rank) for rank in range(self.ranks.world_size)])
            beats = dict(enumerate(map(Heartbeat.from_json, texts)))
            nearly = self.timeout - 2 * self.interval  # published values may be as old as that
            if all(beat.ended or beat.stalled_for >= nearly for beat in beats.values()):
                finding = stalled_ranks(beats, self.timeout)
        return store.compare_set(FINDING, "", finding).decode() if finding else ""

    def _watch_store(self) -> None:
        """Detect that the store is silent; the other thread may then hang in a call to it."""
        silence, holder = Unchanged(2 * self.interval), "rank 0"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = f"the launcher on {os.environ.get('MASTER_ADDR')}"
        while not self._stopping.wait(self.interval):
            if silence.look(self._exchanges) >= self.timeout:
                description = f"{holder}, which holds the job's store, has stopped answering"
                self._end(f"{description} for {self.timeout:g} s")

    def _end(self, finding: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        rank = f"rank {self.ranks.rank}"
        sys.stderr.write(f"{rank}: {finding}. This job ends; the stacks of {rank} follow\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            raise RuntimeError(finding)
        except RuntimeError as error:  # torchrun's report shows its traceback
            get_error_handler().record_exception(error)
        # Other ranks read the finding within an interval; a launcher kills them when one exits.
        time.sleep(1.5 * self.interval)
        os._exit(1)


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, published by that rank."""

    number: int
    ended: bool
    stalled_for: float  # seconds without progress while progress is expected
    collectives: int  # number begun so far
    marks: int
    last_mark: str
    place: str  # source line of the main thread

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        return cls(**json.loads(text))

    def __str__(self) -> str:
        status = "ended" if self.ended else "last seen"
        return f"{status} after '{self.last_mark}', in {self.place}"


class Unchanged:
    """Measures how long a value has been the same, without the time that the job was suspended."""

    def __init__(self, longest_lapse: float) -> None:
        self.longest_lapse = longest_lapse
        self.value: object = None
        self.seconds = 0.0
        self.looked_at = time.monotonic()

    def look(self, value: object) -> float:
        """Return the seconds since `value` became its present value."""
        seconds = time.monotonic()
        lapse = min(seconds - self.looked_at, self.longest_lapse)
        self.seconds = self.seconds + lapse if value == self.value else 0.0
        self.value, self.looked_at = value, seconds
        return self.seconds


def silent_ranks(beats: dict[int, Heartbeat], timeout: float) -> str:
    """Describe the ranks that no longer publish heartbeats."""
    return f"{_rank_names(beats)} stopped answering for {timeout:g} s ({_states(beats)})"


def stalled_ranks(beats: dict[int, Heartbeat], timeout: float) -> str:
    """Describe the ranks that the others wait for: those that have begun the fewest collectives."""
    floor = min((beat.collectives, beat.marks) for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if (beat.collectives, beat.marks) == floor}
    finding = f"{_rank_names(behind)} made no progress for {timeout:g} s while the others wait"
    if len(behind) == len(beats):
        finding = (
            f"no rank has made progress for {timeout:g} s and none is behind the others: a "
            "collective or a device hangs"
        )
    return f"{finding} ({_states(behind)})"


def _rank_names(beats: dict[int, Heartbeat]) -> str:
    numbers = ", ".join(map(str, sorted(beats)))
    return f"rank {numbers} has" if len(beats) == 1 else f"ranks {numbers} have"


def _states(beats: dict[int, Heartbeat]) -> str:
    if len(beats) == 1:
        return str(next(iter(beats.values())))
    return "; ".join(f"rank {rank}: {beats[rank]}" for rank in sorted(beats)[:DESCRIBED_RANKS])


def main_thread_location() -> str:
    """Return `file:line function` of the main thread, and the caller in this product."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "its end"
    frames = (frame for frame, _ in traceback.walk_stack(innermost))
    callers = (frame for frame in frames if frame.f_code.co_filename.startswith(PACKAGE_SOURCE))
    location, caller = _source_line(innermost), next(callers, innermost)
    return location if caller is innermost else f"{location}, called from {_source_line(caller)}"


def _source_line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
