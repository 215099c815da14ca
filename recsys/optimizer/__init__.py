"""Optimizer of the dense parameters: groups, schedules, clipping and averaged weights.

Fused kernels update ID tables in the backward pass (`embeddings.sharding`).
"""

from recsys.optimizer.averaging import AveragedWeights
from recsys.optimizer.dense import DenseGroup as DenseGroup
from recsys.optimizer.dense import build_dense_optimizer
from recsys.optimizer.schedules import LearningRateShare

__all__ = ["AveragedWeights", "LearningRateShare", "build_dense_optimizer"]
