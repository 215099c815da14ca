"""Features come from Feast's online store, where Feast is installed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from recsys.data.schema_columns import FeatureTable
from recsys.serving.features.source import FeastFeatures

feast = pytest.importorskip("feast")

CURRENT_TIME = datetime(2026, 11, 28, tzinfo=UTC)
STORE = """\
project: shop
registry: registry.db
provider: local
online_store: {type: sqlite, path: online.db}
entity_key_serialization_version: 3
"""
TABLE = FeatureTable(["item"], ["brand", "cost", "views"], {"views": "1d"})
TYPES = {
    "item": pa.schema(
        {
            "item": pa.string(),
            "brand": pa.string(),
            "cost": pa.float32(),
            "views": pa.float32(),
            "views@": pa.int64(),
        }
    )
}


def test_features_come_from_feast_with_the_times_of_their_events(tmp_path: Path) -> None:
    rows = {"item": ["i1", "i2"], "brand": ["a", None], "cost": [1.5, 2.5], "views": [3.0, 4.0]}
    frame = pd.DataFrame({**rows, "ts": [CURRENT_TIME, CURRENT_TIME]})
    frame.to_parquet(tmp_path / "items.parquet")
    (tmp_path / "feature_store.yaml").write_text(STORE)
    item = feast.Entity(name="item", join_keys=["item"], value_type=feast.ValueType.STRING)
    view = feast.FeatureView(
        name="item_view",
        entities=[item],
        ttl=timedelta(days=36_500),
        schema=[
            feast.Field(name=name, dtype=feast.types.from_value_type(kind))
            for name, kind in {
                "item": feast.ValueType.STRING,
                "brand": feast.ValueType.STRING,
                "cost": feast.ValueType.FLOAT,
                "views": feast.ValueType.FLOAT,
            }.items()
        ],
        source=feast.FileSource(path=str(tmp_path / "items.parquet"), timestamp_field="ts"),
    )
    store = feast.FeatureStore(repo_path=str(tmp_path))
    store.apply([item, view])
    store.write_to_online_store("item_view", frame)
    source = FeastFeatures(TYPES, str(tmp_path), {"item": "item_view"})
    values = source.read(TABLE, [pa.array(["i2", "unseen", "i1", None])]).to_pydict()
    assert values["brand"] == [None, None, "a", None]
    assert values["cost"] == [2.5, None, 1.5, None]
    assert values["views"] == [4.0, None, 3.0, None]
    micros = int(CURRENT_TIME.timestamp() * 1_000_000)
    assert values["views@"] == [micros, None, micros, None]
    assert source.read(TABLE, [pa.array([None], pa.string())])["cost"].to_pylist() == [None]
