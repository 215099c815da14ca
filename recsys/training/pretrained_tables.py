"""Tables that start from vectors in Parquet: the setting `embedding.tables.NAME.init_from`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings import PretrainedFiles, load_pretrained_rows
from embeddings.pretrained_files import RowsOfIds
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.config import InitFromSettings
from recsys.data.filesystem import Location
from recsys.data.schema import Schema

logger = logging.getLogger(__name__)


def load_pretrained_tables(job: Job, known: Mapping[str, int] | None = None) -> None:
    """Write the vectors of every `init_from` into its table. A collective.

    Args:
        job: the job.
        known: by table with an exact map, the number of its first ids, whose rows stay as they are;
            other tables stay whole. None: all rows are written.

    Raises:
        ValueError: the file does not exist, or its content does not fit the table.
    """
    for name, settings in job.config.embedding.tables.items():
        if (source := settings.init_from) is None or (known is not None and name not in known):
            continue
        with job.ranks.raise_on_all_ranks():
            files, rows_of_ids = _files_of(job.schema, name, source)
        if known is not None:
            if rows_of_ids is None:  # the file has rows, of which new ids have none
                continue
            rows_of_ids = partial(_rows_of_new_ids, rows_of_ids, known[name])
        parts = job.model, name, files, rows_of_ids, job.ranks.group
        loaded = load_pretrained_rows(*parts, may_be_empty=known is not None)
        logger.info(
            f"table '{name}': {loaded.num_set:,} rows set, {loaded.num_left_out:,} unknown ids "
            f"left out, from {source.path}"
        )


def _rows_of_new_ids(rows_of_ids: RowsOfIds, num_known: int, ids: pa.Array) -> np.ndarray:
    """Return the rows of ids, -1 for those that a map had before."""
    rows = rows_of_ids(ids)
    return np.where(rows < num_known, -1, rows)


def _files_of(
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
