"""All private parts of TorchRec that training uses, written for TorchRec 1.8.

`tests/recsys/distributed/test_torchrec_internals.py` says which of them an upgrade has changed.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.dist_data import KJTAllToAll, KJTAllToAllTensorsAwaitable
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward
from torchrec.distributed.types import Awaitable, NoWait, ShardedModule, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

TORCHREC_VERSION = "1.8"


class DataParallelWrapper(DefaultDataParallelWrapper):
    """TorchRec's wrapper of the dense parameters; a job of one rank gets none."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        if env.world_size == 1:
            dmp._dmp_wrapped_module = dmp._dmp_wrapped_module.to(device)
        else:
            super().wrap(dmp, env, device)


def no_gradient_reduction(model: DistributedModelParallel) -> AbstractContextManager[Any]:
    """Return a context in which a backward does not average the dense gradients over the ranks."""
    wrapped = model._dmp_wrapped_module
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def require_pipelined(model: nn.Module) -> None:
    """Raise a RuntimeError if, after a first step, a sharded module does not send its ids ahead."""
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module.forward, BaseForward):
            raise RuntimeError(
                f"sharded module '{name}' is not pipelined: EM3.forward must stay a straight line "
                "and give each collection an attribute of the batch itself"
            )


class IdsPipeline(TrainPipelineSparseDist[Any, Any]):
    """TorchRec's pipeline; a job of one rank keeps its ids by `LocalIds`."""

    def _pipeline_model(self, *arguments: Any, **options: Any) -> None:
        super()._pipeline_model(*arguments, **options)
        if self._model._env.world_size == 1:
            keep_ids(self._pipelined_modules)

    def sync_embeddings(self, *arguments: Any, **options: Any) -> None:
        """Leave the mean over copies of tables to `CopiesMean`; TorchRec takes it every batch."""


def keep_ids(modules: Iterable[nn.Module]) -> None:
    """Replace the exchanges of sharded collections on the only rank by `LocalIds`."""
    for module in modules:
        for child in module.modules():
            for input_dist in getattr(child, "_input_dists", ()):
                if isinstance(exchange := getattr(input_dist, "_dist", None), KJTAllToAll):
                    splits, stagger = exchange._splits, exchange._stagger
                    input_dist._dist = LocalIds(exchange._pg, splits, stagger)


class LocalIds(KJTAllToAll):
    """Returns the ids of one sharding of a collection as they are, on the only rank."""

    def forward(self, ids: KeyedJaggedTensor) -> Awaitable[KJTAllToAllTensorsAwaitable]:
        return NoWait(_LocalIdsAwaitable(ids))


class _LocalIdsAwaitable(KJTAllToAllTensorsAwaitable):
    """Awaitable of the ids, with the sizes that the output exchange reads."""

    def __init__(self, ids: KeyedJaggedTensor) -> None:
        super(KJTAllToAllTensorsAwaitable, self).__init__()
        self._workers, self._input, self._recat = 1, ids, None
        self._input_splits = self._output_splits = {"values": [ids.values().numel()]}
        self._stride_per_rank = [ids.stride()]
