"""Measure how well a retrieval model ranks the whole catalogue, by exact search.

Ties count their expected value. Items stay on the ranks that encoded them; all ranks get queries.
Shapes: R impressions with a query, I items of this rank, D dimension, B batch, S seen items.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.config.ranking import RetrievalSettings
from recsys.data.batch import Batch
from recsys.data.item_frequency import ItemCounts, frequency_masks, target_counts
from recsys.data.items.item_table import ItemTable
from recsys.data.parquet.columns import RowColumns
from recsys.data.parquet.values import empty_table, padding_rows
from recsys.data.row_source import RowSource, columns_to_read
from recsys.distributed.lockstep import Lockstep
from recsys.distributed.ranks import Ranks
from recsys.evaluation.availability import LaterItems, later_items
from recsys.evaluation.forward_pass import forward_pass
from recsys.ranking.generative import MAX_BEAMS, CodeTrie, Generative, beam_search
from recsys.ranking.settings import GenerativeSettings

QUERIES_PER_BLOCK = 256
# Dot products count as equal below this share of the vectors' lengths: rounding of float64 sums.
TIE = 1e-12
NOT_FOUND = 2**40  # rank of a target that a search does not find, beyond any list


def catalogue_of(job: Job) -> np.ndarray | range:  # int64 [items]
    """Return the ids to search: those in `items/*.parquet`, or all ids without such files."""
    if job.store is not None:
        return np.sort(job.store.items.ids)
    if job.schema.items is None:
        if job.schema.has_bounded_items:
            raise ValueError(
                f"{job.root}/schema.yaml: a search needs the ids of all items, which a bounded "
                f"vocabulary of '{job.schema.target_item}' does not keep; add `items`"
            )
        ids = job.schema.vocabularies.get(job.schema.target_item)
        return range(len(ids) if isinstance(ids, ExactVocabulary) else job.schema.num_items)
    return np.sort(ItemTable(job.root, job.schema, job.config.on_bad_row).ids)


@torch.no_grad()
def catalogue_vectors(job: Job, lockstep: Lockstep) -> tuple[Tensor, Tensor]:
    """Encode this rank's share of the catalogue: ids [I] and vectors [I, D]. A collective."""
    ranks = job.ranks
    with ranks.raise_on_all_ranks():
        items = catalogue_of(job)
    share = np.asarray(items[_share(len(items), ranks)])
    longest = -(-len(items) // ranks.world_size)  # size of the largest share of a rank
    batches = _batches_of_items(job, share, longest)
    total = -(-longest // job.config.batch_size)
    outputs = forward_pass(job, batches, lockstep, title="catalogue batch", total=total)
    vectors = [towers["item"] for towers, _, _ in outputs]
    return torch.from_numpy(share), torch.cat(vectors)[: len(share)].cpu()


def _share(number: int, ranks: Ranks) -> slice:
    return slice(*(index * number // ranks.world_size for index in (ranks.rank, ranks.rank + 1)))


def _batches_of_items(job: Job, share: np.ndarray, longest: int) -> Iterator[Batch]:
    """Yield impressions without a user, one per item [I]; all ranks have equally many batches."""
    build = job.batch_builder(with_labels=False, with_content=False)
    rows = padding_rows(empty_table(job.schema, columns_to_read(job.schema, with_labels=False)), 1)
    padding = RowColumns.of(rows)
    ids = np.resize(share if len(share) else np.zeros(1, np.int64), longest)
    for start in range(0, longest, job.config.batch_size):
        batch_ids = ids[start : start + job.config.batch_size]
        batch_rows = padding.take(np.zeros(len(batch_ids), np.int64))
        batch_rows.numbers[job.schema.target_item] = batch_ids
        yield build(batch_rows)


@dataclass(frozen=True)
class SeenItems:
    """Items that the users of rows have seen, concatenated row by row."""

    items: Tensor  # int64 [S]
    lengths: Tensor  # [R], number of items of each row

    def mask(self, rows: slice, items: Tensor) -> Tensor:  # [I] ascending -> bool [rows, I]
        """Return which of `items` each of the rows has seen."""
        ends = self.lengths.cumsum(0)
        lengths = self.lengths[rows]
        first = int(ends[rows][0] - lengths[0])
        seen_items = self.items[first : int(ends[rows][-1])]
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        mask = torch.zeros(len(lengths), len(items), dtype=torch.bool)
        index = torch.searchsorted(items, seen_items).clamp(max=max(len(items) - 1, 0))
        if len(items):
            is_here = items[index] == seen_items
            mask[row[is_here], index[is_here]] = True
        return mask


def count_above(
    queries: Tensor,  # [R, D], the same on all ranks
    targets: Tensor,  # [R, D], vectors of the items to retrieve
    target_items: Tensor,  # [R]
    items: Tensor,  # [I]
    vectors: Tensor,  # [I, D]
    group: dist.ProcessGroup | None = None,
    excluded: Sequence[SeenItems | LaterItems] = (),
) -> tuple[Tensor, Tensor]:  # int64 [R], int64 [R]
    """Count the other items of all ranks with a higher and an equal dot product. A collective.

    `excluded` items are not counted, which requires ascending `items`. A target that no rank has
    among its items, such as the row of unknown ids, gets the count `NOT_FOUND`.
    """
    vectors, counts = vectors.double(), torch.zeros(3, len(queries), dtype=torch.int64)
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        query, target = queries[block].double(), targets[block].double()
        lead = query @ vectors.T - (query * target).sum(dim=1, keepdim=True)
        margin = TIE * (query.norm(dim=1) * target.norm(dim=1)).unsqueeze(1)
        is_other = items != target_items[block].unsqueeze(1)
        for excluded_items in excluded:
            is_other &= ~excluded_items.mask(block, items)
        counts[0, block] = ((lead > margin) & is_other).sum(dim=1)
        counts[1, block] = ((lead.abs() <= margin) & is_other).sum(dim=1)
        counts[2, block] = torch.isin(target_items[block], items).long()
    if group is not None:
        dist.all_reduce(counts, group=group)
    above, tied, is_here = counts
    return above.where(is_here > 0, NOT_FOUND), tied.where(is_here > 0, 0)


def beam_count_above(
    job: Job,
    queries: Tensor,  # [R, D], the same on all ranks
    target_items: Tensor,  # [R]
    excluded: Sequence[SeenItems | LaterItems],
) -> tuple[Tensor, Tensor, int]:  # int64 [R], int64 [R], items in the trie
    """Count a beam search's items with higher and with equal score than each target. A collective.

    A target that is not found gets the count `NOT_FOUND`. Each rank searches its share of rows.
    """
    ranking, settings, ranks = job.em3.ranking, job.config.ranking, job.ranks
    assert isinstance(ranking, Generative) and isinstance(settings, GenerativeSettings)
    with ranks.raise_on_all_ranks():
        items = torch.from_numpy(np.asarray(catalogue_of(job)))
    table = ranking.table.cpu()[items]
    items, table = items[table[:, -1] > 0], table[table[:, -1] > 0]
    trie, decoder = CodeTrie(table.numpy()), copy.deepcopy(ranking.decoder).cpu()
    counts = torch.zeros(2, len(queries), dtype=torch.int64)
    size = max(1, MAX_BEAMS // settings.beam_size)
    share = _share(len(queries), ranks)
    for start in range(share.start, share.stop, size):
        block = slice(start, min(start + size, share.stop))
        targets = target_items[block].unsqueeze(1).cpu()
        is_out = torch.zeros(len(targets), len(items), dtype=torch.bool)
        for excluded_items in excluded:
            is_out |= excluded_items.mask(block, items) & (items != targets)
        results = beam_search(decoder, trie, queries[block].cpu(), settings.beam_size, is_out)
        scores, is_target = results[0], (results[1] >= 0) & (items[results[1]] == targets)
        highest = scores.masked_fill(~is_target, -torch.inf).amax(dim=1, keepdim=True)
        missed = ~is_target.any(dim=1)
        counts[0, block] = (scores > highest).sum(dim=1).masked_fill(missed, NOT_FOUND)
        counts[1, block] = ((scores == highest).sum(dim=1) - 1).masked_fill(missed, 0)
    dist.all_reduce(counts, group=ranks.group)
    return counts[0], counts[1], len(items)


def retrieval_metrics(
    above: Tensor,
    tied: Tensor,
    weights: Tensor | None = None,
    depths: Sequence[int] = (10, 50, 100),
) -> dict[str, Any]:
    """Compute recall@K, NDCG@K and MRR@K for each depth K; None without impressions.

    With one relevant item per impression, recall is the hit rate. A target has each of the places
    `above` to `above + tied`, int [R], with equal probability.
    """
    metrics: dict[str, Any] = {}
    for name in GAINS:
        for depth in depths:
            gains = row_gains(name, above, tied, depth)
            mean = gains.mean()
            if weights is not None:
                mean = gains @ weights.double() / weights.double().sum()
            metrics[f"{name}@{depth}"] = float(mean) if len(above) else None
    return metrics | {"num_samples": len(above)}


# Gain of a target at a rank, counted from 1, within the first K.
GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "recall": torch.ones_like,
    "ndcg": lambda rank: 1 / torch.log2(1 + rank),
    "mrr": lambda rank: 1 / rank,
}


def row_gains(name: str, above: Tensor, tied: Tensor, depth: int) -> Tensor:  # [R], [R] -> [R]
    """Return the expected gain of each impression within the first `depth` places."""
    above, rows = above.long(), tied.long() + 1
    gains = GAINS[name](torch.arange(1, depth + 1).double())
    summed = torch.cat([torch.zeros(1).double(), gains.cumsum(0)])  # cumulative gains, 0 first
    first, end = above.clamp(max=depth), (above + rows).clamp(max=depth)
    gain = (summed[end] - summed[first]) / rows
    # Without ties, use the exact gain: a difference of sums is rounded.
    single = torch.where(above < depth, gains[above.clamp(max=depth - 1)], 0)
    return torch.where(tied == 0, single, gain)


def retrieval_report(
    job: Job, rows: RowSource, scored: dict[str, Tensor], counts: ItemCounts, lockstep: Lockstep
) -> dict[str, Any]:
    """Compute `retrieval_metrics` of all rows and of warm, cold and unseen items. A collective."""
    settings = job.config.ranking
    if not isinstance(settings, RetrievalSettings):  # a user-defined model with other settings
        settings = RetrievalSettings()
    queries, target_items = scored["queries"], scored["query_items"]
    excluded: list[SeenItems | LaterItems] = []
    if settings.exclude_seen:
        excluded.append(SeenItems(scored["query_seen"], scored["query_seen_lengths"]))
    with job.ranks.raise_on_all_ranks():
        if later := later_items(job, settings, rows, scored["query_positions"]):
            excluded.append(later)
    if isinstance(job.em3.ranking, Generative):
        above, tied, size = beam_count_above(job, queries, target_items, excluded)
    else:
        items, vectors = catalogue_vectors(job, lockstep)
        targets, group = scored["query_targets"], job.ranks.group
        above, tied = count_above(queries, targets, target_items, items, vectors, group, excluded)
        size = sum(job.ranks.gather(len(items)))
    weights, reports = scored.get("query_weights"), {}
    row_counts = target_counts(counts, target_items.numpy(), job.schema)
    for subset, is_in_subset in frequency_masks(row_counts).items():
        mask = torch.from_numpy(is_in_subset)
        row_weights = None if weights is None else weights[mask]
        reports[subset] = retrieval_metrics(above[mask], tied[mask], row_weights, settings.depths)
    return reports.pop("all") | {"catalogue": size} | reports
