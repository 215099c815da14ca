"""Chooses the partition to train on next, and refuses what would break the order of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recsys.checkpoint.partitions import RunState
from recsys.storage.location import Location
from recsys.training.continual.partitions import (
    SUCCESS,
    Key,
    Partition,
    has_success,
    key_of,
    key_of_bound,
    seconds_quiet,
    unfinished_file,
)


@dataclass(frozen=True)
class PartitionRange:
    """Partitions to walk."""

    first: str | None = None  # value such as `2026-11-01` or `2026-11-01/05`; None: from the start
    last: str | None = None  # one of fewer levels takes all partitions in it

    def begins_after(self, key: Key) -> bool:
        bound = () if self.first is None else key_of_bound(self.first, key)
        return key[: len(bound)] < bound

    def ends_before(self, key: Key) -> bool:
        bound = () if self.last is None else key_of_bound(self.last, key)
        return key[: len(bound)] > bound

    def is_over(self, partitions: Sequence[Partition], state: RunState) -> bool:
        if self.last is None or state.last is None:
            return False
        newest = max(key_of(trained.name) for trained in state.trained)
        bound = key_of_bound(self.last, newest)
        is_last = len(newest) == len(bound) and newest >= bound
        return is_last or any(self.ends_before(partition.key) for partition in partitions)


def next_partition(
    where: object,
    partitions: Sequence[Partition],
    state: RunState,
    span: PartitionRange,
    late: Literal["refuse", "train"] = "refuse",
) -> Partition | None:
    """Return the partition to train on now; None if all of the span are trained.

    `late` is for partitions older than one that is trained or begun.

    Raises:
        ValueError: a partition is late and refused, or the span would leave one out.
    """
    trained = {partition.name for partition in state.trained}
    waiting = [partition for partition in partitions if partition.name not in trained]
    newest = newest_of(state)
    if newest is None:
        waiting = [p for p in waiting if not span.begins_after(p.key)]
        return next((p for p in waiting if not span.ends_before(p.key)), None)
    run_range = PartitionRange(state.first)
    waiting = [p for p in waiting if not run_range.begins_after(p.key)]
    begun_name = "" if state.begun is None else state.begun.name
    older = [p for p in waiting if p.key < key_of(newest) and p.name != begun_name]
    if older and late == "refuse":
        raise ValueError(
            f"{where}/{older[0].name}: is older than {newest}, which is trained on already; train "
            "on it all the same, without scores, by --continual.late train, move its rows to the "
            "next partition or remove it, or start a new run in another --out"
        )
    waiting.sort(key=lambda p: (p.name != begun_name, p.key))  # what is begun goes on first
    waiting = [p for p in waiting if not span.ends_before(p.key)]
    if waiting and span.begins_after(waiting[0].key):
        raise ValueError(
            f"--from {span.first}: would leave out {waiting[0].name}, which could then never be "
            f"trained on; leave out --from, since the run goes on after {newest}"
        )
    return waiting[0] if waiting else None


def newest_of(state: RunState) -> str | None:
    """Return the partition that is latest in time among those trained or begun."""
    unfinished = [] if state.begun is None else [state.begun]
    return max((p.name for p in (*state.trained, *unfinished)), key=key_of, default=None)


def is_late(name: str, state: RunState) -> bool:
    """Return whether the model knows rows that are later in time than those of a partition."""
    return any(key_of(name) < key_of(trained.name) for trained in state.trained)


def check_whole(root: Location, partition: Partition, partitions: Sequence[Partition]) -> None:
    """Refuse a partition with an unfinished file, or without the _SUCCESS that others have."""
    folder = root / partition.folder
    if (name := unfinished_file(root, partition)) is not None:
        raise ValueError(
            f"{folder}/{name}: the partition is being written; wait until it is whole, or remove "
            "the file"
        )
    if has_success(root, partition):
        return
    if (marked := next((p for p in partitions if has_success(root, p)), None)) is not None:
        raise ValueError(
            f"{folder}: has no {SUCCESS}, as {marked.name} has: it is not whole; wait for it, or "
            f"write {folder}/{SUCCESS}"
        )


def waiting_for(root: Location, partition: Partition, quiet_seconds: float | None) -> str | None:
    """Return what a partition lacks to be whole (_SUCCESS, or time without change), or None."""
    if has_success(root, partition):
        return None
    if quiet_seconds is None:
        return f"{root / partition.folder}/{SUCCESS} (or set --continual.quiet-seconds)"
    is_written = unfinished_file(root, partition) is not None
    if is_written or seconds_quiet(root, partition) < quiet_seconds:
        return f"{quiet_seconds:g} seconds without a change of {root / partition.folder}"
    return None


def require_rows(root: Location, partition: Partition) -> None:
    """Refuse a partition without files."""
    folder = root / partition.folder
    if not folder.files(".parquet"):
        raise ValueError(f"{folder}: has no *.parquet files; write its rows, or remove the folder")
