"""Exponential moving average (EMA) of the weights, through torch.optim.swa_utils.

After n updates the decay is at most (1 + n) / (10 + n), so initial weights are soon forgotten.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.table_state import State, in_blocks, table_weights
from recsys.config import OptimizerSettings
from recsys.optimizer.dense import dense_parameters


class AveragedWeights:
    """Averages of named parameters: average = decay * average + (1 - decay) * weight.

    The first update copies the weights. Of sharded `tables` it averages the rows on this rank.

    Example::

        from torch import nn
        from recsys.optimizer import AveragedWeights

        model = nn.Linear(2, 1)
        averages = AveragedWeights(dict(model.named_parameters()), decay=0.999)
        averages.update()  # after each step of the optimizer
        with averages.in_place():
            model.eval()  # evaluate here
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        tables: Mapping[str, ShardedTensor] | None = None,
    ) -> None:
        self.names, self.tables = list(parameters), dict(tables or {})
        shards = [
            nn.Parameter(shard.tensor.detach(), requires_grad=False)
            for table in self.tables.values()
            for shard in table.local_shards()
        ]
        self.weights: list[Tensor] = [*parameters.values(), *shards]
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.decay = decay
        # A number on the host, which checkpoints load in place: reading it waits for no GPU.
        self._num_updates = np.zeros((), np.int64)

    @torch.no_grad()
    def update(self) -> None:
        if count := int(self._num_updates):
            decay = min(self.decay, (1 + count) / (10 + count))
            get_ema_multi_avg_fn(decay)(self.averages, self.weights, count)
        else:
            self.copy_weights()
        self._num_updates += 1

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Set the averages to the weights, as before a load that replaces some averages."""
        torch._foreach_copy_(self.averages, self.weights)

    @torch.no_grad()
    def copy_rows(self, table: str, rows: Tensor) -> None:
        """Set the averages of rows, int64 [N], of a table to its weights; not a collective."""
        averages = iter(self.averages[len(self.names) :])
        for key, weights in self.tables.items():
            for shard, average in zip(weights.local_shards(), averages):
                if key.split(".")[-2] == table:
                    indices = rows - shard.metadata.shard_offsets[0]
                    indices = indices[(indices >= 0) & (indices < len(average))].to(average.device)
                    average[indices] = shard.tensor[indices]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the weights by the averages, if there are any yet, inside the block."""
        if not self._num_updates:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            previous = weight.clone()
            weight.copy_(average)
            average.copy_(previous)

    def state_dict(self) -> State:
        """Return averages by name and their number of updates, in the memory of this object."""
        state: State = dict(zip(self.names, self.averages))
        shard_averages = iter(self.averages[len(self.names) :])
        for name, table in self.tables.items():
            local = [next(shard_averages) for _ in table.local_shards()]
            state[name] = in_blocks(table, table._process_group, local)
        return {**state, "num_updates": torch.from_numpy(self._num_updates)}


def build_averages(
    model: DistributedModelParallel, settings: OptimizerSettings
) -> AveragedWeights | None:
    """Return averages of a model's weights; None if `optimizer.ema_decay` is not set."""
    if settings.ema_decay is None:
        return None
    tables = table_weights(model) if settings.ema_tables else None
    return AveragedWeights(dense_parameters(model), settings.ema_decay, tables)
