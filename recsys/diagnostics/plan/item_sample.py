"""Samples items: the number of tokens in each modality, 0 where an item lacks it.

Shapes: S sampled items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.config import ModalitySettings
from recsys.content.kinds.feature import Feature
from recsys.data.filesystem import Location
from recsys.data.items.content_store import require_column
from recsys.data.items.feature_file import FeatureFile
from recsys.data.items.item_features import feature_tokens
from recsys.data.items.kind import ModalityKind, make_kind
from recsys.data.parquet.file import READ_ERRORS, column_type, open_parquet
from recsys.data.parquet.values import list_lengths
from recsys.data.schema import Schema

SAMPLED_ITEMS = 2048
SAMPLED_FILES = 8


@dataclass
class ItemSample:
    """Numbers read from some items.

    num_items: rows of all files.
    looked_at: rows that were sampled.
    lengths: tokens of each sampled item [S], by modality: 0 where it lacks the modality; for
        images, the number of images.
    feature_widths: width of stored features, by modality.
    """

    num_items: int
    looked_at: int
    lengths: dict[str, Tensor] = field(default_factory=dict)
    feature_widths: dict[str, int] = field(default_factory=dict)


def sample_items(
    root: Location, schema: Schema, modalities: dict[str, ModalitySettings]
) -> ItemSample:
    """Sample the first items of some files.

    Raises:
        ValueError: there are no files, or a modality's column is missing or of a wrong type.
    """
    folder = root / "items"
    if schema.items is None:
        raise ValueError(f"{root}/schema.yaml: a model with content needs `items`; add them")
    counts = {file: _num_rows(file) for file in folder.files(".parquet")}
    files = [file for file, count in counts.items() if count]
    if not files:
        raise ValueError(f"{folder}: no *.parquet files with rows; write one row per item there")
    places = np.unique(np.linspace(0, len(files) - 1, SAMPLED_FILES).astype(int))
    chosen = [files[place] for place in places]
    sample = ItemSample(sum(counts.values()), 0)
    for name, modality in modalities.items():
        kind = make_kind(f"content.modalities.{name}", modality)
        require_column(schema.items, kind)
        if (file := schema.items.columns[modality.column].file) is not None:  # type: ignore[union-attr]
            sample.lengths[name] = _lengths_in_file(name, root / file, sample)
            continue
        lengths = [
            _lengths(name, kind, file, chunk, sample)
            for file in chosen
            for chunk in _first_rows(file, modality.column, SAMPLED_ITEMS // len(chosen))
        ]
        sample.lengths[name] = torch.cat(lengths)
        sample.looked_at = max(sample.looked_at, len(sample.lengths[name]))
    return sample


def _num_rows(file: Location) -> int:
    with open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def _first_rows(file: Location, column: str, count: int) -> Iterator[pa.Array]:
    try:
        with open_parquet(file, streaming=True) as parquet:
            column_type(parquet, file, column)
            for batch in parquet.iter_batches(min(count, 256), columns=[column]):
                yield batch.column(0).slice(0, count)
                count -= len(batch)
                if count <= 0:
                    return
    except READ_ERRORS as error:
        raise ValueError(f"{file}: column '{column}' cannot be read ({error})") from error


def _lengths_in_file(name: str, file: Location, sample: ItemSample) -> Tensor:  # [S]
    """Return the lengths of the first rows of a .npy file; keep its width in `sample`."""
    features = FeatureFile(file)
    sample.feature_widths[name] = features.width
    _, values = next(features.pieces())
    there = ~np.isnan(values[:SAMPLED_ITEMS]).all(axis=2)
    sample.looked_at = max(sample.looked_at, len(there))
    return torch.from_numpy(there.sum(axis=1))


def _lengths(
    name: str, kind: ModalityKind, file: Location, chunk: pa.Array, sample: ItemSample
) -> Tensor:  # int64 [rows of chunk]
    """Return the tokens of each item of a chunk; keep a feature's width in `sample`."""
    where = f"{file}: column '{kind.modality.column}'"
    if isinstance(kind, Feature) and len(widths := list_lengths(feature_tokens(chunk, where)[1])):
        sample.feature_widths.setdefault(name, int(widths[0]))
    return torch.from_numpy(kind.lengths(chunk, where).astype(np.int64))
