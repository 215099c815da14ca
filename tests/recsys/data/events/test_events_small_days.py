"""Days of small logs: files that come late, settings and calls that days cannot have."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.recsys.data.events.daily_logs import (
    DAY,
    DAYS,
    HOUR,
    SMALL,
    START,
    add_file,
    content_of,
    write_small,
)


def test_an_event_of_a_file_that_comes_late_counts_from_its_call_on(tmp_path: Path) -> None:
    config, out = write_small(tmp_path), tmp_path / "out"
    prepare_events(config, out, until=DAYS[0])
    add_file(tmp_path / "log" / "1.parquet", [("ann", 3, 2 * HOUR), ("ann", 4, 30 * HOUR)])
    add_file(tmp_path / "buys" / "1.parquet", [("ann", 4, 31 * HOUR), ("ann", 3, 3 * HOUR)])
    report = prepare_events(config, out, until=DAYS[2])
    rows = content_of(out)
    assert [row["item"] for row in rows["train/date=2026-09-21"]] == [1]
    # bob's row of the first evening, and ann's late one, whose label counts what came with it
    second = [(row["item"], row["viewed"], row["bought"]) for row in rows["train/date=2026-09-22"]]
    assert second == [(3, [1], 1.0), (2, [], 0.0), (4, [1, 3], 1.0)]
    assert report["days"] == {"2026-09-22": {"rows": 3, "positive": pytest.approx(2 / 3)}}


@pytest.mark.parametrize("rows", ["of a text file", "of a file", "chosen", "with a value"])
def test_files_of_a_later_day_may_have_no_rows(rows: str, tmp_path: Path) -> None:
    tables = {
        "view": {"path": "log", "columns": ["shop"], "where": {"shown": 1}},
        "buy": {"path": "buys"},
    }
    context = {"shop": {"kind": "id", "fill": 0}}
    config, folder = write_small(tmp_path, events=tables, context=context), tmp_path / "log"
    first = {"user": ["ann"], "item": [1], "time": [START], "shop": [7], "shown": [1]}
    pq.write_table(pa.table(first), folder / "0.parquet")
    prepare_events(config, tmp_path / "days", until=DAYS[0])
    second = {**first, "time": [START + DAY]}
    second |= {"shown": [0]} if rows == "chosen" else {"shop": pa.nulls(1)}
    if rows == "of a text file":
        (folder / "1.csv").write_text(",".join(first) + "\n")
    elif rows == "of a file":
        pq.ParquetWriter(folder / "1.parquet", pa.table(second).schema).close()
    else:
        pq.write_table(pa.table(second), folder / "1.parquet")
    prepare_events(config, tmp_path / "days", until=DAYS[1])
    prepare_events(config, tmp_path / "once", until=DAYS[1])
    assert content_of(tmp_path / "days") == content_of(tmp_path / "once")


def test_a_pattern_reads_the_files_of_its_folder(tmp_path: Path) -> None:
    folder = write_small(tmp_path)
    tables = {"view": {"path": "l*/*"}, "buy": {"path": "**/buys/[0-9]*.parquet"}}
    pattern = tmp_path / "pattern.yaml"
    pattern.write_text(yaml.safe_dump({**SMALL, "events": tables}))
    (tmp_path / "log" / "notes.txt").touch()
    (tmp_path / "log" / "_unfinished.parquet").touch()
    for number, day in enumerate(DAYS[:3]):
        add_file(tmp_path / "log" / f"{number + 1}.parquet", [("ann", number, number * DAY)])
        for config in (folder, pattern):
            prepare_events(config, tmp_path / config.stem, until=day)
    assert content_of(tmp_path / "pattern") == content_of(tmp_path / "events")


def test_actions_that_no_event_of_the_first_call_has_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {"bought": {"action": "byu", "within": "12h"}}
    config = write_small(tmp_path, labels=labels, histories={"viewed": {"actions": "veiw"}})
    for day in DAYS[:2]:
        prepare_events(config, tmp_path / "out", until=day)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        f"{setting}: no event has the action ['{name}']; the log has ['buy', 'view']"
        for setting, name in (("labels.bought.action", "byu"), ("histories.viewed.actions", "veiw"))
    ]


def test_a_day_that_is_prepared_is_not_prepared_again(tmp_path: Path) -> None:
    config, out = write_small(tmp_path), tmp_path / "out"
    report = prepare_events(config, out, until=DAYS[1])
    old_times = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    add_file(tmp_path / "log" / "1.parquet", [("ann", 3, 2 * HOUR)])
    for day in DAYS[:2]:
        assert prepare_events(config, out, until=day) == report
    assert old_times == {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}


def test_tables_of_ids_grow_when_their_free_rows_are_used_up(tmp_path: Path) -> None:
    config, out = write_small(tmp_path, vocabulary={"headroom": 1}), tmp_path / "out"
    sizes = []
    for number, day in enumerate(DAYS[:5]):
        rows = [("ann", 10 + 4 * number + item, 30 * HOUR) for item in range(4)]
        add_file(tmp_path / "log" / f"{number + 1}.parquet", rows)
        prepare_events(config, out, until=day)
        sizes.append(load_schema(Location.of(out)).columns["item"].num_embeddings)
    assert sizes == [5, 21, 21, 21, 45]  # of 2, 10, 14, 18 and 22 ids, one row for those unknown


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_items_without_events_are_drawn_alike_in_one_call_and_many(by: str, tmp_path: Path) -> None:
    config = write_small(
        tmp_path,
        items={"path": "items", "content": {"title": "text"}},
        labels={"bought": {"action": "view"}},
        negatives={"per_positive": 3, "by": by, "available_from": "published"},
        counts={"views": {"of": "item", "actions": "view"}},
    )
    (tmp_path / "items").mkdir()
    starts = {1: START + HOUR, 2: START + 20 * HOUR}  # of the first file's events
    for number, day in enumerate(DAYS[:5]):
        # Of each day's items one is there from the next day on, one from its first event on.
        begin, ids = START + number * DAY, [100 + 4 * number + item for item in range(4)]
        moments = [begin, begin, begin + DAY, None]
        table = {"id": ids, "title": ["a title"] * 4, "published": moments}
        pq.write_table(pa.table(table), tmp_path / "items" / f"{number}.parquet")
        starts |= {item: moment for item, moment in zip(ids, moments, strict=True) if moment}
        events = [
            (f"u{hour % 7}", 100 + hour % (4 * number + 4), number * DAY + hour * HOUR)
            for hour in range(0, 24, 3)
        ]
        add_file(tmp_path / "log" / f"{number + 1}.parquet", events)
        for _, item, second in events:
            starts[item] = min(START + second, starts.get(item, START + second))
        if number != 2:  # a call may make several days
            prepare_events(config, tmp_path / "calls", until=day)
    prepare_events(config, tmp_path / "once", until=DAYS[4])
    once = content_of(tmp_path / "once")
    assert content_of(tmp_path / "calls") == once
    train = [row for name, lines in once.items() if name.startswith("train") for row in lines]
    drawn = [row for row in train if row["sampled"]]
    assert all(row["time"] >= starts[row["item"]] * 10**6 for row in drawn)
    assert sum(row["views"] == 0 for row in drawn) > 10


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocabulary": {"min_count": {"item": 2}}}, "min_count is not for --until"),
        ({"drop": {"max_events_per_user": 9}}, "max_events_per_user is not for --until"),
        ({"negatives": {"per_positive": 600}}, "per_positive is over 512"),
        ({"drop": {"late_rows": "all"}}, "late_rows is all; write a duration"),
    ],
)
def test_settings_that_days_cannot_have_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        prepare_events(write_small(tmp_path, **changes), tmp_path / "out", until=DAYS[0])


def test_what_does_not_go_on_from_the_calls_before_is_refused(tmp_path: Path) -> None:
    config, out = write_small(tmp_path), tmp_path / "out"
    prepare_events(config, out, until=DAYS[0])
    with pytest.raises(ValueError, match="exists already; remove it"):
        prepare_events(config, out)
    with pytest.raises(ValueError, match="--until soon: no date"):
        prepare_events(config, out, until="soon")
    with pytest.raises(ValueError, match='`attribute` was "last" in the calls before, and is'):
        prepare_events(write_small(tmp_path, attribute="all"), out, until=DAYS[1])
    config = write_small(tmp_path)
    add_file(tmp_path / "log" / "0.parquet", [("ann", item, HOUR) for item in range(9000)])
    with pytest.raises(ValueError, match=r"0\.parquet: has .* bytes, and had .* when it was read"):
        prepare_events(config, out, until=DAYS[1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="exists already, without the state"):
        prepare_events(config, tmp_path / "other", until=DAYS[1])


def test_labels_in_another_order_are_refused_as_the_first_decides_what_is_positive(
    tmp_path: Path,
) -> None:
    config, labels = write_small(tmp_path), {"a": {"action": "buy"}, "b": {"action": "view"}}
    config.write_text(yaml.safe_dump({**SMALL, "labels": labels}))
    prepare_events(config, tmp_path / "out", until=DAYS[0])
    swapped = {name: labels[name] for name in ("b", "a")}
    other_settings = yaml.safe_dump({**SMALL, "labels": {}}).replace("labels: {}\n", "")
    config.write_text(other_settings + yaml.safe_dump({"labels": swapped}, sort_keys=False))
    with pytest.raises(ValueError, match=r'`labels` was {"a": .*, and is {"b": .* another order;'):
        prepare_events(config, tmp_path / "out", until=DAYS[1])


def test_days_do_not_go_on_by_hours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_events(write_small(tmp_path), out, until=DAYS[0])
    with pytest.raises(
        ValueError, match='`partition` was "day" in the calls before, and is "hour"'
    ):
        prepare_events(write_small(tmp_path, partition="hour"), out, until=DAYS[1])
