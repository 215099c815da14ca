"""Reads collectives from a profiler's trace: their kind, bytes sent by a rank, and duration.

Every backend's collectives pass through PyTorch's c10d operations, including those that
DistributedDataParallel starts in C++, so the trace has them all, with the shapes of their tensors.
(NCCL alone records sizes itself, as `record_param_comms`; gloo does not.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operation:
    """A c10d operation: its kind, and which share of one argument's tensors a rank sends."""

    kind: str
    argument: int
    share_sent: Callable[[int], float]  # number of ranks -> share of those bytes


def _others(world_size: int) -> float:
    """Return the share if a rank sends everything to each other rank."""
    return world_size - 1


def _other_parts(world_size: int) -> float:
    """Return the share if each other rank gets a part, or the mean if one sends or gets all."""
    return (world_size - 1) / world_size


def _twice_other_parts(world_size: int) -> float:
    """Return the share for a ring that reduces parts and then gathers them."""
    return 2 * _other_parts(world_size)


OPERATIONS = {
    "c10d::alltoall_base_": Operation("all_to_all", 1, _other_parts),
    "c10d::alltoall_": Operation("all_to_all", 1, _other_parts),
    "c10d::allreduce_": Operation("all_reduce", 0, _twice_other_parts),
    "c10d::allreduce_coalesced_": Operation("all_reduce", 0, _twice_other_parts),
    "c10d::allgather_": Operation("all_gather", 1, _others),
    "c10d::allgather_coalesced_": Operation("all_gather", 1, _others),
    "c10d::allgather_into_tensor_coalesced_": Operation("all_gather", 1, _others),
    "c10d::_allgather_base_": Operation("all_gather", 1, _others),
    "c10d::reduce_scatter_": Operation("reduce_scatter", 0, _others),
    "c10d::reduce_scatter_tensor_coalesced_": Operation("reduce_scatter", 0, _others),
    "c10d::_reduce_scatter_base_": Operation("reduce_scatter", 1, _other_parts),
    "c10d::broadcast_": Operation("broadcast", 0, _other_parts),
    "c10d::reduce_": Operation("reduce", 0, _other_parts),
    "c10d::gather_": Operation("gather", 1, _other_parts),
    "c10d::scatter_": Operation("scatter", 0, _other_parts),
}
SPLITS_ARGUMENT = 4  # of alltoall_base_: elements sent to each rank
ELEMENT_BYTES = {
    "double": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "short int": 2,
    "unsigned char": 1,
    "signed char": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Collective:
    """One call of a collective by one rank."""

    kind: str
    bytes_sent: int  # bytes sent to other ranks
    seconds: float  # from begin to end; other work may overlap


def read_collectives(
    events: list[dict[str, Any]], rank: int, world_size: int
) -> Iterator[tuple[dict[str, Any], Collective]]:
    """Yield the collectives of one rank in a trace, each after the event of its call.

    Beyond 30 ranks a trace does not keep the splits of all_to_all; they count as equal.
    """
    for call, work in _with_work(events):
        yield call, _collective(call, work, rank, world_size)


def _with_work(
    events: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Yield each c10d call and the backend's event for it, which has the type and duration.

    Gloo works in threads of its own, so calls and events are matched by order and shape.
    """
    calls = [event for event in events if event["name"] in OPERATIONS]
    works = [e for e in events if e["name"].startswith(("gloo:", "nccl:"))]
    works = sorted((e for e in works if e["cat"] == "user_annotation"), key=lambda e: e["ts"])
    for call in sorted(calls, key=lambda event: event["ts"]):
        later = [work for work in works if work["ts"] >= call["ts"]]
        shapes = _shapes(call)
        same = [work for work in later if _shapes_of(work["args"].get("Input Dims", [])) == shapes]
        work = next(iter(same or later), None)
        if work is not None:
            works.remove(work)
        yield call, work


def _shapes(call: dict[str, Any]) -> list[list[int]]:
    """Return the shapes of the tensors given to a call."""
    return _shapes_of([call["args"]["Input Dims"][OPERATIONS[call["name"]].argument]])


def _shapes_of(dims: Iterable[Any]) -> list[list[int]]:
    """Return the shapes of arguments, flattening lists of tensors."""
    found: list[list[int]] = []
    for entry in dims:
        if entry and isinstance(entry[0], list):
            found += entry
        elif entry:
            found.append(entry)
    return found


def _collective(
    call: dict[str, Any], work: dict[str, Any] | None, rank: int, world_size: int
) -> Collective:
    operation, arguments = OPERATIONS[call["name"]], call["args"]
    types = [arguments["Input type"][operation.argument]]
    types += work["args"].get("Input type", []) if work is not None else []
    element = next((ELEMENT_BYTES[name] for name in types if name in ELEMENT_BYTES), 4)
    size = element * sum(map(math.prod, _shapes(call)))
    share = operation.share_sent(world_size)
    if call["name"] == "c10d::alltoall_base_":
        text = arguments["Concrete Inputs"][SPLITS_ARGUMENT].strip("[]")
        splits = [int(number) for number in text.split(",")] if text else []
        if len(splits) == world_size:
            share = 1 - splits[rank] / max(sum(splits), 1)
    return Collective(operation.kind, round(size * share), work["dur"] / 1e6 if work else 0.0)
