"""Datasets made of events against loops in plain Python, on logs that hypothesis makes."""

import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import write_datasets
from recsys.data.events.settings import EventsConfig
from recsys.data.events.sql import DuckDBEngine, SqlEngine
from tests.recsys.data.events import logs, oracle
from tests.recsys.data.events.logs import RECIPE_NOW, Row

ONCE = settings(
    max_examples=4,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # without shrinking, which costs minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LATEST = datetime.fromtimestamp(RECIPE_NOW / 1e6, UTC).isoformat()
COMMON: Row = {
    "drop": {"later_than": LATEST},
    "split": {"at": [0.5, 0.75]},
    "items": {"columns": {"brand": {"kind": "id"}, "cost": {"kind": "dense"}}},
    "users": {"columns": {"country": {"kind": "id", "fill": "none"}}},
    "histories": {
        "viewed": {
            "actions": "view",
            "length": 3,
            "parallel": {
                "viewed_age": "age",
                "viewed_brand": "brand",
                "viewed_price": {"column": "price", "scale": 5, "fill": -1},
            },
        },
        "all_past": {
            "length": 50,
            "delay": "2h",
            "parallel": {
                "past_action": "action",
                "past_dear": {"column": "price", "at_least": 3},
            },
        },
    },
    "counts": {
        "user_day": {"of": "user", "within": "1d"},
        "user_rate": {"of": "user", "actions": "buy", "per": "view", "delay": "1h"},
        "item_views": {"of": "item", "actions": "view", "within": "5h", "delay": "1h"},
        "brand_rate": {"of": ["user", "brand"], "actions": "buy", "per": "view"},
    },
    "vocabulary": {"min_count": {"user": 2, "item": 3}},
}
CASES: dict[str, Row] = {
    "impressions": {
        "labels": {
            "bought": {"action": "buy", "within": "2h"},
            "acted": {"action": ["buy", "view"], "within": "4h"},
        },
        "embargo": False,
        "context": {"day": "dense"},
        "drop": {"later_than": LATEST, "max_events_per_user": 35},
    },
    "ratings": {
        "labels": {
            "liked": {"column": "price", "at_least": 4},
            "bought": {"action": "buy"},
        },
        "split": {"by": "user", "at": [0.5, 0.75]},
        "drop": {"later_than": LATEST, "duplicates": False},
    },
    "views": {
        "labels": {"bought": {"action": "buy", "within": "1h"}},
        "rows": "view",
        "attribute": "all",
        "context": {"price": {"kind": "dense", "fill": 2}},
        "weight": {"column": "price", "fill": 0.5},
        "late": "day",
        "split": {"by": "windows", "windows": 2},
        "vocabulary": {"min_count": {"user": 2}},
    },
    # Each action is a row, and labels those before it.
    "again": {
        "labels": {"views_again": {"action": "view", "within": "2h"}},
        "split": {"by": "leave_last", "last": 2},
        "unripe": "keep",
        "weight": {"labels": {"views_again": 4}, "actions": {"buy": 3, "share": 0}, "fill": None},
        "late": ["price"],
    },
}
LATE = ("impressions", "views")  # cases of which events say when they arrived


OpenEngine = Callable[[Path], SqlEngine]


@pytest.mark.parametrize("case", CASES)
@ONCE
@given(data=st.data())
def test_a_dataset_is_what_loops_over_the_log_give(case: str, data: st.DataObject) -> None:
    compare(DuckDBEngine, case, data)


class ListsEngine(DuckDBEngine):
    """Has lists in stages, like Spark, and equal hashes of all rows."""

    hash = "same"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.scratch = None
        self._duckdb.execute("CREATE MACRO same(a, b, c, d, e) AS 0")


@ONCE
@given(data=st.data())
def test_with_lists_in_stages_and_equal_hashes_a_dataset_is_the_same(data: st.DataObject) -> None:
    compare(ListsEngine, "impressions", data)


@pytest.mark.long
@pytest.mark.parametrize("case", ["impressions", "views", "again"])  # each takes a minute
@settings(ONCE, max_examples=2)
@given(data=st.data())
def test_on_spark_a_dataset_is_what_loops_over_the_log_give(
    open_spark: OpenEngine, case: str, data: st.DataObject
) -> None:
    compare(open_spark, case, data)


def compare(open_engine: OpenEngine, case: str, data: st.DataObject) -> None:
    """Make a log and its dataset, and compare that with the loops."""
    wanted_impressions = case == "impressions"
    events = data.draw(logs.events(["view", "view", "buy", "share"]))
    shown = data.draw(logs.events(["impression"], 60)) if wanted_impressions else []
    items = data.draw(logs.snapshots(st.integers(0, 5)))
    users = data.draw(logs.snapshots(logs.users))
    form = data.draw(st.sampled_from(logs.FORMS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_case(folder, case, form, events, shown, items, users)
        check(open_engine, folder, config, [*events, *shown], items, users)


def write_case(
    folder: Path,
    case: str,
    form: str,
    events: list[Row],
    shown: list[Row],
    items: list[Row],
    users: list[Row],
) -> EventsConfig:
    """Write the files and return the settings; rows get the day of their file."""
    for table in (events, shown):
        for number, chunk in enumerate(logs.chunks(table, 2)):
            for row in chunk:
                row["day"] = number
    log = logs.write_events(folder, "log", events, form)
    content: Row = {**COMMON, **CASES[case]}
    content["events"] = {"log": {**log, "action": "type", "request": "request"}}
    if case in LATE:
        content["events"]["log"]["arrived"] = "arrived"
    if shown:
        table = logs.write_events(folder, "shown", shown, "us", files=1)
        content["impressions"] = {**table, "request": "request"}
        for row in shown:
            row["day"] = 0
    content["items"] = {
        **logs.write_snapshots(folder, "items", items, pa.int64()),
        **COMMON["items"],
        "content": {"title": "text"},
    }
    content["users"] = {
        **logs.write_snapshots(folder, "users", users, pa.string()),
        **COMMON["users"],
    }
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_events_config(folder / "events.yaml")


def check(
    open_engine: OpenEngine,
    folder: Path,
    config: EventsConfig,
    log: list[Row],
    items: list[Row],
    users: list[Row],
) -> None:
    for event in log:
        event["price"] = None if event["price"] != event["price"] else event["price"]
    for row in users:
        row["country"] = row["brand"]
    expected = oracle.datasets(config, log, items, users, RECIPE_NOW)
    assume(all(rows for dataset in expected.values() for rows in dataset.values()))
    engine = open_engine(folder / "stages")
    try:
        report = write_datasets(engine, config, folder / "out")
    finally:
        engine.close()
    tables = oracle.last_features(config, log, items, users, RECIPE_NOW)
    for dataset, splits in expected.items():
        out = folder / "out" / dataset
        for name, rows in tables.items():
            assert differences(read_rows(out / "features" / name), rows) == []
        for split, rows in splits.items():
            assert differences(read_rows(out / split), rows) == []
            counts = report["splits"][str(Path(dataset, split))]
            in_train = {row["item"] for row in splits["train"] if row.get("weight", 1) > 0}
            # Rows of weight 0 count for no item, and no figure of items counts them.
            unseen = [row["item"] not in in_train for row in rows if row.get("weight", 1) > 0]
            assert (counts["rows"], counts["unseen"]) == (len(rows), np.mean(unseen or [0]))
        ids = oracle.vocabulary(config, log, items, splits["train"], RECIPE_NOW)
        for name, values in ids.items():
            table = pq.read_table(out / "vocabulary" / f"{name}.parquet")
            assert table["id"].to_pylist() == values


def differences(actual: list[Row], expected: list[Row]) -> list[Any]:
    """Where rows differ, with both values: shorter to read than both lists."""
    if len(actual) != len(expected):
        return [len(actual), len(expected)]
    return [
        (row, name, actual_row.get(name), expected_row.get(name))
        for row, (actual_row, expected_row) in enumerate(zip(actual, expected, strict=True))
        for name in actual_row.keys() | expected_row.keys()
        if actual_row.get(name) != expected_row.get(name)
    ]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(file) for file in files(folder)]
    return pa.concat_tables(tables).to_pylist() if tables else []


def files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.parquet"))
