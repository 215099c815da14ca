"""Score a split over all ranks and compute its metrics exactly, using every row once.

Shapes: N rows of a split, B batch, C labels, Q rows with a query, D dimension.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from embeddings.host import is_on_host
from recsys.build import SPLITS, Job
from recsys.config import BestModelBy, RankingSettings
from recsys.config.ranking import RetrievalSettings, softmax_settings
from recsys.content.item_vectors import encode_into_bank
from recsys.data.batch import Batch
from recsys.data.interactions import Interactions, loader
from recsys.data.item_frequency import (
    ItemCounts,
    NumberRange,
    NumberRanges,
    count_items,
    dense_finding,
    rows_that_count,
    target_counts,
)
from recsys.data.parquet.values import RAW_GROUP, ROW_POSITION
from recsys.data.row_source import RowSource
from recsys.data.schema import Schema
from recsys.data.vocabularies import UnknownIds, format_unknown
from recsys.distributed.gather import gather_rows, gather_rows_to_first
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.evaluation.availability import later_items
from recsys.evaluation.blend_fit import fit_blend
from recsys.evaluation.forward_pass import forward_pass, require_finite, rows_per_batch
from recsys.evaluation.further_metrics import Metric, make_metrics
from recsys.evaluation.metrics import (
    ORDER_METRICS,
    SHOWN,
    SHOWN_OF_NUMBERS,
    evaluation_report,
    format_report,
)
from recsys.evaluation.model_selection import (
    MEANS_OF_DEFINED,
    METRICS,
    RETRIEVAL_DEPTH,
    needs_search,
)
from recsys.evaluation.retrieval import catalogue_of, retrieval_report
from recsys.evaluation.scores import SplitScores, write_scores
from recsys.storage.location import Location

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedRows:
    """Results of `check_data`."""

    item_counts: ItemCounts  # number of training rows of each item, only on rank 0
    skipped: dict[str, Any]  # skipped rows by split; empty if `on_bad_row` is error
    numbers: dict[str, NumberRange]  # range of each numeric column in the training rows


def check_data(
    job: Job, splits: Sequence[str] = SPLITS, opened: Mapping[str, RowSource] | None = None
) -> CheckedRows:
    """Read all splits once, so that a bad value raises before the first step. A collective.

    `opened` maps splits to row sources that are already open.
    """
    ranks, is_skip = job.ranks, job.config.on_bad_row == "skip"
    counts, skipped = dict[str, ItemCounts](), dict[str, Any]()
    if is_skip and job.store is not None:
        skipped["items"] = job.store.items.bad_rows.summary(ranks, "items")
    labels, ranges = ValidationLabels(job.schema), NumberRanges(job.schema)
    readers = {"train": ranges.add, "valid": labels.add}
    for split in splits:
        with ranks.raise_on_all_ranks():
            rows = (opened or {}).get(split) or job.rows(split)
            reader, settings = readers.get(split), job.config.ranking
            if split == "train" or not isinstance(settings, RetrievalSettings):
                counts[split] = count_items(rows, ranks.rank, ranks.world_size, reader)
            else:
                counts[split] = _count_and_check_moments(job, settings, rows, reader)
        if job.schema.weight and not sum(ranks.gather(int(counts[split].counts.sum()))):
            folder = job.train_folder if split == "train" else split
            raise _without_weight(job.root / folder, job.schema.weight)
        if is_skip:
            skipped[split] = rows.skipped(ranks, split)
    if "valid" in splits:
        check_validation(job, labels)
    numbers = ranges.gather(ranks)
    for column in job.schema.of_kind("dense"):
        extent = numbers[column]
        is_scaled = job.em3.scaling is not None and extent.lowest < extent.highest
        if not is_scaled and (finding := dense_finding(column, extent.lowest, extent.highest)):
            logger.warning("%s; fix: %s", *finding)
    counted = counts["train"].sum_of_ranks(job.schema.item_id_limit, ranks)
    return CheckedRows(counted, skipped, numbers)


def _count_and_check_moments(
    job: Job,
    settings: RetrievalSettings,
    rows: RowSource,
    also: Callable[[pa.Table], None] | None,
) -> ItemCounts:
    """Call `count_items`, and read the moments of the rows that a search queries after training."""
    label, positions = job.schema.of_kind("label")[0], [np.zeros(0, np.int64)]

    def read(table: pa.Table) -> None:
        is_query = rows_that_count(table, job.schema) & (table[label].to_numpy() > 0)
        positions.append(table[ROW_POSITION].to_numpy()[is_query])  # as `_add_queries` chooses them
        if also is not None:
            also(table)

    counts = count_items(rows, job.ranks.rank, job.ranks.world_size, read)
    later_items(job, settings, rows, torch.from_numpy(np.concatenate(positions)))
    return counts


class ValidationLabels:
    """Counts rows by value of the first label in a rank's share, and collects their users."""

    def __init__(self, schema: Schema) -> None:
        self.schema, self.label = schema, schema.of_kind("label")[0]
        self.rows = np.zeros(2, np.int64)  # with label 0 and 1
        self.users = [np.zeros(0, np.int64)] * 2  # with a row of label 0 and of 1

    def add(self, table: pa.Table) -> None:
        """Count the rows of a chunk, except padding, rows of weight 0 and rows without a label."""
        counted = rows_that_count(table, self.schema)
        labels = table[self.label].to_numpy()
        counted &= ~np.isnan(labels)
        positive = labels[counted] == 1
        group = RAW_GROUP if RAW_GROUP in table.column_names else self.schema.group
        users = table[group].to_numpy()[counted]
        for value, rows in enumerate((~positive, positive)):
            self.rows[value] += rows.sum()
            if not self._has_user_with_both():
                self.users[value] = np.union1d(self.users[value], users[rows])

    def _has_user_with_both(self) -> bool:
        return bool(np.isin(self.users[0], self.users[1], assume_unique=True).any())

    def totals(self, ranks: Ranks) -> tuple[int, int, bool]:
        """Return rows with label 0 and with 1, and whether a user has both. A collective."""
        *counts, has_both = zip(*ranks.gather((*self.rows.tolist(), self._has_user_with_both())))
        negatives, positives = map(sum, counts)
        if any(has_both):
            return negatives, positives, True
        users = [torch.from_numpy(users) for users in self.users]  # users may be split over ranks
        self.users = [gather_rows(ids, ranks.group).unique().numpy() for ids in users]
        return negatives, positives, self._has_user_with_both()


