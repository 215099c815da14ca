"""Content vectors, the content branch's input to a ranking model.

Shapes: B batch, U unique history items, D dimension, M modalities, S sampled negatives,
R items that this rank needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ReadHistory = Callable[[], tuple[Tensor, Tensor]]


class StoredHistory(NamedTuple):
    """Vectors of history items as the memory bank has them, before the history map."""

    rows: Tensor  # [U, D + M * D], no gradient: content vectors, then modalities' mean tokens
    matrix: Tensor  # [D, D], with gradient: the map of a content vector v is matrix @ v


@dataclass
class ItemRows:
    """Vectors of a step's items, from which a compiled graph makes its `ContentVectors`."""

    items: Tensor  # [R, D + M * D] that this rank needs, with gradient into fusion and encoders
    history: Tensor  # [U, D + M * D] of the history items, before the history map


@dataclass
class ContentVectors:
    """Content vectors and, for similarities, the mean token of each of the M modalities."""

    target: Tensor  # [B, D], with gradient into fusion and encoders
    history: Tensor | None  # [U, D], after the history map; None until `read_history`
    target_modalities: Tensor  # [B, M, D]; zero where an item lacks a modality
    history_modalities: Tensor | None  # [U, M, D]
    negatives: Tensor | None = None  # [S, D], encoded as the targets are
    negative_modalities: Tensor | None = None  # [S, M, D]
    read: ReadHistory | None = None
    # The history before its map, for kernels that apply it elsewhere; a collective like `read`.
    read_stored: Callable[[], StoredHistory] | None = None

    def read_history(self) -> tuple[Tensor, Tensor]:  # [U, D], [U, M, D]
        """Return [U, D] vectors of the history items and [U, M, D] mean tokens of their modalities.

        A collective at the first call: all ranks call it, or none. It may wait, so call it late.
        """
        if self.history is None or self.history_modalities is None:
            assert self.read is not None
            self.history, self.history_modalities = self.read()
        return self.history, self.history_modalities
