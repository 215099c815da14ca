"""Configurations of `prepare events` that hypothesis draws, with logs and tables that fit them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

Row = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
START, HOUR, EVENTS = 1_790_000_000, 3600, 160
USERS, ITEMS, SHOPS = 9, 12, 4


def write_case(folder: Path, draw: Draw) -> Path:
    """Write a log, tables of items and users, and the configuration; return its file."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    is_rows = draw(st.booleans())
    kinds = {name: "int" if is_rows else draw(st.sampled_from(["int", "string"])) for name in NAMES}

    def ids(name: str, numbers: Any, nulls: float = 0.0) -> pa.Array:
        return id_array(random, kinds[name], numbers, 0.0 if is_rows else nulls)

    has_items, has_users = draw(st.booleans()), draw(st.booleans())
    write_log(folder, random, ids)
    content: Row = {
        "events": {"log": {"path": "log.parquet", "action": "action", "columns": [*COLUMNS]}},
        "labels": labels(draw),
        "rows": draw(st.sampled_from([None, ["view"], ["view", "buy"]])),
        "context": subset(draw, CONTEXT),
        "split": draw(st.sampled_from(SPLITS)),
        "vocabulary": {"kind": "rows"} if is_rows else {"min_count": draw(MIN_COUNT)},
    }
    if has_items:
        write_table(folder, "items", random, ids, "item", ITEMS, is_rows)
        content["items"] = {
            "path": "items.parquet",
            "columns": subset(draw, TABLE_COLUMNS, "item_"),
            "content": subset(draw, CONTENT),
        }
    if has_users:
        write_table(folder, "users", random, ids, "user", USERS, is_rows)
        content["users"] = {
            "path": "users.parquet",
            "columns": subset(draw, TABLE_COLUMNS, "user_"),
        }
    item_columns = content["items"]["columns"] if has_items else {}
    content["histories"] = histories(draw, item_columns, content["context"], is_rows)
    content["counts"] = subset(draw, counts_of(item_columns))
    if draw(st.booleans()):
        by = draw(st.sampled_from(["uniform", "popularity"]))
        content["negatives"] = {"per_positive": draw(st.integers(1, 3)), "by": by}
    content = {name: part for name, part in content.items() if part not in (None, {}, [])}
    (folder / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "events.yaml"


NAMES = ("user", "item", "shop", "tags")
COLUMNS = ("price", "shop", "tags", "liked")
CONTEXT: Row = {
    "price": {"kind": "dense", "fill": 0.5},
    "shop": "id",
    "tags": "ids",
}
LABELS: Row = {
    "bought": {"action": "buy", "within": "12h"},
    "liked_it": {"column": "liked"},
    "dear": {"column": "price", "at_least": 0.5},
}
TABLE_COLUMNS: Row = {
    "shop": "id",
    "tags": "ids",
    "number": {"kind": "dense", "fill": -1},
}
CONTENT: Row = {"words": "text", "class": "category", "classes": "category", "vector": "feature"}
SPLITS: list[Row] = [
    {"by": "time", "at": [0.6, 0.8]},
    {"by": "time", "at": [0.6, 0.8, 0.95]},
    {"by": "user", "at": [0.6, 0.8]},
    {"by": "dates", "at": ["2026-09-25", "2026-09-27"]},
]
MIN_COUNT = st.sampled_from([{}, {"item": 3}, {"user": 2, "item": 100}, {"user": 1000}])


def subset(draw: Draw, options: Row, prefix: str = "") -> Row:
    names = (
        draw(st.lists(st.sampled_from(sorted(options)), unique=True, max_size=3)) if options else []
    )
    return {f"{prefix}{name}": deepcopy(options[name]) for name in names}


def labels(draw: Draw) -> Row:
    first = draw(st.sampled_from(sorted(LABELS)))
    return {first: LABELS[first]} | subset(draw, LABELS)


def histories(draw: Draw, item_columns: Row, context: Row, is_rows: bool) -> Row:
    result: Row = {}
    for number in range(draw(st.integers(0, 3))):
        beside: Row = {"age": "age", "price": {"column": "price", "scale": 2}}
        beside |= {} if is_rows else {"action": "action"}
        beside |= {name: name for name, kind in item_columns.items() if kind == "id"}
        beside |= {"shop": "shop"} if "shop" in context else {}
        parallel = {f"h{number}_{name}": column for name, column in subset(draw, beside).items()}
        result[f"h{number}"] = {
            "actions": draw(st.sampled_from([None, ["view"], ["buy"]])),
            "length": draw(st.sampled_from([1, 4, 50])),
            "delay": draw(st.sampled_from(["0s", "3h"])),
            "parallel": parallel,
        }
    return result


def counts_of(item_columns: Row) -> Row:
    counts: Row = {
        "n_user": {"of": "user", "within": "1d"},
        "n_item": {"of": "item", "actions": "buy", "delay": "1h"},
        "n_pair": {"of": ["user", "item"], "actions": "buy", "per": "view"},
    }
    ids = [name for name, kind in item_columns.items() if kind == "id"]
    return counts | {f"n_{name}": {"of": name} for name in ids}


def id_array(random: np.random.Generator, kind: str, numbers: Any, nulls: float) -> pa.Array:
    """Ids of some numbers, or lists of them, some of them null."""
    if isinstance(numbers, list):
        flat = id_array(
            random,
            kind,
            np.array([n for numbers_of_row in numbers for n in numbers_of_row], int),
            nulls,
        )
        offsets = np.cumsum([0, *map(len, numbers)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
    mask = random.random(len(numbers)) < nulls
    if kind == "int":
        return pa.array(numbers, pa.int64(), mask=mask)
    return pa.array([f"ü{number}" for number in numbers], pa.string(), mask=mask)


def write_log(folder: Path, random: np.random.Generator, ids: Callable[..., pa.Array]) -> None:
    price = random.random(EVENTS)
    log = {
        "user": ids("user", random.integers(0, USERS, EVENTS)),
        "item": ids("item", random.integers(0, ITEMS, EVENTS)),
        "time": START + np.sort(random.integers(0, 8 * 24, EVENTS)) * HOUR,
        "action": random.choice(["view", "view", "buy"], EVENTS),
        "price": pa.array(price, mask=random.random(EVENTS) < 0.1),
        "shop": ids("shop", random.integers(0, SHOPS, EVENTS), 0.2),
        "tags": ids("tags", lists_of(random, EVENTS), 0.1),
        "liked": random.integers(0, 2, EVENTS).astype(float),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")


def write_table(
    folder: Path,
    name: str,
    random: np.random.Generator,
    ids: Callable[..., pa.Array],
    key: str,
    size: int,
    is_whole: bool,
) -> None:
    """A table of items or users with one that no event has; it lacks some unless it is whole."""
    numbers = random.permutation(size + 1)[: None if is_whole else size - 2]
    rows = len(numbers)
    table = {
        "id": ids(key, numbers),
        f"{key}_shop": ids("shop", random.integers(0, SHOPS, rows), 0.3),
        f"{key}_tags": ids("tags", lists_of(random, rows), 0.1),
        f"{key}_number": pa.array(random.random(rows), mask=random.random(rows) < 0.3),
        "words": pa.array(["some words"] * rows, mask=random.random(rows) < 0.3),
        "class": pa.array([f"c{n % 3}" for n in range(rows)], mask=random.random(rows) < 0.3),
        "classes": pa.array([[f"c{n % 3}"] * (n % 2) for n in range(rows)]),
        "vector": pa.array([[0.5, float(n)] for n in range(rows)], mask=random.random(rows) < 0.3),
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet")


def lists_of(random: np.random.Generator, rows: int) -> list[list[int]]:
    return [random.integers(0, 5, random.integers(0, 4)).tolist() for _ in range(rows)]
