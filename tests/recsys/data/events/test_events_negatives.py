"""Drawn negatives, and forms of input and output that the oracle does not have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.filesystem import Location
from recsys.data.schema import load_schema

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


def prepare(path: str, folder: Path, **more: Any) -> Path:
    content = {
        "events": {"buy": {"path": path, "columns": ["words"]}},
        "labels": {"bought": {"action": "buy"}},
        **more,
    }
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
def test_negatives_are_distinct_items_that_the_user_never_takes(
    by: str, file: str, tmp_path: Path
) -> None:
    negatives = {"per_positive": DRAWN, "by": by, "seed": 5}
    written = rows(prepare(file, tmp_path, negatives=negatives))
    taken = {(row["user"], row["item"]) for row in written if row["bought"] == 1}
    drawn = [row for row in written if row["bought"] == 0]
    assert len(taken) == 4 * USERS
    assert len(drawn) == DRAWN * len(taken)
    assert [row for row in drawn if (row["user"], row["item"]) in taken] == []
    of_moment = Counter((row["user"], row["time"], row["item"]) for row in drawn)
    assert set(of_moment.values()) == {1}
    counts = Counter(row["item"] for row in drawn)
    assert counts[0] == 0
    # Of 30 users 15 took item 1: by popularity it comes to the others far more often than most.
    assert (counts[1] > 3 * np.median(list(counts.values()))) == (by == "popularity")


def test_a_seed_gives_the_same_negatives_and_another_gives_others(
    file: str, tmp_path: Path
) -> None:
    first, again, other = (
        rows(prepare(file, tmp_path, negatives={"per_positive": 2, "seed": seed}))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


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
