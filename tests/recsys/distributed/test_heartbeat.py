"""What is told from the heartbeats of all ranks: who is silent, and whom the others wait for."""

import threading
import time

import pytest

from recsys.distributed.watchdog import (
    Heartbeat,
    Unchanged,
    place_of_main_thread,
    silent_ranks,
    stalled_ranks,
)


def beat(collectives: int = 9, marks: int = 5, ended: bool = False) -> Heartbeat:
    return Heartbeat(1, ended, 10.0, collectives, marks, "batch 3", "model.py:7 forward")


def test_all_ranks_of_a_machine_that_is_gone_are_named() -> None:
    assert silent_ranks({9: beat(), 8: beat()}, 300.0) == (
        "ranks 8, 9 have stopped answering for 300 s (rank 8: last seen after 'batch 3', in "
        "model.py:7 forward; rank 9: last seen after 'batch 3', in model.py:7 forward)"
    )


def test_ranks_are_told_apart_by_collectives_then_by_marks() -> None:
    by_collectives = stalled_ranks({0: beat(), 1: beat(collectives=8, marks=6), 2: beat()}, 10.0)
    assert by_collectives.startswith("rank 1 has ") and " 10 s " in by_collectives
    by_marks = stalled_ranks({0: beat(), 1: beat(), 2: beat(marks=4)}, 10.0)
    assert by_marks.startswith("rank 2 has ") and " 10 s " in by_marks


def test_a_rank_that_has_ended_while_the_others_wait_is_named() -> None:
    found = stalled_ranks({0: beat(), 1: beat(collectives=8, ended=True)}, 10.0)
    assert found.endswith("(ended after 'batch 3', in model.py:7 forward)")


def test_no_rank_is_accused_where_all_have_come_equally_far() -> None:
    found = stalled_ranks({0: beat(), 1: beat()}, 10.0)
    assert found.startswith("no rank ") and " 10 s " in found


def test_time_in_which_the_whole_job_was_suspended_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 0.5, 1.5, 1000.0, 1001.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    unchanged = Unchanged(longest_lapse=2.0)
    assert unchanged.look(1) == 0.0
    assert unchanged.look(1) == 1.0
    assert unchanged.look(1) == 1.0 + 2.0
    assert unchanged.look(2) == 0.0


def test_the_place_of_the_main_thread_is_known_to_other_threads() -> None:
    places: list[str] = []
    thread = threading.Thread(target=lambda: places.append(place_of_main_thread()))
    thread.start()
    thread.join()
    assert places[0].startswith("threading.py:")


def test_a_heartbeat_travels_as_text() -> None:
    assert Heartbeat.from_json(beat().to_json()) == beat()
