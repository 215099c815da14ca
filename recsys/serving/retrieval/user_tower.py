"""The user tower of a two-tower run as a package: requests -> query vectors.

The graph returns a vector in place of logits. Shapes: N rows, V width of tower vectors, F dense
features of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys.build import Job
from recsys.content.vectors import ContentVectors
from recsys.model.tables import pooled_features
from recsys.ranking.two_tower import TwoTower
from recsys.ranking.vectors import IDVectors
from recsys.serving.export import PackagedModel, top_k, write_package
from recsys.serving.package import Manifest
from recsys.serving.ranking_graph import CandidateBatch
from recsys.serving.requests import request_columns
from recsys.serving.scorer import Scorer


class QueryVectors(nn.Module):
    """Query vectors of the first label, from `num_pooled` pooled vectors and F dense features."""

    places: Tensor

    def __init__(self, towers: TwoTower, num_pooled: int, num_dense: int) -> None:
        super().__init__()
        self.towers, self.num_pooled, self.num_dense = towers, num_pooled, num_dense
        self.register_buffer("places", torch.tensor(towers.dense, dtype=torch.int64), False)

    def forward(
        self, ids: IDVectors, content: ContentVectors | None, batch: CandidateBatch
    ) -> Tensor:  # [N, V]
        """Return the query of each row; ranked items and their content may be any."""
        by_place = dict(zip(self.towers.pooled, ids.pooled, strict=True))
        unread = batch.dense_features.new_zeros(0)
        pooled = [by_place.get(place, unread) for place in range(self.num_pooled)]
        dense = batch.dense_features.new_zeros(ids.target.shape[0], self.num_dense)
        dense = dense.index_copy(1, self.places, batch.dense_features)
        rows = replace(batch, dense_features=dense)
        return self.towers(replace(ids, pooled=pooled), content, rows).query[:, 0]


def write_user_tower(run: Path, job: Job, folder: Path) -> Manifest:
    """Write the package of a two_tower run's user tower into an empty folder."""
    towers, further = job.em3.ranking, job.em3.further_histories
    if not isinstance(towers, TwoTower):
        raise ValueError(
            f"{run}: ranking.name is '{job.config.ranking.name}', which has no item tower; give a "
            "run of two_tower, or --vectors content"
        )
    if top_k(job):
        raise ValueError(
            f"{run}: content.history.top_k is {top_k(job)}, which chooses history items by the "
            "ranked item, so that queries differ between items; train with top_k 0"
        )
    pooled, dense = pooled_features(job.config.embedding, job.schema), job.schema.of_kind("dense")
    num_pooled = len(pooled) + (0 if further is None else len(further.widths))
    model = PackagedModel(
        QueryVectors(towers, num_pooled, len(dense)),
        [pooled[place] for place in towers.pooled if place < len(pooled)],
        [dense[place] for place in towers.dense],
        reads_targets=False,
    )
    return write_package(run, job, folder, "fp32", model)


class UserTower(Scorer):
    """Computes query vectors from the package of a user tower; threads may share one."""

    def columns(self, given: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return columns of user and history that a query reads; those looked up only if given."""
        user, history = request_columns(self.schema, self.manifest.pooled, self.manifest.dense)
        return [name for name in user if name in given or not self.schema.lookup_of(name)], history

    def query(
        self, user: Mapping[str, Any], history: Mapping[str, Sequence[Any]] | Sequence[Any] = ()
    ) -> np.ndarray:  # float32 [V]
        """Return the query of a user, whose dot product with an item's vector ranks the item."""
        rows = replace(self.read(user, history, []), target=np.zeros(1, np.int64))
        return self._run(rows).numpy()[0]
