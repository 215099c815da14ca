"""An error that one rank sees ends every rank, with the cause; none is left waiting."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.config import load_config
from recsys.distributed.ranks import Ranks
from recsys.training.train import train
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.command_runs import TINY, run_recsys, train_words


def change_column(file: Path, name: str, change: Callable[[list], None]) -> None:  # type: ignore[type-arg]
    """Writes a Parquet file again with one column changed in place."""
    table = pq.read_table(file)
    values = table[name].to_pylist()
    change(values)
    index = table.column_names.index(name)
    column = pa.array(values, table.schema.field(name).type)
    pq.write_table(table.set_column(index, name, column), file, row_group_size=11)


def a_bad_id_in_the_last_validation_row(data: Path) -> None:
    """Only rank 1 reads it, after both ranks have trained an epoch."""

    def change(values: list) -> None:  # type: ignore[type-arg]
        values[-1] = 77

    change_column(data / "valid" / "part-0.parquet", "item", change)


def a_table_for_a_million_machines(data: Path) -> None:
    schema = data / "schema.yaml"
    schema.write_text(schema.read_text().replace("num_embeddings: 5}", "num_embeddings: 10**14}"))
    schema.write_text(schema.read_text().replace("10**14", str(10**14)))


CASES: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "bad id in validation": (
        a_bad_id_in_the_last_validation_row,
        [],
        ["valid/part-0.parquet", "column 'item', row 24", "id 77 is outside [0, 30)"],
    ),
    "does not fit": (
        a_table_for_a_million_machines,
        [],
        ["the tables do not fit", "'genres'"],
    ),
}


def messages_of_training(
    rank: int, world_size: int, folder: Path, words: dict[str, list[str]]
) -> dict[str, tuple[str, str]]:
    """By case: what this rank raised, type and message."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    raised = {}
    for case, extra in words.items():
        config = load_config(TINY, ["--cache", str(folder / case / "cache"), *extra])
        try:
            train(config, str(folder / case / "data"), folder / case / "run", ranks)
        except Exception as error:
            raised[case] = (type(error).__name__, str(error))
    return raised


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    for case, (spoil, _, _) in CASES.items():
        spoil(write_dataset(folder / case / "data", {"train": 61, "valid": 25, "test": 23}))
    return folder


@pytest.fixture(scope="module")
def raised(folder: Path) -> list[dict[str, tuple[str, str]]]:
    words = {case: ["--batch_size", "8", *extra] for case, (_, extra, _) in CASES.items()}
    return run_on_ranks(messages_of_training, 2, folder, words)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_raises_the_cause(raised: list[dict[str, tuple[str, str]]], case: str) -> None:
    for rank in raised:
        kind, message = rank[case]
        assert kind == "ValueError"
        for part in CASES[case][2]:
            assert part in message


def test_the_command_ends_with_the_cause_from_each_rank_before_anything_is_written(
    folder: Path,
) -> None:
    """Rank 1 alone meets the bad row, in a split that is read after the first training steps."""
    case = "bad id in validation"
    out = folder / "command"
    process = run_recsys(*train_words(folder / case / "data", out), ranks=2)
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if "error: " in line and "id 77" in line]
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
