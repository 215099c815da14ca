"""Rows of sharded tables under any plan. Shapes: N rows, R rows of the table, D dimension."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.table_state import local_tensors, table_weights
from embeddings.tables import INITIALIZATION_BLOCK_ROWS, NormalInitializer, TableConfig

BLOCK_ROWS = 2**16


@dataclass(frozen=True)
class TableShard:
    """A shard of a table on this rank: a rectangle of rows and columns."""

    weight: Tensor  # [rows, columns], shares memory with the model
    states: list[Tensor]  # fused optimizer state, [rows] or [rows, columns]; empty under SGD
    row: int  # first row, counted in the table
    column: int  # first column, counted in the table

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.weight.shape[1])

    def contains(self, rows: Tensor) -> Tensor:  # int64 [N] -> bool [N]
        return (rows >= self.row) & (rows < self.row + len(self.weight))

    def write(self, rows: Tensor, values: Tensor) -> None:  # int64 [N], [N, D]
        """Write those rows and columns of `values` that this shard holds."""
        inside = self.contains(rows)
        indices = (rows[inside] - self.row).to(self.weight.device)
        self.weight[indices] = values[inside, self.columns].to(self.weight)

    def is_trained(self) -> Tensor:  # bool [rows], on the host
        """Return which rows were updated: their optimizer state is not zero."""
        trained = torch.zeros(len(self.weight), dtype=torch.bool)
        for state in self.states:
            rows = state != 0 if state.dim() == 1 else (state != 0).any(dim=1)
            trained |= rows.cpu()
        return trained


def local_shards(model: DistributedModelParallel) -> Iterator[tuple[str, TableShard]]:
    """Yield every table's name with each of its shards on this rank."""
    states = model.fused_optimizer.state_dict()["state"]
    for key, weight in table_weights(model).items():
        optimizer_states = [local_tensors(state) for state in states.get(key, {}).values()]
        for index, shard in enumerate(weight.local_shards()):
            row, column = shard.metadata.shard_offsets
            shard_states = [tensors[index] for tensors in optimizer_states]
            by_row = [state for state in shard_states if len(state) == len(shard.tensor)]
            yield key.split(".")[-2], TableShard(shard.tensor.detach(), by_row, row, column)


class TableRows:
    """One table of a sharded model, and which of its rows have been trained."""

    def __init__(
        self, model: DistributedModelParallel, table: str, group: dist.ProcessGroup
    ) -> None:
        weights = {key.split(".")[-2]: weight for key, weight in table_weights(model).items()}
        self.dim = weights[table].metadata().size[1]
        self.group = group
        self.shards = [shard for name, shard in local_shards(model) if name == table]
        self.trained = [shard.is_trained() for shard in self.shards]  # bool [rows] each

    @torch.no_grad()
    def mean(self) -> tuple[Tensor, int]:  # float64 [D], number of rows
        """Return the mean of the trained rows and their number. A collective."""
        totals = torch.zeros(2, self.dim, dtype=torch.float64)  # sums and counts
        for shard, trained in zip(self.shards, self.trained, strict=True):
            for start in range(0, len(trained), BLOCK_ROWS):
                is_trained = trained[start : start + BLOCK_ROWS].to(shard.weight.device)
                block = shard.weight[start : start + BLOCK_ROWS][is_trained]
                totals[0, shard.columns] += block.double().sum(dim=0).cpu()
            totals[1, shard.columns] += trained.sum()
        dist.all_reduce(totals, group=self.group)
        return totals[0] / totals[1].clamp(min=1), int(totals[1].min())

    @torch.no_grad()
    def fill_untrained(self, value: Tensor) -> None:  # [D]
        """Write one vector into every row that was not trained; not a collective."""
        for shard, trained in zip(self.shards, self.trained, strict=True):
            indices = torch.nonzero(~trained).squeeze(1).to(shard.weight.device)
            shard.weight[indices] = value[shard.columns].to(shard.weight)


class RowReset:
    """Sets rows of a sharded model to initial weights and zeroes their optimizer state.

    Weights do not depend on rank or plan. `seed` is torch's seed from when the tables were built.
    """

    def __init__(
        self, model: DistributedModelParallel, tables: Sequence[TableConfig], seed: int
    ) -> None:
        self._fresh = {table.name: _fresh_rows(table, seed) for table in tables}
        self._shards: dict[str, list[TableShard]] = {table.name: [] for table in tables}
        for name, shard in local_shards(model):
            if name in self._shards:
                self._shards[name].append(shard)

    @torch.no_grad()
    def __call__(self, table: str, rows: Tensor) -> None:
        """Reset ``rows``, int64 [N] and the same on all ranks, of ``table``; not a collective."""
        for shard in self._shards[table]:
            inside = rows[shard.contains(rows)]
            if not len(inside):
                continue
            fresh = self._fresh[table][inside % INITIALIZATION_BLOCK_ROWS, shard.columns]
            device = shard.weight.device
            stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
            with torch.cuda.stream(stream):
                indices = (inside - shard.row).to(device)
                shard.weight[indices] = fresh.to(shard.weight)
                for state in shard.states:
                    state[indices] = 0


def _fresh_rows(table: TableConfig, seed: int) -> Tensor:
    rows = min(INITIALIZATION_BLOCK_ROWS, table.num_embeddings)
    fresh = torch.empty(rows, table.embedding_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        NormalInitializer(table).fill(fresh)
    return fresh
