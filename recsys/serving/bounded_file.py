"""Maps of raw ids that were learned in training, stored in a package as tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.vocabulary.bounded import BoundedVocabulary
from recsys.data.schema import Schema


def _file(folder: Path, table: str) -> Path:
    return folder / "vocabulary" / f"{table}.safetensors"


def save_bounded(folder: Path, table: str, vocabulary: BoundedVocabulary) -> None:
    """Write the map of a table, which is whole on this process."""
    path = _file(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = {
        name: state.local_tensor() if isinstance(state, ShardedTensor) else state
        for name, state in vocabulary.state_dict().items()
    }
    save_file({name: piece.contiguous() for name, piece in pieces.items()}, path)


def load_bounded(folder: Path, table: str, schema: Schema) -> BoundedVocabulary:
    """Load the map of a table into a vocabulary of this process alone."""
    settings = schema.vocabulary_of(table)
    assert settings is not None
    vocabulary = BoundedVocabulary(
        schema.limit(table), settings.admit_after, settings.half_life, process_group=None
    )
    stored = load_file(_file(folder, table))
    for name, state in vocabulary.state_dict().items():
        assert isinstance(state, Tensor)  # one process holds the map whole
        state.copy_(stored[name])
    return vocabulary
