"""The shards of sharded tables on this rank, with the state of their optimizers by row."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.placement.current_state import local_tensors
from embeddings.table_state import table_weights


@dataclass(frozen=True)
class TableShard:
    """A rectangle of a table on this rank.

    weight: [rows, columns], the memory of the model.
    states: state of the fused optimizer, [rows] or [rows, columns] each, none under SGD.
    row, column: offsets in the table.
    """

    weight: Tensor
    states: list[Tensor]
    row: int
    column: int

    @property
    def columns(self) -> slice:
        """Columns of the table in this shard."""
        return slice(self.column, self.column + self.weight.shape[1])

    def contains(self, rows: Tensor) -> Tensor:  # int64 [N] -> bool [N]
        """Return which rows of the table lie in this shard."""
        return (rows >= self.row) & (rows < self.row + len(self.weight))

    def is_trained(self) -> Tensor:  # bool [rows], on the host
        """Return which rows an optimizer with state has updated: their moments are not zero."""
        trained = torch.zeros(len(self.weight), dtype=torch.bool)
        for state in self.states:
            rows = state != 0 if state.dim() == 1 else (state != 0).any(dim=1)
            trained |= rows.cpu()
        return trained


def local_shards(model: DistributedModelParallel) -> Iterator[tuple[str, TableShard]]:
    """Yield every table's name with each of its shards on this rank."""
    states = model.fused_optimizer.state_dict()["state"]
    for key, weight in table_weights(model).items():
        kept = [local_tensors(state) for state in states.get(key, {}).values()]
        for index, shard in enumerate(weight.local_shards()):
            row, column = shard.metadata.shard_offsets
            own = [tensors[index] for tensors in kept]
            by_row = [state for state in own if len(state) == len(shard.tensor)]
            yield key.split(".")[-2], TableShard(shard.tensor.detach(), by_row, row, column)
