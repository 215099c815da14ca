"""Values that a Redis store returns have the types of the package's feature files."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pytest

from recsys.data.schema_columns import FeatureTable
from recsys.serving.features.source import RedisFeatures, table_of_rows


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