def check_validation(job: Job, labels: ValidationLabels) -> None:
    """Raise on every rank if the validation split cannot choose the best model. A collective."""
    negatives, positives, has_both = labels.totals(job.ranks)
    metric, label, cause = job.config.best_model_by, f"column '{labels.label}'", None
    if job.schema.label_losses[0] != "bce":
        cause = None if negatives + positives else f"{label} is known in no row"
    elif positives == 0:
        cause = f"{label} has no row with label 1"
    elif needs_search(metric):
        with job.ranks.raise_on_all_ranks():
            items = len(catalogue_of(job))
        if items <= RETRIEVAL_DEPTH and metric == "recall":
            cause = f"of a catalogue of {items} items every one is among the {RETRIEVAL_DEPTH} best"
    elif negatives == 0:
        cause = f"{label} has no row with label 0"
    elif "gauc" in METRICS[metric] and not has_both:
        cause = f"no user has rows of both labels in {label}"
        if metric in MEANS_OF_DEFINED:
            if job.ranks.is_first:
                logger.warning("%s/valid: %s: GAUC does not choose the best model", job.root, cause)
            cause = None
    if cause is not None:
        raise ValueError(undefined_selection(job.root, metric, cause, positives, negatives))


def undefined_selection(
    root: Location, metric: BestModelBy, cause: str, positives: int = 1, negatives: int = 1
) -> str:
    """Return the error message for a validation split that cannot choose the best model."""
    fix = "use another validation split"
    if positives and not negatives:
        fix += ", or set best_model_by: recall with ranking.name two_tower"
    elif positives and metric != "auc":
        fix += f", or set best_model_by: {'ndcg' if needs_search(metric) else 'auc'}"
    return f"{root}/valid: best_model_by {metric} cannot choose the best model: {cause}; {fix}"


def _without_weight(split: Location, column: str | None) -> ValueError:
    problem = f"{split}: column '{column}' is 0 in all rows"
    return ValueError(f"{problem}; write weights above 0, or remove it from schema.yaml")


def fill_bank(job: Job, lockstep: Lockstep | None = None) -> None:
    """Encode every item with a table row and write its vector to the memory bank. A collective."""

    def check_stop() -> None:
        if lockstep is not None:
            lockstep.sync_errors()
            lockstep.raise_if_stopped()

    content, store, find = job.em3.content, job.store, job.vocabularies.find_items
    if content is not None and content.bank is not None and store is not None:
        encode_into_bank(content, store, job.ranks, check_stop, find=find)


