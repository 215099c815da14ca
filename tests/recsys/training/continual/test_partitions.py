"""Partitions in order, the next one of a run, and what would break the order of time."""

import os
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from recsys.checkpoint.partitions import RunState, TrainedPartition
from recsys.storage.location import Location
from recsys.training.continual.partitions import (
    Partition,
    PartitionRange,
    check_complete,
    list_partitions,
    next_partition,
    parse_date,
    refused_partitions,
    require_files_in_order,
    require_order_of_time,
    waiting_for,
)

DAYS = [Partition(f"date=2025-11-{day:02}") for day in (1, 2, 3, 4)]
TODAY = datetime(2026, 11, 28, 7)
HOURS = [Partition(f"date=2025-11-0{day}/hour={hour}") for day in (1, 2) for hour in (5, 9, 10)]


def state(*names: str, unfinished: str | None = None, first: str | None = None) -> RunState:
    trained = tuple(TrainedPartition(f"date=2025-11-{name}", 1, "x") for name in names)
    current = None if unfinished is None else TrainedPartition(f"date=2025-11-{unfinished}", 1, "x")
    return RunState(trained, current, first=first)


def folder_with(root: Path, *names: str) -> Location:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return Location.of(root)


def test_partitions_are_ordered_by_their_values_numbers_as_numbers(tmp_path: Path) -> None:
    names = [f"train/{partition.name}/part-0.parquet" for partition in reversed(HOURS)]
    root = folder_with(tmp_path, *names, "train/_SUCCESS", "train/.hidden=1/a.parquet")
    assert list_partitions(root) == HOURS


def test_dates_of_single_digits_are_in_the_order_of_time(tmp_path: Path) -> None:
    """As text, October came before September, whose days were scored by a model that knew it."""
    names = [f"day={day}" for day in ("2025-9-9", "2025-9-30", "2025-10-1", "2025-10-10")]
    root = folder_with(tmp_path, *[f"train/{name}/a.parquet" for name in names])
    partitions = list_partitions(root)
    assert [partition.name for partition in partitions] == names
    assert not refused_partitions(partitions, names[:1], TODAY)
    span = PartitionRange("2025-9-30", "2025-10-1")
    span.check(partitions)
    assert next_partition("train", partitions, RunState(), span) == Partition(names[1])
    assert [span.ends_before(partition.key) for partition in partitions] == [False] * 3 + [True]


def test_links_to_folders_and_files_are_read_like_these(tmp_path: Path) -> None:
    """A linked day was passed over, and one of linked files never quiet."""
    root = folder_with(tmp_path, "stored/date=2/a.parquet", "train/date=1/_SUCCESS")
    (tmp_path / "train" / "date=2").symlink_to(tmp_path / "stored" / "date=2")
    (tmp_path / "train" / "date=1" / "a.parquet").symlink_to("../../stored/date=2/a.parquet")
    (tmp_path / "train" / "date=1" / "_SUCCESS").unlink()
    (tmp_path / "train" / "date=3").symlink_to(tmp_path / "stored" / "date=3")  # not there now
    assert [partition.name for partition in list_partitions(root)] == ["date=1", "date=2", "date=3"]
    assert waiting_for(root, Partition("date=1"), 0.0) is None


def test_a_day_whose_hours_have_not_come_yet_is_no_partition(tmp_path: Path) -> None:
    root = folder_with(tmp_path, "train/date=1/hour=23/a.parquet", "train/date=2/_SUCCESS")
    assert list_partitions(root) == [Partition("date=1/hour=23")]


@pytest.mark.parametrize(
    ("names", "is_in_order"),
    [
        (["date=2025-11-02/country=de", "date=2025-11-02/country=us"], True),
        (["country=de/date=2025-11-02", "country=us/date=2025-11-01"], False),
        (["month=1/year=2026", "month=12/year=2025"], False),
        (["year=2025/month=9/day=30", "year=2025/month=10/day=1"], True),
        (["batch=9", "batch=10"], True),
    ],
)
def test_folders_whose_order_is_not_that_of_their_dates_are_refused(
    names: list[str], is_in_order: bool
) -> None:
    """Days of one country were scored by a model that knew later days of another."""
    with nullcontext() if is_in_order else pytest.raises(ValueError, match=rf"{names[0]} comes"):
        require_order_of_time("train", [Partition(name) for name in names])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["date=1/a.parquet", "date=1/hour=2/a.parquet"], r"date=1/a\.parquet: lies outside"),
        (["hour=5/a.parquet", "hour=05/a.parquet"], "one value"),
        (["date=01-12-2026/a.parquet", "date=02-11-2026/a.parquet"], r"01-12-2026: the order"),
    ],
)
def test_folders_without_one_order_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    root = folder_with(tmp_path, *[f"train/{name}" for name in names])
    with pytest.raises(ValueError, match=message):
        list_partitions(root)


