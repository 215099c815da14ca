"""Rows of Parquet files: their order, their ranges, and files that are replaced meanwhile."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.checkpoint.compatibility import check_equal
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions, loader
from recsys.data.parquet.file import open_parquet, rows_digest
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION
from recsys.data.row_source import Stage
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset, write_parquet
from tests.recsys.data.parquet.four_rows import open_rows, read_all, schema_of, table_of


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ParquetRows:
    """61 rows in two files and row groups of 11, shuffled in windows of about 15."""
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_ROWS", 15)
    root = Location.of(write_dataset(tmp_path, {"train": 61}))
    return ParquetRows.of_split(root, "train", load_schema(root))


def share(rows: ParquetRows, rank: int, stage: Stage, seed: int | None = 5) -> Interactions:
    build = BatchBuilder(rows.schema, ["user"])
    return Interactions(rows, build, stage.batch_size, rank, stage.world_size, seed)


def read(rows: ParquetRows, stages: list[Stage], first_batch: int = 0) -> list[list[list[int]]]:
    """By rank the positions of its batches in the last stage, after the stages before it."""
    *earlier, last = stages
    positions = []
    for rank in range(last.world_size):
        interactions = share(rows, rank, last)
        interactions.begin(3, earlier, first_batch)
        positions.append([batch.rows.positions.tolist() for batch in interactions])
    return positions


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_read", [0, 1, 4, 7])
def test_the_rest_of_a_share_is_what_an_uninterrupted_one_reads_after_it(
    rows: ParquetRows, world_size: int, num_read: int
) -> None:
    stage = Stage(world_size, 3, 0)
    full = read(rows, [stage])
    assert len(full[0]) >= 7
    assert read(rows, [stage], num_read) == [batches[num_read:] for batches in full]


@pytest.mark.parametrize(
    "stages",
    [
        [Stage(1, 4, 5), Stage(2, 4, 0)],
        [Stage(2, 4, 3), Stage(1, 7, 0)],
        [Stage(3, 5, 2), Stage(2, 3, 4), Stage(3, 2, 1), Stage(1, 8, 0)],
        [Stage(2, 4, 8), Stage(3, 4, 0)],  # nothing is left
        [Stage(2, 4, 0), Stage(3, 4, 0)],  # nothing was done
    ],
)
def test_continued_on_other_ranks_an_epoch_is_still_read_exactly_once(
    rows: ParquetRows, stages: list[Stage]
) -> None:
    counts: Counter[int] = Counter()
    for index, stage in enumerate(stages):
        ranks = read(rows, stages[: index + 1])
        assert len({tuple(map(len, batches)) for batches in ranks}) == 1
        last = index == len(stages) - 1
        for batches in ranks:
            for batch in batches if last else batches[: stage.batches]:
                counts.update(position for position in batch if position >= 0)
    assert counts == Counter(range(61))


def test_loader_threads_continue_in_the_same_place(rows: ParquetRows) -> None:
    stage = Stage(2, 4, 0)
    interactions = share(rows, 1, stage)
    interactions.begin(3, [Stage(3, 4, 2)], 2)
    expected = [batch.rows.positions for batch in interactions]
    loaded = [batch.rows.positions for batch in loader(interactions, 2, False)]
    assert len(loaded) == len(interactions) == len(expected) > 2
    assert all(torch.equal(one, other) for one, other in zip(loaded, expected, strict=True))


def test_parts_of_an_epoch_end_at_the_same_rows_whatever_was_done_before(rows: ParquetRows) -> None:
    fresh = share(rows, 0, Stage(1, 1, 0))
    assert [fresh.batches_until(segment, 4) for segment in (1, 2, 3, 4)] == [15, 30, 45, 61]
    fresh.begin(0, [Stage(1, 1, 20)])
    assert [fresh.batches_until(segment, 4) for segment in (1, 2, 3, 4)] == [0, 10, 25, 41]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_end_where_long_histories_make_them_large(
    rows: ParquetRows, seed: int | None, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(world_size, 4, 0)
    largest = max(group.num_bytes for group in rows.row_groups)
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_ROWS", 1000)
    by_rows = share(rows, 0, stage, seed).slices
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_BYTES", largest)
    by_bytes = share(rows, 0, stage, seed).slices
    assert len(by_rows) == 1
    assert sum(map(len, by_bytes)) == len(by_rows[0])
    # No two row groups of about equal size fit together.
    assert max(map(len, by_bytes)) <= 11
    counts = Counter(row for batches in read(rows, [stage]) for batch in batches for row in batch)
    counts.pop(-1, None)
    assert counts == Counter(range(61))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose train split a test writes itself."""
    return write_dataset(tmp_path / "data", num_rows={})


def test_labels_may_lack_where_none_are_wanted(dataset: Path) -> None:
    table = table_of().drop_columns(["liked"])
    with pytest.raises(ValueError, match="column 'liked' is missing"):
        open_rows(dataset, table)
    file = Location.of(dataset / "train" / "part-0.parquet")
    rows = ParquetRows([file], schema_of(dataset), with_labels=False)
    assert "liked" not in read_all(rows)


@pytest.mark.skipif(
    int(pa.__version__.split(".")[0]) < 26, reason="pyarrow writes such a file from 26 on"
)
def test_lists_of_one_size_keep_their_values_and_nulls(dataset: Path) -> None:
    genres = pa.array([[0, 1], None, [2, 3], [4, 0]], pa.list_(pa.int32(), 2))
    rows = open_rows(dataset, table_of(genres=genres), row_group_size=3)
    assert read_all(rows)["genres"] == [[0, 1], None, [2, 3], [4, 0]]


