"""Settings of ID tables that do not fit data, device or ranks are refused with the fix."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recsys.config import (
    Config,
    ContentSettings,
    EmbeddingSettings,
    InitFromSettings,
    ModalitySettings,
    ParallelSettings,
    TableSettings,
    ranking_settings,
)
from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import VocabularySettings
from recsys.model.inputs import IDVectorReader
from recsys.model.tables import (
    check_placement,
    cold_row_rules,
    id_dropouts,
    scoring_config,
    table_configs,
    target_dropout,
)
from recsys.storage.location import Location
from tests.datasets import write_dataset
from tests.recsys.em3_runs import em3_config

DROPPED = TableSettings(id_dropout=0.5)


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    return load_schema(Location.of(write_dataset(tmp_path / "data")))


def test_id_dropout_is_that_of_the_named_table(schema: Schema) -> None:
    config = Config(embedding=EmbeddingSettings(tables={"user": DROPPED}))
    dropouts = id_dropouts(config.embedding, schema)
    assert dropouts["user"] == 0.5
    assert all(not p for name, p in dropouts.items() if name != "user")
    skipped = replace(config.embedding, skip=["user"])
    assert "user" not in id_dropouts(skipped, schema)


def test_the_target_item_s_vector_may_be_dropped_unless_items_are_retrieved(schema: Schema) -> None:
    config = Config(embedding=EmbeddingSettings(tables={"item": DROPPED}))
    assert target_dropout(config, schema) == 0.5
    assert not any(id_dropouts(config.embedding, schema).values())
    retrieval = replace(config, ranking=ranking_settings("two_tower", loss="in_batch_softmax"))
    with pytest.raises(ValueError, match=r"item\.id_dropout: retrieval compares"):
        target_dropout(retrieval, schema)


def test_id_dropout_zeroes_vectors_of_its_feature_in_training() -> None:
    torch.manual_seed(0)
    read = IDVectorReader(["user", "place"], "item", "history", dropout={"user": 0.5})
    vectors = {name: torch.ones(100, 2) for name in ("user", "place", "item", "history")}
    pooled = SimpleNamespace(to_dict=lambda: vectors)
    sequences = {name: SimpleNamespace(values=lambda name=name: vectors[name]) for name in vectors}
    batch: Any = SimpleNamespace(history=SimpleNamespace(full=None))  # all that is read
    ids = read(pooled, sequences, batch)
    assert 20 < int((ids.pooled[0] == 0).all(dim=1).sum()) < 80
    for full in (ids.pooled[1], ids.target, ids.history):
        assert torch.equal(full, torch.ones(100, 2))
    assert torch.equal(read.eval()(pooled, sequences, batch).pooled[0], vectors["user"])


CONTENT = ContentSettings({"clip": ModalitySettings("feature", "clip")}, dim=16)


def config(table: str, content: Any = CONTENT, **settings: Any) -> Config:
    tables = {table: TableSettings(**settings)}
    return Config(content=content, embedding=EmbeddingSettings(tables=tables))


def test_a_rule_other_than_random_is_that_of_its_table(schema: Schema) -> None:
    tables = {
        "item": TableSettings(new_rows="zero"),
        "user": TableSettings(new_rows="mean"),
        "genres": TableSettings(),
    }
    config_of_both = Config(content=CONTENT, embedding=EmbeddingSettings(tables=tables))
    assert cold_row_rules(config_of_both, schema) == {"item": "zero", "user": "mean"}


@pytest.mark.parametrize(
    ("table", "settings", "line"),
    [
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


def config_with(item: dict[str, Any] | None = None, **settings: Any) -> Config:
    tables = {"item": TableSettings(**item)} if item else {}
    return em3_config(Path("unused"), embedding=EmbeddingSettings(16, tables=tables, **settings))


CACHED: dict[str, Any] = {"kernel": "uvm_caching"}


@pytest.mark.parametrize(
    ("device", "config", "message"),
    [
        ("cpu", config_with(CACHED), r"tables\.item\.kernel is uvm_caching,.* cpu.*fused"),
        ("cpu", config_with(prefetch=True), r"embedding\.prefetch is true.* cpu.*false"),
        ("cpu", config_with(parallel=ParallelSettings(2)), r"copies is 2.* cpu.*1"),
        ("cuda", config_with(prefetch=True), r"prefetch is true.*uvm_caching.*false"),
        (
            "cuda",
            config_with({"cache_load_factor": 0.5}),
            r"tables\.item\.cache_load_factor is 0\.5.*uvm_caching",
        ),
        ("cuda", config_with(parallel=ParallelSettings(3)), r"copies is 3.*8 ranks"),
        ("cuda", config_with(CACHED, parallel=ParallelSettings(2)), r"item\.kernel is uvm_caching"),
        (
            "cuda",
            config_with(parallel=ParallelSettings(2), optimizer="adam"),
            r"embedding\.optimizer is adam",
        ),
        (
            "cuda",
            config_with({"new_rows": "mean"}, parallel=ParallelSettings(2)),
            r"tables\.item\.new_rows is mean",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_value_and_a_fix(
    schema: Schema, device: str, config: Config, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_placement(config.embedding, schema, device, world_size=16, ranks_per_node=8)


def test_a_cache_is_refused_where_rows_are_reset_behind_it(schema: Schema) -> None:
    bounded = deepcopy(schema)
    bounded.columns["item"].vocabulary = VocabularySettings("bounded")
    with pytest.raises(ValueError, match=r"item\.kernel is uvm_caching.*bounded.*exact"):
        check_placement(config_with(CACHED).embedding, bounded, "cuda", 1, 1)
    check_placement(config_with({"kernel": "uvm"}).embedding, bounded, "cuda", 1, 1)


def test_a_run_is_scored_with_one_copy_and_on_cpu_from_the_host_s_memory() -> None:
    trained = config_with({**CACHED, "cache_load_factor": 0.5}, prefetch=True)
    on_cpu, on_cuda = scoring_config(trained, "cpu"), scoring_config(trained, "cuda")
    assert on_cpu.embedding.tables["item"] == TableSettings()
    assert on_cuda.embedding.tables["item"] == trained.embedding.tables["item"]
    copied = scoring_config(config_with(parallel=ParallelSettings(2)), "cuda")
    assert copied.embedding.parallel.copies == 1 and not on_cuda.embedding.prefetch
