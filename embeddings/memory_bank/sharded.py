"""A store of one content vector per item, split over the ranks in blocks of rows.

Each step writes the vectors that it has computed; user histories read from the bank instead of
running the encoder again (the memory bank of LEMUR, arXiv 2511.10962). The route of each row
follows from the ids: a `BankRoute` is computed for a whole batch before its step, so that the
step itself sends vectors and nothing else.

Shapes: U ids, D dimension, W ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import (
    Shard,
    ShardedTensor,
    ShardMetadata,
    init_from_local_shards,
)

from embeddings.memory_bank.routes import BankRoute, Routes, exchange_routes


class MemoryBank:
    """Vectors of items by id, each with the step that wrote it.

    It is no ``nn.Module``, on purpose: TrainPipelineSparseDist would trace a submodule,
    DistributedDataParallel would broadcast its buffers, and its rows would enter the model's
    ``state_dict`` as weights. Any module may hold a bank as an attribute; ``module.to`` does not
    move it, and it is checkpointed by its own ``state_dict``.

    With a process group every method is a collective: all ranks call it together, each with its
    own ids, or with none. Without a group the bank is a plain tensor of this process.

    Args:
        num_items: ids run from 0 to num_items - 1.
        dim: size of a vector, D.
        device: device of the rows; lookups and updates take tensors of this device.
        process_group: the ranks over which the rows are split.

    Example::

        import torch
        from embeddings import MemoryBank

        bank = MemoryBank(num_items=100, dim=8, device="cpu")
        bank.update(torch.tensor([3, 7]), torch.ones(2, 8), step=0)
        vectors, written = bank.lookup(torch.tensor([7, 8]))  # [2, 8]; [0, -1]
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        device: torch.device | str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Allocate the rows of this rank, filled with zeros."""
        for name, value in [("num_items", num_items), ("dim", dim)]:
            if value < 1:
                raise ValueError(f"memory bank: {name} is {value}; set at least 1")
        self.num_items, self.dim = num_items, dim
        self.device, self._group = torch.device(device), process_group
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self.world_size = world_size
        self._block_size = -(-num_items // world_size)
        self._first = self._rank * self._block_size
        size = max(0, min(self._block_size, num_items - self._first))
        try:
            self._rows, self._block = self._allocated(size)
        except RuntimeError as error:
            raise ValueError(
                f"memory bank: {num_items:,} items x {dim} do not fit into the memory of "
                f"{world_size} ranks ({error}); add ranks, lower dim, or lower num_embeddings of "
                "the target item"
            ) from error

    def _allocated(self, size: int) -> tuple[Tensor, Tensor]:  # [.., D + 1], [size, D + 1]
        """Return the rows on this rank, and among them the block that this rank owns.

        The last column: step of the last write + 1, 0 if never written. Steps beyond 2**24 are
        rounded to the next float32, by less than one in 16 million.
        """
        rows = torch.zeros(size, self.dim + 1, device=self.device)
        return rows, rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows on this rank."""
        return self._rows.nbytes

    def routes(
        self,
        reads: Tensor,  # [U]
        writes: Tensor | None = None,  # [U]
    ) -> Callable[[], Routes]:
        """Begin to compute routes for ids [U] to read and for ids [U] to write.

        Call the result to get them, on the host; None if no route is needed. Both calls are
        collectives; work between them does not wait for other ranks.

        Raises:
            ValueError: an id is outside the bank.
        """
        if self.world_size == 1:
            return lambda: (None, None)
        routes = self._routes([reads] if writes is None else [reads, writes])

        def finish() -> Routes:
            read, *write = routes()
            return read, write[0] if write else None

        return finish

    def _routes(self, wanted: Sequence[Tensor]) -> Callable[[], list[BankRoute]]:
        ids = [self._checked(part).cpu() for part in wanted]
        return exchange_routes(ids, self._block_size, self._group)

    def _route(self, ids: Tensor, route: BankRoute | None) -> BankRoute:  # ids [U]
        return self._on_device(self._routes([ids])()[0] if route is None else route)

    def _on_device(self, route: BankRoute) -> BankRoute:
        return replace(route, order=route.order.to(self.device), rows=route.rows.to(self.device))

    @torch.no_grad()
    def lookup(self, item_ids: Tensor, route: BankRoute | None = None) -> tuple[Tensor, Tensor]:
        """Read vectors, without gradient. A collective.

        Args:
            item_ids: [U] integer ids.
            route: the route of these ids, on the device of the rows; None: computed now.

        Returns:
            vectors [U, D], zero if never written, and the step of the last write [U] int64,
            -1 if never written; the step is rounded to float32.

        Raises:
            ValueError: an id is outside the bank.
        """
        self._finish_write()
        if self.world_size == 1:
            rows = self._rows.index_select(0, self._checked(item_ids))
        else:
            route = self._route(item_ids, route)
            sent = self._rows.index_select(0, route.rows)
            received = sent.new_empty(len(item_ids), self.dim + 1)
            splits = route.wanted_counts, route.asked_counts
            dist.all_to_all_single(received, sent, *splits, group=self._group)
            rows = torch.empty_like(received).index_copy_(0, route.order, received)
        return rows[:, : self.dim], rows[:, self.dim].long() - 1

    @torch.no_grad()
    def update(
        self, item_ids: Tensor, vectors: Tensor, step: int, route: BankRoute | None = None
    ) -> None:
        """Write vectors by id.

        If an id is written several times in one call, the last vector of the highest rank is kept.

        Args:
            item_ids: [U] integer ids.
            vectors: [U, D]; detached and stored as float32.
            step: the current step, stored as the age of the rows.
            route: the route of these ids, on the device of the rows; None: computed now.

        Raises:
            ValueError: an id is out of range, the step is negative, or the shapes do not fit.
        """
        ids = self._checked(item_ids) if route is None else item_ids
        if vectors.shape != (ids.numel(), self.dim):
            raise ValueError(
                f"memory bank: vectors of shape {tuple(vectors.shape)} for {ids.numel()} ids; "
                f"pass [{ids.numel()}, {self.dim}]"
            )
        if step < 0:
            raise ValueError(f"memory bank: step {step} is outside [0, ...); pass at least 0")
        written = torch.full((ids.numel(), 1), step + 1, dtype=torch.float32, device=self.device)
        values = torch.cat([vectors.detach().to(self.device, torch.float32), written], dim=1)
        if self.world_size == 1:
            self._rows[ids] = values
        else:
            self._write(item_ids, values, route)

    def _write(self, item_ids: Tensor, values: Tensor, route: BankRoute | None) -> None:
        """Send rows [U, D + 1] to the ranks that hold them. A collective."""
        route = self._route(item_ids, route)
        received = values.new_empty(len(route.rows), self.dim + 1)
        splits = route.asked_counts, route.wanted_counts
        dist.all_to_all_single(received, values[route.order], *splits, group=self._group)
        self._rows[route.rows] = received

    @torch.no_grad()
    def forget(self, item_ids: Tensor) -> None:
        """Zero vectors as if never written, of ids [U] equal on all ranks; not a collective."""
        self._finish_write()
        places = item_ids - (self._first if self._rows is self._block else 0)
        inside = (places >= 0) & (places < len(self._rows))
        self._rows[places[inside].to(self.device)] = 0

    def _checked(self, item_ids: Tensor) -> Tensor:  # [U] -> int64 [U]
        if item_ids.dim() != 1 or item_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"memory bank: ids of shape {tuple(item_ids.shape)} and {item_ids.dtype}; pass "
                "[U] int64"
            )
        outside = item_ids[(item_ids < 0) | (item_ids >= self.num_items)]
        if outside.numel() > 0:
            raise ValueError(
                f"memory bank: item id {int(outside[0])} is outside [0, {self.num_items}); "
                "raise num_items or map the item to a known id"
            )
        return item_ids.to(self.device, torch.int64)

    def coverage(self) -> float:
        """Return the share of all items that were ever written, over all ranks."""
        return self._written_count_and_steps()[0] / self.num_items

    def mean_age(self, step: int) -> float:
        """Return the mean number of steps since the last writes of written items; nan for none."""
        count, steps = self._written_count_and_steps()
        return step - steps / count if count else float("nan")

    def _written_count_and_steps(self) -> tuple[float, float]:
        """Count written items and sum the steps of their last writes. A collective."""
        self._finish_write()
        marks = self._block[:, self.dim].double()
        count = (marks > 0).sum(dtype=torch.float64)
        totals = torch.stack([count, marks.sum() - count])
        if self._group is not None:
            dist.all_reduce(totals, group=self._group)
        return float(totals[0]), float(totals[1])

    def _finish_write(self) -> None:
        """Finish a write that is still in progress; called before rows are read."""

    def finish_loading(self) -> None:
        """Complete a load into `state_dict` from a checkpoint. A collective."""

    def state_dict(self) -> dict[str, Tensor | ShardedTensor]:
        """Return the rows, [num_items, D + 1], sharing memory with the bank.

        torch.distributed.checkpoint saves them from any number of ranks and loads them, in
        place, on any other; then call :meth:`finish_loading`.
        """
        self._finish_write()
        rows = self._block
        if self._group is None:
            return {"pool": rows}
        pieces = []
        if len(rows) > 0:
            placement = f"rank:{dist.get_rank()}/{rows.device}"
            metadata = ShardMetadata([self._first, 0], list(rows.shape), placement)
            pieces.append(Shard(tensor=rows, metadata=metadata))
        size = (self.num_items, self.dim + 1)
        return {"pool": init_from_local_shards(pieces, *size, process_group=self._group)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor | ShardedTensor]) -> None:
        """Load the rows of another bank's ``state_dict``, whole or split over the same ranks.

        Raises:
            ValueError: the sizes differ, or the rows are split over another number of ranks (load
                such a state through torch.distributed.checkpoint).
        """
        pool = state_dict["pool"]
        size = pool.metadata().size if isinstance(pool, ShardedTensor) else pool.shape
        if tuple(size) != (self.num_items, self.dim + 1):
            raise ValueError(
                f"memory bank: the state holds [num_items, dim + 1] = {list(size)}, this bank "
                f"{[self.num_items, self.dim + 1]}; build the bank with the checkpoint's sizes"
            )
        self._finish_write()
        rows, start = self._block, self._first
        if isinstance(pool, ShardedTensor):
            for piece in pool.local_shards():
                if piece.metadata.shard_offsets != [start, 0] or piece.tensor.shape != rows.shape:
                    raise ValueError(
                        "memory bank: the state is split over another number of ranks; load it "
                        "through torch.distributed.checkpoint into this bank's state_dict()"
                    )
                rows.copy_(piece.tensor)
        else:
            rows.copy_(pool[start : start + len(rows)])
