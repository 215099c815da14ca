"""A memory bank with all rows on every rank, for item sets that fit: reads need no communication.

A step reads far more vectors (the items of all histories) than it writes (the ranked items).
If each rank has all rows, only written rows are sent. The rows are the same on every rank at
any time, and the same as those of a :class:`~embeddings.memory_bank.sharded.MemoryBank`; a
checkpoint of either loads into the other.

Shapes: U ids, D dimension, W ranks, P ids per rank after padding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.memory_bank.routes import BankRoute, Routes
from embeddings.memory_bank.sharded import MemoryBank

# Largest replica. With more ranks than MAX_REPLICAS, all ranks together write more rows than one
# rank reads.
MAX_REPLICA_BYTES = 256 * 2**20
MAX_REPLICAS = 16


@dataclass(frozen=True)
class _Write:
    """An all-gather of written vectors in progress; `sent` must exist until it has ended."""

    work: Any
    sent: Tensor  # [P, D + 1]
    gathered: Tensor  # [W * P, D + 1]
    route: BankRoute


class ReplicatedMemoryBank(MemoryBank):
    """A memory bank with all rows on every rank; `lookup` is not a collective.

    The interface is that of :class:`~embeddings.memory_bank.sharded.MemoryBank`. `update` sends
    rows asynchronously; the next read waits for them.

    In its routes, `rows` are the ids that all ranks write, each once; `order` holds the positions
    of their vectors among the gathered ones; each rank sends `wanted_counts` rows.

    Example::

        import torch
        from embeddings import ReplicatedMemoryBank

        bank = ReplicatedMemoryBank(100, 2, "cpu")  # every rank of a job builds the same
        bank.update(torch.tensor([7]), torch.tensor([[1.0, 2.0]]), step=0)
        bank.lookup(torch.tensor([7, 8]))[0]  # [[1, 2], [0, 0]]
    """

    _capacity = 0  # ids that a rank sends beside their number
    _under_way: _Write | None = None

    def _allocated(self, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(self.num_items, self.dim + 1, device=self.device)
        return rows, rows[self._first : self._first + size]

    def routes(
        self,
        reads: Tensor,  # [U]
        writes: Tensor | None = None,  # [U]
    ) -> Callable[[], Routes]:
        """Begin to compute the route of `writes`; reads need none. Both calls are collectives."""
        if writes is None:
            return lambda: (None, None)
        finish = self._write_route(writes)
        return lambda: (None, finish())

    def _write_route(self, ids: Tensor) -> Callable[[], BankRoute]:
        """Begin to send these ids [U] to all ranks; the result finishes. Both are collectives."""
        ids = self._checked(ids).cpu()
        # Up to `_capacity` ids are sent with their count, so that one message is usually enough.
        message = _padded(torch.cat([torch.tensor([len(ids)]), ids]), 1 + self._capacity)
        arrived = torch.empty(self.world_size * len(message), dtype=torch.int64)
        work = dist.all_gather_into_tensor(arrived, message, group=self._group, async_op=True)

        def finish() -> BankRoute:
            """Wait for the ids of all ranks; where they are more than expected, a collective."""
            work.wait()
            by_rank = arrived.view(self.world_size, -1)
            counts, gathered = by_rank[:, 0], by_rank[:, 1:]
            padded = int(counts.max())
            if padded > gathered.shape[1]:
                self._capacity = max(self._capacity, padded)
                whole = torch.empty(self.world_size * padded, dtype=torch.int64)
                mine = _padded(ids, padded)
                dist.all_gather_into_tensor(whole, mine, group=self._group)
                gathered = whole.view(self.world_size, -1)
            rows, places = _last_of_each(gathered[:, :padded].reshape(-1))
            return BankRoute(places, [padded] * self.world_size, rows, counts.tolist())

        return finish

    @torch.no_grad()
    def lookup(
        self,
        item_ids: Tensor,  # [U]
        route: BankRoute | None = None,
    ) -> tuple[Tensor, Tensor]:  # vectors [U, D], steps int64 [U]
        """Read vectors and the steps of their last writes from this rank; not a collective."""
        ids = self._checked(item_ids)
        self._finish_write()
        rows = self._rows.index_select(0, ids)
        return rows[:, : self.dim], rows[:, self.dim].long() - 1

    def _write(self, item_ids: Tensor, values: Tensor, route: BankRoute | None) -> None:
        """Begin to send rows [U, D + 1] to all ranks. A collective."""
        self._finish_write()
        route = self._on_device(self._write_route(item_ids)() if route is None else route)
        padded = values.new_zeros(route.wanted_counts[0], self.dim + 1)
        padded[: len(values)] = values
        gathered = values.new_empty(self.world_size * len(padded), self.dim + 1)
        work = dist.all_gather_into_tensor(gathered, padded, group=self._group, async_op=True)
        self._under_way = _Write(work, padded, gathered, route)

    def _finish_write(self) -> None:
        if (write := self._under_way) is not None:
            self._under_way = None
            write.work.wait()
            self._rows[write.route.rows] = write.gathered.index_select(0, write.route.order)

    def finish_loading(self) -> None:
        """Bring the block of each rank, loaded from a checkpoint, to all ranks. A collective."""
        padded = self._rows.new_zeros(self._block_size, self.dim + 1)
        padded[: len(self._block)] = self._block
        gathered = self._rows.new_empty(self.world_size * self._block_size, self.dim + 1)
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        self._rows.copy_(gathered[: self.num_items])

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor | ShardedTensor]) -> None:
        """Load the rows of this rank's block, then gather all blocks. A collective."""
        super().load_state_dict(state_dict)
        self.finish_loading()


def _padded(ids: Tensor, length: int) -> Tensor:  # [U] -> [length]
    """Return the first `length` ids, filled up with -1."""
    padded = torch.full((length,), -1)
    padded[: len(ids)] = ids[:length]
    return padded


def _last_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [U], [U]
    """Return the distinct ids without -1, ascending, and the last position of each.

    The result is the same on all ranks and devices.
    """
    unique, of_unique = ids.unique(return_inverse=True)
    places = torch.arange(len(ids))
    last = torch.zeros_like(unique).scatter_reduce_(0, of_unique, places, "amax")
    is_id = unique >= 0
    return unique[is_id], last[is_id]


def is_replicated(num_items: int, dim: int, world_size: int, placement: str) -> bool:
    """Return whether every rank holds the whole bank.

    Args:
        num_items: rows of the bank.
        dim: dimension of a vector, D.
        world_size: number of ranks, W.
        placement: `sharded`, `replicated`, or `auto`: replicated if the bank is small and the ranks
            are few.

    Example::

        from embeddings import is_replicated

        is_replicated(10_000, 32, world_size=8, placement="auto")  # True: 1.3 MB on each rank
    """
    is_small = num_items * (dim + 1) * 4 <= MAX_REPLICA_BYTES and world_size <= MAX_REPLICAS
    return world_size > 1 and (placement == "replicated" or (placement == "auto" and is_small))


def build_memory_bank(
    num_items: int,
    dim: int,
    device: torch.device | str,
    process_group: dist.ProcessGroup | None,
    placement: str = "auto",
) -> MemoryBank:
    """Build the memory bank of a job; `placement` as for :func:`is_replicated`.

    Example::

        from embeddings import build_memory_bank

        build_memory_bank(1000, 32, "cpu", process_group=None)  # one rank: a MemoryBank
    """
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    whole = is_replicated(num_items, dim, world_size, placement)
    return (ReplicatedMemoryBank if whole else MemoryBank)(num_items, dim, device, process_group)
