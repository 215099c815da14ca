"""Bytes of collectives, as a trace of real ones over three ranks tells them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from recsys.diagnostics.profile.collective_trace import Collective, read_collectives
from tests.ranks import run_on_ranks

WORLD_SIZE = 3
SPLITS = torch.tensor([[1, 2, 3], [0, 5, 1], [4, 0, 0]])  # rows from rank to rank


def all_to_all(rank: int) -> None:
    out, into = SPLITS[rank].tolist(), SPLITS[:, rank].tolist()
    dist.all_to_all_single(torch.empty(sum(into), 2), torch.ones(sum(out), 2), into, out)


def equal_all_to_all(rank: int) -> None:
    dist.all_to_all_single(torch.empty(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64))


def all_reduce(rank: int) -> None:
    dist.all_reduce(torch.ones(9, dtype=torch.int64))


def all_gather(rank: int) -> None:
    pieces = [torch.empty(4, dtype=torch.bfloat16) for _ in range(WORLD_SIZE)]
    dist.all_gather(pieces, torch.ones(4, dtype=torch.bfloat16))


def all_gather_into_tensor(rank: int) -> None:
    dist.all_gather_into_tensor(torch.empty(3 * 5, 2), torch.ones(5, 2))


def reduce_scatter(rank: int) -> None:
    dist.reduce_scatter_tensor(torch.empty(5, 2), torch.ones(3 * 5, 2))


def broadcast(rank: int) -> None:
    dist.broadcast(torch.ones(6, dtype=torch.uint8), src=0)


CALLS: list[Callable[[int], None]] = [
    all_to_all,
    equal_all_to_all,
    all_reduce,
    all_gather,
    all_gather_into_tensor,
    reduce_scatter,
    broadcast,
]
FLOAT, INT64, BFLOAT16 = 4, 8, 2
EXPECTED: dict[str, tuple[str, list[int]]] = {  # bytes each rank sends
    "all_to_all": ("all_to_all", [5 * 2 * FLOAT, 1 * 2 * FLOAT, 4 * 2 * FLOAT]),
    "equal_all_to_all": ("all_to_all", [4 * INT64] * 3),
    "all_reduce": ("all_reduce", [2 * 2 * 9 * INT64 // 3] * 3),
    "all_gather": ("all_gather", [2 * 4 * BFLOAT16] * 3),
    "all_gather_into_tensor": ("all_gather", [2 * 10 * FLOAT] * 3),
    "reduce_scatter": ("reduce_scatter", [2 * 10 * FLOAT] * 3),
    "broadcast": ("broadcast", [2 * 6 // 3] * 3),
}


def trace_all(rank: int, world_size: int, folder: Path) -> list[Collective]:
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for call in CALLS:
            call(rank)
        dist.all_reduce(torch.ones(1))  # gloo notes the end of one when it begins the next
    path = folder / f"{rank}.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    return [collective for _, collective in read_collectives(complete, rank, world_size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[Collective]]:
    return run_on_ranks(trace_all, WORLD_SIZE, tmp_path_factory.mktemp("traces"))


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_are_what_each_rank_sends_to_others(found: list[list[Collective]], name: str) -> None:
    kind, expected = EXPECTED[name]
    calls = [rank[list(EXPECTED).index(name)] for rank in found]
    assert [call.kind for call in calls] == [kind] * WORLD_SIZE
    assert [call.bytes_sent for call in calls] == expected
    assert all(call.seconds > 0 for call in calls)
