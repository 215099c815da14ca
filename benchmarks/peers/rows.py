"""Writes a dataset as plain arrays, which every peer's environment can read.

Item vectors are the outputs of the recipe's frozen encoders, of unit length by modality.
Shapes: N rows of a split, H history items of a split, I items, V width of all modalities.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.build import Job, build_job
from recsys.config import Config, load_config, to_plain
from recsys.content.encoders.base import Encoder, mean_token
from recsys.data.events.samples import SPLITS
from recsys.data.row_source import open_rows
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.search.search import dataset_digest
from recsys.serving.new_items.item_encoder import ITEMS_PER_CALL
from recsys.serving.retrieval.item_vectors import unit
from recsys.storage.files import whole_folder
from recsys.storage.location import Location

VECTORS, WIDTHS, ABOUT = "item_vectors.npy", "widths.npy", "about.json"
LISTS = ("history_liked", "history_stars")  # that adapters read by name


def write_rows(data: str, recipe: Path, out: Path, most_rows: int | None = None) -> None:
    """Write `SPLIT.npz` for each split, `item_vectors.npy` [I, V] and `widths.npy` of modalities.

    The folder appears whole or not at all; one that exists is kept if it is of this data.

    Args:
        data: dataset with one label, whose ids are rows of tables.
        recipe: names the encoders.
        out: folder to write.
        most_rows: of each split, the first in time; None: all.

    Raises:
        ValueError: the dataset has another form, or the folder is of other data or encoders.
    """
    config, schema = load_config(recipe, ["--device", "cpu"]), load_schema(Location.of(data))
    _check(data, schema)
    about = _about(data, schema, config, most_rows)
    if out.exists():
        if json.loads((out / ABOUT).read_text()) != about:
            raise ValueError(
                f"{out}: holds rows of other data, encoders or sizes than {data} has now; remove "
                "it, or choose another --out"
            )
        return
    with whole_folder(out) as partial:
        for split in SPLITS:
            table = pq.read_table(Path(data) / split).slice(0, most_rows)
            np.savez(partial / f"{split}.npz", **_arrays(table, schema))
        vectors, widths = _vectors(data, config)
        np.save(partial / VECTORS, vectors)
        np.save(partial / WIDTHS, widths)
        (partial / ABOUT).write_text(json.dumps(about))


def _check(data: str, schema: Schema) -> None:
    with_map = [name for name, column in schema.columns.items() if column.vocabulary]
    absent = sorted(set(LISTS) - set(schema.parallel))
    if with_map or absent or len(schema.of_kind("label")) != 1:
        raise ValueError(
            f"{data}: peers need one label, ids that are rows of tables (with a vocabulary: "
            f"{with_map}) and the lists {list(LISTS)} beside the history (absent: {absent}); make "
            "it by `recsys prepare movielens`"
        )


def _about(data: str, schema: Schema, config: Config, most_rows: int | None) -> dict[str, Any]:
    root = Location.of(data)
    return {
        "dataset": dataset_digest(root),
        "test": open_rows(config.source, root, "test", schema).fingerprint(),
        "modalities": to_plain(config.content)["modalities"],
        "most_rows": most_rows,
    }


def _arrays(table: pa.Table, schema: Schema) -> dict[str, np.ndarray]:
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


def _vectors(data: str, config: Config) -> tuple[np.ndarray, np.ndarray]:
    with joined_ranks("cpu") as ranks:
        job = build_job(config, data, ranks)
        assert job.store is not None and job.em3.content is not None
        rows = np.arange(job.schema.columns[job.schema.target_item].num_embeddings)
        vectors = frozen_vectors(job, rows)
        widths = [int(encoder.output_dim) for encoder in job.em3.content.encoders.values()]
    return vectors, np.array(widths)


@torch.no_grad()
def frozen_vectors(
    job: Job,
    rows: np.ndarray,  # int64 [I]
) -> np.ndarray:  # float32 [I, V]
    """Return the outputs of a job's frozen encoders for items, of unit length by modality."""
    branch, store = job.em3.content, job.store
    assert branch is not None and store is not None
    blocks = []
    for start in range(0, len(rows), ITEMS_PER_CALL):
        content, means = store.gather(rows[start : start + ITEMS_PER_CALL]), []
        for name, encoder in branch.encoders.items():
            assert isinstance(encoder, Encoder)
            tokens = encoder.encode(content[name])
            means.append(unit(mean_token(tokens.values, tokens.mask).float().numpy()))
        blocks.append(np.concatenate(means, axis=1))
    return np.concatenate(blocks)
