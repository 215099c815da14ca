"""The memory bank: one content vector per item, written when the item is encoded, read by id.

User histories read the bank instead of running the encoder again (LEMUR, arXiv 2511.10962).
Shapes: U ids, D dimension, W ranks, P ids per rank after padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import (
    Shard,
    ShardedTensor,
    ShardMetadata,
    init_from_local_shards,
)

from embeddings.host import is_on_host, to_device

# Limits of a replica: with many ranks, it receives more written rows than its rank reads.
MAX_REPLICA_BYTES = 256 * 2**20
MAX_REPLICAS = 16


@dataclass(frozen=True)
class BankRoute:
    """Indices and counts with which ranks exchange the bank's rows of some ids."""

    order: Tensor  # int64 [U], sorts the ids by the rank that holds them
    owner_counts: list[int]  # number of these ids that each rank holds
    rows: Tensor  # int64, rows of this rank's block that each rank requests; distinct in a write
    requester_counts: list[int]  # number of rows that each rank requests
    # int64, only for a write: for each row, the index of its last vector among those received.
    # Without it a GPU would store an arbitrary one of several vectors.
    last: Tensor | None = None


Routes = tuple[BankRoute | None, BankRoute | None]  # to read, to write


class MemoryBank:
    """Vectors of items by id, [num_items, D], and the steps that wrote them; sharded over ranks.

    The bank is no ``nn.Module``, so its rows are neither traced, broadcast nor saved as weights.
    With a process group every method is a collective. Ids outside [0, num_items) are a ValueError.

    Example::

        import torch
        from embeddings import MemoryBank

        bank = MemoryBank(num_items=100, dim=8, device="cpu")
        bank.update(torch.tensor([3, 7]), torch.ones(2, 8), step=0)
        vectors, written = bank.lookup(torch.tensor([7, 8]))  # [2, 8]; [0, -1]
    """

    holds_all = False  # True if every rank has all rows; False: only its own block

    def __init__(
        self,
        num_items: int,
        dim: int,
        device: torch.device | str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value in [("num_items", num_items), ("dim", dim)]:
            if value < 1:
                raise ValueError(f"memory bank: {name} is {value}; set at least 1")
        self.num_items, self.dim = num_items, dim
        self.device, self.group = torch.device(device), process_group
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)
        rank = 0 if process_group is None else dist.get_rank(process_group)
        self._block_size = -(-num_items // self.world_size)
        self._first = rank * self._block_size
        size = max(0, min(self._block_size, num_items - self._first))
        self._start = 0 if self.holds_all else self._first  # id of the first row here
        try:
            rows = num_items if self.holds_all else size
            self._rows = torch.zeros(rows, dim + 1, device=self.device)
        except RuntimeError as error:
            raise ValueError(
                f"memory bank: {num_items:,} items x {dim} do not fit into the memory of "
                f"{self.world_size} ranks ({error}); add ranks, lower dim, or lower num_embeddings "
                "of the target item"
            ) from error
        # The block that this rank owns.
        self._block = self._rows[self._first : self._first + size] if self.holds_all else self._rows

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes

    def routes(self, reads: Tensor, writes: Tensor | None = None) -> Callable[[], Routes]:
        """Start computing routes of ids [U] on the host; the result finishes. Both: collectives."""
        if self.world_size == 1:
            return lambda: (None, None)
        checked = [self._checked(ids) for ids in ([reads] if writes is None else [reads, writes])]
        kinds, ids = len(checked), torch.cat(checked).to("cpu")  # only a fill has ids on a GPU
        lengths = torch.tensor([len(item_ids) for item_ids in checked])
        kind = torch.arange(kinds).repeat_interleave(lengths)  # of each id; 0: read, 1: write
        owner = ids // self._block_size
        key = owner * kinds + kind
        counts = key.bincount(minlength=self.world_size * kinds).view(-1, kinds)  # [W, kinds]
        request_counts = torch.empty_like(counts)
        work = dist.all_to_all_single(request_counts, counts, group=self.group, async_op=True)

        def finish() -> Routes:
            """Send the ids to their owners. A collective."""
            work.wait()
            sent, sent_counts = ids[key.argsort(stable=True)], counts.sum(1).tolist()
            received = exchange(sent, sent_counts, request_counts.sum(1).tolist(), self.group)
            ranks_kinds = torch.arange(kinds).repeat(self.world_size)
            received_kinds = ranks_kinds.repeat_interleave(request_counts.flatten())
            read, *write = [
                BankRoute(
                    order=owner[kind == index].argsort(stable=True),
                    owner_counts=counts[:, index].tolist(),
                    rows=received[received_kinds == index] - self._first,
                    requester_counts=request_counts[:, index].tolist(),
                )
                for index in range(kinds)
            ]
            if not write:
                return read, None
            rows, last = _last_positions(write[0].rows)
            return read, replace(write[0], rows=rows, last=last)

        return finish

    def _on_device(self, route: BankRoute | None) -> BankRoute:
        assert route is not None
        last = None if route.last is None else to_device(route.last, self.device)
        order, rows = to_device(route.order, self.device), to_device(route.rows, self.device)
        return replace(route, order=order, rows=rows, last=last)

    @torch.no_grad()
    def lookup(self, item_ids: Tensor, route: BankRoute | None = None) -> tuple[Tensor, Tensor]:
        """Read vectors [U, D] without gradient, and the steps of their last writes, int64 [U].

        Where never written, vectors are zero and steps -1. A collective unless `holds_all`.
        """
        self._finish_write()
        if self.holds_all or self.world_size == 1:
            rows = self._rows.index_select(0, to_device(self._checked(item_ids), self.device))
        else:
            route = self._on_device(route or self.routes(item_ids)()[0])
            sent = self._rows.index_select(0, route.rows)
            received = exchange(sent, route.requester_counts, route.owner_counts, self.group)
            rows = torch.empty_like(received).index_copy_(0, route.order, received)
        return rows[:, : self.dim], rows[:, self.dim].long() - 1

    @torch.no_grad()
    def update(
        self, item_ids: Tensor, vectors: Tensor, step: int, route: BankRoute | None = None
    ) -> None:
        """Write vectors [U, D]; for equal ids the highest rank's last one wins. A collective."""
        ids = self._checked(item_ids) if route is None else item_ids
        if vectors.shape != (ids.numel(), self.dim):
            raise ValueError(
                f"memory bank: vectors of shape {tuple(vectors.shape)} for {ids.numel()} ids; "
                f"pass [{ids.numel()}, {self.dim}]"
            )
        steps = torch.full((ids.numel(), 1), step + 1, dtype=torch.float32, device=self.device)
        values = torch.cat([vectors.detach().to(self.device, torch.float32), steps], dim=1)
        if self.world_size == 1:
            self._rows[ids.to(self.device)] = values
        else:
            self._write(item_ids, values, route)

    def _write(self, item_ids: Tensor, values: Tensor, route: BankRoute | None) -> None:
        """Send rows [U, D + 1] to the ranks that hold them. A collective."""
        route = self._on_device(route or self.routes(item_ids[:0], item_ids)()[1])
        assert route.last is not None
        sent = values[route.order]
        received = exchange(sent, route.owner_counts, route.requester_counts, self.group)
        self._rows[route.rows] = received.index_select(0, route.last)

    @torch.no_grad()
    def forget(self, item_ids: Tensor) -> None:
        """Mark ids [U], the same on all ranks, as never written; not a collective."""
        self._finish_write()
        indices = item_ids - self._start
        inside = (indices >= 0) & (indices < len(self._rows))
        self._rows[indices[inside].to(self.device)] = 0

    def _checked(self, item_ids: Tensor) -> Tensor:  # [U] -> int64 [U]
        if item_ids.dim() != 1 or item_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"memory bank: ids of shape {tuple(item_ids.shape)} and {item_ids.dtype}; pass "
                "[U] int64"
            )
        if is_on_host(item_ids):  # on a GPU the indexing kernel asserts the range
            outside = item_ids[(item_ids < 0) | (item_ids >= self.num_items)]
            if outside.numel() > 0:
                raise ValueError(
                    f"memory bank: item id {int(outside[0])} is outside [0, {self.num_items}); "
                    "raise num_items or map the item to a known id"
                )
        return item_ids.long()

    def coverage(self) -> float:
        """Return the share of all items that were ever written. A collective."""
        return self._written_count_and_steps()[0] / self.num_items

    def mean_age(self, step: int) -> float:
        """Return the mean number of steps since written items' last writes; nan without any."""
        count, steps = self._written_count_and_steps()
        return step - steps / count if count else float("nan")

    def _written_count_and_steps(self) -> tuple[float, float]:
        """Count written items and sum the steps of their last writes. A collective."""
        self._finish_write()
        steps = self._block[:, self.dim].double()
        count = (steps > 0).sum(dtype=torch.float64)
        totals = torch.stack([count, steps.sum() - count])
        if self.group is not None:
            dist.all_reduce(totals, group=self.group)
        return float(totals[0]), float(totals[1])

    def _finish_write(self) -> None:
        """Finish a write that is still in progress."""

    def finish_loading(self) -> None:
        """Complete a load into `state_dict` from a checkpoint. A collective."""

    def state_dict(self) -> dict[str, Tensor | ShardedTensor]:
        """Return the rows, [num_items, D + 1], which share the bank's memory. A collective."""
        self._finish_write()
        return {"pool": sharded_by_rows(self._block, self._first, self.num_items, self.group)}


