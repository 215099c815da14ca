"""Content vectors that the content branch gives a ranking model.

Shapes: B batch, U unique history items, D dimension, M modalities, S sampled negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class ContentVectors:
    """Content vectors and, for similarities, the mean token of each of the M modalities.

    target: [B, D] with gradient into fusion and encoders.
    history: [U, D] of the batch's `history_items`, after the history map. Reading it may wait for
        what other ranks have just computed, so a ranking model does that late.
    target_modalities: [B, M, D], history_modalities: [U, M, D]; zero where an item lacks one, and
        M = 0 where `content.history.similarity_features` is off.
    negatives: [S, D], negative_modalities: [S, M, D], of the bank and without gradient, where a
        retrieval model samples negatives.
    """

    target: Tensor
    history: Tensor
    target_modalities: Tensor
    history_modalities: Tensor
    negatives: Tensor | None = None
    negative_modalities: Tensor | None = None


class LateContentVectors(ContentVectors):
    """`ContentVectors` whose history is read when it is first asked for.

    read: gives `history` and `history_modalities`.
    """

    def __init__(
        self,
        target: Tensor,
        target_modalities: Tensor,
        read: Callable[[], tuple[Tensor, Tensor]],
        negatives: Tensor | None = None,
        negative_modalities: Tensor | None = None,
    ) -> None:
        self.target, self.target_modalities, self._read = target, target_modalities, read
        self.negatives, self.negative_modalities = negatives, negative_modalities

    @cached_property
    def _history(self) -> tuple[Tensor, Tensor]:
        return self._read()

    @property
    def history(self) -> Tensor:  # type: ignore[override]
        return self._history[0]

    @property
    def history_modalities(self) -> Tensor:  # type: ignore[override]
        return self._history[1]
