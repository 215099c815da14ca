"""Partitions of the training rows: Hive folders such as `train/date=2026-11-01/hour=05`.

Values are ordered as numbers, dates or text. A partition dated in the future would make all days
until then late, so it is refused, as are partitions whose order is not that of time.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import unquote

from recsys.checkpoint.partitions import RunState
from recsys.storage.location import Location, is_partition

SUCCESS = "_SUCCESS"
# Endings of names that writers use until a file or folder is whole.
UNFINISHED = ("_temporary", ".partial", ".tmp", ".inprogress", "._COPYING_", ".crdownload")
NULL = "__HIVE_DEFAULT_PARTITION__"  # the value of rows without one, as Hive writes it
# Clocks differ by time zone, and the day of a partition may be that of its end.
AHEAD = timedelta(days=1)
Key = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Partition:
    """A folder with training rows."""

    name: str  # path below `train/`

    @property
    def folder(self) -> str:
        return f"train/{self.name}"

    @property
    def key(self) -> Key:
        return sort_key(self.name)


def parse_levels(name: str) -> list[tuple[str, str]]:
    """Return the levels of a partition with their values, such as `date` and `2026-11-01`."""
    pairs = (segment.partition("=") for segment in name.split("/"))
    return [(level, unquote(value)) for level, _, value in pairs]


def sort_key(name: str) -> Key:
    """Return the sort key of a partition."""
    return tuple(_value_key(value) for _, value in parse_levels(name))


def bound_key(bound: str, like: Key) -> Key:
    """Return the sort key of a bound such as `2026-11-01/05`, of the types of key `like`."""
    keys = []
    for value, (kind, *_) in zip(_bound_values(bound), like):
        keys.append((1, 0, _padded(value)) if kind else _value_key(value))
    return tuple(keys)


def _bound_values(bound: str) -> list[str]:
    return [unquote(level.partition("=")[2] or level) for level in bound.split("/")]


def _value_key(value: str) -> tuple[int, int, str]:
    return (0, int(value), "") if value.isascii() and value.isdigit() else (1, 0, _padded(value))


def _padded(value: str) -> str:
    """Return a date such as 2026-9-1 with months and days of two digits, in the order of time."""
    is_date = re.fullmatch(r"[0-9]{4}(-[0-9]{1,2}){1,2}", value) is not None
    return re.sub(r"-(?=[0-9](-|$))", "-0", value) if is_date else value


def list_partitions(root: Location) -> list[Partition]:
    """Return all partitions in order.

    Files outside of them, equal values, and dates that begin with a day are ValueErrors.
    """
    train = root / "train"
    names = list(_leaves(train, ""))
    depth = max((name.count("/") for name in names), default=0)
    # A day's folder without hours yet is no partition.
    names = [name for name in names if name.count("/") == depth or (train / name).files(".parquet")]
    partitions = [Partition(name) for name in names]
    partitions.sort(key=lambda partition: partition.key)
    levels = [[level for level, _ in parse_levels(partition.name)] for partition in partitions]
    for partition, names in zip(partitions, levels):
        if re.search(r"=[0-9]{1,2}[-_.][0-9]{1,2}[-_.][0-9]{4}(/|$)", partition.name):
            raise ValueError(
                f"{train / partition.name}: the order of such dates is not that of time; name the "
                "folders by year, month and day, such as date=2026-11-01"
            )
        if names != levels[0]:
            raise ValueError(
                f"{train}: {partitions[0].name} and {partition.name} are of different levels; give "
                "all partitions the same"
            )
    for previous, following in pairwise(partitions):
        if previous.key == following.key:
            raise ValueError(
                f"{train}: {previous.name} and {following.name} are one value; merge them"
            )
    return partitions


def _leaves(train: Location, path: str) -> Iterator[str]:
    """Yield the paths of folders that hold no further level."""
    folder = train / path if path else train
    entries = _entries(folder) if folder.filesystem.isdir(folder.path) else {}
    names = [name for name in sorted(entries) if not name.startswith((".", "_"))]
    folders = {name for name in names if _is_folder(folder / name, entries[name])}
    levels = [name for name in names if name in folders and is_partition(name)]
    files = [name for name in names if name not in folders and name.endswith(".parquet")]
    if files and (levels or not path):
        raise ValueError(
            f"{folder}/{files[0]}: lies outside of a partition; move it to a folder such as "
            f"{folder}/date=2026-11-01"
        )
    if path and not levels:
        yield path
    for name in levels:
        yield from _leaves(train, f"{path}/{name}" if path else name)


def _is_folder(path: Location, entry: Mapping[str, Any]) -> bool:
    """Whether an entry is a folder or a link to one, even to one that is not there now."""
    is_other = entry["type"] not in ("directory", "file")
    return entry["type"] == "directory" or (is_other and not path.filesystem.isfile(path.path))


def unfinished_file(folder: Location) -> str | None:
    """Return the name of a file or folder that shows that a partition is being written."""
    return next((name for name in sorted(_entries(folder)) if name.endswith(UNFINISHED)), None)


def _entries(folder: Location) -> dict[str, dict[str, Any]]:
    """Return the filesystem's entries of the files and folders in a folder, by name."""
    try:
        entries = folder.filesystem.ls(folder.path, detail=True)
    except FileNotFoundError:  # removed after its parent was listed
        return {}
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}


