"""Keeps statistics of batch normalisation, in encoders and user modules, equal on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningStatistics:
    """Means and variances that normalisation layers keep of the batches of their rank.

    With different statistics each rank would score by another model than the saved one.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.group, modules = group, model.modules()
        self.layers = [norm for norm in modules if isinstance(norm, nn.modules.batchnorm._NormBase)]

    @torch.no_grad()
    def average(self) -> None:
        """Set the statistics of layers in training to their mean over the ranks. A collective."""
        statistics: list[Tensor] = []
        for layer in self.layers:
            if layer.training and layer.running_mean is not None and layer.running_var is not None:
                statistics += [layer.running_mean, layer.running_var]
        if not statistics or not dist.is_initialized():
            return
        if (num_ranks := dist.get_world_size(self.group)) == 1:
            return
        joined = torch.cat(statistics)
        dist.all_reduce(joined, group=self.group)
        means = (joined / num_ranks).split([len(tensor) for tensor in statistics])
        torch._foreach_copy_(statistics, means)
