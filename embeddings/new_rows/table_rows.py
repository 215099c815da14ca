"""Rows of a sharded table, read, averaged and written by their numbers under any plan.

Shapes: N rows, R rows of the table, D dimension.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.table_shards import TableShard, local_shards
from embeddings.table_state import table_weights

BLOCK_ROWS = 2**16
TrainedRows = Callable[[int, int], np.ndarray]  # rows [start, stop) -> bool [stop - start]


class TableRows:
    """One table of a sharded model, and which of its rows were trained before.

    Args:
        model: sharded under any plan.
        table: name of the table.
        group: the ranks of the model.
        trained: returns which rows of a range count as trained; default: those whose moments in the
            fused optimizer are not zero, so that a gradient has reached them.

    Example::

        rows = TableRows(model, "item", group)  # of a DistributedModelParallel
        mean, count = rows.mean()
        rows.fill_untrained(mean)
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        table: str,
        group: dist.ProcessGroup,
        trained: TrainedRows | None = None,
    ) -> None:
        """Collect the shards on this rank and note which of their rows were trained."""
        sizes = {
            key.split(".")[-2]: tuple(weight.metadata().size)
            for key, weight in table_weights(model).items()
        }
        self.num_rows, self.dim = sizes[table]
        self.group = group
        self.shards = [shard for name, shard in local_shards(model) if name == table]
        self.trained = [_trained(shard, trained) for shard in self.shards]  # bool [rows] each

    @torch.no_grad()
    def mean(self) -> tuple[Tensor, int]:  # float64 [D], number of rows
        """Return the mean of the trained rows, each counted once, and their number. A collective.

        Under column-wise sharding with no explicit `trained`, each column shard averages the rows
        that it has moments of.
        """
        totals = torch.zeros(2, self.dim, dtype=torch.float64)  # sums and counts
        for shard, trained in zip(self.shards, self.trained, strict=True):
            for start in range(0, len(trained), BLOCK_ROWS):
                chosen = trained[start : start + BLOCK_ROWS].to(shard.weight.device)
                block = shard.weight[start : start + BLOCK_ROWS][chosen]
                totals[0, shard.columns] += block.double().sum(dim=0).cpu()
            totals[1, shard.columns] += trained.sum()
        dist.all_reduce(totals, group=self.group)
        return totals[0] / totals[1].clamp(min=1), int(totals[1].min())

    @torch.no_grad()
    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # int64 [N] -> float32 [N, D], bool [N]
        """Return rows and whether they were trained; all ranks ask for the same. A collective."""
        values = torch.zeros(len(rows), self.dim)
        seen = torch.zeros(len(rows), dtype=torch.uint8)
        for shard, trained in zip(self.shards, self.trained, strict=True):
            inside = torch.nonzero(shard.contains(rows)).squeeze(1)
            places = rows[inside] - shard.row
            found = shard.weight[places.to(shard.weight.device)].float().cpu()
            values[inside, shard.columns] = found
            seen[inside] |= trained[places].to(torch.uint8)
        # Exactly one shard of all ranks has each number, so the sums are the numbers themselves.
        dist.all_reduce(values, group=self.group)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.group)
        return values, seen.bool()

    @torch.no_grad()
    def fill_untrained(self, value: Tensor) -> None:  # [D]
        """Write one vector into every row that was not trained; not a collective."""
        for shard, trained in zip(self.shards, self.trained, strict=True):
            places = torch.nonzero(~trained).squeeze(1).to(shard.weight.device)
            shard.weight[places] = value[shard.columns].to(shard.weight)

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor) -> None:  # int64 [N], [N, D]
        """Write rows, the same on all ranks; not a collective. The state of optimizers stays."""
        for shard in self.shards:
            inside = shard.contains(rows)
            places = (rows[inside] - shard.row).to(shard.weight.device)
            shard.weight[places] = values[inside, shard.columns].to(shard.weight)


def _trained(shard: TableShard, trained: TrainedRows | None) -> Tensor:  # bool [rows]
    if trained is None:
        return shard.is_trained()
    return torch.from_numpy(trained(shard.row, shard.row + len(shard.weight)))
