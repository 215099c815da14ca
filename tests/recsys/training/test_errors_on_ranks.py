"""An error that one rank sees ends every rank, with the cause; none is left waiting."""

from pathlib import Path

import pyarrow as pa
import torch

from recsys.config import load_config
from recsys.distributed.ranks import Ranks
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, run_recsys, train_words
from tests.recsys.weighted_data import table_of, write_split


def test_the_command_ends_with_the_cause_from_each_rank_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """Rank 1 alone meets the bad row, in a split that is read after the first training steps."""
    data = write_dataset(tmp_path / "data", {"train": 61, "valid": 25, "test": 23})
    rows = table_of(data, "valid")
    items = pa.array([*rows["item"].to_pylist()[:-1], 77])
    write_split(data, "valid", rows.set_column(rows.column_names.index("item"), "item", items))
    out = tmp_path / "run"

    process = run_recsys(*train_words(data, out), ranks=2)

    assert process.returncode != 0
    cause = "valid/part-0.parquet: column 'item', row 24: id 77 is outside [0, 30)"
    lines = [line for line in process.stderr.splitlines() if "error: " in line and cause in line]
    assert any(line.startswith("rank 0: error: rank 1: ") for line in lines), process.stderr
    assert any(line.startswith("rank 1: error: ") for line in lines), process.stderr
    assert not out.exists()


UNEVEN = (3, 13, 14)


def train_unevenly(rank: int, world_size: int, folder: Path) -> list[tuple[int, int]]:
    """Steps, and rows validated, for each number of training rows."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    words = ["--batch_size", "4", "--cache", str(folder / "cache"), "--device", "cpu"]
    config = load_config(TINY, words)
    results = []
    for rows in UNEVEN:
        metrics = train(config, str(folder / str(rows)), folder / f"run-{rows}", ranks)
        results.append((metrics["train"]["steps"], metrics["valid"]["num_samples"]))
    return results


def test_three_ranks_finish_whatever_the_number_of_rows(tmp_path: Path) -> None:
    """Shares of one row each; of 5, 4 and 4, where 5 are two batches and 4 one; of 5, 5 and 4.
    The test split has fewer rows than ranks."""
    for rows in UNEVEN:
        write_dataset(tmp_path / str(rows), {"train": rows, "valid": 13, "test": 2})
    for result in run_on_ranks(train_unevenly, 3, tmp_path):
        assert result == [(1, 13), (2, 13), (2, 13)]