def refused_partitions(
    partitions: Sequence[Partition], trained: Sequence[str], today: datetime
) -> dict[str, str]:
    """Return the partitions that cannot be trained on by their names, each with the reason."""
    forms = [_form(name) for name in trained or [partition.name for partition in partitions]]
    usual = max(forms, key=forms.count, default=())
    refused = {}
    for name in (p.name for p in partitions if p.name not in trained):
        begin = parse_date(name)
        if NULL in name:
            refused[name] = "has rows without a value for its level"
        elif _form(name) != usual:
            refused[name] = f"is no {'/'.join(usual)}, as the other partitions are"
        elif begin is not None and begin > today + AHEAD:
            days = (begin - today).days
            refused[name] = f"lies {days:,} days in the future; all days until then would be late"
    return refused


def parse_date(name: str) -> datetime | None:
    """Return the day in a name, such as `date=2026-11-01`, `20261101` or `year=2026/month=11`."""
    by_level = {level.lower(): value for level, value in parse_levels(name)}
    if "year" in by_level:
        fields = [by_level.get(level, "1").zfill(2) for level in ("year", "month", "day")]
        return _parsed("-".join(fields))
    return next(filter(None, map(_parsed, by_level.values())), None)


def require_order_of_time(where: object, partitions: Sequence[Partition]) -> None:
    """Refuse partitions whose names have dates in another order, as of country=de/date=2026-11-01.

    `partitions` are in order: the next ones of a country would be scored by later days of others.
    """
    dated = [(begin, p.name) for p in partitions if (begin := parse_date(p.name)) is not None]
    for (previous, name), (following, later_name) in pairwise(dated):
        if previous > following:
            raise ValueError(
                f"{where}: {name} comes before {later_name} in the order of folders, but later in "
                "time; make the date the first level, year before month before day"
            )


def require_files_in_order(files: Iterable[str]) -> None:
    """Refuse files whose numbers have another order than their names, as of part-10 and part-2."""
    names = list(dict.fromkeys(files))
    for name, by_number in zip(names, sorted(names, key=_with_numbers)):
        if name != by_number:
            raise ValueError(
                f"{name}: is read before {by_number}, and continual.order is time; write the "
                "numbers of files with leading zeros, or set continual.order shuffled"
            )


def _with_numbers(name: str) -> list[str | int]:
    segments = re.split("([0-9]+)", name)
    return [int(segment) if index % 2 else segment for index, segment in enumerate(segments)]


def _form(name: str) -> tuple[str, ...]:
    return tuple(_form_of_value(value) for _, value in parse_levels(name))


def _form_of_value(value: str) -> str:
    is_number = value.isascii() and value.isdigit()
    return "number" if is_number else "date" if _parsed(value) else "text"


def _differ_in_form(one: str, other: str) -> bool:
    """Whether the order of two values is not that of time, as of 2026-11 and 2026-11-01."""
    forms = _form_of_value(one), _form_of_value(other)
    if other != _padded(other):
        one, other = _padded(one), _padded(other)
    return forms[0] != forms[1] or (forms[0] == "date" and len(one) != len(other))


def _parsed(value: str) -> datetime | None:
    for date in (_padded(value), f"{_padded(value)}-01"):  # of a day or of a month
        with suppress(ValueError):
            return datetime.fromisoformat(date).replace(tzinfo=None)
    return None


