"""Scores a split over all ranks and computes its metrics exactly, using every row once.

Shapes: N rows of a split, B batch, C labels, Q rows with a query, D dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.build import SPLITS, Job
from recsys.config import Config
from recsys.config.ranking import softmax_settings
from recsys.content.bank_fill import encode_into_bank
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.item_frequency import ItemCounts, count_items
from recsys.data.number_ranges import NumberRange, NumberRanges, dense_finding
from recsys.data.row_source import RowSource
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.distributed.gather import gather_rows, gather_rows_to_first
from recsys.distributed.lockstep import Lockstep
from recsys.evaluation.forward_pass import forward_pass, require_finite, rows_per_batch
from recsys.evaluation.further_metrics import Metric, make_metrics
from recsys.evaluation.metrics import (
    ORDER_METRICS,
    SHOWN,
    SHOWN_OF_NUMBERS,
    evaluation_report,
    format_report,
)
from recsys.evaluation.retrieval import format_retrieval, retrieval_report
from recsys.evaluation.scores import SplitScores, write_scores
from recsys.evaluation.validation_check import ValidationLabels, check_validation

logger = logging.getLogger(__name__)

# Every rank searches for them.
QUERY_COLUMNS = ("queries", "query_targets", "query_items", "query_weights")


@dataclass(frozen=True)
class CheckedRows:
    """Results of `check_data`.

    item_counts: number of training rows of each item, on rank 0 alone.
    skipped: the skipped rows by split; empty where `on_bad_row` is error.
    numbers: ranges of the numbers in the training rows, by column.
    """

    item_counts: ItemCounts
    skipped: dict[str, Any]
    numbers: dict[str, NumberRange]


def check_data(job: Job, splits: Sequence[str] = SPLITS) -> CheckedRows:
    """Read all splits once, so that a bad value shows before the first step. A collective.

    Logs a warning for each dense column that is constant or unscaled in the training rows.

    Raises:
        ValueError: on every rank: a row cannot be used and `on_bad_row` is error, no row can, or
            the validation split cannot choose the best model.
    """
    ranks, is_skip = job.ranks, job.config.on_bad_row == "skip"
    counts: dict[str, ItemCounts] = {}
    skipped: dict[str, Any] = {}
    if is_skip and job.store is not None:
        skipped["items"] = job.store.items.bad_rows.summary(ranks, "items")
    labels, ranges = ValidationLabels(job.schema), NumberRanges(job.schema)
    also = {"train": ranges.add, "valid": labels.add}
    for split in splits:
        with ranks.raise_on_all_ranks():
            rows = job.rows(split)
            counts[split] = count_items(rows, ranks.rank, ranks.world_size, also.get(split))
        if job.schema.weight and not sum(ranks.gather(int(counts[split].counts.sum()))):
            raise _without_weight(job, split)
        if is_skip:
            skipped[split] = rows.skipped(ranks, split)
    if "valid" in splits:
        check_validation(job, labels)
    numbers = ranges.of_all_ranks(ranks)
    _warn_of_dense_columns(job, numbers)
    counted = counts["train"].sum_of_ranks(job.schema.item_id_limit, ranks)
    return CheckedRows(counted, skipped, numbers)


def _warn_of_dense_columns(job: Job, numbers: Mapping[str, NumberRange]) -> None:
    """Log what is wrong with dense columns; wide ones may be standardised."""
    for column in job.schema.of_kind("dense"):
        rows = numbers[column]
        is_scaled = job.em3.scaling is not None and rows.least < rows.greatest
        if not is_scaled and (finding := dense_finding(column, rows.least, rows.greatest)):
            logger.warning("%s; fix: %s", *finding)


def _without_weight(job: Job, split: str) -> ValueError:
    """Return the error to raise where no row of a split counts."""
    return ValueError(
        f"{job.root}/{split}: column '{job.schema.weight}' is 0 in all rows; write weights above "
        "0, or remove it from schema.yaml"
    )


def require_usable(job: Job, rows: RowSource, split: str, scored: Mapping[str, Tensor]) -> None:
    """Require finite logits of the rows of a split, and a row that counts, on rank 0.

    Raises:
        ValueError: names the rows with other logits, or the column of weights.
    """
    require_finite(scored, rows)
    if len(weights := scored.get("weights", torch.ones(1))) and not weights.any():
        raise _without_weight(job, split)


def fill_bank(job: Job, lockstep: Lockstep | None = None) -> None:
    """Encode every item that has a row and write its vector to the memory bank. A collective.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
    """
    content, store = job.em3.content, job.store
    if content is None or content.bank is None:
        return
    assert store is not None

    def stop_if_asked() -> None:
        """Raise TrainingStopped on all ranks if the job is to end. A collective."""
        if lockstep is not None:
            lockstep.sync_errors()
            lockstep.raise_if_stopped()

    encode_into_bank(content, store, job.ranks, stop_if_asked, find=job.vocabularies.find_items)


def split_interactions(job: Job, split: str) -> Interactions:
    """Return this rank's share of a split, for scoring. A collective.

    Raises:
        ValueError: on every rank: the split cannot be read.
    """
    with job.ranks.raise_on_all_ranks():
        return Interactions(
            job.rows(split),
            job.batch_builder(with_content=False),
            rows_per_batch(job.config),
            job.ranks.rank,
            job.ranks.world_size,
        )


@torch.no_grad()
def score(
    job: Job,
    interactions: Interactions,
    lockstep: Lockstep | None = None,
    unknown: UnknownIds | None = None,
    with_queries: bool = False,
) -> dict[str, Tensor]:
    """Score the rows of all ranks and return them on rank 0, none on the others. A collective.

    Rows that only pad are left out; random states are restored. `unknown` counts the ids that have
    no row of their own. With `with_queries`, a retrieval model's queries are returned, too, for
    rows whose first label is positive.

    Returns:
        `positions` [N], `logits` [N, C], `labels` [N, C], `groups` [N] and `items` [N] (targets),
        and `weights` [N] if there are any. With `with_queries`, if the model makes queries:
        `queries` [Q, D], the vectors and ids to retrieve, `query_targets` [Q, D] and `query_items`
        [Q], and `query_weights` [Q] if there are any, on every rank.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
    """
    lockstep = lockstep or Lockstep(job.ranks)
    devices = [job.ranks.device] if job.ranks.device.type == "cuda" else []
    columns: dict[str, list[Tensor]] = {}
    with (
        torch.random.fork_rng(devices),
        closing(loader(interactions, job.config.num_workers, bool(devices))) as source,
    ):
        outputs = forward_pass(job, source, lockstep, unknown, total=len(interactions))
        for vectors, logits, batch in outputs:
            part = _columns(batch, logits)
            if with_queries and "query" in vectors:
                part |= _queries(batch, vectors)
            for name, column in part.items():
                columns.setdefault(name, []).append(column.cpu())
    return {
        name: (gather_rows if name in QUERY_COLUMNS else gather_rows_to_first)(
            torch.cat(column), job.ranks.group
        )
        for name, column in columns.items()
    }


def _columns(batch: Batch, logits: Tensor) -> dict[str, Tensor]:  # logits: [B, C]
    """Return the score columns of real (non-padding) rows."""
    known = batch.row_positions >= 0
    columns = {
        "positions": batch.row_positions,
        "logits": logits.float(),
        "labels": batch.labels,
        "groups": batch.groups,
        "items": batch.frequency_keys,
        "weights": batch.weights,
    }
    return {name: column[known] for name, column in columns.items() if column is not None}


def _queries(batch: Batch, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the query columns of rows that count and whose first label is positive."""
    wanted = (batch.row_weights > 0) & (batch.labels[:, 0] > 0)
    columns = {
        "queries": vectors["query"],
        "query_targets": vectors["item"],
        "query_items": batch.frequency_keys,
        "query_weights": batch.weights,
    }
    return {name: column[wanted] for name, column in columns.items() if column is not None}