def test_files_that_are_read_in_another_order_than_their_numbers_are_refused() -> None:
    require_files_in_order(["date=1/a-02", "date=1/a-02", "date=1/a-10", "date=1/b"])
    with pytest.raises(ValueError, match=r"a-10: is read before date=1/a-2.*leading zeros"):
        require_files_in_order(["date=1/a-1", "date=1/a-10", "date=1/a-2"])


@pytest.mark.parametrize(
    ("progress", "span", "expected"),
    [
        (state(), PartitionRange(), "01"),
        (state(), PartitionRange("2025-11-02"), "02"),
        (state(), PartitionRange(None, "2025-10-31"), None),
        (state("01", "02"), PartitionRange(), "03"),
        (state("02", first="2025-11-02"), PartitionRange(), "03"),  # not "01"
        (state("01", "02"), PartitionRange(None, "2025-11-02"), None),
        (state("01", unfinished="02"), PartitionRange(), "02"),
        (state("01", "02", "03", "04"), PartitionRange(), None),
    ],
)
def test_the_next_partition_follows_the_last_one(
    progress: RunState, span: PartitionRange, expected: str | None
) -> None:
    actual = next_partition("train", DAYS, progress, span)
    assert actual == (None if expected is None else Partition(f"date=2025-11-{expected}"))


def test_a_bound_of_one_level_takes_all_partitions_in_it() -> None:
    one = PartitionRange("2025-11-01/9", "2025-11-01")
    assert next_partition("train", HOURS, RunState(), one) == HOURS[1]
    trained = RunState(
        tuple(TrainedPartition(partition.name, 1, "x") for partition in HOURS[1:3]), first=one.first
    )
    assert next_partition("train", HOURS, trained, one) is None
    assert one.is_over(HOURS, trained) and not one.is_over(HOURS[:3], trained)


@pytest.mark.parametrize(
    ("bound", "partition"),
    [
        ("20251102", "date=2025-11-01"),
        ("2025-11-2", "date=2025-11-01"),
        ("2025-11", "date=2025-11-01"),
        ("2025-11-02/05", "date=2025-11-01"),
        ("2025-11-02", "date=20251101"),
        ("2025-11-02", "year=2025/month=11/day=1"),
    ],
)
def test_a_bound_of_another_form_than_the_partitions_is_refused(bound: str, partition: str) -> None:
    """All partitions were before it, so that `--until` ended nowhere."""
    for option, span in (("from", PartitionRange(bound)), ("until", PartitionRange(None, bound))):
        with pytest.raises(ValueError, match=f"--{option} {bound}: .*{partition}"):
            span.check([Partition(partition)])
    PartitionRange("2025/9", "year=2025").check([Partition("year=2025/month=11/day=1")])
    PartitionRange("2025-10-30", "date=2025-12-01").check([Partition("date=2025-11-01")])


