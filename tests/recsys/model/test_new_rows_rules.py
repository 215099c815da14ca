"""Rules for new rows that do not fit their table: each is refused with the fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recsys.config import (
    Config,
    ContentSettings,
    EmbeddingSettings,
    InitFromSettings,
    ModalitySettings,
    TableSettings,
)
from recsys.data.filesystem import Location
from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import VocabularySettings
from recsys.model.tables import cold_row_rules, table_configs
from recsys.training.train import id_only_baseline
from tests.datasets import write_dataset

CONTENT = ContentSettings({"clip": ModalitySettings("feature", "clip")}, dim=16)


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    return load_schema(Location.of(str(write_dataset(tmp_path / "data"))))


def config(table: str, content: Any = CONTENT, **settings: Any) -> Config:
    tables = {table: TableSettings(**settings)}
    return Config(content=content, embedding=EmbeddingSettings(tables=tables))


def test_a_rule_other_than_random_is_that_of_its_table(schema: Schema) -> None:
    tables = {
        "item": TableSettings(new_rows="content"),
        "user": TableSettings(new_rows="mean"),
        "genres": TableSettings(),
    }
    both = Config(content=CONTENT, embedding=EmbeddingSettings(tables=tables))
    assert cold_row_rules(both, schema) == {"item": "content", "user": "mean"}
    baseline = id_only_baseline(both)
    assert cold_row_rules(baseline, schema) == {"item": "mean", "user": "mean"}


@pytest.mark.parametrize(
    ("table", "settings", "line"),
    [
        ("user", {"new_rows": "content"}, r"user\.new_rows is content.*'item'.*set mean"),
        ("item", {"new_rows": "content", "content": "none"}, r"content is none"),
        ("item", {"new_rows": "mean", "frozen": True}, r"item\.new_rows is mean.*frozen"),
        ("item", {"new_rows": "mean", "optimizer": "sgd"}, r"sgd"),
        ("item", {"new_rows": "mean", "init_from": InitFromSettings("x")}, r"init_from"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(
    schema: Schema, table: str, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        table_configs(config(table, **settings), schema)


def test_a_bounded_table_has_none(schema: Schema) -> None:
    user = replace(schema.columns["user"], vocabulary=VocabularySettings("bounded"))
    schema.columns["user"] = user
    with pytest.raises(ValueError, match=r"user\.new_rows is mean.*bounded"):
        table_configs(config("user", new_rows="mean"), schema)
