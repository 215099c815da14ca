"""Training, `predict` and the scorer read of each row what a slow reading in plain Python gives.

Over nulls, NaN, infinities and values that no training row has, with arbitrary settings of the
steps, types of the columns and sizes of row groups.
"""

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as some

from embeddings import HashVocabulary
from embeddings.vocabulary.fixed import NULL_ID
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.prepare import prepare_transforms, prepare_vocabularies
from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import Column, VocabularySettings
from recsys.data.transforms.chain import chains_of
from recsys.serving.requests import RequestReader
from recsys.storage.location import Location

ZONE = "Europe/Berlin"
EXACT, HASHED, WORDS = 9, 50, 7
Row = dict[str, Any]

prices = some.one_of(
    some.none(),
    some.floats(-3, 50, width=32),
    some.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30]),
)
cities = some.none() | some.sampled_from(["Köln", "köln", "ROM", "", "x\x1f1"])
rows_of_train = some.fixed_dictionaries(
    {
        "price": prices,
        "city": cities,
        "device": some.none() | some.integers(0, 3),
        "time": some.integers(0, 2**31),
        "tags": some.none() | some.lists(cities, max_size=3),
    }
)
unseen = rows_of_train.flatmap(
    lambda row: some.fixed_dictionaries(
        {
            **{name: some.just(value) for name, value in row.items()},
            "city": some.text("ÄZß", max_size=2),
        }
    )
)


@some.composite
def schemas(draw: some.DrawFn) -> Row:
    """Transforms of the columns; some leave nulls, so that rows cannot be used."""
    fills = some.sampled_from([[], [{"fill": 0.5}]])
    low = draw(some.integers(-2, 3))
    numbers = some.permutations(
        ["log1p", "standardize", {"clip": {"low": low, "high": low + draw(some.integers(0, 9))}}]
    )
    buckets = some.integers(2, 6).map(lambda number: {"quantiles": number}) | some.lists(
        some.floats(-5, 60), unique=True, max_size=6
    ).map(sorted)
    end = draw(fills)
    return {
        "size": draw(fills) + draw(numbers) + end,
        "bucket": [*draw(fills), {"bucketize": draw(buckets)}],
        "standard": [{"fill": 1}, "standardize", {"bucketize": {"quantiles": 3}}],
        "town": [{"fill": "?"}, "lower"],
        "pair": ["cross", *draw(some.sampled_from([[], ["lower"]]))],
        "hour": [{draw(some.sampled_from(["hour", "weekday", "day_of_year"])): ZONE}],
        "words": [{"fill": "?"}, "lower", {"hash": WORDS}],
    }


def columns_of(transforms: Row) -> dict[str, Column]:
    columns = {
        "size": Column("dense", column="price"),
        "bucket": Column("id", 8, column="price"),
        "standard": Column("id", 3, column="price"),
        "town": Column("id", EXACT, column="city", vocabulary=VocabularySettings("exact")),
        "pair": Column("id", HASHED, vocabulary=VocabularySettings("hash")),
        "hour": Column("id", 366, column="time"),
        "words": Column("ids", WORDS, column="tags"),
    }
    for name, column in columns.items():
        column.transform = transforms[name]
    columns["pair"].column = ["town", "device"]
    return columns


@contextmanager
def schema_without_parser(columns: dict[str, Column]) -> Iterator[None]:
    """Reads this schema in place of a file, which takes a tenth of a second to parse."""
    plain = {name: Column("id", 3) for name in ("user", "item")}

    def read_schema(root: Location) -> Schema:
        schema_columns = copy.deepcopy({**plain, **columns, "liked": Column("label")})
        schema = Schema("item", "user", schema_columns)
        schema.transforms = chains_of(schema_columns, "item", str(root))
        return schema

    with (
        patch("recsys.data.schema.read_schema", read_schema),
        patch("recsys.data.prepare.read_schema", read_schema),
    ):
        yield


KINDS = {
    "price": some.sampled_from([pa.float32(), pa.float64()]),
    "city": some.sampled_from([pa.string(), pa.large_string()]),
    "device": some.sampled_from([pa.int8(), pa.uint32()]),
    "time": some.just(pa.int64()),
    "tags": some.sampled_from([pa.list_(pa.string()), pa.large_list(pa.string())]),
}


def write(folder: Path, rows: list[Row], kinds: Row, row_group_size: int) -> Path:
    folder.mkdir()
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    fixed = {"user": [0] * len(rows), "item": [1] * len(rows), "liked": [0] * len(rows)}
    pq.write_table(pa.table(columns | fixed), folder / "part-0.parquet", row_group_size)
    return folder


def reference(row: Row, schema: Schema) -> Row | None:
    """The columns of one row, a value at a time; None for a row that cannot be used."""
    columns: Row = {}
    for name, steps in [(name, chain.steps) for name, chain in schema.transforms.items()]:
        if name == "pair":
            pair = columns["town_text"], row["device"]
            value: Any = None if None in pair else f"{pair[0]}\x1f{pair[1]}"
        else:
            value = row[schema.transforms[name].sources[0]]
            value = list(value or ()) if name == "words" else value
            value = (
                float(np.float32(value)) if isinstance(value, float) else value
            )  # as columns are
        for step in steps:
            if step.name == "cross":
                continue
            if name == "words":
                value = [one_value(step.name, step.settings, item) for item in value]
            else:
                value = one_value(step.name, step.settings, value)
        if name == "town":
            columns["town_text"] = value
            towns = schema.vocabularies["town"].ids.to_pylist()
            value = towns.index(value) if value in towns else EXACT - 1
        if name == "pair":  # null is an id of its own of a hash
            id_or_null = NULL_ID if value is None else value
            value = int(HashVocabulary(HASHED).rows_of(pa.array([id_or_null]))[0, 0])
        columns[name] = value
    del columns["town_text"]
    if None in columns.values() or not math.isfinite(columns["size"]):
        return None
    return columns | {"size": pytest.approx(columns["size"], rel=1e-5, abs=1e-5)}


