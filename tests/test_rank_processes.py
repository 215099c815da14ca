"""The scaffold for distributed tests must itself report failures instead of hanging."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


def add_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int, float]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, world_size, float(total)


def fail_on_rank_one_while_others_wait(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.all_reduce(torch.zeros(1))


def sleep_forever(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_results_come_in_rank_order_from_a_working_group() -> None:
    assert run_on_ranks(add_over_ranks, 2, 10) == [(0, 2, 21.0), (1, 2, 21.0)]


def test_the_first_failing_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(?s:.)*ValueError: the cause"):
        run_on_ranks(fail_on_rank_one_while_others_wait, 2)


def test_a_hanging_rank_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        run_on_ranks(sleep_forever, 1, timeout_seconds=3.0)