def split_interactions(job: Job, split: str) -> Interactions:
    """Return this rank's share of a split, for scoring. A collective."""
    ranks, size = job.ranks, rows_per_batch(job.config.batch_size)
    with ranks.raise_on_all_ranks():
        rows, build = job.rows(split), job.batch_builder(with_content=False)
        return Interactions(rows, build, size, ranks.rank, ranks.world_size)


@torch.no_grad()
def score(
    job: Job,
    interactions: Interactions,
    lockstep: Lockstep | None = None,
    unknown: UnknownIds | None = None,
    with_queries: bool = False,
    with_evidence: bool = False,
    with_histories: bool = False,
) -> dict[str, Tensor]:
    """Score all rows and return columns by name. A collective.

    Returns:
        On rank 0 alone: `positions`, `groups`, `items`, `weights` [N], `logits`, `labels` [N, C];
        with `with_evidence` and neighbours also `network`, `evidence_logits` [N, C], `evidence`
        [N, E]. On every rank, with `with_queries`: `queries`, `query_targets` [Q, D],
        `query_items`, `query_groups`, `query_weights`, `query_positions` [Q]; and `query_seen`,
        `query_seen_lengths` if `with_histories` or `ranking.exclude_seen`.
    """
    lockstep, columns, queries = lockstep or Lockstep(job.ranks), _HostColumns(), _HostColumns()
    devices = [job.ranks.device] if job.ranks.device.type == "cuda" else []
    with_seen = with_histories or getattr(job.config.ranking, "exclude_seen", False)
    with (
        torch.random.fork_rng(devices),
        closing(loader(interactions, job.config.num_workers, bool(devices))) as source,
    ):
        outputs = forward_pass(job, source, lockstep, unknown, total=len(interactions))
        for vectors, logits, batch in outputs:
            rows, target = batch.rows, batch.target
            scores = {"positions": rows.positions, "logits": logits.float(), "labels": batch.labels}
            scores |= {"groups": rows.groups, "items": target.frequency_keys}
            columns.add(rows.positions >= 0, {**scores, "weights": rows.weights})
            if with_evidence and "evidence" in vectors:
                names = ("network", "evidence_logits", "evidence")
                columns.add(rows.positions >= 0, {name: vectors[name].float() for name in names})
            if with_queries and "query" in vectors:
                _add_queries(queries, batch, vectors, with_seen)
    joined, group = columns.joined(job.ranks.device), job.ranks.group
    scored = {name: gather_rows_to_first(column, group) for name, column in joined.items()}
    joined = queries.joined(job.ranks.device)  # every rank searches its items for all queries
    return scored | {name: gather_rows(column, group) for name, column in joined.items()}


class _HostColumns:
    """Selected rows of all batches, copied to the host; it waits for a GPU only at the end."""

    def __init__(self) -> None:
        self._chunks: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def add(self, mask: Tensor, columns: dict[str, Tensor | None]) -> None:  # bool [B], [B, ...]
        copied = mask.to("cpu", non_blocking=True)  # into pinned memory
        for name, column in columns.items():
            if column is not None:
                is_here = is_on_host(column)
                selected = column[mask] if is_here else column.to("cpu", non_blocking=True)
                self._chunks.setdefault(name, []).append((selected, None if is_here else copied))

    def joined(self, device: torch.device) -> dict[str, Tensor]:  # [N, ...] by name
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {
            name: torch.cat([column if mask is None else column[mask] for column, mask in chunks])
            for name, chunks in self._chunks.items()
        }


def _add_queries(
    columns: _HostColumns, batch: Batch, vectors: dict[str, Tensor], with_seen: bool
) -> None:
    """Add rows of positive weight and positive first label; `with_seen` adds their histories."""
    is_query, rows = (batch.rows.loss_weights > 0) & (batch.labels[:, 0] > 0), batch.rows
    queries = {"queries": vectors["query"], "query_targets": vectors["item"]}
    queries |= {"query_items": batch.target.frequency_keys, "query_groups": rows.groups}
    columns.add(is_query, {**queries, "query_positions": rows.positions})
    columns.add(is_query, {"query_weights": rows.weights})
    if with_seen:  # histories are concatenated row by row
        history = batch.history.jagged()
        columns.add(is_query, {"query_seen_lengths": history.lengths})
        columns.add(is_query[history.rows], {"query_seen": batch.history.items[history.index]})


