"""Optimizer of the dense parameters: groups, schedules, clipping and averaged weights.

Fused kernels update ID tables in the backward pass (`embeddings.sharding`).
"""

from recsys.optimizer.averaging import AveragedWeights
from recsys.optimizer.averaging import build_averages as build_averages
from recsys.optimizer.dense import DenseGroup as DenseGroup
from recsys.optimizer.dense import build_dense_optimizer
from recsys.optimizer.dense import count_state as count_state
from recsys.optimizer.dense import dense_groups as dense_groups
from recsys.optimizer.dense import dense_parameters as dense_parameters
from recsys.optimizer.dense import describe_optimizers as describe_optimizers
from recsys.optimizer.dense import gradient_norm as gradient_norm
from recsys.optimizer.dense import make_room as make_room
from recsys.optimizer.dense import numbers_loaded as numbers_loaded
from recsys.optimizer.dense import state_tensors as state_tensors
from recsys.optimizer.schedules import LearningRateShare
from recsys.optimizer.schedules import build_schedule as build_schedule
from recsys.optimizer.schedules import set_updates as set_updates

__all__ = [
    "AveragedWeights",
    "LearningRateShare",
    "build_dense_optimizer",
]
