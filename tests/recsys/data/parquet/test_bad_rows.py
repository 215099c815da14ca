"""With `on_bad_row: skip`, rows that cannot be used are left out, counted once and told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import load_config
from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions
from recsys.data.item_frequency import count_items
from recsys.data.parquet.rows import ParquetRows
from recsys.data.parquet.values import ROW_POSITION
from recsys.data.schema import load_schema
from recsys.distributed.log import configure_logging
from recsys.distributed.ranks import Ranks, joined_ranks
from recsys.evaluation.predict import evaluate, predict
from recsys.storage.location import Location
from recsys.training.train import train
from tests.datasets import write_dataset, write_parquet
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY
from tests.recsys.data.bad_impressions import VALUES, replace_column
from tests.recsys.data.parquet.bad_files import damaged_page
from tests.recsys.data.parquet.four_rows import COLUMNS, read_all, table_of

NAN = float("nan")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", num_rows={})


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A job of this process, whose log goes to standard output."""
    with joined_ranks("cpu") as ranks:
        configure_logging()
        yield ranks


def skipping(dataset: Path, split: str = "train", **options: Any) -> ParquetRows:
    root = Location.of(dataset)
    return ParquetRows.of_split(root, split, load_schema(root), on_bad_row="skip", **options)


def write_four(dataset: Path, row_group_size: int = 2, **replaced: list[Any]) -> Path:
    """Four good impressions but for these columns."""
    arrays = {name: pa.array(values, COLUMNS[name][1]) for name, values in replaced.items()}
    path = dataset / "train" / "part-0.parquet"
    return write_parquet(path, table_of(**arrays), row_group_size)


def entry(file: Path, column: str, reason: str, rows: int, first_row: int) -> dict[str, Any]:
    location = {"file": str(file), "column": column, "reason": reason}
    return location | {"rows": rows, "first_row": first_row}


def test_a_padding_row_stands_where_the_bad_one_was(dataset: Path) -> None:
    write_four(dataset, user=[0, None, 2, 3], price=[0.5, 1.5, NAN, 4])
    rows = read_all(skipping(dataset))
    assert rows.pop(ROW_POSITION) == [0, -1, -1, 3]
    for name, values in rows.items():
        good = COLUMNS[name][0]
        padding: Any = [] if isinstance(good[0], list) else 0
        assert values == [good[0], padding, padding, good[3]], name