def one_value(step: str, step_settings: Row, value: Any) -> Any:
    """One step on one value."""
    if isinstance(value, float):
        value = None if math.isnan(value) else value
    if step == "fill":
        return step_settings["value"] if value is None else value
    if value is None:
        return None
    if step == "clip":
        return min(max(value, step_settings["low"]), step_settings["high"])
    if step == "log1p":
        return math.log1p(value) if value > -1 else None
    if step == "standardize":
        return (value - step_settings["mean"]) / (step_settings["std"] or 1)
    if step == "bucketize":
        return sum(boundary <= value for boundary in step_settings["boundaries"])
    if step == "lower":
        return value.lower()
    if step == "hash":
        return int(HashVocabulary(step_settings["buckets"]).rows_of(pa.array([value]))[0, 0])
    moment = datetime.fromtimestamp(value, UTC).astimezone(ZoneInfo(step_settings["zone"]))
    fields = {"hour": moment.hour, "weekday": moment.weekday()}
    return fields.get(step, moment.timetuple().tm_yday - 1)


def read(rows: ParquetRows, names: list[str]) -> list[Row | None]:
    [table] = rows.read(0, rows.num_rows)
    is_row = [position >= 0 for position in table[ROW_POSITION].to_pylist()]
    return [row if ok else None for row, ok in zip(table.select(names).to_pylist(), is_row)]


def requested_row(reader: RequestReader, row: Row) -> Row | None:
    """What the scorer reads of a row in a request."""
    try:
        rows = reader({"user": 0} | row, (), [1])
    except ValueError:
        return None
    pooled = {name: ids.rows.tolist() for name, ids in rows.pooled.items() if name != "user"}
    values = {
        name: rows_of_name if name == "words" else rows_of_name[0]
        for name, rows_of_name in pooled.items()
    }
    return values | {name: numbers.tolist()[0] for name, numbers in rows.dense.items()}


# Without the search for a smaller example, which would take minutes.
@settings(max_examples=15, phases=[Phase.generate], deadline=None, database=None, derandomize=True)
@given(
    rows=some.lists(rows_of_train, min_size=4, max_size=30),
    new=some.lists(unseen, min_size=1, max_size=8),
    transforms=schemas(),
    kinds=some.fixed_dictionaries(KINDS),
    row_group_size=some.integers(1, 9),
)
def test_all_who_read_a_row_read_what_the_steps_say(
    rows: list[Row], new: list[Row], transforms: Row, kinds: Row, row_group_size: int
) -> None:
    rows = [rows[0] | {"price": 1.5, "city": "Rom"}, *rows[1:]]  # something to fit, and an id
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write(data / "train", rows, kinds, row_group_size)
        inputs = [Location.of(write(data / "new", new, kinds, 99) / "part-0.parquet")]
        root = Location.of(folder)
        with schema_without_parser(columns_of(transforms)):
            prepare_transforms(folder)
            prepare_vocabularies(folder)
            schema = load_schema(root)
        names = list(schema.transforms)
        trained = read(ParquetRows.of_split(root, "train", schema, "skip"), names)
        train_file = (root / "train").files(".parquet")
        predicted = read(ParquetRows(train_file + inputs, schema, False, "skip"), names)
    pooled = ["user", *(name for name in names if name != "size")]
    reader = RequestReader(schema, pooled, {})
    assert predicted[: len(rows)] == trained
    assert [requested_row(reader, row) for row in rows + new] == predicted
    for actual, row in zip(predicted, rows + new, strict=True):
        assert actual == reference(row, schema)


@settings(max_examples=10, deadline=None, database=None, derandomize=True)
@given(values=some.lists(prices, min_size=1), number=some.integers(2, 5), size=some.integers(1, 9))
def test_fitted_values_are_those_of_all_training_rows(
    values: list[float | None], number: int, size: int
) -> None:
    quantiles = {"quantiles": number}
    columns = {
        "mean": Column("dense", column="x", transform=["standardize"]),
        "bucket": Column("id", 5, column="x", transform=[{"bucketize": quantiles}]),
    }
    finite = [
        float(np.float32(value)) for value in values if value is not None and math.isfinite(value)
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train").mkdir()
        table = pa.table({"x": pa.array(values, pa.float64())})
        pq.write_table(table, Path(folder) / "train" / "part-0.parquet", size)
        with schema_without_parser(columns):
            if not finite:
                with pytest.raises(ValueError, match="'mean'"):
                    prepare_transforms(folder)
                assert not (Path(folder) / "transforms.yaml").exists()
                return
            chains = prepare_transforms(folder)
            assert load_schema(Location.of(folder)).transforms == chains
    fitted = chains["mean"].steps[0].settings
    assert fitted == pytest.approx({"mean": np.mean(finite), "std": np.std(finite)}, rel=1e-6)
    shares = [count / number for count in range(1, number)]
    boundaries = np.unique(np.quantile(finite, shares)).tolist()
    assert chains["bucket"].steps[0].settings["boundaries"] == boundaries
