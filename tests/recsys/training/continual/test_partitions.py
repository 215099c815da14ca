"""Partitions in order, the next one of a run, and what would break the order of time."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys.checkpoint.partitions.state import RunState, Trained
from recsys.data.filesystem import Location
from recsys.training.continual.partitions import Partition, list_partitions
from recsys.training.continual.queue import Span, awaited, check_whole, next_partition

DAYS = [Partition(f"date=2026-11-{day:02}") for day in (1, 2, 3, 4)]
HOURS = [Partition(f"date=2026-11-0{day}/hour={hour}") for day in (1, 2) for hour in (5, 9, 10)]


def state(*names: str, begun: str | None = None) -> RunState:
    trained = tuple(Trained(f"date=2026-11-{name}", 1, "x") for name in names)
    return RunState(trained, None if begun is None else Trained(f"date=2026-11-{begun}", 1, "x"))


def folder_with(root: Path, *names: str) -> Location:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return Location.of(root)


def test_partitions_are_ordered_by_their_values_numbers_as_numbers(tmp_path: Path) -> None:
    names = [f"train/{each.name}/part-0.parquet" for each in reversed(HOURS)]
    root = folder_with(tmp_path, *names, "train/_SUCCESS", "train/.hidden=1/a.parquet")
    assert list_partitions(root) == HOURS


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.parquet", "date=1/a.parquet"], r"a\.parquet: lies outside"),
        (["date=1/a.parquet", "date=1/hour=2/a.parquet"], r"date=1/a\.parquet: lies outside"),
        (["date=1/a.parquet", "date=2/hour=2/a.parquet"], "different levels"),
        (["date=1/a.parquet", "day=2/a.parquet"], "different levels"),
        (["hour=5/a.parquet", "hour=05/a.parquet"], "one value"),
    ],
)
def test_folders_without_one_order_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    root = folder_with(tmp_path, *[f"train/{name}" for name in names])
    with pytest.raises(ValueError, match=message):
        list_partitions(root)


@pytest.mark.parametrize(
    ("done", "span", "expected"),
    [
        (state(), Span(), "01"),
        (state(), Span("2026-11-02"), "02"),
        (state(), Span("date=2026-11-02"), "02"),
        (state(), Span(None, "2026-10-31"), None),
        (state("01", "02"), Span(), "03"),
        (state("02"), Span(), "03"),  # what lies before the first is not of this run
        (state("01", "02"), Span("2026-11-03"), "03"),
        (state("01", "02"), Span(None, "2026-11-02"), None),
        (state("01", begun="02"), Span(), "02"),
        (state("01", "02", "03", "04"), Span(), None),
    ],
)
def test_the_next_partition_follows_the_last_one(
    done: RunState, span: Span, expected: str | None
) -> None:
    found = next_partition("train", DAYS, done, span)
    assert found == (None if expected is None else Partition(f"date=2026-11-{expected}"))


def test_a_bound_of_one_level_takes_all_partitions_in_it() -> None:
    one = Span("2026-11-01/9", "2026-11-01")
    assert next_partition("train", HOURS, RunState(), one) == HOURS[1]
    trained = RunState(tuple(Trained(each.name, 1, "x") for each in HOURS[1:3]))
    assert next_partition("train", HOURS, trained, one) is None
    assert one.is_over(HOURS, trained) and not one.is_over(HOURS[:3], trained)


@pytest.mark.parametrize("done", [state("01", "03"), state("01", begun="03")])
def test_a_partition_older_than_a_trained_one_is_refused(done: RunState) -> None:
    with pytest.raises(ValueError, match=r"2026-11-02: is older than date=2026-11-03"):
        next_partition("train", DAYS, done, Span())


def test_a_span_may_not_leave_out_partitions() -> None:
    with pytest.raises(ValueError, match=r"--from 2026-11-04: .*2026-11-03"):
        next_partition("train", DAYS, state("01", "02"), Span("2026-11-04"))


@pytest.mark.parametrize("name", ["_temporary/0/a.parquet", "part-1.parquet.tmp", ".a.inprogress"])
def test_a_partition_that_is_being_written_is_refused(tmp_path: Path, name: str) -> None:
    place = f"train/{DAYS[0].name}"
    root = folder_with(tmp_path, f"{place}/part-0.parquet")
    check_whole(root, DAYS[0], DAYS[:1])
    folder_with(tmp_path, f"{place}/{name}")
    with pytest.raises(ValueError, match=r"11-01/.*being written"):
        check_whole(root, DAYS[0], DAYS[:1])


def test_a_partition_needs_the_mark_that_others_have(tmp_path: Path) -> None:
    names = [f"train/{DAYS[0].name}/_SUCCESS", f"train/{DAYS[1].name}/part-0.parquet"]
    root = folder_with(tmp_path, *names)
    check_whole(root, DAYS[0], DAYS[:2])
    with pytest.raises(ValueError, match=r"11-02: has no _SUCCESS"):
        check_whole(root, DAYS[1], DAYS[:2])


def test_a_followed_partition_is_whole_with_its_mark_or_after_a_quiet_time(tmp_path: Path) -> None:
    root = folder_with(tmp_path, f"train/{DAYS[0].name}/part-0.parquet")
    assert "_SUCCESS" in (awaited(root, DAYS[0], None) or "")
    assert "3600 seconds" in (awaited(root, DAYS[0], 3600.0) or "")
    assert awaited(root, DAYS[0], 0.0) is None
    folder_with(tmp_path, f"train/{DAYS[0].name}/part-1.parquet.tmp")
    assert awaited(root, DAYS[0], 0.0) is not None
    folder_with(tmp_path, f"train/{DAYS[0].name}/_SUCCESS")
    assert awaited(root, DAYS[0], None) is None
