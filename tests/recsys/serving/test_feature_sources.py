"""Sources of features: values have the types of the package's files, and every key has a row."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pytest

from recsys.data.schema_columns import FeatureTable
from recsys.serving.features.source import (
    FeatureSource,
    RedisFeatures,
    table_of_rows,
    without_old_values,
)


class Hashes(dict[str, dict[str, str]]):
    """Stands for a pipeline of Redis: hashes by key."""

    def pipeline(self, transaction: bool) -> Hashes:
        self.answers: list[Any] = []
        return self

    def hset(self, key: str, name: str, value: str) -> None:
        self.setdefault(key, {})[name] = value

    def hmget(self, key: str, names: list[str]) -> None:
        self.answers.append([dict.get(self, key, {}).get(name) for name in names])

    def get(self, key: str) -> None:  # type: ignore[override]
        self.answers.append(None)

    def execute(self) -> list[Any]:
        return self.answers


def test_the_empty_text_is_an_id_in_redis_and_null_is_none() -> None:
    pytest.importorskip("redis")
    table = FeatureTable(["user"], ["views"])
    store = RedisFeatures({"user": pa.schema({"user": pa.string(), "views": pa.int64()})})
    store._redis = Hashes()
    store.write(table, pa.table({"user": ["", None, "ann"], "views": [3, 4, 5]}))
    values = store.read(table, [pa.array(["", None, "ann", "bob"])])
    assert values["views"].to_pylist() == [3, None, 5, None]


def test_redis_keeps_keys_of_several_ids_apart_and_returns_dates_and_times() -> None:
    pytest.importorskip("redis")
    table = FeatureTable(["user", "shop"], ["day", "moment"])
    types = {"day": pa.date32(), "moment": pa.timestamp("us")}
    store = RedisFeatures({table.name: pa.schema(types)})
    store._redis = Hashes()
    keys = [["a:b", "a", "a\\", "a:b\\"], ["c", "b:c", "b:c", "c"]]
    days = [date(2026, 11, day) for day in range(1, 5)]
    moments = [datetime(2026, 11, 1, hour) for hour in range(4)]
    rows = {"user": keys[0], "shop": keys[1], "day": days, "moment": moments}
    store.write(table, pa.table(rows))
    values = store.read(table, [pa.array(ids) for ids in keys])
    assert values.to_pydict() == {"day": days, "moment": moments}


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pa.int64(), 1.5), (pa.list_(pa.string()), "red"), (pa.list_(pa.int8()), [1, 2.5])],
)
def test_values_of_a_store_that_another_type_would_change_are_refused(
    kind: pa.DataType, value: object
) -> None:
    table = FeatureTable(["item"], ["tags"])
    types = {table.name: pa.schema({"tags": kind})}
    assert table_of_rows([{}, {"tags": None}], table, types)["tags"].null_count == 2
    with pytest.raises(ValueError, match=r"features by item: column 'tags' has the value .*types"):
        table_of_rows([{}, {"tags": value}], table, types)


def test_a_value_without_any_time_is_too_old() -> None:
    table = FeatureTable(["item"], ["views"], {"views": "1d"})
    for times in (pa.nulls(2), pa.array([None, 86_400_000_000])):  # a file of nulls alone, too
        values = pa.table({"views": [5, 6], "views@": times})
        read = without_old_values(values, table, unix_time=86_401)["views"].to_pylist()
        assert read == ([None, None] if times.null_count == 2 else [None, 6])


def test_a_source_that_leaves_out_keys_is_named() -> None:
    """Its rows would be those of other keys."""

    class Forgetful(FeatureSource):
        def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:
            return pa.table({"views": [5]})

    table, ids = FeatureTable(["item"], ["views"], {}), pa.array(["a", "b"])
    with pytest.raises(ValueError, match="by item: Forgetful returned 1 rows for 2 keys"):
        Forgetful().lookup(table, [ids], unix_time=0)