def split_scores(job: Job, scored: dict[str, Tensor], item_counts: ItemCounts) -> SplitScores:
    """Sort the result of `score`, of all ranks, by the rows' positions in the split."""
    order = np.argsort(scored["positions"].numpy())
    names = ("positions", "groups", "items", "labels", "logits", "weights")
    columns = {name: scored[name].numpy()[order] for name in names if name in scored}
    labels = tuple(job.schema.of_kind("label"))
    counts, losses = item_counts.of(columns["items"]), job.schema.label_losses
    return SplitScores(**columns, counts=counts, label_names=labels, losses=losses)


def evaluate_split(
    job: Job,
    split: str,
    item_counts: ItemCounts,
    lockstep: Lockstep | None = None,
    searches: bool = False,
    scores_to: Path | None = None,
    model: str | None = None,
    shows_skipped: bool = False,
) -> dict[str, Any]:
    """Compute the metrics of a split: all items, and cold, warm and unseen ones. A collective.

    With several labels, the metrics of the first are at the top level and those of each are under
    `labels`. With `searches`, a retrieval model also encodes and searches the whole catalogue; the
    metrics are under `retrieval`. The rows' scores are written to the file `scores_to`, with the
    name of their `model`. With `shows_skipped`, skipped rows are logged, and one must be left.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
        ValueError: on every rank: no row is left, or a logit is not finite.
    """
    interactions = split_interactions(job, split)
    unknown = UnknownIds(job.schema)
    lockstep = lockstep or Lockstep(job.ranks)
    scored = score(job, interactions, lockstep, unknown, searches)
    if shows_skipped:
        interactions.rows.skipped(job.ranks, split)
    report: dict[str, Any] = {}
    with job.ranks.raise_on_all_ranks():
        if job.ranks.is_first:
            require_usable(job, interactions.rows, split, scored)
            scores = split_scores(job, scored, item_counts)
            report = scores_report(scores, make_metrics(job.config.metrics))
            if scores_to is not None:
                write_scores(scores, scores_to, model)
    report = job.ranks.from_first(report)
    if "queries" in scored:
        report["retrieval"] = retrieval_report(job, scored, item_counts, lockstep)
    ids = unknown.totals(job.ranks.group)
    if (line := format_unknown(split, ids)) is not None:
        logger.info(line)
    return {**report, "ids": ids} if ids else report


