"""Kernels, prefetching and copies that need GPUs are refused elsewhere, and left out in scoring."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from recsys.config import Config, EmbeddingSettings, ParallelSettings, TableSettings
from recsys.data.filesystem import Location
from recsys.data.schema import Schema, load_schema
from recsys.data.schema_columns import VocabularySettings
from recsys.model.placement import check_placement, placed_for_scoring
from tests.datasets import write_dataset
from tests.recsys.em3_runs import em3_config


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return load_schema(Location.of(write_dataset(tmp_path_factory.mktemp("placement") / "data")))


def config_with(item: dict[str, Any] | None = None, **settings: Any) -> Config:
    tables = {"item": TableSettings(**item)} if item else {}
    return em3_config(Path("unused"), embedding=EmbeddingSettings(16, tables=tables, **settings))


CACHED: dict[str, Any] = {"kernel": "uvm_caching"}


@pytest.mark.parametrize(
    ("device", "config", "words"),
    [
        ("cpu", config_with({"kernel": "uvm"}), r"tables\.item\.kernel is uvm,.* cpu.*fused"),
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
    schema: Schema, device: str, config: Config, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_placement(config, schema, device, world_size=16, ranks_per_node=8)


def test_copies_of_every_rank_are_refused(schema: Schema) -> None:
    with pytest.raises(ValueError, match=r"copies is 8.*8 ranks"):
        check_placement(config_with(parallel=ParallelSettings(8)), schema, "cuda", 8, 8)


def test_a_cache_is_refused_where_rows_are_reset_behind_it(schema: Schema) -> None:
    bounded = deepcopy(schema)
    bounded.columns["item"].vocabulary = VocabularySettings("bounded")
    with pytest.raises(ValueError, match=r"item\.kernel is uvm_caching.*bounded.*exact"):
        check_placement(config_with(CACHED), bounded, "cuda", 1, 1)
    check_placement(config_with({"kernel": "uvm"}), bounded, "cuda", 1, 1)


def test_gpus_take_what_fits(schema: Schema) -> None:
    check_placement(config_with(CACHED, prefetch=True), schema, "cuda", 16, 8)
    check_placement(config_with(parallel=ParallelSettings(4)), schema, "cuda", 16, 8)


def test_a_run_is_scored_with_one_copy_and_on_cpu_from_the_host_s_memory() -> None:
    trained = config_with({**CACHED, "cache_load_factor": 0.5}, prefetch=True)
    on_cpu, on_cuda = placed_for_scoring(trained, "cpu"), placed_for_scoring(trained, "cuda")
    assert on_cpu.embedding.tables["item"] == TableSettings()
    assert on_cuda.embedding.tables["item"] == trained.embedding.tables["item"]
    copied = placed_for_scoring(config_with(parallel=ParallelSettings(2)), "cuda")
    assert copied.embedding.parallel.copies == 1 and not on_cuda.embedding.prefetch
