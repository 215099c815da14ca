"""The processes that a variant's steps run in: one per rank, or those that torchrun started."""

import logging
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist

from benchmarks.timing.step_work import BatchCounts, matmul_rate, wait_for_device
from benchmarks.timing.steps import Steps, Variant, build_steps
from recsys.distributed.ranks import Ranks, joined_ranks

STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class RankReport:
    """Counts and memory that one rank reports at the end."""

    rows: int
    peak_bytes: int  # peak of resident memory during the steps
    resting_bytes: int  # resident memory before the steps
    counts: list[BatchCounts]  # of all steps; empty for the plain baseline


class RankSteps:
    """A variant's steps on one rank: the methods that a process can be asked to run."""

    def __init__(self, variant: Variant, ranks: Ranks) -> None:
        """Build the steps and reset the peak of memory. A collective."""
        self.ranks = ranks
        self.steps: Steps = build_steps(variant, ranks)
        self.counts: list[BatchCounts] = []
        CLEAR_PEAK.write_text("5")  # the peak of building does not count
        self.resting = psutil.Process().memory_info().rss

    def run(self, count: int) -> list[float]:
        """Time each of `count` steps, in seconds. A collective."""
        dist.barrier(group=self.ranks.group)
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.steps.step()
            wait_for_device()
            seconds.append(time.perf_counter() - begin)
            self.counts += self.steps.counts()
        return seconds

    def matmul_rate(self, size: int) -> float:
        """Measure the FLOP/s of a large matrix product on all ranks at once. A collective."""
        dist.barrier(group=self.ranks.group)
        return matmul_rate(size, self.ranks.device)

    def profile(self, steps: int) -> dict[str, Any]:
        return self.steps.profile(steps)

    def report(self) -> RankReport:
        status = STATUS.read_text()
        high_water_mark = int(status.split("VmHWM:")[1].split()[0]) * 1024
        # The kernel updates the peak separately from the current size, and counts some pages late.
        peak = max(high_water_mark, self.resting)
        return RankReport(self.steps.rows, peak, self.resting, self.counts)


class Processes(Protocol):
    """The ranks of a variant: `call` runs a method of `RankSteps` on each, in rank order."""

    def call(self, method: str, *arguments: Any) -> list[Any]: ...

    def close(self) -> None: ...


def is_launched() -> bool:
    """Return whether torchrun or torchx started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def require_not_launched(benchmark: str) -> None:
    """Require that this process was not started as one of several ranks.

    Raises:
        ValueError: several ranks were started for a benchmark that starts its own.
    """
    if is_launched():
        raise ValueError(
            f"{benchmark} compares different numbers of ranks and starts them itself; run it with "
            "--nproc 1 or without torchrun, or measure this job with throughput or compare"
        )


class CurrentProcesses:
    """The ranks of the job that this process belongs to."""

    def __init__(self, variant: Variant, ranks: Ranks) -> None:
        """Build the variant's steps. A collective."""
        self.steps = RankSteps(variant, ranks)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on this rank; return the results of all ranks. A collective."""
        mine = getattr(self.steps, method)(*arguments)
        return self.steps.ranks.gather(mine)

    def close(self) -> None:
        """Do nothing: this process continues."""


class SpawnedProcesses:
    """New processes, which wait for calls."""

    def __init__(self, variant: Variant, threads: int) -> None:
        self.variant = variant
        # This process holds the stores, as torchrun's agent does: a port is never free to others.
        self.stores = [
            dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for _ in range(variant.ranks if variant.apart else 1)
        ]
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        with _environment(OMP_NUM_THREADS=str(threads)):  # read when libraries are loaded
            for rank in range(variant.ranks):
                parent_end, child_end = context.Pipe()
                world = (0, 1) if variant.apart else (rank, variant.ranks)
                port = self.stores[rank if variant.apart else 0].port
                process = context.Process(
                    target=_serve, args=(variant, *world, port, threads, child_end), daemon=True
                )
                process.start()
                child_end.close()
                self.connections.append(parent_end)
                self.processes.append(process)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on each rank; return the results of all ranks.

        Raises:
            RuntimeError: a rank raised, or its process has ended.
        """
        for connection in self.connections:
            connection.send((method, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.connections):
            # Whichever rank answers: one that failed leaves the others waiting in a collective.
            waiting = [rank for rank in range(len(self.connections)) if rank not in results]
            ready = wait([self.connections[rank] for rank in waiting])
            for rank in waiting:
                if self.connections[rank] in ready:
                    results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(results))]

    def _receive(self, rank: int) -> Any:
        try:
            succeeded, result = self.connections[rank].recv()
        except EOFError:
            succeeded, result = False, "the process is gone"
        if not succeeded:
            raise RuntimeError(f"variant '{self.variant.name}', rank {rank}: {result}")
        return result

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()


def silence_advice_to_library_developers() -> None:
    """Ignore deprecations inside torch and TorchRec, which users of a benchmark cannot fix."""
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")


def _serve(
    variant: Variant, rank: int, world_size: int, port: int, threads: int, connection: Connection
) -> None:
    """Serve calls as one rank: build the variant, then answer until the process is killed."""
    silence_advice_to_library_developers()
    torch.set_num_threads(threads)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # set by a torchrun that started the benchmark, not for this rank
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",  # gloo would look up the machine's name, which need not resolve
    )
    call: Callable[[], Any]
    try:
        with joined_ranks(variant.config().device) as ranks:
            steps: RankSteps | None = None
            while True:
                method, arguments = connection.recv()
                if steps is None:
                    steps = RankSteps(variant, ranks)
                call = getattr(steps, method)
                connection.send((True, call(*arguments)))
    except EOFError:
        return
    except BaseException:
        connection.send((False, traceback.format_exc()))


@contextmanager
def _environment(**values: str) -> Any:
    old_values = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old_values.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