def scores_report(scores: SplitScores, more: Mapping[str, Metric]) -> dict[str, Any]:
    """Compute the metrics of the first label, and those of each if there are several."""
    reports = {}
    for index, label in enumerate(scores.label_names):
        of = scores.counted(index)
        columns = of.labels[:, index], of.logits[:, index], of.groups, of.counts
        reports[label] = evaluation_report(*columns, more, of.weights, of.loss_of(index))
    first = next(iter(reports.values()))
    return dict(first) if len(reports) == 1 else {**first, "labels": reports}


def format_evaluation(report: dict[str, Any], config: Config) -> str:
    """Format the result of `evaluate_split` as text tables, one for each label."""
    of_labels = {f"label {name}": part for name, part in report.get("labels", {}).items()}
    texts = []
    for title, part in (of_labels or {"items": report}).items():
        more = [name for name in config.metrics if name in part]
        texts.append(format_report(part, more, shown_metrics(config, part), title))
    if "retrieval" in report:
        texts.append(format_retrieval(report["retrieval"]))
    return "\n".join(texts)


def shown_metrics(config: Config, report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the metrics to show: a softmax loss orders items and makes no probabilities."""
    if "rmse" in report:
        return SHOWN_OF_NUMBERS
    return SHOWN if softmax_settings(config.ranking) is None else ORDER_METRICS
