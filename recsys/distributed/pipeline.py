"""TorchRec's pipeline with gradient accumulation: one dense update for several batches.

ID tables are updated in each batch, as their kernels are fused; the loss is divided by the group.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from embeddings.sharding import CopiesMean
from embeddings.torchrec_internals import unlock_cached_rows
from recsys.distributed.torchrec_internals import IdsPipeline, no_gradient_reduction
from recsys.optimizer.averaging import AveragedWeights
from recsys.optimizer.dense import gradient_norm
from recsys.optimizer.running_statistics import RunningStatistics


@dataclass(eq=False)
class DenseUpdate:
    """One update of dense parameters: clip the gradient, step, update averages and statistics."""

    optimizer: CombinedOptimizer  # also sets the rates of fused optimizers
    dense: Optimizer  # the optimizer of dense parameters inside `optimizer`
    clip_norm: float | None = None
    averages: AveragedWeights | None = None
    statistics: RunningStatistics | None = None
    _norm: Tensor | None = None  # of the last gradient, before it was clipped

    def step(self) -> None:
        if self.clip_norm is not None:
            parameters = [p for group in self.dense.param_groups for p in group["params"]]
            self._norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.dense.step()  # a step of fused optimizers only sets their rates once more
        if self.averages is not None:
            self.averages.update()
        if self.statistics is not None:
            self.statistics.average()

    def gradient_norm(self) -> Tensor:
        """Return the norm [] of the last dense gradient before clipping, equal on all ranks."""
        return gradient_norm(self.dense) if self._norm is None else self._norm


class AccumulatingPipeline(IdsPipeline):
    """TorchRec's pipeline, with an update of dense parameters after `accumulate_steps` batches.

    TorchRec's `GradientAccumulationWrapper` does not divide the loss.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        update: DenseUpdate,
        device: torch.device,
        accumulate_steps: int = 1,
        copies: CopiesMean | None = None,
    ) -> None:
        optimizer = cast(Optimizer, _GroupOptimizer(update, self))
        super().__init__(model, optimizer, device, custom_model_fwd=self._forward)
        self.model, self.update = model, update
        self.accumulate_steps, self.copies = accumulate_steps, copies
        self.has_stepped = False  # whether the last batch was the end of a group
        self._batches_left = math.inf  # remaining training batches, if they are known
        self._group_size, self._position = accumulate_steps, 0
        self._has_synchronized = False

    def begin(self, num_batches: int) -> None:
        """Set how many training batches follow; a group that is not complete is a RuntimeError."""
        if not self.is_first:
            raise RuntimeError(
                f"{self._position} of {self._group_size} batches are accumulated; a dense step "
                "must end them before anything else begins"
            )
        self._batches_left = num_batches

    @property
    def is_first(self) -> bool:
        """Whether the batch is the first of its group; only then the state may be saved."""
        return self._position == 0

    @property
    def is_last(self) -> bool:
        return self._position + 1 == self._group_size

    def outputs(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the output of each batch after its step, of equally many batches on all ranks."""
        while True:
            try:
                output = self.progress(batches)
            except StopIteration:
                if self.copies is not None:
                    self.copies.average()  # tables may be saved or scored next
                unlock_cached_rows(self.model)
                return
            yield output

    def progress(self, dataloader_iter: Any) -> Any:
        is_training = self.model.training
        if is_training and self.is_first:
            self._group_size = int(max(min(self.accumulate_steps, self._batches_left), 1))
        output = super().progress(dataloader_iter)
        if is_training:
            self.has_stepped = self.is_last
            self._position = (self._position + 1) % self._group_size
            self._batches_left -= 1
            if self.copies is not None:
                self.copies.step()
        return output

    def _forward(self, batch: Any) -> tuple[Tensor, Any]:
        """Return the loss [] that the backward gets, and the output."""
        if not self.model.training:
            return self.model(batch)
        # No all_reduce inside a group, except in the first backward, which DDP records.
        is_inside = self._has_synchronized and not self.is_last
        self._has_synchronized = True
        with no_gradient_reduction(self.model) if is_inside else nullcontext():
            losses, output = self.model(batch)
        return losses / self._group_size, output


class PrefetchingPipeline(AccumulatingPipeline, PrefetchTrainPipelineSparseDist[Any, Any]):
    """The same pipeline, which fetches rows of the next batch into the caches of `uvm_caching`."""


class _GroupOptimizer:
    """The pipeline's view of the optimizer: zeroes gradients before a group, steps after it."""

    def __init__(self, update: DenseUpdate, pipeline: AccumulatingPipeline) -> None:
        self.update, self.pipeline = update, pipeline

    def zero_grad(self) -> None:
        if self.pipeline.is_first:
            self.update.optimizer.zero_grad()

    def step(self) -> None:
        if self.pipeline.is_last:
            self.update.step()
