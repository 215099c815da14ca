"""A run reads the columns it was trained on: by name, in any order, or not at all."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from recsys.checkpoint import run_schema
from recsys.checkpoint.run_schema import agree_on_id_types, load_run_schema, schema_of_data
from recsys.data.parquet.rows import ParquetRows
from recsys.data.schema import Schema
from recsys.data.schema_columns import IdType
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import evaluate, predict
from recsys.storage.location import Location
from recsys.training.train import train
from tests.recsys.checkpoint.schema_runs import (
    COLUMNS,
    SCHEMA,
    copy_of,
    rewrite,
    with_other_type,
    write_data,
    write_schema,
)
from tests.recsys.checkpoint.stopped_runs import config_of
from tests.recsys.em3_runs import ranks_of

ARGV = ["--embedding.skip", "[]", "--epochs", "1"]
# Attribute, its new value: no two make the same model, or the same inputs of one.
CHANGES: list[tuple[str, str, Any]] = [
    ("user", "vocabulary.admit_after", 1),
    ("user", "vocabulary.half_life", 9.0),
    ("user", "vocabulary", None),
    ("friends", "shares", "genres"),
    ("item", "num_embeddings", 41),
    ("item", "vocabulary", {"kind": "hash"}),
    ("genres", "vocabulary.seed", 0),
    ("genres", "vocabulary.num_hashes", 3),
    ("genres", "kind", "id"),
    ("shop", "vocabulary", {"kind": "hash"}),
    ("price", "kind", "extra"),
    ("bought", "kind", "dense"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with joined_ranks("cpu") as ranks:
        train(config_of(folder, *ARGV), str(folder / "data"), folder / "run", ranks)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> Iterator[Schema]:
    """The run's schema, which takes a tenth of a second to parse, parsed once."""
    schema = load_run_schema(run)
    assert schema is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_schema, "load_run_schema", lambda *_, **__: copy.deepcopy(schema))
        yield schema


def in_order(names: list[str], schema: dict[str, Any] = SCHEMA) -> dict[str, Any]:
    """The schema with its columns in another order, and the lists beside the history turned."""
    changed = copy.deepcopy(schema)
    changed["columns"] = {name: changed["columns"][name] for name in names}
    changed["columns"]["history"]["parallel"].reverse()
    return changed


def with_change(column: str, attribute: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(SCHEMA)
    owner = changed["columns"][column]
    *path, last = attribute.split(".")
    for key in path:
        owner = owner[key]
    owner[last] = value
    if attribute == "kind" and value in ("dense", "label", "extra"):
        changed["columns"][column] = {"kind": value}
    return changed


def scores_of(run: Path, data: Path, ranks: Any) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Metrics of the test split, and the predictions by column."""
    report = evaluate(run, str(data), "test", ranks, "cpu")
    out = data / "predictions.parquet"
    predict(run, [str(data / "test")], out, str(data), ranks, "cpu")
    table = pq.read_table(out)
    names = ("prediction_liked", "prediction_bought")
    return report, {name: table[name].to_pylist() for name in names}


def test_columns_are_read_by_name_in_any_order(folder: Path, run: Path, tmp_path: Path) -> None:
    data = copy_of(folder / "data", tmp_path / "data")
    with joined_ranks("cpu") as ranks:
        old_scores = scores_of(run, data, ranks)
        write_schema(data, in_order(sorted(COLUMNS, reverse=True)))
        assert scores_of(run, data, ranks) == old_scores
        assert list(old_scores[0]["labels"]) == ["liked", "bought"]


def test_training_goes_on_with_columns_in_another_order(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    data, tests = copy_of(folder / "data", tmp_path / "data"), []
    config = config_of(folder, *ARGV, "--epochs", "2")
    with joined_ranks("cpu") as ranks:
        for schema in (SCHEMA, in_order(sorted(COLUMNS))):
            write_schema(data, schema)
            longer = copy_of(run, tmp_path / f"run-{len(tests)}")
            tests.append(train(config, str(data), longer, ranks)["test"])
        assert tests[0] == tests[1]
        write_schema(data, with_change("genres", "vocabulary.seed", 0))
        with pytest.raises(
            ValueError, match=r"column 'genres' vocabulary.seed \(run: 1, data: 0\)"
        ):
            train(config, str(data), longer, ranks)
        extended = copy.deepcopy(SCHEMA)
        extended["columns"]["shipping"] = {"kind": "dense"}
        write_schema(data, extended)
        with pytest.raises(ValueError, match="column 'shipping'"):
            train(config, str(data), longer, ranks)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}.{change[1]}")
@pytest.mark.usefixtures("trained")
def test_a_change_of_meaning_is_refused_with_column_and_attribute(
    run: Path, tmp_path: Path, change: tuple[str, str, Any]
) -> None:
    write_schema(tmp_path, with_change(*change))
    column, attribute, _ = change
    with pytest.raises(ValueError, match=rf"column '{column}'.* {re.escape(attribute)}"):
        schema_of_data(run, Location.of(tmp_path), ranks_of(0, 1))


@pytest.mark.parametrize("column", ["user", "friends", "genres", "item", "history"])
def test_ids_of_another_type_than_in_training_are_refused(
    folder: Path, run: Path, tmp_path: Path, column: str
) -> None:
    data = copy_of(folder / "data", tmp_path / "data")
    rewrite(data / "test", lambda table: with_other_type(table, column))
    schema = schema_of_data(run, Location.of(data), ranks_of(0, 1))
    with pytest.raises(ValueError, match=rf"test/part-0.parquet: column '{column}'.*(int|string)"):
        ParquetRows.of_split(Location.of(data), "test", schema)


def test_ranks_that_read_ids_of_two_types_agree_that_neither_goes_on(trained: Schema) -> None:
    schema = copy.deepcopy(trained)
    other = {"genres": IdType("string", "part-1.csv")}
    ranks = SimpleNamespace(gather=lambda mine: [mine, other])
    with pytest.raises(ValueError, match=r"part-1\.csv: .*string.*'genres'.* integer"):
        agree_on_id_types(schema, cast(Ranks, ranks))
    del schema.id_types["genres"]
    agree_on_id_types(schema, cast(Ranks, ranks))
    assert schema.id_types["genres"].name == "string"
