"""Optimizer of the dense parameters: groups, schedules, clipping and averaged weights.

ID tables are not included: fused kernels update them in the backward pass
(`embeddings.table_optimizers`). `build_dense_optimizer` makes the optimizer of all other
parameters, `build_schedule` its learning rates, `AveragedWeights` their moving average.
"""

from recsys.optimizer.averaging import AveragedWeights, build_averages
from recsys.optimizer.dense import build_dense_optimizer, count_state, gradient_norm
from recsys.optimizer.description import describe_optimizers
from recsys.optimizer.groups import DenseGroup, dense_groups, dense_parameters
from recsys.optimizer.schedules import LearningRateShare, build_schedule, set_updates
from recsys.optimizer.state import make_room, numbers_loaded, state_tensors

__all__ = [
    "AveragedWeights",
    "DenseGroup",
    "LearningRateShare",
    "build_averages",
    "build_dense_optimizer",
    "build_schedule",
    "count_state",
    "dense_groups",
    "dense_parameters",
    "describe_optimizers",
    "gradient_norm",
    "make_room",
    "numbers_loaded",
    "set_updates",
    "state_tensors",
]
