"""Runs a function on several ranks of one machine, for tests of distributed code.

Each rank is a process with a gloo group, and an NCCL group if it has a GPU; what it returns or
raises travels through a file, so that a dead or hanging rank is noticed instead of waited for. The
processes are forked from a server that has imported the libraries and done nothing else: a test
need not wait for that again.
"""

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Only what hangs meets it; anything else may take minutes on a busy machine.
HANG_SECONDS = 600.0
# After one rank has failed, the others get this long to fail or return by themselves.
GRACE_SECONDS = 10.0
PRELOADED = ["tests.preloaded"]
DEVICE = "TESTS_DEVICE"  # cpu or cuda, in the environment of a rank


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = HANG_SECONDS,
    device: str = "cpu",
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank; the results in rank order.

    ``function`` must be at the top of its module, and its arguments and result picklable. On
    ``device`` cuda each rank has a GPU of its own, which it asks for by ``rank_device``; a test is
    skipped where there are fewer. Tensors of the results are on the host.

    Raises:
        RuntimeError: a rank raised (the traceback of the first to do so is in the message), or
            died without a word.
        TimeoutError: a rank did not end within ``timeout_seconds``.
    """
    require_gpus(world_size if device == "cuda" else 0)
    context = forking_server()
    environment = dict(os.environ) | {DEVICE: device}
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes: list[BaseProcess] = [
            context.Process(
                target=_run_rank,
                args=(function, rank, world_size, args, folder, timeout_seconds, environment),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            timed_out = _wait(processes, timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for rank in range(world_size):
                if (output := Path(folder, f"{rank}.output")).exists():
                    print(output.read_text(errors="replace"), end="")
        return _collect(folder, [process.exitcode for process in processes], timed_out)


class RunsByWorldSize(dict[int, list[Any]]):
    """What every rank returned, by number of ranks; each number runs when a test first asks."""

    def __init__(self, function: Callable[..., Any], *args: Any, device: str = "cpu") -> None:
        super().__init__()
        self.function, self.args, self.device = function, args, device

    def __missing__(self, world_size: int) -> list[Any]:
        results = run_on_ranks(self.function, world_size, *self.args, device=self.device)
        return self.setdefault(world_size, results)


def rank_device() -> torch.device:
    """The device of this rank."""
    device = os.environ.get(DEVICE, "cpu")
    return torch.device(device, dist.get_rank() if device == "cuda" else None)


def require_gpus(count: int) -> None:
    """Skips the test that asks for more GPUs than there are."""
    usable = torch.cuda.device_count() if count else 0
    if usable < count:
        pytest.skip(f"needs {count} GPU{'s' if count > 1 else ''}, and {usable} can be used")


def forking_server() -> ForkServerContext:
    """What forks processes from a server that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: str,
    timeout_seconds: float,
    environment: dict[str, str],
) -> None:
    output = os.open(Path(folder, f"{rank}.output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)  # the server has that of the first test
    torch.set_num_threads(1)
    # Gloo would else look up the machine's own name, which need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    outcome: dict[str, Any]
    is_cuda = environment[DEVICE] == "cuda"
    try:
        if is_cuda:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        outcome = {"result": function(rank, world_size, *args)}
        dist.barrier()
    except BaseException:
        outcome = {"error": traceback.format_exc(), "time": time.time()}
    partial = Path(folder, f"{rank}.partial")
    torch.save(outcome, partial)
    partial.rename(Path(folder, f"{rank}.outcome"))
    if "error" in outcome:
        # Not sys.exit: the threads of a group whose peers are gone may block a normal exit.
        os._exit(1)
    dist.destroy_process_group()


def _wait(processes: list[BaseProcess], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    failed = False
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return not failed
        if not failed and any(process.exitcode not in (None, 0) for process in processes):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    return False


def _collect(folder: str, exit_codes: list[int | None], timed_out: bool) -> list[Any]:
    outcomes: dict[int, dict[str, Any]] = {}
    for rank in range(len(exit_codes)):
        path = Path(folder, f"{rank}.outcome")
        if path.exists():
            outcomes[rank] = torch.load(path, map_location="cpu", weights_only=False)
    errors = {rank: outcome for rank, outcome in outcomes.items() if "error" in outcome}
    if errors:
        first = min(errors, key=lambda rank: errors[rank]["time"])
        raise RuntimeError(f"rank {first} failed:\n{errors[first]['error']}")
    if timed_out:
        silent = [rank for rank in range(len(exit_codes)) if rank not in outcomes]
        raise TimeoutError(f"ranks {silent} did not end in time")
    for rank, exit_code in enumerate(exit_codes):
        if exit_code != 0 or rank not in outcomes:
            raise RuntimeError(f"rank {rank} died with exit code {exit_code}")
    return [outcomes[rank]["result"] for rank in range(len(exit_codes))]
