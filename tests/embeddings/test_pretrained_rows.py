"""Pretrained vectors end in the right rows of the right shards, or in an error with their place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from embeddings import pretrained
from embeddings.pretrained import LoadedRows, PretrainedFiles, load_pretrained_rows
from embeddings.vocabulary.fixed import ExactVocabulary
from tests.embeddings.tables_model import (
    DIM,
    SEED,
    TablesModel,
    full_table,
    initial_tables,
    local_shards,
    sharded_model,
    table_configs,
)
from tests.ranks import run_on_ranks

SHARDINGS = ["row_wise", "table_wise", "column_wise"]
# Of the ten rows of `user` and the seven of `item`, in no order.
IDS = {"user": [8, 0, 3, 9, 5], "item": [6, 1, 2]}


def vectors(ids: list[int]) -> np.ndarray:
    """A vector per id that no other id and no other column shares a number with, [N, D]."""
    return np.array(ids)[:, None] * 100.0 + np.arange(DIM)


def write(path: Path, ids: Any, values: Any, row_group_size: int = 2, **other_columns: Any) -> str:
    """One file; ``values`` as nested lists or as an Arrow array."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    columns = {"id": ids, "vector": values, **other_columns}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def expected(table: str) -> Tensor:
    """The table with the vectors of IDS, and its initial weights in the other rows."""
    weights = initial_tables()[table]
    weights[IDS[table]] = torch.tensor(vectors(IDS[table]), dtype=torch.float32)
    return weights


def model_with_tables() -> TablesModel:
    torch.manual_seed(SEED)
    return TablesModel(table_configs(), device="cpu")


def weights_of(model: TablesModel, table: str) -> Tensor:
    return {**model.bags.embedding_bags, **model.sequences.embeddings}[table].weight.detach()


def load(path: str | list[str], rows_of_ids: Any = None, **options: Any) -> LoadedRows:
    paths = [path] if isinstance(path, str) else path
    files = PretrainedFiles(paths, **options)
    return load_pretrained_rows(model_with_tables(), "user", files, rows_of_ids)


# On ranks


def write_files(folder: Path) -> None:
    for table, ids in IDS.items():
        (folder / table).mkdir()
        values = vectors(ids)
        write(folder / table / "0.parquet", ids[:2], values[:2])
        fixed = pa.FixedSizeListArray.from_arrays(values[2:].astype(np.float32).ravel(), DIM)
        write(folder / table / "1.parquet", ids[2:], fixed)
    write(folder / "twice.parquet", [9, 4, 9], vectors([9, 4, 9]))


def load_all_cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    return {sharding: load_case(sharding, Path(folder)) for sharding in SHARDINGS}


def load_case(sharding: str, folder: Path) -> dict[str, Any]:
    model = sharded_model(table_configs(sharding))  # type: ignore[arg-type]
    counts = {
        table: load_pretrained_rows(
            model, table, PretrainedFiles([str(folder / table / f"{i}.parquet") for i in range(2)])
        )
        for table in IDS
    }
    shards = local_shards(model)
    try:
        load_pretrained_rows(model, "user", PretrainedFiles([str(folder / "twice.parquet")]))
    except ValueError as raised:
        return {"counts": counts, "shards": shards, "error": str(raised)}
    return {"counts": counts, "shards": shards, "error": None}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pretrained")
    write_files(folder)
    return run_on_ranks(load_all_cases, 3, str(folder))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_get_their_vectors_under_every_plan(ranks: list[Any], sharding: str) -> None:
    for table, ids in IDS.items():
        shards = [shard for rank in ranks for shard in rank[sharding]["shards"][table]]
        assert torch.equal(full_table(shards), expected(table))
        for rank in ranks:
            assert rank[sharding]["counts"][table] == LoadedRows(len(ids), 0)
    untouched = [shard for rank in ranks for shard in rank[sharding]["shards"]["tags"]]
    assert torch.equal(full_table(untouched), initial_tables()["tags"])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_row_that_is_set_twice_is_an_error_where_it_lies(ranks: list[Any], sharding: str) -> None:
    for rank in ranks:
        shards = rank[sharding]["shards"]["user"]
        holds_row_9 = any(row <= 9 < row + len(shard) for (row, _), shard in shards)
        error = rank[sharding]["error"]
        assert (error is not None) == holds_row_9
        assert error is None or "column 'id', row 2: id 9: row 9 of table 'user'" in error
    assert any(rank[sharding]["error"] for rank in ranks)


# Reading


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, DIM)])
def test_lists_of_every_kind_of_float_are_read(
    tmp_path: Path, kind: pa.DataType, make_list: Callable[[pa.DataType], pa.DataType]
) -> None:
    model = model_with_tables()
    values = vectors(IDS["user"]).astype(np.float16).tolist()
    path = write(tmp_path / "vectors.parquet", IDS["user"], pa.array(values, make_list(kind)))
    load_pretrained_rows(model, "user", PretrainedFiles([path]))
    assert torch.equal(weights_of(model, "user"), expected("user"))


