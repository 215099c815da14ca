"""Several processes fill one cache: ranks, machines, and jobs at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recsys.content.cache import fill as frozen_cache
from recsys.content.cache.fill import cache_frozen_outputs
from recsys.distributed.ranks import Ranks
from tests.datasets import write_dataset
from tests.ranks import run_on_ranks
from tests.recsys.content.cache.frozen_outputs import (
    NUM_ITEMS,
    TEXT,
    WITH_TEXT,
    Interrupted,
    Watched,
    assert_nothing_else_is_left,
    assert_same_outputs,
    encoder_of,
    expected_outputs,
    fill,
    outputs,
    parts_in,
    store_of,
)


def fill_as_job_of_one(rank: int, world_size: int, dataset: Path) -> dict[str, Any]:
    """Each process is a job by itself, at the same time as the others."""
    frozen_cache.ITEMS_PER_CALL = 2
    groups = [dist.new_group([other]) for other in range(world_size)]
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), groups[rank])
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    dist.barrier()
    cache_frozen_outputs(store, "text", encoder, ranks)
    return outputs(store, "text", encoder)


def test_several_jobs_fill_one_folder_at_once(dataset: Path) -> None:
    store_of(dataset, "text", TEXT)
    expected = expected_outputs(dataset)
    for cached in run_on_ranks(fill_as_job_of_one, 2, dataset):
        assert_same_outputs(cached, expected)
    assert_nothing_else_is_left(dataset)


def fill_as_machine(
    rank: int, world_size: int, folders: list[list[Path]]
) -> list[tuple[int, dict[str, Any]]]:
    """Each rank is the only one of its machine; for each case, the items it encoded and outputs."""
    frozen_cache.ITEMS_PER_CALL = 2
    ranks = Ranks(rank, world_size, 0, 1, torch.device("cpu"))
    results = []
    for datasets in folders:
        store, encoder = store_of(datasets[rank], "text", TEXT), encoder_of("text", TEXT)
        watched = Watched(encoder)
        report = cache_frozen_outputs(store, "text", encoder, ranks)
        assert report.encoded == sum(ranks.gather(watched.items))
        results.append((watched.items, outputs(store, "text", encoder)))
    return results


def test_machines_that_share_a_folder_share_the_work_and_others_fill_their_own(
    tmp_path: Path,
) -> None:
    names = ("shared", "of the first", "of the second")
    shared, first, second = (
        write_dataset(tmp_path / name / "data", num_items=NUM_ITEMS) for name in names
    )
    expected = expected_outputs(shared)
    ranks = run_on_ranks(fill_as_machine, 2, [[shared, shared], [first, second]])
    for (num_shared, shared_outputs), (num_separate, own_outputs) in ranks:
        assert (num_shared, num_separate) == (WITH_TEXT // 2, WITH_TEXT)
        assert_same_outputs(shared_outputs, expected)
        assert_same_outputs(own_outputs, expected)
    for folder in (shared, first, second):
        assert_nothing_else_is_left(folder)


def fail_on_rank_1(rank: int, world_size: int, dataset: Path) -> str:
    frozen_cache.ITEMS_PER_CALL = 2
    store, encoder = store_of(dataset, "text", TEXT), encoder_of("text", TEXT)
    Watched(encoder, failing_call=1 if rank == 1 else None)
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    with pytest.raises((Interrupted, RuntimeError)) as caught:
        cache_frozen_outputs(store, "text", encoder, ranks)
    return str(caught.value)


def test_an_error_on_one_rank_ends_both_and_what_was_done_is_kept(
    dataset: Path, ranks: Ranks
) -> None:
    messages = run_on_ranks(fail_on_rank_1, 2, dataset)
    assert all("on purpose" in message for message in messages)
    num_done = len(parts_in(dataset))
    assert 1 <= num_done <= 3  # that of rank 1, and what rank 0 had done until it noticed
    names = [path.name for path in (dataset.parent / "cache").iterdir()]
    assert not [name for name in names if name.startswith("frozen")]
    store, encoder, watched = fill(dataset, ranks)
    assert watched.items == WITH_TEXT - 2 * num_done
    assert_same_outputs(outputs(store, "text", encoder), expected_outputs(dataset))
    assert_nothing_else_is_left(dataset)
