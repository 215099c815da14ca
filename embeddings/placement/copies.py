"""Several copies of all tables, each sharded over some of the ranks: TorchRec's 2D parallelism.

With W ranks and C copies, lookups and gradients travel among the W / C ranks of a copy only. Every
few steps the copies are set to their mean, weights and optimizer state. The ranks 0, C, 2C, ...
share the first copy, the ranks 1, C + 1, ... the second, so that means are taken inside a node.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DataParallelWrapper, DMPCollection
from torchrec.distributed.types import ModuleSharder, ShardingPlan


def distribute_copies(
    model: nn.Module,
    plan: ShardingPlan,
    copies: int,
    device: torch.device,
    group: dist.ProcessGroup,
    sharders: list[ModuleSharder[nn.Module]],
    wrapper: DataParallelWrapper | None = None,
) -> DMPCollection:
    """Shard each copy of the tables as the plan says, and make dense parts data-parallel.

    A collective. TorchRec changes the plan in place to the numbers of the ranks of this copy.

    Args:
        model: with tables on meta.
        plan: the plan of one copy, from `plan_sharding(..., copies=copies)`.
        copies: a divisor of the number of ranks.
        device: device of this rank, a GPU.
        group: all ranks.
        sharders: those that the plan was made with.
        wrapper: wrapper of the dense parts; default: TorchRec's.
    """
    world_size = dist.get_world_size(group)
    return DMPCollection(
        model,
        device,
        plan,
        world_size=world_size,
        sharding_group_size=world_size // copies,
        global_pg=group,
        sharders=sharders,
        data_parallel_wrapper=wrapper,
    )


class CopiesMean:
    """Sets the copies of all tables to their mean every few steps. Each call is a collective.

    Args:
        model: a model of `distribute_copies`.
        every: steps from one mean to the next.
    """

    def __init__(self, model: DMPCollection, every: int) -> None:
        """Keep the model; see the class."""
        self.model, self.every, self._since = model, every, 0

    def step(self) -> None:
        """Count a training step, after which a mean may be due. A collective."""
        self._since += 1
        if self._since >= self.every:
            self.settle()

    def settle(self) -> None:
        """Take the mean unless no step was made since the last one. A collective."""
        if self._since:
            self.model.sync()
            self._since = 0
