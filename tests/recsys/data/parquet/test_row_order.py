"""An epoch is read exactly once, whatever ranks continue it."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from recsys.data.batch_builder import BatchBuilder
from recsys.data.interactions import Interactions, loader
from recsys.data.parquet.rows import ParquetRows
from recsys.data.row_source import Stage
from recsys.data.schema import load_schema
from recsys.storage.location import Location
from tests.datasets import write_dataset


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
    whole = read(rows, [stage])
    assert len(whole[0]) >= 7
    assert read(rows, [stage], num_read) == [batches[num_read:] for batches in whole]


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
    assert [fresh.batches_until(part, 4) for part in (1, 2, 3, 4)] == [15, 30, 45, 61]
    fresh.begin(0, [Stage(1, 1, 20)])
    assert [fresh.batches_until(part, 4) for part in (1, 2, 3, 4)] == [0, 10, 25, 41]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_windows_end_where_long_histories_make_them_large(
    rows: ParquetRows, seed: int | None, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(world_size, 4, 0)
    largest = max(group.num_bytes for group in rows.row_groups)
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_ROWS", 1000)
    by_rows = share(rows, 0, stage, seed).share.slices
    monkeypatch.setattr("recsys.data.row_source.SHUFFLE_BYTES", largest)
    by_bytes = share(rows, 0, stage, seed).share.slices
    assert len(by_rows) == 1
    assert sum(map(len, by_bytes)) == len(by_rows[0])
    # No two row groups of about equal size fit together.
    assert max(map(len, by_bytes)) <= 11
    counts = Counter(place for batches in read(rows, [stage]) for part in batches for place in part)
    counts.pop(-1, None)
    assert counts == Counter(range(61))