@pytest.mark.parametrize(
    ("progress", "span", "expected"),
    [
        (state("02", "03"), PartitionRange(), "01"),
        (state("02", "03", "01"), PartitionRange(), "04"),
        (state("02", unfinished="03"), PartitionRange(), "03"),  # goes on first
        (state("03", unfinished="01"), PartitionRange(), "01"),
        (state("02", "04", first="2025-11-02"), PartitionRange(), "03"),
        (state("03", "01", "02"), PartitionRange(None, "2025-11-03"), None),
    ],
)
def test_late_partitions_come_next_where_that_is_asked(
    progress: RunState, span: PartitionRange, expected: str | None
) -> None:
    actual = next_partition("train", DAYS, progress, span, late="train")
    assert actual == (None if expected is None else Partition(f"date=2025-11-{expected}"))


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("date=2026-11-01", datetime(2026, 11, 1)),
        ("ds=2026-11-01T05%3A30%3A00", datetime(2026, 11, 1, 5, 30)),
        ("day=20261101", datetime(2026, 11, 1)),
        ("month=2026-11", datetime(2026, 11, 1)),
        ("year=2026/month=2/day=03", datetime(2026, 2, 3)),
        ("batch=17", None),
        ("date=2026-13-01", None),
    ],
)
def test_the_begin_of_a_partition_is_the_date_in_its_name(
    name: str, begin: datetime | None
) -> None:
    assert parse_date(name) == begin


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("date=2026-11-29", None),  # tomorrow has begun in another time zone
        ("date=2026-11-30", "1 days in the future"),
        ("date=2062-11-01", "13,121 days in the future"),
        ("date=__HIVE_DEFAULT_PARTITION__", "without a value"),
        ("date=2026-13-01", "is no date"),
        ("date=20261101", "is no date"),
    ],
)
@pytest.mark.parametrize("trained", [[], ["date=2026-11-05", "date=2026-11-06"]])
def test_partitions_that_would_block_all_later_ones_are_refused(
    name: str, reason: str | None, trained: list[str]
) -> None:
    usual = ["date=2026-11-07", "date=2026-11-08"] * (not trained)
    actual = refused_partitions(
        [Partition(partition) for partition in [name, *usual]], trained, TODAY
    )
    assert list(actual) == ([] if reason is None else [name])
    assert reason is None or reason in actual[name]


@pytest.mark.parametrize("names", [["batch=1", "batch=1000000"], ["part=a", "part=b"]])
def test_partitions_of_numbers_or_words_have_no_date(names: list[str]) -> None:
    assert not refused_partitions([Partition(name) for name in names], [], TODAY)


@pytest.mark.parametrize("name", ["_temporary/0/a.parquet", "part-1.parquet.tmp"])
def test_a_partition_that_is_being_written_is_refused(tmp_path: Path, name: str) -> None:
    location = f"train/{DAYS[0].name}"
    root = folder_with(tmp_path, f"{location}/part-0.parquet")
    check_complete(root, DAYS[0], DAYS[:1])
    folder_with(tmp_path, f"{location}/{name}")
    with pytest.raises(ValueError, match=r"11-01/.*being written"):
        check_complete(root, DAYS[0], DAYS[:1])


def test_a_followed_partition_is_whole_with_its_mark_or_after_a_quiet_time(tmp_path: Path) -> None:
    root = folder_with(tmp_path, f"train/{DAYS[0].name}/part-0.parquet")
    assert "_SUCCESS" in (waiting_for(root, DAYS[0], None) or "")
    assert "3600 seconds" in (waiting_for(root, DAYS[0], 3600.0) or "")
    assert waiting_for(root, DAYS[0], 0.0) is None
    folder_with(tmp_path, f"train/{DAYS[0].name}/part-1.parquet.tmp")
    assert waiting_for(root, DAYS[0], 0.0) is not None
    folder_with(tmp_path, f"train/{DAYS[0].name}/_SUCCESS")
    assert waiting_for(root, DAYS[0], None) is None


def test_a_copy_that_keeps_old_times_of_files_is_not_quiet_at_once(tmp_path: Path) -> None:
    root, name = folder_with(tmp_path, f"train/{DAYS[0].name}/part-0.parquet"), DAYS[0].name
    os.utime(tmp_path / "train" / name / "part-0.parquet", (0, 0))
    assert waiting_for(root, DAYS[0], 3600.0) is not None  # part-1 may be on its way
    os.utime(tmp_path / "train" / name, (0, 0))
    assert waiting_for(root, DAYS[0], 3600.0) is None


@pytest.mark.parametrize("renamed", [DAYS[0].name, f"{DAYS[0].name}/part-0.parquet.tmp"])
def test_what_is_renamed_while_it_is_listed_is_a_change(
    renamed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_with(tmp_path, f"train/{DAYS[0].name}/part-0.parquet.tmp")
    location, list_folder = tmp_path / "train" / renamed, LocalFileSystem.ls

    def list_then_rename(self: LocalFileSystem, path: str, **options: Any) -> Any:
        entries = list_folder(self, path, **options)
        if path == str(location.parent) and location.exists():
            location.rename(location.with_suffix(".whole"))
        return entries

    monkeypatch.setattr(LocalFileSystem, "ls", list_then_rename)
    if location.is_dir():
        list_partitions(root)
    assert waiting_for(root, DAYS[0], 3600.0) is not None
