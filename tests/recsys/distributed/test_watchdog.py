"""The watchdog, on real processes: one rank is stopped or slow, and every rank ends, naming it.

All jobs run at the same time, as each mostly waits; the tests look at what they left. The ranks
are forked from a server that has imported torch once.
"""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recsys.distributed.ranks import joined_ranks
from recsys.distributed.watchdog import (
    Heartbeat,
    Unchanged,
    Watchdog,
    silent_ranks,
    stalled_ranks,
)
from tests.ranks import HANG_SECONDS

TIMEOUT = 4.0
LONG = TIMEOUT + 3  # seconds after which a watchdog would have spoken
STEPS, FAULTY_STEP = 5, 3
PACE = 0.3  # seconds per step, as little is seen of a rank that stops at once


@dataclass
class Job:
    """Ranks that make steps, of which one has a fault."""

    world_size: int = 2
    faulty: int = 1
    in_data: Callable[[], None] = lambda: None
    at_the_end: Callable[[], None] = lambda: None
    section: str | None = "armed"
    launcher_holds_the_store: bool = True


@dataclass
class Outcome:
    """What a job left, by rank."""

    exit_codes: list[int | None] = field(default_factory=list)  # None: did not end by itself
    seconds: list[float] = field(default_factory=list)  # from the fault to its end
    output: list[str] = field(default_factory=list)


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_until_killed() -> None:
    time.sleep(HANG_SECONDS)


def sleep_long() -> None:
    time.sleep(LONG)


def fail() -> None:
    raise ValueError("the fault of this rank")


JOBS = {
    "stopped": Job(in_data=stop_this_process),
    "holder of the store stopped": Job(
        world_size=3, faulty=0, in_data=stop_this_process, launcher_holds_the_store=False
    ),
    "slow in data": Job(in_data=sleep_until_killed),
    "slow outside of a section": Job(in_data=sleep_long, section=None),
    "ends later than the others": Job(at_the_end=sleep_long),
    "fails": Job(in_data=fail),
}


