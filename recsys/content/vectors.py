"""Content vectors that the content branch gives a ranking model.

Shapes: B batch, U unique history items, D dimension, M modalities, S sampled negatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import InitVar, dataclass

from torch import Tensor

ReadHistory = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class ContentVectors:
    """Content vectors and, for similarities, the mean token of each of the M modalities.

    Args:
        target: [B, D] with gradient into fusion and encoders.
        history: [U, D] of the batch's `history_items`, after the history map.
        target_modalities: [B, M, D]; zero where an item lacks one, and M = 0 where
            `content.history.similarity_features` is off.
        history_modalities: [U, M, D], likewise.
        negatives: [S, D], of the bank and without gradient, where a retrieval model samples them.
        negative_modalities: [S, M, D], likewise.
        read: gives `history` and `history_modalities` when they are first asked for, in their
            place.
    """

    target: Tensor
    history: InitVar[Tensor | None]
    target_modalities: Tensor
    history_modalities: InitVar[Tensor | None]
    negatives: Tensor | None = None
    negative_modalities: Tensor | None = None
    read: InitVar[ReadHistory | None] = None

    def __post_init__(
        self,
        history: Tensor | None,
        history_modalities: Tensor | None,
        read: ReadHistory | None,
    ) -> None:
        if read is None:
            assert history is not None and history_modalities is not None
            known = history, history_modalities
            read = lambda: known  # noqa: E731
        self._read = functools.cache(read)

    def read_history(self) -> tuple[Tensor, Tensor]:  # [U, D], [U, M, D]
        """Returns the vectors of the history items and their modalities' mean tokens.

        A collective: the first call may read a memory bank that is sharded over the ranks, so all
        ranks call it, or none does, whatever their data. Later calls return the same tensors. The
        first call may wait for what other ranks have just computed; a ranking model makes it late.
        """
        return self._read()
