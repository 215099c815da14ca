"""The ranks of a job: join them, and end them together.

A job started alone has one rank; under torchrun or torchx the environment describes the ranks.
An error that only one rank sees (a bad row in its share, a full disk) is reported to all,
so that every rank ends with the cause instead of waiting in a collective.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from recsys.distributed.host_memory import keep_freed_memory
from recsys.distributed.rendezvous import attempt_store

TIMEOUT = timedelta(minutes=30)  # one rank may encode items for a long time while others wait


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    own_group: dist.ProcessGroup | None = None  # default: the job's group

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group for the collectives of this object."""
        group = self.own_group or dist.group.WORLD
        assert group is not None
        return group

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        """Whether this rank fills the caches of its machine."""
        return self.local_rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return a small object of each rank, on every rank. A collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def apart(self) -> Ranks:
        """Return the same ranks with a new group, for collectives beside those of the steps.

        A collective.
        """
        return replace(self, own_group=dist.new_group(backend="gloo"))

    def from_first(self, value: Any) -> Any:
        """Return rank 0's small object on every rank. A collective."""
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.group)
        return values[0]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Make the code inside succeed on every rank or raise on every rank; a collective.

        Raises:
            ValueError: a rank raised ValueError; the message is that rank's.
            RuntimeError: a rank raised anything else.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.raise_first(error)

    def raise_first(self, error: Exception | None, moment: int = 0) -> None:
        """Report an error on any rank to all ranks; each raises it. A collective.

        Args:
            error: error of this rank, if any.
            moment: order of the errors: of several ranks' errors all raise the earliest, except
                that a rank raises its own one of the same moment.
        """
        failed = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.group)
        if not failed.item():
            return
        mine: tuple[int, bool, str] | None = None
        if error is not None:
            mine = moment, isinstance(error, ValueError), str(error) or repr(error)
        failures = [(rank, one) for rank, one in enumerate(self.gather(mine)) if one is not None]
        rank, (earliest, is_value_error, message) = min(failures, key=lambda of: of[1][0])
        if error is not None and moment == earliest:
            raise error
        raise (ValueError if is_value_error else RuntimeError)(f"rank {rank}: {message}")


@contextmanager
def joined_ranks(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Join the process group of the environment, or create one for this process alone."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no GPU is usable; set device to cpu or auto")
    torch_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(torch_device)
    else:
        keep_freed_memory()
    # Small agreements between ranks travel over gloo even where the model uses NCCL.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, world_size = attempt_store(TIMEOUT)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Ranks(
            dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, torch_device
        )
    finally:
        dist.destroy_process_group()
