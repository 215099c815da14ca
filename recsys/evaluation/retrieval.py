"""Measures how well a retrieval model ranks the whole catalogue, by exact search.

For every impression with a positive first label, the place of its item in the catalogue is the
number of items whose dot product with the query is higher. Items stay on the ranks that encoded
them; queries go to all ranks and the counts are summed, so that no rank holds the whole catalogue
and no approximate index is needed.

Shapes: R impressions with a query, I items of this rank, D dimension, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.build import Job
from recsys.data.batch import Batch
from recsys.data.batch_builder import BatchBuilder
from recsys.data.item_parts import item_parts
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import empty_table, padding_rows
from recsys.distributed.lockstep import Lockstep
from recsys.evaluation.forward_pass import forward_pass
from recsys.evaluation.metrics import format_report

DEPTHS = (10, 50, 100)
QUERIES_PER_BLOCK = 256


def catalogue_of(job: Job) -> np.ndarray:  # int64 [items]
    """Return the ids to search: items with a row in `items/*.parquet`, or all ids without files."""
    if job.store is not None:
        return np.sort(job.store.items.ids)
    if job.schema.items is None:
        return np.arange(job.schema.num_items)
    return np.sort(ItemTable(job.root, job.schema, job.config.on_bad_row).ids)


@torch.no_grad()
def catalogue_vectors(job: Job, lockstep: Lockstep) -> tuple[Tensor, Tensor]:
    """Encode this rank's share of the catalogue: ids [I] and vectors [I, D]. A collective.

    Raises:
        TrainingStopped: `lockstep` reports that the job is to end.
    """
    ranks = job.ranks
    with ranks.raise_on_all_ranks():
        items = catalogue_of(job)
    share = np.array_split(items, ranks.world_size)[ranks.rank]
    batches = _batches_of_items(job, share, len(items))
    outputs = forward_pass(job, batches, lockstep, place="catalogue batch")
    vectors = [parts["item"] for parts, _, _ in outputs]
    return torch.from_numpy(share), torch.cat(vectors)[: len(share)].cpu()


def _batches_of_items(
    job: Job,
    share: np.ndarray,  # int64 [I]
    num_items: int,
) -> Iterator[Batch]:
    """Yield impressions without a user, one per item, in equally many batches on every rank."""
    build: BatchBuilder = job.batch_builder(with_labels=False)
    columns = [name for name, column in job.schema.columns.items() if column.kind != "label"]
    rows = padding_rows(empty_table(job.schema, columns + job.schema.parallel), 1)
    nobody = RowColumns.of(rows)
    longest = -(-num_items // job.ranks.world_size)
    ids = np.resize(share if len(share) else np.zeros(1, np.int64), longest)
    for start in range(0, longest, job.config.batch_size):
        part = ids[start : start + job.config.batch_size]
        batch_rows = nobody.take(np.zeros(len(part), np.int64))
        batch_rows.numbers[job.schema.target_item] = part
        yield build(batch_rows)


def search_places(
    queries: Tensor,  # [R, D], the same on all ranks
    targets: Tensor,  # [R, D], vectors of the items to retrieve
    target_items: Tensor,  # [R]
    items: Tensor,  # [I]
    vectors: Tensor,  # [I, D]
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # int64 [R]
    """Count the other items, over all ranks, with a higher dot product; in float64.

    A collective if `group` is given.

    Example::

        vectors = torch.eye(3)
        search_places(torch.tensor([[3.0, 2, 1]]), vectors[1:2], torch.tensor([1]),
                      torch.arange(3), vectors)  # [1]
    """
    vectors, places = vectors.double(), torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        query = queries[block].double()
        own = (query * targets[block].double()).sum(dim=1, keepdim=True)
        is_higher = (query @ vectors.T > own) & (items != target_items[block].unsqueeze(1))
        places[block] = is_higher.sum(dim=1)
    if group is not None:
        dist.all_reduce(places, group=group)
    return places


def retrieval_metrics(places: Tensor) -> dict[str, Any]:
    """Compute Recall@K and NDCG@K from places [R], one relevant item per impression.

    recall@K: share of impressions whose item is in the top K. ndcg@K: mean of 1 / log2(2 + place),
    counting 0 where the item is not in the top K. None without impressions.
    """
    metrics: dict[str, Any] = {}
    gains = 1 / torch.log2(2 + places.double())
    for depth in DEPTHS:
        found = (places < depth).double()
        is_there = len(places) > 0
        metrics[f"recall@{depth}"] = float(found.mean()) if is_there else None
        metrics[f"ndcg@{depth}"] = float((found * gains).mean()) if is_there else None
    return metrics | {"num_samples": len(places)}


def retrieval_report(
    job: Job, scored: dict[str, Tensor], item_counts: np.ndarray, lockstep: Lockstep
) -> dict[str, Any]:
    """Compute `retrieval_metrics` of all rows, and nested those of warm, cold and unseen items.

    A collective.

    Args:
        job: a job with a two-tower model.
        scored: `queries` [R, D], `query_targets` [R, D] and `query_items` [R] of the impressions.
        item_counts: int64 [num_items], training rows of each item.
        lockstep: keeps the ranks on the same batch.
    """
    items, vectors = catalogue_vectors(job, lockstep)
    places = search_places(
        scored["queries"],
        scored["query_targets"],
        scored["query_items"],
        items,
        vectors,
        job.ranks.group,
    )
    counts = item_counts[scored["query_items"].numpy()]
    reports = {
        part: retrieval_metrics(places[torch.from_numpy(rows)])
        for part, rows in item_parts(counts).items()
    }
    catalogue = {"catalogue": sum(job.ranks.gather(len(items)))}
    return reports.pop("all") | catalogue | reports


def format_retrieval(report: dict[str, Any]) -> str:
    """Format a `retrieval_report` as a plain text table; undefined values are `-`."""
    names = [f"{name}@{depth}" for name in ("recall", "ndcg") for depth in DEPTHS]
    return format_report(report, names=names, title="retrieval")
