"""Inputs that cannot be used: an error names the file, the column and the fix; nothing is left."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events

Config = dict[str, Any]
START = 1_790_000_000


def write_log(file: Path, **columns: pa.Array) -> None:
    rows = 40
    table: dict[str, pa.Array] = {
        "user": pa.array([f"u{row % 4}" for row in range(rows)]),
        "item": pa.array([row % 7 for row in range(rows)]),
        "time": pa.array([START + row for row in range(rows)]),
        "type": pa.array(["view", "buy"] * (rows // 2)),
        "price": pa.array([1.5] * rows),
        **columns,
    }
    pq.write_table(pa.table(table), file)


def write_inputs(folder: Path) -> Config:
    """A log, items, and settings that can be used."""
    write_log(folder / "log.parquet")
    items = {"id": list(range(7)), "brand": ["x"] * 7, "cost": [1.0] * 7}
    pq.write_table(pa.table(items), folder / "items.parquet")
    return {
        "events": {"log": {"path": "log.parquet", "action": "type", "columns": ["price"]}},
        "items": {"path": "items.parquet", "columns": {"brand": "id", "cost": "dense"}},
        "labels": {"bought": {"action": "buy"}},
        "histories": {"viewed": {"actions": "view", "parallel": {"viewed_price": "price"}}},
    }


def prepare(folder: Path, config: Config) -> Config:
    (folder / "events.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return prepare_events(folder / "events.yaml", folder / "data")


@dataclass
class Bad:
    """A change that spoils the inputs, and what the error must name."""

    name: str
    spoil: Callable[[Path, Config], object]
    messages: tuple[str, ...]


def change(*keys: str, value: Any) -> Callable[[Path, Config], object]:
    """Set one setting."""

    def spoil(folder: Path, config: Config) -> None:
        for key in keys[:-1]:
            config = config.setdefault(key, {})
        config[keys[-1]] = value

    return spoil


def column(name: str, values: list[Any], kind: pa.DataType | None = None) -> Any:
    return lambda folder, config: write_log(
        folder / "log.parquet", **{name: pa.array(values * (40 // len(values)), kind)}
    )


def text(file: str, content: str, key: str = "log") -> Any:
    def spoil(folder: Path, config: Config) -> None:
        (folder / file).write_text(content)
        config["events"][key]["path"] = file

    return spoil


BAD = [
    Bad(
        "scale of ids beside events",
        change("histories", "viewed", "parallel", "beside", value={"column": "brand", "scale": 2}),
        ("'beside'", "'brand'", "scale"),
    ),
    Bad(
        "min_count of a number",
        change("vocabulary", "min_count", value={"cost": 2}),
        ("min_count", "'cost'", "'brand'"),
    ),
    Bad(
        "numbers as a category",
        change("items", "content", value={"cost": "category"}),
        ("items.parquet", "'cost'", "double"),
    ),
    Bad("no action of a label", change("labels", "bought", "action", value=[]), ("empty",)),
    Bad(
        "texts as rows", change("vocabulary", value={"kind": "rows"}), ("vocabulary", "user", "u0")
    ),
    Bad("absent action", change("labels", "bought", "action", value="by"), ("labels.bought", "by")),
    Bad("no file", change("events", "log", "path", value="absent.parquet"), ("absent.parquet",)),
    Bad("no match", change("events", "log", "path", value="*.csv"), ("*.csv", "matches no", "log")),
    Bad("other ending", text("log.txt", "user"), ("log.txt", ".csv")),
    Bad("CSV without a column", text("log.csv", "user,item,type\na,1,buy\n"), ("log.csv", "time")),
    Bad("float ids", column("item", [1.5]), ("log.parquet", "'item'", "integer or string")),
    Bad("unknown key", change("histories", "viewed", "lenght", value=3), ("lenght",)),
    Bad("unknown action", change("rows", value=["order"]), ("order",)),
    Bad("empty CSV", text("log.csv", ""), ("log.csv", "empty")),
    Bad(
        "CSV with a broken row",
        text("log.csv", "user,item,time,type,price\na,1,1790000000,buy,2\nb,2,1790000000\n"),
        ("log.csv", "#3"),
    ),
    Bad("float time", column("time", [1.5]), ("log.parquet", "'time'", "ISO")),
    Bad("wrong unit", column("time", [START * 1000]), ("log.parquet", "'time'", "time_unit")),
    Bad(
        "items of another type",
        lambda folder, config: pq.write_table(
            pa.table({"id": ["a"], "brand": ["x"], "cost": [1.0]}), folder / "items.parquet"
        ),
        ("items.parquet", "'id'", "int64"),
    ),
    Bad(
        "an item twice",
        lambda folder, config: pq.write_table(
            pa.table({"id": [3, 3], "brand": ["x", "y"], "cost": [1.0, 1.0]}),
            folder / "items.parquet",
        ),
        ("items.parquet", "'id'", "3", "valid_from"),
    ),
    Bad("all in the future", change("drop", "later_than", value="2001-01-01"), ("in the future",)),
    Bad(
        "no time zone", change("events", "log", "time_zone", value="Mars/X"), ("time_zone", "Mars")
    ),
    Bad(
        "no date in a form of times",
        change("events", "log", "time_format", value="%H:%M"),
        ("time_format '%H:%M'", "year"),
    ),
    Bad("duration", change("histories", "viewed", "delay", value="1 hour"), ("1 hour", "7d")),
    Bad("no path", change("events", "log", "path", value=[]), ("path",)),
    Bad(
        "division by zero",
        change("histories", "viewed", "parallel", "p", value={"column": "price", "scale": 0}),
        ("'p'", "scale"),
    ),
    Bad("undeclared column", change("labels", "dear", value={"column": "rating"}), ("rating",)),
    Bad("label given as 1.5", change("labels", "dear", value={"column": "price"}), ("dear", "1.5")),
    Bad("empty split", change("split", value={"at": [0.99, 0.995]}), ("split", "valid")),
    Bad("infinite price", column("price", [1.5, float("inf")]), ("log.parquet", "'price'", "inf")),
    Bad(
        "texts that are not UTF-8",
        lambda folder, config: write_log(
            folder / "log.parquet", user=pa.array([b"\xff"] * 40).view(pa.string())
        ),
        ("log.parquet", "'user'", "UTF8"),
    ),
    Bad(
        "a column twice",
        lambda folder, config: pq.write_table(
            pa.Table.from_arrays([pa.array([1])] * 5, ["user", "item", "time", "type", "item"]),
            folder / "log.parquet",
        ),
        ("log.parquet", "'item'", "2 times"),
    ),
    *(
        Bad(
            f"{fill!r} for nulls of {name}",
            change("items", "columns", name, value={"kind": kind, "fill": fill}),
            (f"'{name}'", "fill"),
        )
        for name, kind, fill in (
            ("cost", "dense", float("nan")),
            ("cost", "dense", 1e300),
            ("cost", "dense", "dear"),
            ("brand", "id", 1.5),
        )
    ),
    *(
        Bad(f"negatives with {settings}", change("negatives", value=settings), texts)
        for settings, texts in (
            ({"available_from": "sold"}, ("items.parquet", "'sold'", "missing")),
            ({"available_from": "brand"}, ("items.parquet", "'brand'", "row 0", "'x'", "ISO")),
            ({"available_from": "cost"}, ("items.parquet", "'cost'", "double", "ISO")),
            ({"available_from": "id", "by": "popularity", "smoothing": 0}, ("smoothing 0",)),
            ({"smoothing": 1}, ("smoothing", "by: popularity")),
            ({"smoothing": -1, "by": "popularity"}, ("smoothing is -1", "set 0 to")),
        )
    ),
    Bad(
        "available_from without items",
        lambda folder, config: config.update(items=None, negatives={"available_from": "sold"}),
        ("available_from", "`items`"),
    ),
    Bad("cuts in disorder", change("split", value={"at": [0.9, 0.8]}), ("split", "ascending")),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_an_error_names_what_is_wrong_and_nothing_is_written(bad: Bad, tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    bad.spoil(tmp_path, config)
    with pytest.raises(ValueError, match=r"\w") as raised:
        prepare(tmp_path, config)
    assert [name for name in bad.messages if name not in str(raised.value)] == []
    assert len(str(raised.value).splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == []


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old_limit[1]))
    try:
        (tmp_path / "events.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match="data"):
            prepare_events(tmp_path / "events.yaml", tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == []


def test_an_id_that_stands_for_null_has_the_type_of_its_column(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    for brands, fill in (([None, 3], 7), ([None, "x"], "7")):
        items = {"id": [0, 1], "brand": brands, "cost": [1.0, 1.0]}
        pq.write_table(pa.table(items), tmp_path / "items.parquet")
        config["items"]["columns"]["brand"] = {"kind": "id", "fill": fill}
        assert prepare(tmp_path, config)["splits"]["train"]["rows"]
        train = pq.read_table(tmp_path / "data" / "train")
        assert set(train["brand"].to_pylist()) == {fill, brands[1]}
        shutil.rmtree(tmp_path / "data")