def exchange(
    values: Tensor,
    sent_counts: list[int],
    received_counts: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:  # [N, ...] -> [sum of received_counts, ...]
    """Send rank r the r-th slice of `values`; return received values by rank. A collective."""
    received = values.new_empty(sum(received_counts), *values.shape[1:])
    dist.all_to_all_single(received, values, received_counts, sent_counts, group=group)
    return received


def sharded_by_rows(
    block: Tensor, first_row: int, num_rows: int, group: dist.ProcessGroup | None
) -> Tensor | ShardedTensor:  # [rows of this rank, D] -> [num_rows, D]
    """Return the blocks of all ranks as one tensor that shares their memory. A collective."""
    if group is None:
        return block
    placement = f"rank:{dist.get_rank()}/{block.device}"
    metadata = ShardMetadata([first_row, 0], list(block.shape), placement)
    shards = [Shard(block, metadata)] if len(block) else []
    return init_from_local_shards(shards, num_rows, block.shape[1], process_group=group)


class ReplicatedMemoryBank(MemoryBank):
    """A memory bank with all rows on every rank; `lookup` is not a collective.

    Written rows go to all ranks asynchronously; the next read waits for them. In a route, `rows`
    are the distinct ids that all ranks write, and `order` are their positions among gathered rows.
    """

    holds_all = True
    _capacity = 0  # number of ids that a rank sends in one message with their count
    # An all-gather in progress: its work handle, the rows sent [P, D + 1], which must stay alive
    # until it ends, the gathered rows [W * P, D + 1], and their route.
    _pending_write: tuple[Any, Tensor, Tensor, BankRoute] | None = None

    def routes(self, reads: Tensor, writes: Tensor | None = None) -> Callable[[], Routes]:
        """Start computing the route of `writes`; reads need none. Both calls are collectives."""
        if writes is None:
            return lambda: (None, None)
        finish = self._write_route(writes)
        return lambda: (None, finish())

    def _write_route(self, ids: Tensor) -> Callable[[], BankRoute]:
        """Start sending ids [U] to all ranks; the returned function finishes. Both: collectives."""
        ids = self._checked(ids).cpu()  # only a fill of the bank passes ids on a GPU
        # `_capacity` ids are sent with their count, so that one message is usually enough.
        message = _padded(torch.cat([torch.tensor([len(ids)]), ids]), 1 + self._capacity)
        arrived = torch.empty(self.world_size * len(message), dtype=torch.int64)
        work = dist.all_gather_into_tensor(arrived, message, group=self.group, async_op=True)

        def finish() -> BankRoute:
            """Wait for the ids of all ranks. A collective if a rank has more than `_capacity`."""
            work.wait()
            by_rank = arrived.view(self.world_size, -1)
            counts, gathered = by_rank[:, 0], by_rank[:, 1:]
            padded = int(counts.max())
            if padded > gathered.shape[1]:
                self._capacity = max(self._capacity, padded)
                complete = torch.empty(self.world_size * padded, dtype=torch.int64)
                dist.all_gather_into_tensor(complete, _padded(ids, padded), group=self.group)
                gathered = complete.view(self.world_size, -1)
            rows, positions = _last_positions(gathered[:, :padded].reshape(-1))
            return BankRoute(positions, [padded] * self.world_size, rows, counts.tolist())

        return finish

    def _write(self, item_ids: Tensor, values: Tensor, route: BankRoute | None) -> None:
        """Start sending rows [U, D + 1] to all ranks. A collective."""
        self._finish_write()
        route = self._on_device(self._write_route(item_ids)() if route is None else route)
        padded = values.new_zeros(route.owner_counts[0], self.dim + 1)
        padded[: len(values)] = values
        gathered = values.new_empty(self.world_size * len(padded), self.dim + 1)
        work = dist.all_gather_into_tensor(gathered, padded, group=self.group, async_op=True)
        self._pending_write = work, padded, gathered, route

    def _finish_write(self) -> None:
        if self._pending_write is not None:
            work, _, gathered, route = self._pending_write
            self._pending_write = None
            work.wait()
            self._rows[route.rows] = gathered.index_select(0, route.order)

    def finish_loading(self) -> None:
        """Gather the block that each rank loaded from a checkpoint on all ranks. A collective."""
        padded = self._rows.new_zeros(self._block_size, self.dim + 1)
        padded[: len(self._block)] = self._block
        gathered = self._rows.new_empty(self.world_size * self._block_size, self.dim + 1)
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        self._rows.copy_(gathered[: self.num_items])


def _padded(ids: Tensor, length: int) -> Tensor:  # [U] -> [length]
    padded = torch.full((length,), -1)
    padded[: len(ids)] = ids[:length]
    return padded


def _last_positions(ids: Tensor) -> tuple[Tensor, Tensor]:  # [N] -> [U], [U]
    """Return the distinct ids in ascending order, without -1, and the last position of each."""
    unique, inverse = ids.unique(return_inverse=True)
    positions = torch.arange(len(ids))
    last = torch.zeros_like(unique).scatter_reduce_(0, inverse, positions, "amax")
    is_id = unique >= 0
    return unique[is_id], last[is_id]


def is_replicated(num_items: int, dim: int, world_size: int, placement: str) -> bool:
    """Return whether every rank holds all rows; `auto` requires a small bank and few ranks."""
    is_small = num_items * (dim + 1) * 4 <= MAX_REPLICA_BYTES and world_size <= MAX_REPLICAS
    return world_size > 1 and (placement == "replicated" or (placement == "auto" and is_small))


def build_memory_bank(
    num_items: int,
    dim: int,
    device: torch.device | str,
    process_group: dist.ProcessGroup | None,
    placement: str = "auto",
) -> MemoryBank:
    """Build the memory bank of a job.

    Example::

        from embeddings import build_memory_bank

        build_memory_bank(1000, 32, "cpu", process_group=None)  # one rank: a MemoryBank
    """
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    replicated = is_replicated(num_items, dim, world_size, placement)
    bank = ReplicatedMemoryBank if replicated else MemoryBank
    return bank(num_items, dim, device, process_group)
