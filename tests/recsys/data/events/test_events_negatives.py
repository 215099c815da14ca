"""Drawn negatives, and forms of input and output that the oracle does not have."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import make_samples, prepare_events
from recsys.data.events.sql import DuckDBEngine, SqlEngine
from recsys.data.item_frequency import COLD_BELOW, count_items
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import load_schema
from recsys.diagnostics.dataset.summary import summarize_dataset
from recsys.storage.location import Location

OpenEngine = Callable[[Path], SqlEngine]
CONTENT: dict[str, Any] = {
    "events": {"buy": {"path": "log.parquet"}},
    "labels": {"bought": {"action": "buy"}},
}
USERS, ITEMS, DRAWN = 30, 40, 3
START = 1_790_000_000


def log() -> pa.Table:
    """Each user takes four items; item 0 is taken by all, item 1 by a half."""
    random = np.random.default_rng(0)
    rows = [
        (user, item)
        for user in range(USERS)
        for item in [0, *([1] if user % 2 else [2]), *random.choice(np.arange(3, ITEMS), 2, False)]
    ]
    table = {
        "user": [user for user, _ in rows],
        "item": [int(item) for _, item in rows],
        "time": [START + 60 * number for number in range(len(rows))],
        "words": [["red", "shoe"][: number % 3] for number in range(len(rows))],
    }
    return pa.table(table)


def prepare(path: str, folder: Path, **settings: Any) -> Path:
    has_words = "words" in settings.get("context", {})
    content = {**CONTENT, **settings}
    if "events" not in settings:
        table = {"path": path, "columns": ["words"] if has_words else []}
        content["events"] = {"buy": table}
    (folder / "events.yaml").write_text(yaml.safe_dump(content))
    out = folder / "out" / str(len(list(folder.glob("out/*"))))
    prepare_events(folder / "events.yaml", out)
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        row
        for split in ("train", "valid", "test")
        for row in pq.read_table(out / split).to_pylist()
    ]


@pytest.fixture
def file(tmp_path: Path) -> str:
    pq.write_table(log(), tmp_path / "log.parquet")
    return "log.parquet"


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_negatives_are_distinct_items_that_existed_and_that_the_user_had_not_taken(
    by: str, file: str, tmp_path: Path
) -> None:
    negatives = {"per_positive": DRAWN, "by": by, "seed": 5}
    samples = rows(prepare(file, tmp_path, negatives=negatives))
    drawn = [row for row in samples if row["sampled"] == 1]
    logged = [row for row in samples if row["sampled"] == 0]
    assert {row["bought"] for row in drawn} == {0} and {row["bought"] for row in logged} == {1}
    assert len(logged) == 4 * USERS
    taken_items = {(row["user"], row["item"]): row["time"] for row in logged}
    first: dict[int, int] = {}
    for row in logged:
        first[row["item"]] = min(row["time"], first.get(row["item"], row["time"]))
    for row in drawn:
        assert first[row["item"]] <= row["time"]
        assert taken_items.get((row["user"], row["item"]), row["time"] + 1) > row["time"]
    draws = Counter((row["user"], row["time"], row["item"]) for row in drawn)
    assert set(draws.values()) == {1}
    # Of 30 users all take item 0 and 15 item 1: by popularity these come far more often than most.
    counts = Counter(row["item"] for row in drawn)
    assert (counts[1] > 3 * np.median(list(counts.values()))) == (by == "popularity")


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_draws_are_exact_where_a_user_has_taken_nearly_everything(by: str, tmp_path: Path) -> None:
    # Each of 40 users takes items 0 to 97: at its last row 98 (once) and 99 (three times) are left.
    users = [100, 101, 102, 103, *np.repeat(np.arange(40), 98)]
    items = [99, 99, 99, 98, *np.tile(np.arange(98), 40)]
    table = pa.table({"user": users, "item": items, "time": START + np.arange(len(items))})
    pq.write_table(table, tmp_path / "log.parquet")
    out = prepare("log.parquet", tmp_path, negatives={"per_positive": 1, "by": by})
    samples = rows(out)
    last = {row["user"]: row["time"] for row in samples}
    drawn = Counter(r["item"] for r in samples if r["sampled"] and r["time"] == last[r["user"]])
    assert drawn[98] + drawn[99] >= 40
    assert (drawn[99] > 26) == (by == "popularity")  # 30 of 40 expected, or 20


def test_what_is_left_is_drawn_and_what_is_missing_is_counted(tmp_path: Path) -> None:
    # At its second row the user has taken one of three items, and takes the second.
    table = {"user": ["a", "b", "c", "a"], "item": [1, 2, 3, 2], "time": range(START, START + 4)}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    out = prepare("log.parquet", tmp_path, negatives={"per_positive": 2}, split={"at": [0.3, 0.6]})
    drawn = [(row["user"], row["item"]) for row in rows(out) if row["sampled"] == 1]
    # Row by row 0, 1, 2 and 1 items are left of two to draw.
    assert drawn == [("b", 1), ("c", 1), ("c", 2), ("a", 3)]
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {"no item left to draw": 4}


def test_in_valid_and_test_no_positive_of_the_user_in_that_split_is_drawn(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    table = {
        "user": random.integers(0, 5, 300),
        "item": random.integers(0, 40, 300),
        "time": START + np.arange(300),
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    split = {"by": "windows", "windows": 2}
    out = prepare("log.parquet", tmp_path, negatives={"per_positive": 3}, split=split)
    later_positives = 0
    for folder in ("window-1/valid", "window-1/test", "window-2/valid", "window-2/test"):
        samples = pq.read_table(out / folder).to_pylist()
        positives = {(row["user"], row["item"]) for row in samples if row["sampled"] == 0}
        assert [r for r in samples if r["sampled"] and (r["user"], r["item"]) in positives] == []
    for window in ("window-1", "window-2"):
        samples = pq.read_table(out / window / "train").to_pylist()
        positives = {(row["user"], row["item"]) for row in samples if row["sampled"] == 0}
        later_positives += sum(
            r["sampled"] and (r["user"], r["item"]) in positives for r in samples
        )
    assert later_positives  # a training row does not know them


def test_an_item_is_drawn_from_its_first_snapshot_on(tmp_path: Path) -> None:
    users, times = [*range(20)], [*range(START, START + 20)]
    log = pa.table({"user": users, "item": [0] * 20, "time": times})
    pq.write_table(log, tmp_path / "log.parquet")
    skus = pa.table({"sku": [0, 1, 2], "since": [START, START + 5, START + 30]})
    pq.write_table(skus, tmp_path / "skus.parquet")
    items = {"path": "skus.parquet", "id": "sku", "valid_from": "since"}
    out = prepare("log.parquet", tmp_path, negatives={"per_positive": 1}, items=items)
    drawn = [row for row in rows(out) if row["sampled"] == 1]
    assert {row["item"] for row in drawn} == {1}
    assert [row["time"] // 10**6 - START for row in drawn] == [*range(5, 20)]


def test_an_event_counts_for_draws_from_its_arrival_on(tmp_path: Path) -> None:
    # Item 1 is taken at second 1 but known from second 10 on.
    users, times = [*range(20)], [*range(START, START + 20)]
    arrived = [START + 10 if second == 1 else START + second for second in range(20)]
    table = {"user": users, "item": [0, 1] + [0] * 18, "time": times, "known": arrived}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    events = {"buy": {"path": "log.parquet", "arrived": "known"}}
    for by in ("uniform", "popularity"):
        negatives = {"per_positive": 1, "by": by}
        out = prepare("log.parquet", tmp_path, events=events, negatives=negatives)
        drawn = [row for row in rows(out) if row["sampled"] == 1]
        assert [row["item"] for row in drawn] == [0] + [1] * 10
        assert [row["time"] // 10**6 - START for row in drawn] == [1, *range(10, 20)]


@pytest.mark.parametrize(("by", "digest"), [("uniform", "1b14932c"), ("popularity", "941138e1")])
def test_draws_are_those_of_versions_without_available_from(
    by: str, digest: str, file: str, tmp_path: Path
) -> None:
    negatives = {"per_positive": 20, "by": by, "seed": 5}  # the last ones from all that are left
    samples = rows(prepare(file, tmp_path, negatives=negatives))
    drawn = [(row["user"], row["time"], row["item"]) for row in samples if row["sampled"]]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:8] == digest


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_an_item_is_drawn_from_its_moment_or_its_first_event_on_whichever_is_earlier(
    by: str, tmp_path: Path
) -> None:
    # At second s user s takes item 0, but at second 8 item 3 and at 10 item 4.
    user_items = {8: 3, 10: 4}
    items = [user_items.get(second, 0) for second in range(20)]
    log = pa.table({"user": range(20), "item": items, "time": range(START, START + 20)})
    pq.write_table(log, tmp_path / "log.parquet")
    moments = [
        None,
        "2026-09-21T14:13:25",
        "2027-01-01",
        "2026-09-21T14:13:35+00:00",
        "",
        "1980-01-01",
        "2001-00-00",  # no time
    ]
    pq.write_table(pa.table({"id": range(7), "published": moments}), tmp_path / "items.parquet")
    negatives = {"per_positive": 9, "by": by, "available_from": "published"}  # all that are left
    out = prepare(
        "log.parquet",
        tmp_path,
        negatives=negatives,
        items={"path": "items.parquet"},
        counts={"plays": {"of": "item"}},
    )
    start = {0: 0, 1: 5, 3: 8, 4: 10, 5: -1}
    samples = rows(out)
    for second in range(20):
        drawn = {
            row["item"]: row["plays"] for row in samples if row["sampled"] and row["user"] == second
        }
        free = {item for item, first in start.items() if first <= second} - {items[second]}
        assert drawn == {item: items[:second].count(item) for item in free}


def test_the_snapshot_of_a_moment_says_whether_an_item_is_available(tmp_path: Path) -> None:
    log = pa.table({"user": range(20), "item": [0] * 20, "time": range(START, START + 20)})
    pq.write_table(log, tmp_path / "log.parquet")
    # Item, second from which a row is valid, and second of availability that it tells.
    snapshots = [(0, 0, 0), (1, 0, 10), (1, 4, 6), (2, 7, 3), (3, 0, 5), (3, 4, 12), (4, 9, None)]
    table = {
        "id": [item for item, _, _ in snapshots],
        "since": [START + available_from for _, available_from, _ in snapshots],
        "sold": [None if sold is None else START + sold for _, _, sold in snapshots],
    }
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    items = {"path": "items.parquet", "valid_from": "since"}
    negatives = {"per_positive": 9, "available_from": "sold"}
    samples = rows(prepare("log.parquet", tmp_path, negatives=negatives, items=items))
    first: dict[int, int] = {}
    for row in samples:
        if row["sampled"]:
            first.setdefault(row["item"], row["time"] // 10**6 - START)
    assert first == {1: 6, 2: 7, 3: 12, 4: 9}


@pytest.mark.parametrize("is_known", [True, False], ids=["exact", "open"])
@pytest.mark.parametrize(("smoothing", "weights"), [(None, (7, 3, 1, 1)), (0.25, (25, 9, 1, 1))])
def test_smoothing_adds_events_to_each_item(
    smoothing: float | None, weights: tuple[int, ...], is_known: bool, tmp_path: Path
) -> None:
    # Item 0 has six events and item 1 two, 2 and 3 are there. Then each user takes item 9, whose
    # many events are refused, so that draws are made from what is left; or are not known yet.
    number = 2000
    users = [*range(8), *range(8, 8 + 2 * number)]
    times = [*range(START, START + 8), *[START + 100] * number]
    times += [*[START + 101] * (number // 2), *[START + 102] * (number // 2)]
    table = {"user": users, "item": [0] * 6 + [1] * 2 + [9] * 2 * number, "time": times}
    table["known"] = [time if is_known or time < START + 100 else START + 999 for time in times]
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    moments = {"id": range(4), "published": ["1980-01-01"] * 4}
    pq.write_table(pa.table(moments), tmp_path / "items.parquet")
    negatives: dict[str, Any] = {"by": "popularity", "available_from": "published"}
    negatives |= {} if smoothing is None else {"smoothing": smoothing}
    out = prepare(
        "log.parquet",
        tmp_path,
        events={"buy": {"path": "log.parquet", "arrived": "known"}},
        negatives=negatives,
        items={"path": "items.parquet"},
        split={"at": [0.5, 0.7]},
    )
    train = pq.read_table(out / "train").to_pylist()
    moment = (START + 100) * 10**6
    drawn = Counter(row["item"] for row in train if row["sampled"] and row["time"] == moment)
    assert sum(drawn.values()) == number and sorted(drawn) == [0, 1, 2, 3]
    expected = number * np.array(weights) / sum(weights)
    observed = np.array([drawn[item] for item in range(4)])
    assert ((observed - expected) ** 2 / expected).sum() < 16.3  # .999 quantile of 3 degrees


def test_counts_of_items_and_min_count_are_those_of_the_log(file: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": [*range(ITEMS)]}), tmp_path / "items.parquet")
    out = prepare(
        file,
        tmp_path,
        negatives={"per_positive": DRAWN},
        items={"path": "items.parquet", "id": "item"},
        vocabulary={"min_count": {"item": 3}},
    )
    train = pq.read_table(out / "train").to_pylist()
    logged = Counter(row["item"] for row in train if row["sampled"] == 0)
    table = pq.read_table(out / "item_counts.parquet")
    assert dict(zip(*table.to_pydict().values(), strict=True)) == logged
    frequent = sorted(item for item, count in logged.items() if count >= 3)
    ids = pq.read_table(out / "vocabulary" / "item.parquet")["id"].to_pylist()
    assert ids == frequent == pq.read_table(out / "items")["item"].to_pylist()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_cold_and_unseen_count_rows_of_the_log_alone(
    is_weighted: bool, file: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"negatives": {"per_positive": DRAWN}}
    if is_weighted:  # rows of weight 0 count for no item either
        weights = pa.array(np.arange(4 * USERS) % 3)
        pq.write_table(log().append_column("times", weights), tmp_path / file)
        settings |= {"events": {"buy": {"path": file, "columns": ["times"]}}}
        settings |= {"weight": {"column": "times"}}
    out = prepare(file, tmp_path, **settings)
    root = Location.of(out)
    train, test = (
        [
            row["item"]
            for row in pq.read_table(out / split).to_pylist()
            if not row["sampled"] and row.get("weight", 1)
        ]
        for split in ("train", "test")
    )
    logged = Counter(train)
    counts = count_items(ParquetRows.of_split(root, "train", load_schema(root)), 0, 1)
    assert sorted(counts.counts) == sorted(logged.values())
    table = pq.read_table(out / "item_counts.parquet")
    assert dict(zip(*table.to_pydict().values(), strict=True)) == logged
    expected = {
        "cold": np.mean([logged[item] < COLD_BELOW for item in test]),
        "unseen": np.mean([logged[item] == 0 for item in test]),
    }
    assert 0 < expected["unseen"] < expected["cold"]
    report = json.loads((out / "report.json").read_text())["splits"]["test"]
    shares = summarize_dataset(str(out)).splits["test"].shares
    for subset, share in expected.items():
        assert report[subset] == pytest.approx(share)
        assert shares[subset] == pytest.approx(share)


@pytest.mark.long
def test_both_engines_draw_the_same_whatever_the_order_of_the_files(
    open_spark: OpenEngine, tmp_path: Path
) -> None:
    random = np.random.default_rng(2)
    table = pa.table(
        {
            "user": [f"u{number}" for number in random.integers(0, 9, 200)],
            "item": [f"i{number}" for number in random.integers(0, 30, 200)],
            "time": START + random.integers(0, 100, 200),
        }
    )
    moments = [START + 20, None, 0] * 15
    items = pa.table({"id": [f"i{number}" for number in range(45)], "published": moments})
    drawn = []
    for number, open_engine in enumerate((DuckDBEngine, DuckDBEngine, open_spark)):
        folder = tmp_path / str(number)
        folder.mkdir()
        order = random.permutation(200) if number == 1 else np.arange(200)
        pq.write_table(table.take(order), folder / "log.parquet")
        pq.write_table(items, folder / "items.parquet")
        negatives = {"per_positive": 3, "by": "popularity", "available_from": "published"}
        content = {**CONTENT, "negatives": negatives, "items": {"path": "items.parquet"}}
        (folder / "events.yaml").write_text(yaml.safe_dump(content))
        config = load_events_config(folder / "events.yaml")
        with closing(open_engine(folder / "stages")) as engine:
            make_samples(engine, config)
            columns = engine.table("SELECT uid, iid, ts, drawn_as FROM complete")
        drawn.append(sorted(map(tuple, zip(*columns.to_pydict().values(), strict=True))))
    assert drawn[0] == drawn[1] == drawn[2]


def test_inputs_may_be_urls_and_lists_and_dates_may_split(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/logs/day=1/part.parquet", "wb") as stream:
        pq.write_table(log(), stream)
    cuts = ["2026-09-21T15:00", "2026-09-21T15:30:00+00:00"]
    out = prepare(
        "memory://logs", tmp_path, context={"words": "ids"}, split={"by": "dates", "at": cuts}
    )
    first = {split: pq.read_table(out / split)["time"][0].as_py() for split in ("valid", "test")}
    assert first["valid"] // 10**6 >= 1_790_002_800 > first["valid"] // 10**6 - 60
    assert first["test"] // 10**6 >= 1_790_004_600 > first["test"] // 10**6 - 60
    assert rows(out)[2]["words"] == ["red", "shoe"]
    schema = load_schema(Location.of(out))
    assert schema.columns["words"].kind == "ids"
    assert len(schema.vocabularies["words"]) == 2
    assert pq.read_table(out / "item_counts.parquet")["train_rows"].to_pylist()
