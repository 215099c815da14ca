"""Sources of features, the last known values of columns by ids: Redis, Feast, or the package's own.

Shapes: K keys.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embeddings.vocabulary.fixed import is_id_type
from recsys.config.named_parts import make_part
from recsys.config.server import FeatureSettings
from recsys.data.parquet.values import is_list
from recsys.data.schema_columns import FeatureTable
from recsys.data.transforms.steps import SEPARATOR

Types = Mapping[str, pa.Schema]  # of each table, by its name: ids, columns and times
SOURCES = {
    "redis": "recsys.serving.features.source:RedisFeatures",
    "feast": "recsys.serving.features.source:FeastFeatures",
}


class FeatureSourceError(Exception):
    """A store does not answer; the request may be sent again."""


class FeatureSettingsError(ValueError):
    """The settings of a source are invalid, for any package."""


class FeatureSource(ABC):
    """Looks up features by ids. A subclass reads them from a store of your own.

    Example::

        class MyFeatures(FeatureSource):  # --features.name my_store:MyFeatures
            def __init__(self, types: Types, url: str) -> None:  # --features.options.url URL
                self.types, self.client = types, Client(url)

            def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:
                rows = self.client.get(table.name, key_texts(keys))
                return table_of_rows(rows, table, self.types)

    `types` are those of the package's own features. `version` is the store's, if it has one.
    """

    version = ""

    @abstractmethod
    def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:  # K ids each -> [K]
        """Return the columns of a table, and the times of columns that have them; null if unknown.

        `keys` are the ids of each column in `table.by`; a key may be null, which is unknown.
        """

    def lookup(
        self, table: FeatureTable, keys: list[pa.Array], unix_time: float
    ) -> dict[str, pa.Array]:
        """Return the columns [K] of a table; null where a value is older than its `max_age`.

        Raises:
            ValueError: `read` returned another number of rows than there are keys.
        """
        values = self.read(table, keys)
        if values.num_rows != len(keys[0]):
            raise ValueError(
                f"features by {table.name}: {type(self).__name__} returned {values.num_rows} rows "
                f"for {len(keys[0])} keys; return a row for each key, of nulls if it is unknown"
            )
        return without_old_values(values, table, unix_time)


def value_columns(table: FeatureTable) -> list[str]:
    """Return the columns that a source returns: those of the table, and their times."""
    return [*table.columns, *table.times.values()]


def joined_keys(keys: list[pa.Array]) -> pa.Array:  # K ids each -> [K]
    """Return one id per key: its only id, or several joined as text; null if one is null."""
    if len(keys) == 1:
        return keys[0]
    texts = [ids.cast(pa.large_string()) for ids in keys]
    return pc.binary_join_element_wise(*texts, pa.scalar(SEPARATOR, pa.large_string()))


def key_texts(keys: list[pa.Array]) -> list[str | None]:  # K ids each -> K
    r"""Return the text by which stores know a key: its id, or several with `:` between them.

    A `:` within one of several ids is `\:`, and a `\` is `\\`, so that no two keys have one text.
    """
    if len(keys) > 1:
        keys = [ids.cast(pa.large_string()) for ids in keys]
        for text in ("\\", ":"):
            keys = [pc.replace_substring(ids, text, f"\\{text}") for ids in keys]
    texts = joined_keys(keys).cast(pa.large_string())
    return pc.replace_substring(texts, SEPARATOR, ":").to_pylist()


def table_of_rows(rows: list[dict[str, Any]], table: FeatureTable, types: Types) -> pa.Table:
    """Return rows of plain values, by column, in the types of the package."""
    fields = [types[table.name].field(name) for name in value_columns(table)]
    try:
        for name, kind in ((field.name, field.type) for field in fields):
            changed = [value for row in rows if _is_changed(value := row.get(name), kind)]
            if changed:
                raise TypeError(f"column '{name}' has the value {changed[0]!r}, expected {kind}")
        return pa.Table.from_pylist(rows, pa.schema(fields))
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(
            f"features by {table.name}: {error}; write the types of the data"
        ) from error


def _is_changed(value: Any, kind: pa.DataType) -> bool:
    """Return whether Arrow would cut the fraction off a number, or take a text for its letters."""
    if is_list(kind):
        is_text = isinstance(value, str | bytes)
        values = () if value is None else value
        return is_text or any(_is_changed(element, kind.value_type) for element in values)
    return isinstance(value, float) and not value.is_integer() and is_id_type(kind)


def without_old_values(
    values: pa.Table, table: FeatureTable, unix_time: float
) -> dict[str, pa.Array]:
    """Return the columns [K] of a table; null where a value is older than its `max_age`."""
    columns = {}
    for name in table.columns:
        column = values[name].combine_chunks()
        limit = table.max_age_micros.get(name)
        if limit is not None:
            times = values[table.times[name]].cast(pa.float64(), safe=False)  # of nulls alone, too
            age = int(unix_time * 1_000_000) - times.to_numpy()
            is_old = ~(age <= limit)  # also without a time
            column = pc.if_else(pa.array(is_old), pa.scalar(None, column.type), column)
        columns[name] = column
    return columns


def feature_source(
    settings: FeatureSettings, package_features: FeatureSource, types: Types
) -> FeatureSource:
    """Return the source that the settings name; an error says why it cannot be made."""
    if settings.name == FeatureSettings.name:
        return package_features
    kind: type[FeatureSource] = FeatureSource  # type: ignore[type-abstract]
    try:
        return make_part("features.name", settings.name, SOURCES, kind, types, **settings.options)
    except ValueError as error:
        raise FeatureSettingsError(str(error)) from error


def _with_integers(rows: pa.Table, types: pa.Schema) -> pa.Table:
    """Return rows whose dates and times are integers in the units of these types."""
    for index, name in enumerate(rows.column_names):
        kind = types.field(name).type if name in types.names else pa.null()
        if pa.types.is_temporal(kind):
            integer = pa.int64() if kind.bit_width == 64 else pa.int32()
            rows = rows.set_column(index, name, rows[name].cast(kind).cast(integer))
    return rows


class RedisFeatures(FeatureSource):
    """A hash per id in Redis: `PREFIX NAME:ID` has a JSON value by column, also of `COLUMN@`.

    `PREFIX version` is the version of all, if set. `timeout` is in seconds, of each call.
    """

    def __init__(
        self,
        types: Types,
        url: str = "redis://localhost:6379",
        prefix: str = "recsys:",
        timeout: float = 0.2,
    ) -> None:
        try:
            import redis
        except ImportError as error:
            raise ValueError(f"features.name redis: {error}; pip install redis") from error
        self.types, self._prefix, self._error = types, prefix, redis.RedisError
        self._redis = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout
        )

    def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:
        names, texts = value_columns(table), key_texts(keys)
        pipeline = self._redis.pipeline(transaction=False)
        for text in texts:
            pipeline.hmget(self._key(table, text or ""), names)
        pipeline.get(f"{self._prefix}version")
        *hashes, version = self._execute(pipeline)
        self.version = "" if version is None else version.decode(errors="replace")
        try:
            rows = [
                {name: json.loads(value) for name, value in zip(names, values) if value is not None}
                if text is not None  # the empty text is an id
                else {}
                for text, values in zip(texts, hashes, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"features by {table.name}: {error}; write JSON to Redis") from error
        return table_of_rows(rows, table, self.types)

    def write(self, table: FeatureTable, rows: pa.Table) -> None:
        """Write rows with the ids of a table and some of its columns; null removes a value.

        Dates and times are written as the integers of the package's types.
        """
        pipeline = self._redis.pipeline(transaction=False)
        texts = key_texts([rows[name].combine_chunks() for name in table.by])
        values = _with_integers(rows.drop_columns(table.by), self.types[table.name])
        for text, row in zip(texts, values.to_pylist(), strict=True):
            if text is None:
                continue
            key = self._key(table, text)
            for name, value in row.items():
                if value is None:
                    pipeline.hdel(key, name)
                else:
                    pipeline.hset(key, name, json.dumps(value))
        self._execute(pipeline)

    def _key(self, table: FeatureTable, text: str) -> str:
        return f"{self._prefix}{table.name}:{text}"

    def _execute(self, pipeline: Any) -> list[Any]:
        try:
            return list(pipeline.execute())
        except self._error as error:
            raise FeatureSourceError(f"Redis: {error}; send the request again") from error


class FeastFeatures(FeatureSource):
    """Online features of a Feast repository, whose entities have join keys named as the ids.

    Needs the package feast. `views` has the feature view of each table, by its name.
    """

    def __init__(self, types: Types, repo: str, views: dict[str, str]) -> None:
        from feast import FeatureStore

        if missing := types.keys() - views.keys():
            raise ValueError(f"features.options.views: lacks {sorted(missing)}; name their views")
        self.types, self._store, self._views = types, FeatureStore(repo_path=repo), views

    def read(self, table: FeatureTable, keys: list[pa.Array]) -> pa.Table:
        """Read the features of all keys by one call; their times are those of the events."""
        view = self._views[table.name]
        key_values = [values.to_pylist() for values in keys]
        ids = [row for row in zip(*key_values) if None not in row]
        if not ids:
            return table_of_rows([{}] * len(key_values[0]), table, self.types)
        response = self._store.get_online_features(
            features=[f"{view}:{name}" for name in table.columns],
            entity_rows=[dict(zip(table.by, row)) for row in ids],
        ).to_dict(include_event_timestamps=True)
        columns = {name: response[name] for name in table.columns}
        columns |= {
            time: [1_000_000 * seconds if seconds else None for seconds in response[f"{name}__ts"]]
            for name, time in table.times.items()
        }
        stored = iter([dict(zip(columns, row)) for row in zip(*columns.values())])
        rows = [{} if None in row else next(stored) for row in zip(*key_values)]
        return table_of_rows(rows, table, self.types)
