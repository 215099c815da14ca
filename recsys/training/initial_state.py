"""The initial state of a run. Shapes: N ids of a table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings import PretrainedFiles, load_pretrained_rows
from embeddings.pretrained import RowsOfIds
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.progress import Progress
from recsys.config import InitFromSettings
from recsys.content.projection_start import start_projections
from recsys.data.schema import Schema
from recsys.evaluation.evaluate import CheckedRows, fill_bank
from recsys.storage.location import Location
from recsys.training.neighbour_statistics import fit_neighbours

logger = logging.getLogger(__name__)


def start_fresh(job: Job, checked: CheckedRows) -> Progress:
    """Initialise a new run: tables, projections, bank, scales, neighbours. A collective."""
    if job.em3.scaling is not None:
        job.em3.scaling.fit(checked.numbers)
    load_pretrained_tables(job)
    if job.em3.content is not None and job.store is not None:
        start_projections(job.em3.content, job.store, job.ranks, trained=checked.item_counts)
        fill_bank(job)
    fit_neighbours(job)
    return Progress()


def load_pretrained_tables(job: Job, num_old_ids: Mapping[str, int] | None = None) -> None:
    """Write the vectors of every `embedding.tables.NAME.init_from` into its table. A collective.

    `num_old_ids` are the first ids of exact maps, whose rows stay; None: all rows are written.

    Raises:
        ValueError: the file does not exist, or its content does not fit the table.
    """
    for name, settings in job.config.embedding.tables.items():
        source = settings.init_from
        if source is None or (num_old_ids is not None and name not in num_old_ids):
            continue
        with job.ranks.raise_on_all_ranks():
            files, rows_of_ids = _pretrained_files(job.schema, name, source)
        if num_old_ids is not None:
            if rows_of_ids is None:  # the file has rows, of which new ids have none
                continue
            rows_of_ids = partial(_rows_of_new_ids, rows_of_ids, num_old_ids[name])
        with job.ranks.raise_on_all_ranks():
            loaded = load_pretrained_rows(
                job.model, name, files, rows_of_ids, may_be_empty=num_old_ids is not None
            )
        logger.info(
            f"table '{name}': {loaded.num_set:,} rows set, {loaded.num_left_out:,} unknown ids "
            f"left out, from {source.path}"
        )


def _rows_of_new_ids(rows_of_ids: RowsOfIds, num_old_ids: int, ids: pa.Array) -> np.ndarray:
    """Return the rows of ids, -1 for those that a map had before."""
    rows = rows_of_ids(ids)
    return np.where(rows < num_old_ids, -1, rows)


def _pretrained_files(
    schema: Schema, name: str, source: InitFromSettings
) -> tuple[PretrainedFiles, RowsOfIds | None]:
    """Return a table's files, and the map from their ids to rows; None if ids are rows."""
    where = f"embedding.tables.{name}.init_from"
    location = Location.of(source.path)
    paths = [file.path for file in location.files(".parquet")]
    if not paths:
        raise ValueError(
            f"{where}: {source.path}: no such Parquet file, nor a folder with *.parquet files"
        )
    settings = schema.vocabulary_of(name)
    if settings is not None and settings.kind != "exact":
        raise ValueError(
            f"{where}: column '{name}' has a vocabulary of kind {settings.kind}, in which no id "
            "has a row of its own before training; choose kind exact"
        )
    columns = pq.read_schema(paths[0], filesystem=location.arrow).names
    id_column = source.id_column or ("id" if "id" in columns else "row")
    files = PretrainedFiles(paths, location.arrow, id_column, source.vector_column, source.table)
    if settings is None or id_column == "row":  # as `export-tables` writes it
        return files, None
    vocabulary = schema.vocabularies[name]
    assert isinstance(vocabulary, ExactVocabulary)
    return files, vocabulary.find
