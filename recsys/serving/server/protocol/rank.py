"""Ranking of candidates, the best one first. Shapes: N candidates, C labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recsys.config.server import Limits
from recsys.serving.server.columns import RankedUser
from recsys.serving.server.protocol.messages import RankRequest
from recsys.serving.server.refusals import Refusal
from recsys.serving.server.served import Served


def user_of(request: RankRequest, served: Served, limits: Limits) -> RankedUser:
    """Return a request with its candidates, which are all items if it says so.

    Raises:
        Refusal: the label, the number or the items are not to be had.
    """
    labels = served.scorer.labels
    if request.by is not None and request.by not in labels:
        raise Refusal(f"by: '{request.by[:99]}' is none of the labels {list(labels)}")
    if request.top_k is not None and request.top_k < 1:
        raise Refusal(f"top_k: is {request.top_k}; give at least 1")
    candidates = request.candidates
    if candidates == "all":
        try:
            candidates = served.scorer.read.item_ids(limits.max_candidates)
        except ValueError as error:
            raise Refusal(f"candidates: {error}") from error
    return RankedUser(request.user, request.history, candidates)


def ranked(
    request: RankRequest, user: RankedUser, served: Served, scores: np.ndarray
) -> dict[str, Any]:  # scores: float32 [N, C]
    """Return the label, the items and the predictions of a response."""
    labels, candidates = served.scorer.labels, user.candidates
    items = candidates[served.columns.item] if isinstance(candidates, Mapping) else candidates
    by = request.by or labels[0]
    order = np.argsort(-scores[:, labels.index(by)], kind="stable")[: request.top_k]
    kept = scores[order]
    return {
        "by": by,
        "items": [items[place] for place in order.tolist()],
        "scores": {label: kept[:, number].tolist() for number, label in enumerate(labels)},
    }
