"""Data parallelism of the dense parameters, where there are several ranks.

On one rank DistributedDataParallel averages each gradient over itself. Its hooks, buckets and
all-reduce then cost some milliseconds per step, a third of a small one, for the same numbers.
"""

from __future__ import annotations

import torch
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv


class DataParallelWrapper(DefaultDataParallelWrapper):
    """TorchRec's wrapper of the dense parameters; a job of one rank gets none.

    Example::

        env = ShardingEnv.from_process_group(group)
        wrapper = DataParallelWrapper()
        DistributedModelParallel(model, env, device, plan, data_parallel_wrapper=wrapper)
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wrap the model in DistributedDataParallel, or only move it to its device."""
        if env.world_size == 1:
            dmp._dmp_wrapped_module = dmp._dmp_wrapped_module.to(device)
        else:
            super().wrap(dmp, env, device)
