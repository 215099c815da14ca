"""Ranks of one attempt agree on a name; rank 0 logs from info on, as text or JSON lines."""

import json
import logging
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from recsys.distributed.log import configure_logging, print_table
from recsys.distributed.ranks import name_attempt
from tests.ranks import HANG_SECONDS


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
