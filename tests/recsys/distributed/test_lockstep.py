"""Ranks agree before each batch, and a stretch of training ends with whole groups on all."""

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from recsys.distributed.lockstep import FIRST_BATCHES, Lockstep
from recsys.distributed.ranks import joined_ranks
from tests.ranks import run_on_ranks
from tests.recsys.em3_runs import ranks_of


def stretches(rank: int, world_size: int, group: int) -> list[list[int]]:
    """Batches of stretches of at most 6, the first of which is ended after its second batch."""
    lockstep, source = Lockstep(ranks_of(rank, world_size)), iter(range(10))
    batches = lockstep.training_batches(source, 6, group)
    first = [next(batches), next(batches)]
    lockstep.end_stretch()
    return [[*first, *batches], list(lockstep.training_batches(source, 6, group))]


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1, [[0, 1], [2, 3, 4, 5, 6, 7]]), (3, [[0, 1, 2], [3, 4, 5, 6, 7, 8]])],
)
def test_a_stretch_ends_with_the_group_under_way_and_no_batch_is_lost(
    group: int, expected: list[list[int]]
) -> None:
    assert run_on_ranks(stretches, 2, group) == [expected, expected]


def seldom_exchanged(rank: int, world_size: int) -> dict[str, Any]:
    """Steps of 50 ms of a fake clock, so that ten batches pass between two exchanges."""
    clock = SimpleNamespace(now=0.0)
    actual: dict[str, Any] = {"exchanges": 0}
    all_reduce = dist.all_reduce

    def source(event: Any = None) -> Iterator[int]:
        for number in range(60):
            clock.now += 0.05
            if (rank, number) == (1, 30) and event is not None:
                event()
            yield number

    def fail() -> None:
        raise ValueError("row 7 cannot be read")

    def counted(*args: Any, **name: Any) -> Any:
        actual["exchanges"] += 1
        return all_reduce(*args, **name)

    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(monotonic=lambda: clock.now)
        patch.setattr("recsys.distributed.lockstep.time", fake)
        patch.setattr(dist, "all_reduce", counted)
        lockstep = Lockstep(ranks_of(rank, world_size))
        actual["batches"] = list(lockstep.training_batches(source(), 60))
        actual["exchanges of 60"] = actual["exchanges"]
        with Lockstep(ranks_of(rank, world_size)) as lockstep:
            stops = source(lambda: signal.raise_signal(signal.SIGTERM))
            actual["stops"] = [lockstep.stop for _ in lockstep.training_batches(stops, 60)]
        lockstep, actual["before"] = Lockstep(ranks_of(rank, world_size)), []
        try:
            for batch in lockstep.training_batches(source(fail), 60):
                actual["before"].append(batch)
        except ValueError as error:
            actual["error"] = str(error)
    return actual


def test_between_exchanges_a_rank_that_fails_or_is_asked_to_end_keeps_no_other_waiting() -> None:
    first, second = run_on_ranks(seldom_exchanged, 2)
    for actual in (first, second):
        assert actual["batches"] == list(range(60))
        assert actual["exchanges of 60"] == FIRST_BATCHES + 2 + 5
        assert actual["stops"] == first["stops"]
        assert 31 <= actual["stops"].index(True) <= 31 + 11
    assert len(first["before"]) == len(second["before"]) <= 30 + 11
    assert first["before"] == list(range(len(first["before"])))
    assert second["before"][30:] == [29] * (len(second["before"]) - 30)  # its last batch again
    assert second["error"] == "row 7 cannot be read"
    assert first["error"] == "rank 1: row 7 cannot be read"


def batches_of_unequal_ranks(rank: int, world_size: int) -> list[int]:
    return list(Lockstep(ranks_of(rank, world_size)).batches(iter(range(3 + rank))))


def test_all_ranks_end_with_the_first_that_has_no_batch_left() -> None:
    assert run_on_ranks(batches_of_unequal_ranks, 2) == [[0, 1, 2], [0, 1, 2]]


def interrupted(rank: int, world_size: int, seconds: list[float], numbers: list[int]) -> list[bool]:
    """Whether the job is to end, before each batch; signals come at these seconds."""
    clock = SimpleNamespace(now=0.0)

    def source() -> Iterator[int]:
        for clock.now, number in zip(seconds, numbers):
            signal.raise_signal(number)
            yield number

    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(monotonic=lambda: clock.now)
        patch.setattr("recsys.distributed.lockstep.time", fake)
        with Lockstep(ranks_of(rank, world_size)) as lockstep:
            return [lockstep.stop for _ in lockstep.training_batches(source(), len(numbers))]


def test_ctrl_c_asks_to_end_as_sigterm_does_and_a_second_one_ends_at_once() -> None:
    passed_on = [0.0, 0.1, 0.2], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    assert run_on_ranks(interrupted, 1, *passed_on) == [[True, True, True]]
    terminated_twice = [0.0, 5.0, 9.0], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    assert run_on_ranks(interrupted, 1, *terminated_twice) == [[True, True, True]]
    for second in (signal.SIGINT, signal.SIGTERM):  # torchrun makes it the latter
        with pytest.raises(RuntimeError, match=f"exit code -{int(second)}"):
            run_on_ranks(interrupted, 1, [0.0, 1.5], [signal.SIGINT, second])


def test_a_checkpoint_by_time_is_due_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "recsys.distributed.lockstep.time", SimpleNamespace(monotonic=lambda: clock.now)
    )
    due: list[Any] = []
    with joined_ranks("cpu") as ranks:
        lockstep = Lockstep(ranks, checkpoint_seconds=60)
        for _ in lockstep.training_batches(iter(range(6)), 6):
            due.append(lockstep.save)
            if lockstep.save:
                lockstep.saved()
            clock.now += 30
    # The fourth batch was taken at 60 s, and the fifth before the checkpoint was there.
    assert due == [False, False, False, True, False, False]
