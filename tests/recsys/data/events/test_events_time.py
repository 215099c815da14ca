"""What a row of a log knows of time: labels, cuts, clocks, and content, by logs of a few lines."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.events.samples import quantiles
from recsys.data.events.sql import open_engine

DAY = 86_400
START = 1_790_000_000
SPLITS = ("train", "valid", "test")


def prepare(folder: Path, events: dict[str, list[Any]], **options: Any) -> dict[str, Any]:
    """The dataset of one log by split, with the counts of rows left out."""
    pq.write_table(pa.table(events), folder / "log.parquet")
    table = {"path": "log.parquet", **options.pop("table", {})}
    if "action" in events:
        table["action"] = "action"
    content = {"events": {"view": table}, **options}
    (folder / "events.yaml").write_text(options.pop("text", None) or yaml.safe_dump(content))
    out = folder / "out"
    prepare_events(folder / "events.yaml", out)
    report = json.loads((out / "report.json").read_text())
    return {
        **{split: pq.read_table(out / split).to_pylist() for split in SPLITS},
        "left_out": report["left_out"],
    }


def labels(dataset: dict[str, Any], name: str) -> dict[int, list[float]]:
    """Labels by second after START."""
    by_time: dict[int, list[float]] = {}
    for split in SPLITS:
        for row in dataset[split]:
            by_time.setdefault(row["time"] // 10**6 - START, []).append(row[name])
    return by_time


def log(*rows: tuple[int, str]) -> dict[str, list[Any]]:
    """Actions of one user on one item by second, among those of others before and after."""
    filler = [(-3 * DAY + n, "view") for n in range(3)] + [(30 * DAY + n, "view") for n in range(3)]
    events = [(*row, 0) for row in rows] + [(*row, 1 + n) for n, row in enumerate(filler)]
    return {
        "user": [user for *_, user in events],
        "item": [0] * len(events),
        "time": [START + second for second, *_ in events],
        "action": [action for _, action, _ in events],
    }


def daily(days: int) -> dict[str, list[Any]]:
    """A view a day of user 0, each followed by a purchase after a day and a half."""
    views = [(START + day * DAY, "view", day) for day in range(days)]
    buys = [(START + day * DAY + DAY + DAY // 2, "buy", day) for day in range(days - 2)]
    times, actions, items = zip(*views, *buys, strict=True)
    return {"user": [0] * len(times), "item": items, "time": times, "action": actions}


def test_rows_whose_labels_are_decided_after_the_log_are_left_out(tmp_path: Path) -> None:
    options = {"labels": {"bought": {"action": "buy", "within": "2d"}}, "rows": "view"}
    dataset = prepare(tmp_path, daily(20), embargo=False, **options)
    # The log ends with the view of day 19: the last ripe view is that of day 17.
    assert labels(dataset, "bought") == {day * DAY: [1] for day in range(18)}
    assert dataset["left_out"] == {"unripe: `within` ends after the log": 2}


CUTS: dict[str, dict[str, Any]] = {
    "time": {"by": "time", "at": [11 / 19, 15 / 19]},
    "dates": {"by": "dates", "at": [f"{START + n * DAY}" for n in (12, 16)]},
    "user": {"by": "user", "at": [11 / 19, 15 / 19]},
    "leave_last": {"by": "leave_last", "last": 4},
}


@pytest.mark.parametrize("by", CUTS)
def test_rows_whose_labels_are_decided_after_the_next_split_begins_are_left_out(
    by: str, tmp_path: Path
) -> None:
    split = dict(CUTS[by])
    if by == "dates":
        split["at"] = [
            datetime.fromtimestamp(int(end), ZoneInfo("UTC")).isoformat() for end in split["at"]
        ]
    options = {"labels": {"bought": {"action": "buy", "within": "2d"}}, "rows": "view"}
    dataset = prepare(tmp_path, daily(20), split=split, unripe="keep", **options)
    days = {s: [(row["time"] // 10**6 - START) // DAY for row in dataset[s]] for s in SPLITS}
    # Rows of days 0 to 11 are train, to 15 valid. What follows begins at days 12 and 16, and by
    # time a split ends with its last row.
    assert days == {"train": [*range(10)], "valid": [12, 13], "test": [16, 17, 18, 19]}
    assert dataset["left_out"] == {
        "embargo: label of train decided after valid begins": 2,
        "embargo: label of valid decided after test begins": 2,
    }


def test_the_last_rows_of_each_user_are_test_and_those_before_them_valid(tmp_path: Path) -> None:
    users = [0] * 5 + [1] * 3 + [2] * 2 + [3]
    events = {"user": users, "item": [*range(11)], "time": [START + n for n in range(11)]}
    events["time"][3] = events["time"][4]  # a moment is cut in two, by the order of the log
    options = {"labels": {"viewed": {"action": "view"}}, "split": {"by": "leave_last"}}
    dataset = prepare(tmp_path, events, **options)
    items = {split: sorted(row["item"] for row in dataset[split]) for split in SPLITS}
    # A user's first row is for training, and test comes before valid.
    assert items == {"train": [0, 1, 2, 5, 8, 10], "valid": [3, 6], "test": [4, 7, 9]}


def test_a_label_is_1_from_the_limit_on_in_numbers_of_any_width(tmp_path: Path) -> None:
    ratio = pa.array([0.6, 0.7, 0.8] * 5, pa.float32())
    events = {"user": [0] * 15, "item": [0] * 15, "time": list(range(START, START + 15))}
    options = {"table": {"columns": ["ratio"]}, "split": {"by": "time", "at": [0.4, 0.7]}}
    events["ratio"] = ratio
    rows = prepare(
        tmp_path, events, labels={"liked": {"column": "ratio", "at_least": 0.7}}, **options
    )
    assert [row["liked"] for split in SPLITS for row in rows[split]] == [0, 1, 1] * 5


def test_rows_after_the_end_of_test_are_counted(tmp_path: Path) -> None:
    events = {"user": [0] * 11, "item": [0] * 11, "time": [START + n for n in range(11)]}
    options = {"labels": {"viewed": {"action": "view"}}, "split": {"at": [0.4, 0.6, 0.8]}}
    dataset = prepare(tmp_path, events, **options)
    assert [len(dataset[split]) for split in SPLITS] == [5, 2, 2]
    assert dataset["left_out"] == {"after the end of test": 2}


def test_items_have_the_content_that_the_last_training_row_could_know(tmp_path: Path) -> None:
    skus = pa.table(
        {
            "sku": [0, 0, 0, 1, 1],
            "since": [START, START + 5, START + 11, START + 12, START + 14],
            "title": ["old", "of training", "too late", "first", "second"],
        }
    )
    pq.write_table(skus, tmp_path / "skus.parquet")
    events = {"user": [0] * 20, "item": [0] * 20, "time": [START + n for n in range(20)]}
    items = {
        "path": "skus.parquet",
        "id": "sku",
        "valid_from": "since",
        "content": {"title": "text"},
    }
    options = {
        "labels": {"viewed": {"action": "view"}},
        "split": {"at": [0.5, 0.8]},
        "items": items,
    }
    prepare(tmp_path, events, **options)
    assert pq.read_table(tmp_path / "out" / "items").to_pylist() == [
        {"item": 0, "title": "of training"},
        {"item": 1, "title": "first"},
    ]


def test_dates_of_a_split_are_in_the_time_zone_of_the_tables(tmp_path: Path) -> None:
    begin = int(datetime(2026, 3, 1, tzinfo=ZoneInfo("Asia/Tokyo")).timestamp())
    hours = [begin + 3600 * hour for hour in range(24 * 3)]
    events = {"user": [0] * 72, "item": [0] * 72, "time": hours}
    # Without quotes, as YAML reads dates by itself.
    text = """
        events: {view: {path: log.parquet, time_zone: Asia/Tokyo}}
        labels: {viewed: {action: view}}
        split: {by: dates, at: [2026-03-02, 2026-03-03]}
        drop: {later_than: 2026-04-01}
    """
    dataset = prepare(tmp_path, events, text=text)
    assert [len(dataset[split]) for split in SPLITS] == [24, 24, 24]


@pytest.mark.parametrize(("read_as", "true_unit"), [("ms", "s"), ("us", "ms")])
def test_times_in_1970_are_refused_with_the_unit_that_fits(
    read_as: str, true_unit: str, tmp_path: Path
) -> None:
    factor = {"s": 1, "ms": 1000}[true_unit]
    events = {"user": [0] * 9, "item": [0] * 9, "time": [(START + n) * factor for n in range(9)]}
    options = {"labels": {"viewed": {"action": "view"}}, "table": {"time_unit": read_as}}
    with pytest.raises(ValueError, match=f"view: .* 1970 .* time_unit: {true_unit}"):
        prepare(tmp_path, events, **options)


@pytest.mark.parametrize("spread", [1, 40, 10**6, 10**15])
def test_splits_end_at_the_exact_quantiles_of_times(spread: int, tmp_path: Path) -> None:
    times = np.random.default_rng(spread).integers(-spread, spread, 5000)
    shares = [0.0, 0.1, 0.8, 0.9, 0.9001, 1.0]
    expected = np.quantile(times, shares, method="lower")
    with open_engine(tmp_path, threads=1) as engine:
        engine.view("rows", f"SELECT unnest({times.tolist()}) AS ts")
        assert quantiles(engine, shares) == [str(time) for time in expected]
