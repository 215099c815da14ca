"""Maps of raw ids that were learned in training, stored in a package as plain arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.data.schema import Schema


def _file(folder: Path, table: str) -> Path:
    return folder / "vocabulary" / f"{table}.npz"


def save_bounded(folder: Path, table: str, vocabulary: BoundedVocabulary) -> None:
    """Write the map of a table, which is whole on this process."""
    path = _file(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = vocabulary.state_dict()
    arrays = {}
    for name, tensor in state.items():
        whole = tensor if isinstance(tensor, torch.Tensor) else None
        pieces = [] if whole is not None else tensor.local_shards()
        arrays[name] = (whole if whole is not None else pieces[0].tensor).numpy()
    np.savez(path, **arrays)


def load_bounded(folder: Path, table: str, schema: Schema) -> BoundedVocabulary:
    """Load the map of a table into a vocabulary of this process alone."""
    settings = schema.vocabulary_of(table)
    assert settings is not None
    vocabulary = BoundedVocabulary(
        schema.limit(table), settings.admit_after, settings.half_life, process_group=None
    )
    with np.load(_file(folder, table), allow_pickle=False) as arrays:
        for name, tensor in vocabulary.state_dict().items():
            assert isinstance(tensor, torch.Tensor)
            tensor.copy_(torch.from_numpy(arrays[name]))
    return vocabulary
