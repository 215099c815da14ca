"""A log with several histories and ids beside them becomes a dataset that a model trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recsys.config import Config, EmbeddingSettings, ranking_settings
from recsys.data.batch_builder import BatchBuilder
from recsys.data.events import prepare
from recsys.data.events.engines.on_duckdb import DuckDBEngine
from recsys.data.events.splits import SPLITS
from recsys.data.filesystem import Location
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema, load_schema
from recsys.model.build import build_em3
from recsys.model.tables import pooled_features, table_configs

NUM_EVENTS, NUM_ITEMS, STEPS = 400, 12, 5
MEANING = {
    "events": {
        "shop": {
            "path": "log.parquet",
            "user": "visitor",
            "item": "sku",
            "time": "when",
            "action": "event",
            "columns": ["price"],
        }
    },
    "items": {"path": "skus.parquet", "id": "sku", "columns": {"brand": "id"}},
    "rows": "view",
    "labels": {"bought": {"action": "buy", "within": "1d"}},
    "histories": {
        "viewed": {"actions": "view", "length": 5, "parallel": {"viewed_brand": "brand"}},
        "past": {
            "length": 5,
            "parallel": {"past_action": "action", "past_age": "age", "past_price": "price"},
        },
    },
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    random = np.random.default_rng(0)
    log = {
        "visitor": [f"v{number}" for number in random.integers(0, 9, NUM_EVENTS)],
        "sku": random.integers(0, NUM_ITEMS, NUM_EVENTS),
        "when": 1_790_000_000 + np.arange(NUM_EVENTS) * 3600,
        "event": random.choice(["view", "view", "buy"], NUM_EVENTS),
        "price": random.random(NUM_EVENTS),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    brands = [f"brand {number % 3}" for number in range(NUM_ITEMS)]
    pq.write_table(pa.table({"sku": range(NUM_ITEMS), "brand": brands}), folder / "skus.parquet")
    meaning = yaml.safe_dump(MEANING, sort_keys=False).replace("path: ", f"path: {folder}/")
    (folder / "events.yaml").write_text(meaning)
    prepare.prepare_events(folder / "events.yaml", folder / "data")
    return folder / "data"


def losses_of(schema: Schema, root: Location) -> list[float]:
    """The losses of some steps of DIN on the first training rows."""
    ranking = ranking_settings("din", attention_units=[8], mlp_units=[8], dropout=0.0)
    config = Config(content="none", embedding=EmbeddingSettings(dim=8), ranking=ranking)
    torch.manual_seed(0)
    em3 = build_em3(config, schema, table_configs(config, schema), {}, None, "cpu")
    build = BatchBuilder(schema, pooled_features(config, schema))
    batch = build(next(ParquetRows.of_split(root, "train", schema).read(0, 64)))
    optimizer = torch.optim.AdamW(em3.parameters(), 1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = em3(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_a_model_trains_on_several_histories_of_a_log(prepared: Path) -> None:
    root = Location.of(prepared)
    schema = load_schema(root)

    viewed, past = schema.histories
    assert (viewed.name, viewed.numbers, viewed.ids) == ("viewed", [], ["viewed_brand"])
    assert (past.numbers, past.ids) == (["past_age", "past_price"], ["past_action"])
    assert schema.table_of("past") == "item"
    known = {name: map.ids.to_pylist() for name, map in schema.vocabularies.items()}  # type: ignore[union-attr]
    assert known["past_action"] == ["buy", "view"]
    assert known["viewed_brand"] == known["brand"] == ["brand 0", "brand 1", "brand 2"]
    losses = losses_of(schema, root)
    assert losses[-1] < losses[0]


def test_an_engine_without_files_of_its_own_and_with_equal_hashes_writes_the_same_rows(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherEngine(DuckDBEngine):
        """Has lists in stages, like Spark, and compares all rows for duplicates."""

        hash = "same"

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.own_files = None
            self._duckdb.execute("CREATE MACRO same(a, b, c, d) AS 0")

    monkeypatch.setattr(prepare, "DuckDBEngine", OtherEngine)
    other = prepared.parent / "lists"
    prepare.prepare_events(prepared.parent / "events.yaml", other)

    for split in SPLITS:
        assert pq.read_table(other / split).equals(pq.read_table(prepared / split))
