"""Ranks end together, with the cause of the first failure."""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from recsys.distributed.lockstep import FIRST_BATCHES, Lockstep
from recsys.distributed.log import configure_logging, print_table
from recsys.distributed.ranks import joined_ranks, name_attempt
from tests.ranks import HANG_SECONDS, run_on_ranks
from tests.recsys.em3_runs import ranks_of

logger = logging.getLogger(__name__)


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


def names(store: dist.Store, world_size: int) -> list[str]:
    """The name each rank of an attempt comes to, all running at once."""
    actual: list[str] = [""] * world_size

    def join(rank: int) -> None:
        actual[rank] = name_attempt(store, rank, world_size, timedelta(seconds=HANG_SECONDS))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return actual


def test_all_ranks_of_an_attempt_get_one_name_and_every_attempt_another() -> None:
    store = dist.HashStore()
    attempts = [names(store, world_size) for world_size in (3, 3, 2, 1, 3)]
    for attempt in attempts:
        assert len(set(attempt)) == 1
    assert len({attempt[0] for attempt in attempts}) == len(attempts)


def test_a_rank_that_died_while_joining_is_not_taken_for_its_successor() -> None:
    store = dist.HashStore()
    store.set("join/word/1", "dead")
    first: list[str] = []
    rank0 = threading.Thread(
        target=lambda: first.append(name_attempt(store, 0, 2, timedelta(seconds=HANG_SECONDS)))
    )
    rank0.start()
    store.wait(["join/answer/1"])  # rank 0 has answered the dead one
    assert name_attempt(store, 1, 2, timedelta(seconds=HANG_SECONDS))
    rank0.join()
    assert store.get("join/confirmed/1").decode() == first[0]


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] "):
        name_attempt(dist.HashStore(), 0, 3, timedelta(seconds=0.1))


logger = logging.getLogger("recsys.any")


def logged(capsys: pytest.CaptureFixture[str], rank: int, *settings: str) -> list[str]:
    """The lines of a debug, an info and a warning message."""
    configure_logging(rank, *settings)  # type: ignore[arg-type]
    logger.debug("detail")
    logger.info("step %d", 3)
    logger.warning("slow")
    return capsys.readouterr().out.splitlines()


def test_rank_0_says_what_happens_and_marks_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, 0) == ["step 3", "warning: rank 0: slow"]


def test_json_lines_have_level_source_rank_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = (json.loads(line) for line in logged(capsys, 2, "info", "json"))
    assert first.pop("asctime")
    assert first == {"levelname": "INFO", "name": "recsys.any", "message": "step 3", "rank": 2}


def test_tables_are_printed_whatever_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, "error", "json")
    print_table("a  b\n1  2")
    assert capsys.readouterr().out == "a  b\n1  2\n"
