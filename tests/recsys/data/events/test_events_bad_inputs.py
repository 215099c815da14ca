"""Inputs that cannot be used: an error names the file, the column and the fix; nothing is left."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events, run_stages
from recsys.data.events.settings import EventsConfig

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
    words: tuple[str, ...]


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


def item_column(name: str, values: Any, *keys: str, value: Any) -> Any:
    """Add a column to the items, and set one setting."""

    def spoil(folder: Path, config: Config) -> None:
        items = pq.read_table(folder / "items.parquet")
        pq.write_table(items.append_column(name, values), folder / "items.parquet")
        change(*keys, value=value)(folder, config)

    return spoil


SEVEN_TAGS = pa.array([["x"]] * 7)
CONTENT = ("items", "content", "more")
BESIDE = ("histories", "viewed", "parallel", "beside")

BAD = [
    Bad(
        "a list of ids beside events",
        lambda folder, config: (
            item_column("tags", SEVEN_TAGS, "items", "columns", "tags", value="ids")(
                folder, config
            ),
            change(*BESIDE, value="tags")(folder, config),
        ),
        ("'beside'", "'tags'", "lists of ids"),
    ),
    *(
        Bad(
            f"{setting} of {beside} beside events",
            change(*BESIDE, value={"column": beside, setting: 2}),
            ("'beside'", f"'{beside}'", setting),
        )
        for setting, beside in (("scale", "brand"), ("fill", "age"), ("at_least", "action"))
    ),
    *(
        Bad(
            f"min_count of {name}",
            change("vocabulary", "min_count", value={name: 2}),
            ("min_count", f"'{name}'", "'brand'"),
        )
        for name in ("cost", "bought", "viewed", "viewed_price", "time")
    ),
    Bad(
        "min_count where ids are rows",
        change("vocabulary", value={"kind": "rows", "min_count": {"item": 2}}),
        ("min_count", "exact"),
    ),
    Bad("content named as ids", change("items", "content", value={"item": "text"}), ("'item'",)),
    *(
        Bad(
            f"content of kind {kind} and type {values.type}",
            item_column("more", values, *CONTENT, value=kind),
            ("items.parquet", "'more'", word),
        )
        for kind, values, word in [
            ("category", pa.array([0.5] * 7), "double"),
            ("feature", pa.array([[1]] * 7), "int64"),
            ("feature", pa.nulls(7), "null"),
        ]
    ),
    Bad("a table named as torch's", change("context", value={"type": "id"}), ("'type'", "torch")),
    Bad("a name of this program's", change("output", value={"user": "__raw_group"}), ("__raw",)),
    Bad(
        "a label within no time",
        change("labels", "bought", value={"action": "buy", "within": "0s"}),
        ("'bought'", "within is 0s", "7d"),
    ),
    Bad(
        "a label within of a column",
        change("labels", "bought", value={"column": "price", "within": "1d"}),
        ("'bought'", "within"),
    ),
    Bad(
        "a label of ids",
        lambda folder, config: (
            change("context", value={"price": "id"})(folder, config),
            change("labels", "bought", value={"column": "price"})(folder, config),
        ),
        ("'bought'", "'price'", "ids"),
    ),
    *(
        Bad(f"no action of {'.'.join(keys)}", change(*keys, value=[]), (keys[-1], "empty"))
        for keys in [
            ("rows",),
            ("labels", "bought", "action"),
            ("histories", "viewed", "actions"),
        ]
    ),
    Bad(
        "a count within no time",
        change("counts", "n", value={"of": "user", "within": "0s"}),
        ("'n'", "0s"),
    ),
    Bad("no events per user", change("drop", value={"max_events_per_user": 0}), ("is 0", "1")),
    Bad(
        "a quote in what stands for null",
        change("items", "columns", "brand", value={"kind": "id", "fill": "it's"}),
        ("'brand'", "it's", "fill"),
    ),
    Bad(
        "items of other numbers",
        item_column("other", pa.array(range(100, 107)), "items", "id", value="other"),
        ("items.parquet", "'other'", "no event"),
    ),
    Bad(
        "no item with a value",
        item_column("empty", pa.nulls(7, pa.float64()), "items", "columns", "empty", value="dense"),
        ("'empty'", "none is left"),
    ),
    Bad(
        "texts as rows", change("vocabulary", value={"kind": "rows"}), ("vocabulary", "user", "u0")
    ),
    Bad("absent action", change("labels", "bought", "action", value="by"), ("labels.bought", "by")),
    Bad("no file", change("events", "log", "path", value="absent.parquet"), ("absent.parquet",)),
    Bad("not Parquet", text("broken.parquet", "PAR1 no PAR1"), ("broken.parquet",)),
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
    Bad("duration", change("histories", "viewed", "delay", value="1 hour"), ("1 hour", "7d")),
    Bad("no path", change("events", "log", "path", value=[]), ("path",)),
    Bad(
        "label from no number on",
        change("labels", "dear", value={"column": "price", "at_least": float("nan")}),
        ("dear", "at_least"),
    ),
    Bad(
        "division by zero",
        change("histories", "viewed", "parallel", "p", value={"column": "price", "scale": 0}),
        ("'p'", "scale"),
    ),
    Bad("undeclared column", change("labels", "dear", value={"column": "rating"}), ("rating",)),
    Bad("label given as 1.5", change("labels", "dear", value={"column": "price"}), ("dear", "1.5")),
    Bad("a name twice", change("context", value={"viewed": "dense"}), ("viewed",)),
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
    Bad(
        "a column of the settings twice",
        change("events", "log", "columns", value=["price", "price"]),
        ("'log'", "'price'"),
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
    Bad(
        "numbers as texts of items",
        change("items", "content", value={"cost": "text"}),
        ("items.parquet", "'cost'", "string"),
    ),
    Bad("endless delay", change("histories", "viewed", "delay", value="all"), ("viewed", "all")),
    Bad(
        "too many negatives", change("negatives", value={"per_positive": 10**9}), ("per_positive",)
    ),
    Bad("an unknown protocol", change("events", "log", "path", value="foo://x"), ("foo://x",)),
    Bad("cuts in disorder", change("split", value={"at": [0.9, 0.8]}), ("split", "ascending")),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_an_error_names_what_is_wrong_and_nothing_is_written(bad: Bad, tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    bad.spoil(tmp_path, config)
    with pytest.raises(ValueError, match=r"\w") as raised:
        prepare(tmp_path, config)
    assert [name for name in bad.words if name not in str(raised.value)] == []
    assert len(str(raised.value).splitlines()) <= 3
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == []


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        (tmp_path / "events.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match="data"):
            prepare_events(tmp_path / "events.yaml", tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir() if "data" in path.name] == []


KILLED = """
import os, signal, sys
from pathlib import Path
import recsys.data.events.dataset as dataset
from recsys.data.events.duckdb_engine import DuckDBEngine
from recsys.data.events.prepare import prepare_events, run_stages
from recsys.data.events.settings import EventsConfig
dataset.DatasetWriter._write_vocabularies = lambda *words: os.kill(os.getpid(), signal.SIGKILL)
prepare_events(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_it_leaves_nothing_that_looks_whole_and_completes_when_run_again(
    tmp_path: Path,
) -> None:
    config = write_inputs(tmp_path)
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-c", KILLED, str(tmp_path / "events.yaml"), str(tmp_path / "data")]
    assert subprocess.run(words, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    assert list(tmp_path.rglob("schema.yaml")) == []
    prepare(tmp_path, config)
    assert (tmp_path / "data" / "schema.yaml").is_file()


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


def test_the_folder_of_temporary_files_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        run_stages(EventsConfig({}, {}), tmp_path, temp=tmp_path / "nowhere")