def test_raw_ids_are_mapped_and_unknown_ones_left_out(tmp_path: Path) -> None:
    vocabulary = ExactVocabulary(10)
    vocabulary.extend([pa.array(list("abcdefghi"))])  # row 9 is that of unknown ids
    names, rows = ["h", "a", "nobody", "d", "i", "f"], [7, 0, 4, 3, 8, 5]
    path = write(tmp_path / "vectors.parquet", names, vectors(rows))
    model, files = model_with_tables(), PretrainedFiles([path])
    assert load_pretrained_rows(model, "user", files, vocabulary.find) == LoadedRows(5, 1)
    weights, mapped = initial_tables()["user"], [7, 0, 3, 8, 5]
    weights[mapped] = torch.tensor(vectors(mapped), dtype=torch.float32)
    assert torch.equal(weights_of(model, "user"), weights)
    with pytest.raises(ValueError, match="6 ids"):
        load(path, ExactVocabulary(10).find)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    columns = {"movie": [1], "embedding": vectors([1]).tolist(), "id": ["unrelated"]}
    pq.write_table(pa.table(columns), tmp_path / "vectors.parquet")
    path = str(tmp_path / "vectors.parquet")
    assert load(path, id_column="movie", vector_column="embedding") == LoadedRows(1, 0)


def test_of_several_tables_in_a_file_only_the_own_rows_are_read(tmp_path: Path) -> None:
    # The first row group holds both tables, the second none of the own, the third only own rows.
    tables = ["user", "item", "item", "item", "user", "user"]
    ids = [3, 900, 901, 902, 5, 6]
    path = write(tmp_path / "tables.parquet", ids, vectors(ids), table=tables)
    assert load(path) == LoadedRows(3, 0)
    with pytest.raises(ValueError, match=r"row 1: id 900 is outside \[0, 10\)"):
        load(path, table="item")
    with pytest.raises(ValueError, match=r"table 'user'.*'city'"):
        load(path, table="city")


# Errors

GOOD = vectors([1, 2, 3]).tolist()


def with_number(value: float | None) -> pa.Array:
    """Three vectors, one number of the last one replaced."""
    return pa.array([*GOOD[:2], [*GOOD[2][:-1], value]], pa.list_(pa.float64()))


WRONG_IDS = [
    ([1, None, 3], r"column 'id', row 1: null"),
    ([1, 2, -1], r"column 'id', row 2: id -1 is outside \[0, 10\)"),
    ([1, 2, 10], r"column 'id', row 2: id 10 is outside \[0, 10\).*raise num_embeddings"),
    (pa.array([1, 2**64 - 1, 3], pa.uint64()), "row 1: id 18446744073709551615 is outside"),
    ([1, 2, 1], r"row 2: id 1: row 1 of table 'user' "),
    ([3, 3, 1], r"row 1: id 3: row 3 of table 'user' "),
    (["1", "2", "3"], "column 'id'.*string"),
]
WRONG_VECTORS = [
    ([GOOD[0], [1.0, 2.0], GOOD[1]], r"column 'vector', row 1: vectors of 2 numbers .* of dim"),
    (
        pa.array([[1.0] * 4] * 3, pa.list_(pa.float32(), 4)),
        "column 'vector', row 0: vectors of 4 n",
    ),
    ([GOOD[0], GOOD[1], None], r"column 'vector', row 2: null"),
    (with_number(None), r"column 'vector', row 2: value None"),
    (with_number(float("nan")), r"column 'vector', row 2: value nan"),
    (with_number(1e300), r"column 'vector', row 2: value 1e\+300; .*fits float32"),
    ([[1] * DIM] * 3, "column 'vector'.*list<.*int64>"),
    ([1.0, 2.0, 3.0], "column 'vector'.*double"),
]


@pytest.mark.parametrize("block_bytes", [2**24, 1])
@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [(ids, GOOD, message) for ids, message in WRONG_IDS]
    + [([1, 2, 3], values, message) for values, message in WRONG_VECTORS],
)
def test_what_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_bytes: int,
    ids: Any,
    values: Any,
    message: str,
) -> None:
    monkeypatch.setattr(pretrained, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "vectors.parquet", ids, values)
    with pytest.raises(ValueError, match=f"vectors.parquet: .*{message}"):
        load(path)


def test_a_number_beyond_the_type_of_the_table_is_refused(tmp_path: Path) -> None:
    model = TablesModel(table_configs(precision="fp16"), "cpu")
    largest = torch.finfo(torch.float16).max
    path = write(tmp_path / "vectors.parquet", [1, 2], [[largest] * DIM, [1e5] * DIM])
    with pytest.raises(ValueError, match=r"row 1: value 100000\.0; .*fits float16"):
        load_pretrained_rows(model, "user", PretrainedFiles([path]))


def test_an_id_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{row}.parquet", [row, 5], vectors([1, 2])) for row in (0, 1)]
    with pytest.raises(ValueError, match=r"1\.parquet: column 'id', row 1: id 5"):
        load(paths)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    empty = pa.array([], pa.list_(pa.float32()))
    cases: list[tuple[str | list[str], str]] = [
        (str(tmp_path / "absent.parquet"), "absent.parquet: "),
        (str(tmp_path / "text.parquet"), "text.parquet: .*Parquet"),
        (write(tmp_path / "empty.parquet", pa.array([], pa.int64()), empty), "table 'user'"),
        ([], "no files: .*'user'"),
        (write(tmp_path / "kind.parquet", [1], GOOD[:1], table=[7]), "column 'table'"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            load(path)
    path = write(tmp_path / "good.parquet", [1], GOOD[:1])
    with pytest.raises(ValueError, match=r"column 'movie' is missing.*\['id', 'vect"):
        load(path, id_column="movie")


def test_a_table_that_is_absent_or_on_meta_is_refused(tmp_path: Path) -> None:
    files = PretrainedFiles([write(tmp_path / "vectors.parquet", [1], GOOD[:1])])
    with pytest.raises(ValueError, match=r"'city'.*\['user'"):
        load_pretrained_rows(model_with_tables(), "city", files)
    with pytest.raises(ValueError, match=r"'user'.* meta"):
        load_pretrained_rows(TablesModel(table_configs()), "user", files)