@dataclass(frozen=True)
class PartitionRange:
    """Partitions to walk."""

    first: str | None = None  # value such as `2026-11-01` or `2026-11-01/05`; None: from the start
    last: str | None = None  # a value of fewer levels includes all partitions in it

    def check(self, partitions: Sequence[Partition]) -> None:
        """Refuse a bound that cannot be compared with these partitions."""
        example = partitions[0].name if partitions else ""
        values = [value for _, value in parse_levels(example)] if example else []
        for option, bound in (("from", self.first), ("until", self.last)):
            levels = [] if bound is None or not values else _bound_values(bound)
            if len(levels) > len(values) or any(map(_differ_in_form, levels, values)):
                raise ValueError(
                    f"--{option} {bound}: is not comparable with the partition {example}; write "
                    f"a value such as {'/'.join(values[: len(levels)])}"
                )

    def begins_after(self, key: Key) -> bool:
        bound = () if self.first is None else bound_key(self.first, key)
        return key[: len(bound)] < bound

    def ends_before(self, key: Key) -> bool:
        bound = () if self.last is None else bound_key(self.last, key)
        return key[: len(bound)] > bound

    def is_over(self, partitions: Sequence[Partition], state: RunState) -> bool:
        if self.last is None or state.last is None:
            return False
        newest = max(sort_key(trained.name) for trained in state.trained)
        bound = bound_key(self.last, newest)
        is_last = len(newest) == len(bound) and newest >= bound
        return is_last or any(self.ends_before(partition.key) for partition in partitions)


def next_partition(
    where: object,
    partitions: Sequence[Partition],
    state: RunState,
    span: PartitionRange,
    late: Literal["refuse", "train"] = "refuse",
) -> Partition | None:
    """Return the next partition to train on, or None; `late` decides about an older one."""
    trained = {partition.name for partition in state.trained}
    waiting = [partition for partition in partitions if partition.name not in trained]
    begun_name = "" if state.begun is None else state.begun.name
    newest = max(filter(None, [*trained, begun_name]), key=sort_key, default=None)
    run_range = PartitionRange(span.first if newest is None else state.first)
    waiting = [p for p in waiting if not run_range.begins_after(p.key)]
    older = [p for p in waiting if newest and p.key < sort_key(newest) and p.name != begun_name]
    if older and late == "refuse":
        raise ValueError(
            f"{where}/{older[0].name}: is older than {newest}, which is trained on already; train "
            "on it all the same, without scores, by --continual.late train, move its rows to the "
            "next partition or remove it, or start a new run in another --out"
        )
    waiting.sort(key=lambda p: (p.name != begun_name, p.key))  # a begun partition comes first
    waiting = [p for p in waiting if not span.ends_before(p.key)]
    if waiting and span.begins_after(waiting[0].key):
        raise ValueError(
            f"--from {span.first}: would leave out {waiting[0].name}, which could then never be "
            f"trained on; leave out --from, since the run goes on after {newest}"
        )
    return waiting[0] if waiting else None


def is_late(name: str, state: RunState) -> bool:
    """Return whether the model knows rows that are later in time than those of a partition."""
    return any(sort_key(name) < sort_key(trained.name) for trained in state.trained)


def check_complete(root: Location, partition: Partition, partitions: Sequence[Partition]) -> None:
    """Refuse a partition with an unfinished file, or without the _SUCCESS that others have."""
    folder = root / partition.folder
    if (name := unfinished_file(folder)) is not None:
        raise ValueError(
            f"{folder}/{name}: the partition is being written; wait until it is whole, or remove "
            "the file"
        )
    if (folder / SUCCESS).exists():
        return
    marked = (other.name for other in partitions if (root / other.folder / SUCCESS).exists())
    if (name := next(marked, None)) is not None:
        raise ValueError(
            f"{folder}: has no {SUCCESS}, as {name} has: it is not whole; wait for it, or "
            f"write {folder}/{SUCCESS}"
        )


def waiting_for(root: Location, partition: Partition, quiet_seconds: float | None) -> str | None:
    """Return what a partition lacks to be whole (_SUCCESS, or time without change), or None."""
    folder = root / partition.folder
    if (folder / SUCCESS).exists():
        return None
    if quiet_seconds is None:
        return f"{folder}/{SUCCESS} (or set --continual.quiet-seconds)"
    changed_at = _last_change(folder)
    is_quiet = changed_at is not None and time.time() - changed_at >= quiet_seconds
    if not is_quiet or unfinished_file(folder) is not None:
        return f"{quiet_seconds:g} seconds without a change of {folder}"
    return None


def _last_change(folder: Location) -> float | None:
    """Return when a file in a folder was changed or added, as seconds; None: it has none."""
    files = [entry["name"] for entry in _entries(folder).values() if entry["type"] != "directory"]
    if not files:
        return None
    # The time of a file may be that of its source, as `cp -p` writes it, not of its arrival.
    paths = [*files, folder.path] if folder.is_local else files
    try:
        return max(folder.filesystem.modified(path).timestamp() for path in paths)
    except FileNotFoundError:  # renamed or removed after it was listed
        return time.time()


def require_rows(root: Location, partition: Partition) -> None:
    """Refuse a partition without files."""
    folder = root / partition.folder
    if not folder.files(".parquet"):
        raise ValueError(f"{folder}: has no *.parquet files; write its rows, or remove the folder")