def run_rank(name: str, rank: int, port: int, folder: Path) -> None:
    """The process of one rank."""
    job = JOBS[name]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(job.world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(job.launcher_holds_the_store),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.dup2(os.open(folder / f"{rank}.output", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        with joined_ranks("cpu") as ranks, Watchdog(ranks, TIMEOUT) as watchdog:
            fault = rank == job.faulty
            train(job if fault else Job(section=job.section), watchdog, folder / f"{rank}.fault")
    except ValueError as error:
        sys.exit(str(error))


def batches(job: Job, marker: Path) -> Iterator[torch.Tensor]:
    for step in range(STEPS):
        time.sleep(PACE)
        if step == FAULTY_STEP:
            marker.touch()
            job.in_data()
        yield torch.ones(2)


def train(job: Job, watchdog: Watchdog, marker: Path) -> None:
    """A loop of the shape of the real one, which agrees on each batch and then on gradients."""
    with ExitStack() as sections:
        if job.section is not None:
            sections.enter_context(watchdog.armed())
        for step, batch in enumerate(batches(job, marker)):
            watchdog.record_progress(f"batch {step}")
            dist.all_reduce(batch)
            dist.all_reduce(batch)
    job.at_the_end()


def launch(name: str, folder: Path) -> tuple[list[BaseProcess], Any]:
    """Starts the ranks of a job; with them the launcher's store, or a socket that keeps a port."""
    folder.mkdir()
    job = JOBS[name]
    holder: Any
    if job.launcher_holds_the_store:
        holder = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        port = holder.port
    else:
        holder = socket.socket()  # does not listen: the store of rank 0 may, no other program
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("localhost", 0))
        port = holder.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recsys.distributed.watchdog"])
    processes: list[BaseProcess] = [
        context.Process(target=run_rank, args=(name, rank, port, folder), daemon=True)
        for rank in range(job.world_size)
    ]
    for process in processes:
        process.start()
    return processes, holder


def collect(job: Job, folder: Path, ends: list[float | None], codes: list[int | None]) -> Outcome:
    outcome = Outcome(exit_codes=codes)
    fault = (folder / f"{job.faulty}.fault").stat().st_mtime
    for rank, end in enumerate(ends):
        outcome.seconds.append((end or float("inf")) - fault)
        outcome.output.append((folder / f"{rank}.output").read_text())
    return outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("jobs")
    started = {name: launch(name, folder / name) for name in JOBS}
    ranks = {(name, r): p for name, (ps, _) in started.items() for r, p in enumerate(ps)}
    ends: dict[tuple[str, int], float | None] = dict.fromkeys(ranks)
    expected = {key for key in ranks if not stays_stopped(*key)}
    deadline = time.monotonic() + HANG_SECONDS
    while any(ends[key] is None for key in expected) and time.monotonic() < deadline:
        for key, process in ranks.items():
            if ends[key] is None and not process.is_alive():
                ends[key] = time.time()
        time.sleep(0.05)
    for process in ranks.values():
        process.kill()
        process.join()
    return {
        name: collect(
            job,
            folder / name,
            [ends[name, rank] for rank in range(job.world_size)],
            [
                None if ends[name, rank] is None else ranks[name, rank].exitcode
                for rank in range(job.world_size)
            ],
        )
        for name, job in JOBS.items()
    }


def stays_stopped(name: str, rank: int) -> bool:
    return JOBS[name].in_data is stop_this_process and rank == JOBS[name].faulty


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if job.in_data is stop_this_process])
def test_a_stopped_rank_is_named_on_every_other_rank(
    outcomes: dict[str, Outcome], name: str
) -> None:
    job, outcome = JOBS[name], outcomes[name]
    other_ranks = [rank for rank in range(job.world_size) if rank != job.faulty]
    rank_text = f"rank {job.faulty}"
    if not job.launcher_holds_the_store:
        rank_text += ", which holds the job's store,"
    for rank in other_ranks:
        assert re.search(rf"rank {rank}: {rank_text} has stopped", outcome.output[rank])
        assert outcome.exit_codes[rank] == 1
        assert outcome.seconds[rank] > 0


def test_a_slow_rank_is_named_on_every_rank_itself_included(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["slow in data"]
    for rank, output in enumerate(outcome.output):
        assert f"rank {rank}: rank 1 has " in output and " 4 s " in output
        assert "'batch 2', in test_watchdog.py:" in output
        assert "sleep_until_killed" in output
        assert outcome.exit_codes[rank] == 1
        assert outcome.seconds[rank] > 0


def test_every_rank_prints_the_stacks_of_its_threads(outcomes: dict[str, Outcome]) -> None:
    slow, waiting = outcomes["slow in data"].output[1], outcomes["slow in data"].output[0]
    assert "in sleep_until_killed" in slow and "in batches" in slow
    assert "in all_reduce" in waiting and "in train" in waiting


@pytest.mark.parametrize("name", ["slow outside of a section", "ends later than the others"])
def test_a_job_is_not_ended_where_a_rank_may_take_long(
    outcomes: dict[str, Outcome], name: str
) -> None:
    outcome = outcomes[name]
    assert outcome.output == ["", ""]
    assert outcome.exit_codes == [0, 0]
    assert outcome.seconds[1] > LONG


def test_a_job_that_fails_ends_with_its_own_error_and_no_finding(
    outcomes: dict[str, Outcome],
) -> None:
    outcome = outcomes["fails"]
    assert outcome.output[1] == "the fault of this rank\n"
    assert outcome.exit_codes[1] == 1


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
    actual = stalled_ranks({0: beat(), 1: beat(collectives=8, ended=True)}, 10.0)
    assert actual.endswith("(ended after 'batch 3', in model.py:7 forward)")


def test_no_rank_is_accused_where_all_have_come_equally_far() -> None:
    actual = stalled_ranks({0: beat(), 1: beat()}, 10.0)
    assert actual.startswith("no rank ") and " 10 s " in actual


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
