"""Kills the ranks of a continual run again and again, and compares its end with a walk in peace.

Four partitions with new items and ids in each are walked twice on two ranks: in peace, and with
kills at random moments: of one rank (SIGKILL), and of the other a little later. All state, scores
and metrics must be equal to the last bit, every row trained on once per pass, and every partition
scored once.
"""

import json
import os
import random
import time
from collections import Counter
from math import ceil
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recsys.training.continual import walk as walk_module
from recsys.training.trainer import LossWatch
from tests.ranks import HANG_SECONDS, forking_server
from tests.recsys.command_runs import ROOT, TINY, rank_environment, run_rank
from tests.recsys.training.continual.walk_runs import (
    ARGV,
    NAMES,
    ROWS,
    assert_same_end,
    write_walk,
)

PASSES = [3, 2, 2, 2]  # over each partition
READY = "ready"  # the file that a walk makes when it begins
# Of each partition, on two ranks.
STEPS = [passes * ceil(ceil(rows / 2) / 8) for passes, rows in zip(PASSES, ROWS, strict=True)]


def arguments_of(data: Path, path: Path) -> list[str]:
    argv = ["continual", "--config", str(TINY), "--data", str(data), "--out", str(path / "run")]
    argv += [*ARGV, "--cache", str(data.parent / "cache"), "--checkpoint.every_steps", "2"]
    argv += ["--continual.first_passes", str(PASSES[:1]), "--continual.passes", str(PASSES[-1])]
    return [*argv, "--continual.keep", "2"]


def start(data: Path, path: Path, port: int) -> list[BaseProcess]:
    """Two ranks of the walk."""
    processes = []
    for rank in range(2):
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **rank_environment(rank, 2, port)}
        arguments = (arguments_of(data, path), env, path, rank)
        processes.append(forking_server().Process(target=traced_rank, args=arguments, daemon=True))
    for process in processes:
        process.start()
    return processes


def traced_rank(argv: list[str], env: dict[str, str], path: Path, rank: int) -> None:
    """A rank that notes every step it makes, and when its walk begins."""
    step_before, list_before = LossWatch.step, walk_module.list_partitions

    def step(watch: Any, number: int, loss: Any, positions: Any) -> Any:
        name = watch.rows.chunks[0].place.split("/")[-2]
        with (path / f"steps-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([name, number, float(loss), positions.tolist()]) + "\n")
        return step_before(watch, number, loss, positions)

    def list_partitions(root: Any) -> Any:
        (path / READY).touch()
        return list_before(root)

    LossWatch.step = step  # type: ignore[method-assign]
    walk_module.list_partitions = list_partitions
    run_rank(argv, env, ROOT, path / f"output-{rank}")


def walk(data: Path, path: Path, kills: int, rng: random.Random, longest: float) -> int:
    """Walk with at most so many kills, each some seconds after a start; return how many."""
    path.mkdir()
    count = 0
    while True:
        (path / READY).unlink(missing_ok=True)
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        processes = start(data, path, store.port)
        may_kill = count < kills
        if may_kill and not ends_within(processes, path / READY, rng.uniform(0.0, longest)):
            kill(processes, rng)
            count += 1
            continue
        for process in processes:
            process.join(HANG_SECONDS)
        codes = [process.exitcode for process in processes]
        if codes != [0, 0]:
            raise SystemExit(f"{codes}: {(path / 'output-0.err').read_text()[-8000:]}")
        return count


def kill(processes: list[BaseProcess], rng: random.Random) -> None:
    """Kill one rank, and the other a little later."""
    first = rng.randrange(2)
    for process in (processes[first], processes[1 - first]):
        process.kill()  # SIGKILL; it may have ended, as the other is gone
        time.sleep(rng.uniform(0.0, 0.3))
    for process in processes:
        process.join()


def ends_within(processes: list[BaseProcess], ready: Path, seconds: float) -> bool:
    """Whether the ranks end within so many seconds after their walk has begun."""
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        if ready.exists():
            end = min(end, time.monotonic() + seconds)
        if not any(process.is_alive() for process in processes):
            return True
        time.sleep(0.01)
    return False


def check_steps(path: Path) -> None:
    """Every row once per pass, in the steps that led to the result."""
    counts = {name: Counter[int]() for name in NAMES}
    for rank in range(2):
        steps: dict[tuple[str, int], Any] = {}
        for line in (path / f"steps-{rank}.jsonl").read_text().splitlines():
            name, number, loss, positions = json.loads(line)
            again = steps.setdefault((name, number), [loss, positions])
            assert again == [loss, positions], f"rank {rank}, {name} step {number} differs"
        expected = {(name, n + 1) for name, steps in zip(NAMES, STEPS) for n in range(steps)}
        assert set(steps) == expected
        for (name, _), (_, positions) in steps.items():
            counts[name].update(position for position in positions if position >= 0)
    for name, rows, passes in zip(NAMES, ROWS, PASSES, strict=True):
        assert counts[name] == dict.fromkeys(range(rows), passes), name


def survive(folder: Path, kills: int, seed: int) -> None:
    """Walk in peace, and as often with kills as it takes; compare."""
    data, rng = write_walk(folder / "data"), random.Random(seed)
    walk(data, folder / "peaceful", 0, rng, 0.0)
    begin = (folder / "peaceful" / "run" / "scores" / f"{NAMES[1]}.parquet").stat().st_mtime
    seconds, killed = time.time() - begin, 0  # of three partitions
    check_steps(folder / "peaceful")
    while killed < kills:
        path = folder / f"killed-{killed}"
        killed += walk(data, path, kills - killed, rng, 0.7 * seconds)
        check_steps(path)
        assert_same_end(folder / "peaceful" / "run", path / "run")