def test_a_shuffle_keeps_each_row_whole_and_differs_by_seed_and_epoch(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, {"train": 60})
    rows = ParquetRows.of_split(Location.of(root), "train", schema_of(root))
    straight = {row[ROW_POSITION]: row for table in rows.read(0, 60) for row in table.to_pylist()}

    def order(seed: int, epoch: int) -> list[int]:
        read = [row for table in rows.read(0, 60, (seed, epoch)) for row in table.to_pylist()]
        assert all(row == straight[row[ROW_POSITION]] for row in read)
        return [row[ROW_POSITION] for row in read]

    first = order(0, 0)
    assert sorted(first) == list(range(60))
    assert order(0, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Rows of different row groups are mixed, not only the groups put in another order.
    neighbours = np.abs(np.diff(first)) == 1
    assert neighbours.mean() < 0.2


def test_hidden_files_and_files_of_other_endings_are_no_data(dataset: Path) -> None:
    for name in (".part-9.parquet", "_part-9.parquet", "_SUCCESS", "notes.txt"):
        (dataset / "train" / name).parent.mkdir(exist_ok=True)
        (dataset / "train" / name).write_text("not Parquet")
    assert open_rows(dataset, table_of()).num_rows == 4


def test_folders_may_have_names_that_look_like_patterns(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data [v1] *", {"train": 5})
    assert ParquetRows.of_split(Location.of(root), "train", schema_of(root)).num_rows == 5


def replace_values(root: Location, column: str) -> None:
    """Other values in the first training file, none encoded longer or shorter than before."""
    file = root / "train/part-0.parquet"
    with file.filesystem.open(file.path, "rb") as opened:
        table = pq.read_table(opened)
    values = 1 - table[column].to_numpy()
    table = table.set_column(table.column_names.index(column), column, pa.array(values))
    write(table, file)


def write(table: pa.Table, file: Location) -> None:
    with file.filesystem.open(file.path, "wb") as opened:
        pq.write_table(table, opened, row_group_size=11, compression="none", use_dictionary=False)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    write_dataset(tmp_path / "data")
    for file in (tmp_path / "data" / "train").glob("*.parquet"):
        write(pq.read_table(file), Location.of(file))
    if request.param == "local":
        return Location.of(tmp_path / "data")
    root = Location.of(f"memory://replaced-{tmp_path.name}")
    root.filesystem.put(f"{tmp_path}/data", root.path, recursive=True)
    return root


def rows_of(root: Location) -> ParquetRows:
    return ParquetRows.of_split(root, "train", load_schema(root))


def test_other_values_of_equal_size_have_another_fingerprint(root: Location) -> None:
    old_rows = rows_of(root)
    again = rows_of(root).fingerprint()
    replace_values(root, "price")
    new_rows = rows_of(root)
    assert [group.num_bytes for group in new_rows.chunks] == [g.num_bytes for g in old_rows.chunks]
    assert old_rows.fingerprint() == again != new_rows.fingerprint()
    with pytest.raises(ValueError, match="training data"):
        check_equal("the training data", again, new_rows.fingerprint(), "step-1")


def test_exchanged_labels_have_another_fingerprint_whatever_the_footer(root: Location) -> None:
    file = (root / "train").files(".parquet")[0]
    with file.filesystem.open(file.path) as opened:
        table = pq.read_table(opened)
    (name,) = load_schema(root).of_kind("label")
    ones = [0.0, 1.0] * (len(table) // 2) + [0.0] * (len(table) % 2)
    digests, fingerprints = [], []
    for labels in (ones, [*ones[:2], *ones[3:], ones[2]]):
        index = table.column_names.index(name)
        with file.filesystem.open(file.path, "wb") as opened:
            pq.write_table(table.set_column(index, name, pa.array(labels)), opened)
        with open_parquet(file) as parquet:
            digests.append(rows_digest(file, parquet))
        fingerprints.append(rows_of(root).fingerprint())
    assert digests[0] == digests[1] and fingerprints[0] != fingerprints[1]


def test_a_file_replaced_while_it_is_in_use_is_refused_by_name(root: Location) -> None:
    rows = rows_of(root)
    assert next(rows.read(0, 60)).num_rows == 60
    replace_values(root, "price")
    with pytest.raises(ValueError, match=r"train/part-0\.parquet"):
        next(rows.read(0, 60))
    assert np.isfinite(next(rows.read(30, 60))["price"].to_numpy()).all()  # the other file


def test_rows_without_a_group_differ_between_folders_of_training_rows(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    schema = dataset / "schema.yaml"
    kind = "num_embeddings: 10, vocabulary: {kind: hash}"
    schema.write_text(schema.read_text().replace("num_embeddings: 10", kind, 1))
    groups = []
    for folder in ("train/day=1", "train/day=2"):
        table = table_of(user=pa.array([None, 4, None, None], pa.int64()))
        write_parquet(dataset / folder / "part-0.parquet", table)
        rows = ParquetRows.of_split(Location.of(dataset), folder, schema_of(dataset))
        groups += read_all(rows)[RAW_GROUP]
    assert groups[1] == groups[5] and len(set(groups)) == 1 + 6