def test_rows_are_counted_by_file_column_and_reason_with_the_first_of_them(
    dataset: Path, alone: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_four(dataset, price=[0.5, NAN, NAN, 4.0], genres=[[0], [1], [2], [7, 5]])
    rows = skipping(dataset)
    count_items(rows, 0, 1)
    assert rows.skipped(alone, "train") == {
        "rows": 3,
        "found": [
            entry(file, "genres", "id outside [0, 5)", 1, 3),
            entry(file, "price", "not finite", 2, 1),
        ],
    }
    assert capsys.readouterr().out.splitlines() == [
        "skipped 3 rows of train:",
        f"  {file} column 'genres': id outside [0, 5) (1 row, first: row 3)",
        f"  {file} column 'price': not finite (2 rows, first: row 1)",
    ]


def test_items_of_skipped_rows_are_not_counted_as_seen(dataset: Path) -> None:
    write_four(dataset, item=[5, 6, 6, 8], price=[NAN, 1.0, NAN, 1.0])
    assert count_items(skipping(dataset), 0, 1).items.tolist() == [6, 8]


def test_a_row_group_that_cannot_be_read_is_skipped_whole(tmp_path: Path, alone: Ranks) -> None:
    data = write_dataset(tmp_path / "data", {"train": 61})
    damaged_page(data)
    rows = skipping(data)
    positions = read_all(rows)[ROW_POSITION]
    assert positions == [*range(52), *[-1] * 9]
    assert rows.skipped(alone, "train")["found"] == [
        entry(data / "train" / "part-1.parquet", "", "row group that cannot be read", 9, 22)
    ]


def test_no_usable_row_at_all_is_an_error(dataset: Path, alone: Ranks) -> None:
    file = write_four(dataset, price=[NAN] * 4)
    rows = skipping(dataset)
    read_all(rows)
    with pytest.raises(ValueError, match=f"4 rows of train.*{file} column 'price': not finite"):
        rows.skipped(alone, "train")


@pytest.mark.parametrize("case", VALUES)
def test_whatever_is_an_error_in_a_row_can_be_skipped(tmp_path: Path, case: str) -> None:
    data = write_dataset(tmp_path / "data", {"train": 61, "valid": 25, "test": 23})
    VALUES[case].spoil(data)
    lost = 0
    for split in ("train", "valid", "test"):
        rows = skipping(data, split)
        positions = np.array(read_all(rows)[ROW_POSITION])
        lost += int((positions < 0).sum())
        assert (positions[:-1] == np.arange(len(positions) - 1)).all()
    assert lost == 1


def test_a_run_trains_on_the_other_rows_and_says_what_it_skipped(
    tmp_path: Path, alone: Ranks
) -> None:
    data = write_dataset(tmp_path / "data", {"train": 61, "valid": 25, "test": 23})
    VALUES["NaN"].spoil(data)
    VALUES["bad row in validation"].spoil(data)
    run, out = tmp_path / "run", tmp_path / "predictions.parquet"
    argv = ["--batch_size", "16", "--content", "none", "--on_bad_row", "skip"]
    metrics = train(load_config(TINY, argv), str(data), run, alone)
    skipped = metrics["skipped_rows"]
    assert [skipped[split]["rows"] for split in ("train", "valid", "test")] == [1, 1, 0]
    assert metrics["valid"]["num_samples"] == 24
    assert metrics["test"]["num_samples"] == 23
    predict(run, [str(data / "valid")], out, None, alone, "cpu")
    predictions = pq.read_table(out)["prediction_liked"].to_pylist()
    assert [prediction is None for prediction in predictions] == [False] * 24 + [True]

    replace_column("price", pa.array([NAN] * 23, pa.float32()), "test/part-0.parquet", data)
    with pytest.raises(ValueError, match=r"23 rows of test.*part-0\.parquet column 'price'"):
        evaluate(run, None, "test", alone, "cpu")


def batches_of_rank(rank: int, world_size: int, data: Path) -> tuple[list[int], list[int], Any]:
    """Sizes of this rank's batches, positions of its rows, and the counts of all ranks."""
    root = Location.of(data)
    schema = load_schema(root)
    rows = skipping(data)
    build = BatchBuilder(schema, ["user", "genres"])
    batches = list(Interactions(rows, build, 8, rank, world_size, seed=0))
    positions = torch.cat([batch.rows.positions for batch in batches])
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    skipped = rows.skipped(ranks, "train")
    return [batch.batch_size for batch in batches], positions.tolist(), skipped


def test_all_ranks_make_equal_batches_and_tell_one_count(tmp_path: Path) -> None:
    """The bad rows lie in two row groups, which one rank or both read, as the seed decides."""
    data = write_dataset(tmp_path / "data", {"train": 122})
    file = data / "train" / "part-0.parquet"
    prices = pq.read_table(file)["price"].to_pylist()
    prices[20:30] = [NAN] * 10
    replace_column("price", pa.array(prices, pa.float32()), "train/part-0.parquet", data)
    results = run_on_ranks(batches_of_rank, 2, data)
    assert results[0][0] == results[1][0]
    usable = [position for _, positions, _ in results for position in positions if position >= 0]
    assert sorted(usable) == [*range(20), *range(30, 122)]
    for _, _, skipped in results:
        assert skipped == {"rows": 10, "found": [entry(file, "price", "not finite", 10, 20)]}
