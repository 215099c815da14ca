"""Content vectors, the content branch's input to a ranking model.

Shapes: B batch, U unique history items, D dimension, M modalities, S sampled negatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import NamedTuple

from torch import Tensor

ReadHistory = Callable[[], tuple[Tensor, Tensor]]


class StoredHistory(NamedTuple):
    """Vectors of history items as the memory bank has them, before the history map.

    rows: [U, D + M * D], without gradient: content vectors, then the modalities' mean tokens.
    matrix: [D, D] of the history map, with gradient; a content vector v becomes matrix @ v.
    """

    rows: Tensor
    matrix: Tensor


@dataclass
class ContentVectors:
    """Content vectors and, for similarities, the mean token of each of the M modalities.

    Args:
        target: [B, D], with gradient into fusion and encoders.
        history: [U, D], vectors of the batch's `history_items` after the history map; None if
            `read` is given.
        target_modalities: [B, M, D]; zero where an item lacks a modality, and M = 0 if
            `content.history.similarity_features` is off.
        history_modalities: [U, M, D], likewise; None if `read` is given.
        negatives: [S, D], from the bank and without gradient; None if no negatives are sampled.
        negative_modalities: [S, M, D], likewise.
        read: returns `history` and `history_modalities` at the first call of `read_history`.
        read_stored: the same vectors before the history map, for kernels that apply the map
            elsewhere; None where they are not read from a memory bank. A collective like `read`.
    """

    target: Tensor
    history: InitVar[Tensor | None]
    target_modalities: Tensor
    history_modalities: InitVar[Tensor | None]
    negatives: Tensor | None = None
    negative_modalities: Tensor | None = None
    read: InitVar[ReadHistory | None] = None
    read_stored: Callable[[], StoredHistory] | None = None

    def __post_init__(
        self,
        history: Tensor | None,  # [U, D]
        history_modalities: Tensor | None,  # [U, M, D]
        read: ReadHistory | None,
    ) -> None:
        """Keep the function that reads the history; it runs once."""
        if read is None:
            assert history is not None and history_modalities is not None
            known = history, history_modalities
            read = lambda: known  # noqa: E731
        self._read = functools.cache(read)

    def read_history(self) -> tuple[Tensor, Tensor]:  # [U, D], [U, M, D]
        """Return the vectors of the history items and their modalities' mean tokens.

        A collective: the first call may read a memory bank that is sharded over the ranks, so
        either all ranks call it or none does, independent of their data. Later calls return the
        same tensors. The first call may wait for vectors that other ranks have just computed, so a
        ranking model makes it late.
        """
        return self._read()
