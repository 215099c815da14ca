"""The initial state of a run. Shapes: R rows, N history items of the rows, I items, G groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from embeddings import PretrainedFiles, load_pretrained_rows
from embeddings.pretrained import RowsOfIds
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.progress import Progress
from recsys.config import InitFromSettings
from recsys.content.projection_start import start_projections
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import RAW_GROUP
from recsys.data.schema import Schema
from recsys.distributed.ranks import Ranks
from recsys.evaluation.evaluate import CheckedRows, fill_bank
from recsys.ranking.layers.collaborative_filtering import PRIOR_VALUES, CollaborativeFiltering
from recsys.storage.location import Location

logger = logging.getLogger(__name__)


def start_fresh(job: Job, checked: CheckedRows) -> Progress:
    """Initialise a new run: tables, projections, bank, scales, opinions. A collective."""
    if job.em3.scaling is not None:
        job.em3.scaling.fit(checked.numbers)
    load_pretrained_tables(job)
    if job.em3.content is not None and job.store is not None:
        start_projections(job.em3.content, job.store, job.ranks, trained=checked.item_counts)
        fill_bank(job)
    fill_opinions(job)
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


class OpinionSums:
    """Sums of the values of each item by group of users; an opinion is their mean."""

    def __init__(self, schema: Schema, column: str, num_groups: int, mean: float) -> None:
        self.schema, self.column, self.mean = schema, column, mean
        self.shape = schema.num_items, num_groups
        self.sums = torch.zeros(schema.num_items * num_groups)
        self.counts = torch.zeros(schema.num_items * num_groups)

    def add(self, table: pa.Table) -> None:  # R rows
        """Include rows; padding rows have no history."""
        rows = RowColumns.of(table)
        assert self.schema.history is not None
        items, lengths = rows.values(self.schema.history), rows.lengths(self.schema.history)
        values = rows.values(self.column).astype(np.float64)
        users = rows.numbers[RAW_GROUP if RAW_GROUP in rows.numbers else self.schema.group]
        row_index = np.repeat(np.arange(rows.num_rows), lengths)  # [N]
        totals = np.bincount(row_index, values, minlength=rows.num_rows) + PRIOR_VALUES * self.mean
        relative = values - (totals / (lengths + PRIOR_VALUES))[row_index]
        groups = np.remainder(users, self.shape[1])[row_index]
        cells = torch.from_numpy(items * self.shape[1] + groups)
        self.sums.index_add_(0, cells, torch.from_numpy(relative).float())
        self.counts.index_add_(0, cells, torch.ones(len(cells)))

    def add_up(self, ranks: Ranks) -> None:
        """Include the rows of all ranks. A collective."""
        for sums in (self.sums, self.counts):
            dist.all_reduce(sums, group=ranks.group)

    def opinions(self, deviation: float) -> torch.Tensor:  # [I, G]
        """Return the mean of each item and group in standard deviations, 0 without a row."""
        return (self.sums / self.counts.clamp(min=1) / deviation).view(self.shape)


def fill_opinions(job: Job) -> None:
    """Count opinions in the training rows, if the ranking model has votes by them. A collective."""
    votes = [
        module for module in job.em3.ranking.modules() if isinstance(module, CollaborativeFiltering)
    ]
    if not votes:
        return
    ranks, schema = job.ranks, job.schema
    _describe_votes(votes[0], schema)
    column, num_groups = schema.parallel[votes[0].column], votes[0].opinions.shape[1]
    with ranks.raise_on_all_ranks():
        rows = job.rows("train")
        share = rows.share(ranks.rank, ranks.world_size)
        moments = np.zeros(3)
        for table in rows.read(*share):
            values = RowColumns.of(table).values(column).astype(np.float64)
            moments += len(values), values.sum(), np.square(values).sum()
    count, total, square = np.sum(ranks.gather(moments.tolist()), axis=0)
    mean = total / max(count, 1)
    deviation = max(square / max(count, 1) - mean**2, 0) ** 0.5 or 1.0
    sums = OpinionSums(schema, column, num_groups, mean)
    with ranks.raise_on_all_ranks():
        for table in rows.read(*share):
            sums.add(table)
    sums.add_up(ranks)
    opinions = sums.opinions(deviation).to(ranks.device)
    for module in votes:
        module.fill(opinions, mean, deviation)


def _describe_votes(votes: CollaborativeFiltering, schema: Schema) -> None:
    (num_items, groups), users = votes.opinions.shape, schema.limit(schema.group)
    words = f"votes: opinions on {num_items:,} items by {groups:,} groups of users"
    if groups < users:
        words += (
            f", which the {users:,} rows of table '{schema.group}' share; the more share one, the "
            "less votes tell (ranking.opinion_groups, 2 bytes per item and group)"
        )
    logger.info(words)
