"""Write a dataset as plain arrays, which every peer's environment can read.

Item vectors are the outputs of the recipe's frozen encoders, of unit length per modality.
Shapes: N rows of a split, H history items of a split, I items, V width of all modalities.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.build import build_job
from recsys.config import Config, load_config, to_plain
from recsys.data.events.samples import SPLITS
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.row_source import open_rows
from recsys.data.schema import Schema, load_schema
from recsys.distributed.ranks import joined_ranks
from recsys.search.search import dataset_digest
from recsys.serving.retrieval.nearest_items import encoder_means, item_texts
from recsys.storage.files import atomic_folder
from recsys.storage.location import Location

VECTORS, WIDTHS, TEXTS = "item_vectors.npy", "widths.npy", "texts.json"
METADATA = "about.json"
LISTS = ("history_liked", "history_stars")  # that adapters read by name


def write_rows(data: str, recipe: Path, out: Path, max_rows: int | None = None) -> None:
    """Write `SPLIT.npz` for each split, `item_vectors.npy` [I, V], `widths.npy` and `texts.json`.

    The folder appears whole or not at all; one that exists is kept if it is of this data.

    Args:
        data: dataset with one label and a history.
        recipe: names the encoders.
        out: folder to write.
        max_rows: of each split, the first in time; None: all.

    Raises:
        ValueError: the dataset has another form, or the folder is of other data or encoders.
    """
    config, schema = load_config(recipe, ["--device", "cpu"]), load_schema(Location.of(data))
    _check(data, schema)
    metadata = _metadata(data, schema, config, max_rows)
    if out.exists():
        if json.loads((out / METADATA).read_text()) != metadata:
            raise ValueError(
                f"{out}: holds rows of other data, encoders or sizes than {data} has now; remove "
                "it, or choose another --out"
            )
        return
    with atomic_folder(out) as partial:
        for split in SPLITS:
            rows = open_rows(config.source, Location.of(data), split, schema)
            table = pa.concat_tables(rows.read(*rows.share(0, 1))).slice(0, max_rows)
            arrays = _arrays(RowColumns.of(table), schema)
            np.savez(partial / f"{split}.npz", **arrays)  # type: ignore[arg-type]
        vectors, widths = _vectors(data, config)
        np.save(partial / VECTORS, vectors)
        np.save(partial / WIDTHS, widths)
        (partial / TEXTS).write_text(json.dumps(_texts(data, schema)))
        (partial / METADATA).write_text(json.dumps(metadata))


def _check(data: str, schema: Schema) -> None:
    if (labels := schema.of_kind("label")) and len(labels) == 1 and schema.history is not None:
        return
    raise ValueError(
        f"{data}: peers need a history and one label (here: {labels}); make the data by "
        "`recsys prepare movielens` or `prepare events`"
    )


def _metadata(data: str, schema: Schema, config: Config, max_rows: int | None) -> dict[str, Any]:
    root = Location.of(data)
    return {
        "dataset": dataset_digest(root),
        "test": open_rows(config.source, root, "test", schema).fingerprint(),
        "modalities": to_plain(config.content)["modalities"],
        "most_rows": max_rows,
        "files": TEXTS,
    }


def _arrays(columns: RowColumns, schema: Schema) -> dict[str, np.ndarray]:
    history, (label,) = schema.history, schema.of_kind("label")
    assert history is not None
    items = columns.values(history)
    arrays = {
        "user": columns.values(schema.group),
        "item": columns.values(schema.target_item),
        "label": columns.values(label),
        "offsets": np.concatenate([[0], np.cumsum(columns.lengths(history))]),
        "history": items,
    }
    if RAW_GROUP in columns.numbers:
        arrays["group"] = columns.values(RAW_GROUP)
    if schema.sampled:
        arrays["sampled"] = columns.values(schema.sampled)
    if dense := schema.of_kind("dense"):
        arrays["numbers"] = np.stack([columns.values(name) for name in dense], axis=1)
    lists = {name: columns.values(name) for name in schema.parallel}
    # In a log without values each item of the history counts as 1.
    return arrays | {name: np.ones(len(items), np.float32) for name in LISTS} | lists


def _texts(data: str, schema: Schema) -> list[str]:  # [I]
    """Return the text columns of each item as one text; "" for an id without an item."""
    table = ItemTable(Location.of(data), schema)
    texts = [""] * schema.num_items
    for item, text in zip(np.sort(table.ids), item_texts(table) or ()):
        texts[item] = text.strip()
    return texts


def _vectors(data: str, config: Config) -> tuple[np.ndarray, np.ndarray]:
    with joined_ranks("cpu") as ranks:
        job = build_job(config, data, ranks)
        assert job.store is not None and job.em3.content is not None
        rows = np.arange(job.schema.num_items)
        vectors = encoder_means(job, rows)
        encoders = job.em3.content.encoders.values()
        widths = [encoder.output_dim for encoder in encoders]
    return vectors, np.array(widths)