def split_scores(schema: Schema, scored: dict[str, Tensor], item_counts: ItemCounts) -> SplitScores:
    """Return the result of `score` on rank 0, sorted by the rows' positions in the split."""
    order = np.argsort(scored["positions"].numpy())
    names = ("positions", "groups", "items", "labels", "logits", "weights")
    columns = {name: scored[name].numpy()[order] for name in names if name in scored}
    columns["counts"] = target_counts(item_counts, columns["items"], schema)
    labels = tuple(schema.of_kind("label"))
    return SplitScores(**columns, label_names=labels, losses=schema.label_losses)


def usable_scores(
    job: Job, split: str, rows: RowSource, scored: dict[str, Tensor], item_counts: ItemCounts
) -> SplitScores | None:
    """Return the scores of a split on rank 0, else None. A collective.

    A logit that is not finite, or weights that are all 0, are a ValueError on every rank.
    """
    with job.ranks.raise_on_all_ranks():
        if not job.ranks.is_first:
            return None
        require_finite(scored, rows)
        if len(weights := scored.get("weights", torch.ones(1))) and not weights.any():
            raise _without_weight(job.root / split, rows.schema.weight)
        return split_scores(job.schema, scored, item_counts)


def evaluate_split(
    job: Job,
    split: str,
    item_counts: ItemCounts,
    lockstep: Lockstep | None = None,
    searches: bool = False,
    scores_to: Path | None = None,
    model: str | None = None,
    shows_skipped: bool = False,
    fits_blend: bool = False,
) -> dict[str, Any]:
    """Compute the metrics of a split: all items, and cold, warm and unseen ones. A collective.

    With `searches`, a retrieval model searches the whole catalogue. `fits_blend` fits the blend of
    neighbours to the split, and computes metrics from blends fitted to other users. Without rows,
    or with a logit that is not finite, every rank raises a ValueError.
    """
    interactions = split_interactions(job, split)
    unknown = UnknownIds(job.schema)
    lockstep = lockstep or Lockstep(job.ranks)
    scored = score(job, interactions, lockstep, unknown, searches, fits_blend)
    if fits_blend:
        fit_blend(job, scored)
    if shows_skipped:
        interactions.rows.skipped(job.ranks, split)
    report: dict[str, Any] = {}
    scores = usable_scores(job, split, interactions.rows, scored, item_counts)
    with job.ranks.raise_on_all_ranks():
        if scores is not None:
            report = scores_report(scores, make_metrics(job.config.metrics))
            if scores_to is not None:
                write_scores(scores, scores_to, model)
    report = job.ranks.from_first(report)
    if "queries" in scored:
        rows = interactions.rows
        report["retrieval"] = retrieval_report(job, rows, scored, item_counts, lockstep)
    ids = unknown.totals(job.ranks.group)
    if (line := format_unknown(split, ids)) is not None:
        logger.info(line)
    return {**report, "ids": ids} if ids else report


def scores_report(scores: SplitScores, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Compute the metrics of the first label; with several labels, `labels` has those of each."""
    reports = {
        label: evaluation_report(scores, index, metrics)
        for index, label in enumerate(scores.label_names)
    }
    first = next(iter(reports.values()))
    return dict(first) if len(reports) == 1 else {**first, "labels": reports}


def format_evaluation(
    report: dict[str, Any], ranking: RankingSettings, extra_metrics: Collection[str] = ()
) -> str:
    """Format the result of `evaluate_split` as text tables, one for each label."""
    by_title = {f"label {name}": metrics for name, metrics in report.get("labels", {}).items()}
    texts = []
    for title, metrics in (by_title or {"items": report}).items():
        extra_names = [name for name in extra_metrics if name in metrics]
        names = [*shown_metrics(ranking, metrics), *extra_names]
        texts.append(format_report(metrics, names, title))
    if retrieval := report.get("retrieval"):
        names = [name for name in retrieval if "@" in name]
        texts.append(format_report(retrieval, names, "retrieval"))
    return "\n".join(texts)


def shown_metrics(ranking: RankingSettings, report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of metrics to show; a softmax loss yields an order, not probabilities."""
    if "rmse" in report:
        return SHOWN_OF_NUMBERS
    return SHOWN if softmax_settings(ranking) is None else ORDER_METRICS
