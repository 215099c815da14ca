"""Writes a dataset as plain arrays, which every peer's environment can read.

All peers get the rows, labels and histories of `recsys train`, with the parallel lists beside each
history, and the outputs of the recipe's frozen encoders for each item, of unit length by modality.

Shapes: N rows of a split, H history items of a split, I items, V width of all modalities.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.retrieval.semantic_ids import frozen_vectors
from recsys.build import build_job
from recsys.config import load_config
from recsys.data.events.splits import SPLITS
from recsys.data.filesystem import Location, whole_folder
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import joined_ranks

VECTORS, WIDTHS = "item_vectors.npy", "widths.npy"


def write_rows(data: str, recipe: Path, out: Path, most_rows: int | None = None) -> None:
    """Write `SPLIT.npz` for each split, `item_vectors.npy` [I, V] and `widths.npy` of modalities.

    The folder appears whole or not at all; one that exists is kept.

    Args:
        data: dataset with one label, and vocabularies none: ids are rows of tables.
        recipe: names the encoders.
        out: folder to write.
        most_rows: of each split, the first in time; None: all.
    """
    if out.exists():
        return
    schema = load_schema(Location.of(data))
    with whole_folder(out) as partial:
        for split in SPLITS:
            table = pq.read_table(Path(data) / split).slice(0, most_rows)
            np.savez(partial / f"{split}.npz", **_arrays(table, schema))
        vectors, widths = _vectors(data, recipe)
        np.save(partial / VECTORS, vectors)
        np.save(partial / WIDTHS, widths)


def _arrays(table: pa.Table, schema: Schema) -> dict[str, np.ndarray]:
    """Return the columns of a split by the names that adapters read."""
    history, (label,) = schema.history, schema.of_kind("label")
    assert history is not None
    lists = table[history].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    arrays = {
        "user": table[schema.group].to_numpy(),
        "item": table[schema.target_item].to_numpy(),
        "label": table[label].to_numpy(),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "history": lists.flatten().to_numpy(),
    }
    for name in schema.parallel:
        arrays[name] = table[name].combine_chunks().flatten().to_numpy()
    return arrays


def _vectors(data: str, recipe: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of frozen encoders for all items, and the width of each modality."""
    with joined_ranks("cpu") as ranks:
        job = build_job(load_config(recipe, ["--device", "cpu"]), data, ranks)
        assert job.store is not None and job.em3.content is not None
        rows = np.arange(job.schema.columns[job.schema.target_item].num_embeddings)
        vectors = frozen_vectors(job, rows)
        widths = [int(of.output_dim) for of in job.em3.content.encoders.values()]
    return vectors, np.array(widths)
