"""A folder of semantic ids: what `recsys semantic-ids` writes.

`items.parquet` has the raw id of each item and its semantic ids as a list, `codebooks.npy` the
centres of each level, `collisions.json` the report, `manifest.json` the files with their hashes.

Shapes: I items, L levels, C codes of a level, D content dimension.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.build import Job
from recsys.checkpoint.files import model_of
from recsys.checkpoint.new_rows.trained_counts import trained_counts
from recsys.data.filesystem import Location, whole_folder
from recsys.distributed.ranks import Ranks
from recsys.evaluation.predict import data_of
from recsys.evaluation.retrieval import catalogue_of
from recsys.serving.export import load_for_export
from recsys.serving.package import BaseManifest, read_manifest_of, write_manifest
from recsys.serving.retrieval.index import require_faiss
from recsys.serving.retrieval.item_vectors import ItemVectors, item_vectors
from recsys.serving.retrieval.semantic_dataset import schema_without, write_dataset_with
from recsys.serving.retrieval.semantic_ids import Codebooks, check_codes, collision_report

ITEMS, CODEBOOKS, COLLISIONS = "items.parquet", "codebooks.npy", "collisions.json"
COLUMN = "semantic_ids"


@dataclass
class SemanticManifest(BaseManifest):
    """Contents of a folder of semantic ids.

    model: hash of the model whose content vectors were clustered. levels, codes, dim: L, C and D.
    """

    run: str
    model: str | None
    target_item: str
    levels: int
    codes: int
    dim: int


def export_semantic_ids(
    run: Path,
    out: Path,
    levels: int,
    codes: int,
    ranks: Ranks,
    data: str | None = None,
    codebooks: Path | None = None,
    dataset: Path | None = None,
) -> dict[str, Any]:
    """Write semantic ids of all items, fitted to trained ones; return the collision report.

    Args:
        run: folder of a finished run with content.
        out: a folder that does not exist; it appears whole or not at all.
        levels: codes of each item, L.
        codes: codes of each level, C.
        ranks: this process alone.
        data: dataset whose items get ids; default the dataset of the run.
        codebooks: an earlier folder of the same run, whose codebooks, levels and codes are used,
            so that its items keep their ids.
        dataset: also write the dataset with a column of its ranked items' ids, to this folder.

    Raises:
        ValueError: a folder exists, the run has no content or fewer trained items than codes, the
            codebooks are of another model, or FAISS is not installed.
    """
    if dataset is not None:
        if dataset.exists():
            raise ValueError(f"{dataset}: exists already; remove it, or name another folder")
        schema_without(Location.of(data_of(run, data)), COLUMN)
    if codebooks is None:
        require_faiss()
    model = model_of(run)
    known = None if codebooks is None else load_codebooks(codebooks, model)
    job = load_for_export(run, out, ranks, data)
    is_trained = _has_rows(run, job)
    if known is None:
        check_codes(codes, int(is_trained.sum()))
    of_items = item_vectors(job, "content")
    books = known or Codebooks.fit(of_items.vectors[is_trained], levels, codes)
    with whole_folder(out) as partial:
        report = _write(partial, job, of_items, books)
        of_books = books.centres.shape  # L, C, D
        source = str(run), model, job.schema.target_item
        write_manifest(partial, SemanticManifest(*source, *of_books))
        if dataset is not None:
            ids = pq.read_table(partial / ITEMS)
            write_dataset_with(job.root, job.schema, ids, COLUMN, books.num_ids, dataset)
    return report


def _has_rows(run: Path, job: Job) -> np.ndarray:  # bool [I]
    """Return which items have training rows: others, as of the test split, came later."""
    counts = trained_counts(run, job.schema.item_id_limit)
    return counts.of(np.asarray(catalogue_of(job))) > 0


def _write(folder: Path, job: Job, of_items: ItemVectors, books: Codebooks) -> dict[str, Any]:
    """Write ids, codebooks and the collision report, which is returned."""
    ids = books.ids_of(of_items.vectors)
    columns = {job.schema.target_item: of_items.ids, COLUMN: pa.array(list(ids))}
    pq.write_table(pa.table(columns), folder / ITEMS)
    np.save(folder / CODEBOOKS, books.centres)
    num_codes = books.centres.shape[1]
    report = collision_report(ids % num_codes, of_items.ids.to_pylist(), num_codes)
    (folder / COLLISIONS).write_text(json.dumps(report, indent=1) + "\n")
    return report


def load_codebooks(folder: Path, model: str | None = None) -> Codebooks:
    """Load the codebooks of a folder of semantic ids, to give later items their codes.

    Args:
        folder: what `recsys semantic-ids` wrote.
        model: hash of the model that encodes these items; None: not compared.

    Raises:
        ValueError: the folder is none, a file of it differs, or its codes are of another model.

    Example::

        load_codebooks(Path("semantic")).ids_of(vectors)  # int64 [items, levels]
    """
    what, command = "folder of semantic ids", "recsys semantic-ids"
    manifest = read_manifest_of(folder, SemanticManifest, what, command, verify=True)
    if model is not None and manifest.model != model:
        raise ValueError(
            f"{folder}: its codebooks are of the model of {manifest.run}, whose content vectors "
            "another model does not share; name that run, or leave --codebooks out for new ids"
        )
    return Codebooks(np.load(folder / CODEBOOKS))
