"""Which ID vectors `id_dropout` leaves out: those of its table's pooled features, in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recsys.config import Config, EmbeddingSettings, TableSettings
from recsys.data.filesystem import Location
from recsys.data.schema import Schema, load_schema
from recsys.model.id_vectors import IDVectorReader
from recsys.model.tables import id_dropouts
from tests.datasets import write_dataset

DROPPED = TableSettings(id_dropout=0.5)


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    write_dataset(tmp_path / "data")
    return load_schema(Location.of(str(tmp_path / "data")))


def test_the_named_table_s_pooled_features_have_it(schema: Schema) -> None:
    config = Config(embedding=EmbeddingSettings(tables={"user": DROPPED}))
    dropouts = id_dropouts(config, schema)
    assert dropouts["user"] == 0.5
    assert all(not p for name, p in dropouts.items() if name != "user")
    skipped = replace(config.embedding, skip=["user"])
    assert "user" not in id_dropouts(replace(config, embedding=skipped), schema)


def test_the_target_item_s_table_has_none(schema: Schema) -> None:
    config = Config(embedding=EmbeddingSettings(tables={"item": DROPPED}))
    with pytest.raises(ValueError, match=r"item\.id_dropout: 'item' "):
        id_dropouts(config, schema)


def test_only_its_vectors_are_left_out_and_only_in_training() -> None:
    torch.manual_seed(0)
    read = IDVectorReader(["user", "place"], "item", "history", dropout={"user": 0.5})
    vectors = {name: torch.ones(100, 2) for name in ("user", "place", "item", "history")}
    pooled = SimpleNamespace(to_dict=lambda: vectors)
    sequences = {name: SimpleNamespace(values=lambda name=name: vectors[name]) for name in vectors}
    batch: Any = None  # read for lists beside the history alone
    ids = read(pooled, sequences, batch)
    assert 20 < int((ids.pooled[0] == 0).all(dim=1).sum()) < 80
    for whole in (ids.pooled[1], ids.target, ids.history):
        assert torch.equal(whole, torch.ones(100, 2))
    assert torch.equal(read.eval()(pooled, sequences, batch).pooled[0], vectors["user"])
