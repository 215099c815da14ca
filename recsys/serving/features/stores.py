"""Features in stores that other programs write: Redis, and Feast's online store.

Shapes: K keys.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from recsys.config.named_parts import make_part
from recsys.config.server import FeatureSettings
from recsys.data.schema_columns import FeatureTable
from recsys.serving.features.package_features import PackageFeatures
from recsys.serving.features.source import (
    FeatureSource,
    FeatureSourceError,
    Types,
    key_texts,
    table_of_rows,
    value_columns,
)

SOURCES = {
    "redis": "recsys.serving.features.stores:RedisFeatures",
    "feast": "recsys.serving.features.stores:FeastFeatures",
}


def feature_source(settings: FeatureSettings, package_features: PackageFeatures) -> FeatureSource:
    """Return the source that the settings name; a ValueError says why it cannot be used."""
    if settings.name == FeatureSettings.name:
        return package_features
    kind: type[FeatureSource] = FeatureSource  # type: ignore[type-abstract]
    options = settings.options
    return make_part(
        "features.name", settings.name, SOURCES, kind, package_features.types, **options
    )


class RedisFeatures(FeatureSource):
    """A hash per id in Redis: `PREFIX NAME:ID` has a JSON value by column, also of `COLUMN@`.

    `PREFIX version` has the version of all, if its writer sets one.

    `timeout` is in seconds, of each call.
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
        """Read the hashes of all keys in one round trip."""
        names, texts = value_columns(table), key_texts(keys)
        pipeline = self._redis.pipeline(transaction=False)
        for text in texts:
            pipeline.hmget(self._key(table, text or ""), names)
        pipeline.get(f"{self._prefix}version")
        *hashes, version = self._execute(pipeline)
        self.version = "" if version is None else version.decode(errors="replace")
        rows = [dict(zip(names, values, strict=True)) for values in hashes]
        try:
            plain = [
                {name: json.loads(value) for name, value in row.items() if value and text}
                for row, text in zip(rows, texts, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"features by {table.name}: {error}; write JSON to Redis") from error
        return table_of_rows(plain, table, self.types)

    def write(self, table: FeatureTable, rows: pa.Table) -> None:
        """Write rows with the ids of a table and some of its columns; null removes a value."""
        pipeline = self._redis.pipeline(transaction=False)
        texts = key_texts([rows[name].combine_chunks() for name in table.by])
        columns = rows.drop_columns(table.by).to_pylist()
        for text, values in zip(texts, columns, strict=True):
            key = self._key(table, text or "")
            for name, value in values.items():
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
        parts = [part.to_pylist() for part in keys]
        ids = [row for row in zip(*parts) if None not in row]
        if not ids:
            return table_of_rows([{}] * len(parts[0]), table, self.types)
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
        rows = [{} if None in row else next(stored) for row in zip(*parts)]
        return table_of_rows(rows, table, self.types)
