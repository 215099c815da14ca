"""Map raw ids to rows of a table of fixed size while ids appear and disappear.

A hash assigns each id to a set of about a hundred rows; each rank holds some of the sets.
Shapes: N ids or rows, U distinct ids, S sets, R rows per set.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.memory_bank import exchange, sharded_by_rows
from embeddings.vocabulary.fixed import NULL_ID, check_num_embeddings, mix64

MAX_ROWS_PER_SET = 128
BLOCK = 4096  # ids compared with their sets at once: a few megabytes
# TrainPipelineSparseDist fetches the batch of step s before step s - 2 has run.
PIPELINED_STEPS = 2


def set_layout(num_embeddings: int) -> tuple[int, int]:
    """Return the number of sets of a table, and the rows of each."""
    num_sets = -(-(num_embeddings - 1) // MAX_ROWS_PER_SET)
    return num_sets, (num_embeddings - 1) // num_sets


class RowSets:
    """The ids in some sets of rows, with their counts of uses and the step of the last use."""

    def __init__(
        self, shape: tuple[int, int], admit_after: int, half_life: float, protect_steps: int
    ) -> None:
        self.admit_after, self.half_life = admit_after, half_life
        self.protect_steps = protect_steps
        self.ids = np.zeros(shape, np.int64)
        self.last_used = np.full(shape, -1, np.int64)  # step; -1 where a row is free
        self.scores = np.zeros(shape, np.float64)  # decayed count of uses at step `last_used`
        # Ids with fewer than `admit_after` uses wait in slots chosen by hash; a new id overwrites.
        waiting = shape if admit_after > 1 else (0, 0)
        self.waiting_ids = np.zeros(waiting, np.int64)
        self.waiting_counts = np.zeros(waiting, np.int64)

    def find(self, sets: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id in its set, -1 for ids without a row: int64 [N]."""
        rows = np.empty(len(ids), np.int64)
        for start in range(0, len(ids), BLOCK):
            block = slice(start, start + BLOCK)
            rows[block] = (self.ids[sets[block]] == ids[block, None]).argmax(axis=1)
        # argmax gives 0 if nothing is equal, and a free row holds id 0: both mean no row.
        has_row = (self.ids[sets, rows] == ids) & (self.last_used[sets, rows] >= 0)
        return np.where(has_row, rows, -1)

    def use(
        self, sets: np.ndarray, ids: np.ndarray, counts: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count a step's uses of distinct ids, and assign rows to ids that have been used enough.

        Returns the row of each id in its set or -1, whether the row is new for the id, and whether
        another id lost the row. All arrays are [N]. `step` must not decrease between calls.
        """
        rows = self.find(sets, ids)
        has_row = rows >= 0
        at = sets[has_row], rows[has_row]
        self.scores[at] = self._decay(self.scores[at], self.last_used[at], step) + counts[has_row]
        self.last_used[at] = step
        admitted, evicted = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        new = np.flatnonzero(~has_row)
        occurrences = self._count_uses(sets[new], ids[new], counts[new])
        ready = occurrences >= self.admit_after
        picked, new_rows = self._assign_rows(sets[new[ready]], occurrences[ready], step)
        new, occurrences = new[ready][picked], occurrences[ready][picked]
        at = sets[new], new_rows
        rows[new], admitted[new], evicted[new] = new_rows, True, self.last_used[at] >= 0
        self.ids[at], self.scores[at], self.last_used[at] = ids[new], occurrences, step
        self._stop_waiting(sets[new], ids[new])
        return rows, admitted, evicted

    def _assign_rows(
        self, sets: np.ndarray, occurrences: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positions of ids that get a row, and the rows; ids with most occurrences first."""
        order = np.lexsort((-occurrences, sets))
        set_numbers, first, numbers = np.unique(sets[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(first, numbers)  # 0, 1, 2 ... within each set
        rows, num_rows = self._by_use(set_numbers, step)
        has_row = rank < np.repeat(num_rows, numbers)
        set_index = np.repeat(np.arange(len(set_numbers)), numbers)
        return order[has_row], rows[set_index[has_row], rank[has_row]]

    def _by_use(self, sets: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows [N, R] of sets [N] in order of assignment, and how many are available."""
        last = self.last_used[sets]
        priority = self._decay(self.scores[sets], last, step)
        is_protected = (last >= 0) & (last >= step - self.protect_steps)
        priority[is_protected] = np.inf
        return np.lexsort((last, priority), axis=-1), self.ids.shape[1] - is_protected.sum(axis=1)

    def _decay(self, scores: np.ndarray, last_used: np.ndarray, step: int) -> np.ndarray:
        return scores * np.exp2((last_used - step) / self.half_life)  # [N] or [N, R]

    def _slots(self, sets: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hashes = mix64(mix64(ids))  # the first mix was used to choose the set
        return sets, (hashes % np.uint64(self.waiting_ids.shape[1])).astype(np.int64)

    def _count_uses(self, sets: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the occurrences [N] of ids without a row, this call included, and store them."""
        if self.admit_after == 1:
            return counts
        slots = self._slots(sets, ids)
        is_waiting = self.waiting_ids[slots] == ids
        occurrences = counts + np.where(is_waiting, self.waiting_counts[slots], 0)
        self.waiting_ids[slots], self.waiting_counts[slots] = ids, occurrences
        return occurrences

    def _stop_waiting(self, sets: np.ndarray, ids: np.ndarray) -> None:  # [N], [N]
        if self.admit_after == 1:
            return
        sets, slots = self._slots(sets, ids)
        is_waiting = self.waiting_ids[sets, slots] == ids
        self.waiting_counts[sets[is_waiting], slots[is_waiting]] = 0


@dataclass(frozen=True)
class VocabularyCounts:
    """Lookups, admissions and evictions of a bounded vocabulary, summed over all ranks."""

    lookups: int
    unknown: int  # lookups of ids without a row
    admitted: int  # ids that got a row
    evicted: int  # ids that lost their row
    known: int  # ids that have a row now


class BoundedVocabulary:
    """A map of at most ``num_embeddings - 1`` raw ids, learned during training.

    A new id takes a free row of its set, or the least used row. Ids without a row map to
    ``unknown_row``, the last row. With a process group every method is a collective. Arguments out
    of range are a ValueError.

    Args:
        num_embeddings: rows of the table, up to one in 64 of which is unused.
        admit_after: occurrences in training after which an id gets a row.
        half_life: steps in which a count of uses halves; ``float("inf")`` for plain counts.
        protect_steps: steps for which a used row is not evicted; at least the batches mapped ahead.

    Example::

        import torch
        from embeddings import BoundedVocabulary

        vocabulary = BoundedVocabulary(num_embeddings=1000)
        rows = vocabulary.rows_of(torch.tensor([-7, 12, -7]), step=0, training=True)
        vocabulary.rows_of(torch.tensor([99]), step=1, training=False)  # [999], unknown
    """

    def __init__(
        self,
        num_embeddings: int,
        admit_after: int = 1,
        half_life: float = 10_000.0,
        protect_steps: int = PIPELINED_STEPS,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.num_embeddings = check_num_embeddings(num_embeddings)
        limits = ("admit_after", admit_after, 1), ("protect_steps", protect_steps, 0)
        for name, value, lowest in limits:
            if value < lowest:
                raise ValueError(f"{name} is {value}; set at least {lowest}")
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life}; set a positive number of steps")
        self.num_sets, self.rows_per_set = set_layout(num_embeddings)
        self._group = process_group
        self._world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self._bounds = self.num_sets * np.arange(self._world_size + 1) // self._world_size
        self._first_set = int(self._bounds[self._rank])
        shape = int(self._bounds[self._rank + 1]) - self._first_set, self.rows_per_set
        self._sets = RowSets(shape, admit_after, half_life, protect_steps)
        self._evicted: list[Tensor] = []
        self._counts = np.zeros(4, np.int64)  # lookups, unknown, admitted, evicted
        # Ids [A] of this rank's sets that got a row in the last training call, and their rows [A].
        self.admitted = np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def unknown_row(self) -> int:
        return self.num_embeddings - 1

    def _set_index(self, ids: np.ndarray) -> np.ndarray:  # [U] -> int64 [U]
        return (mix64(ids) % np.uint64(self.num_sets)).astype(np.int64)

    def rows_of(self, ids: Tensor, step: int, training: bool) -> Tensor:
        """Return the row of each raw id, int64 [N], on its device. A collective.

        `step` is the same on all ranks. Without `training` the map does not change.
        """
        raw = ids.numpy(force=True)
        distinct, inverse, counts = np.unique(raw, return_inverse=True, return_counts=True)
        is_id, rows = distinct != NULL_ID, np.full(len(distinct), self.unknown_row)
        serve = self._serve if self._world_size == 1 else self._request_rows
        rows[is_id], evicted = serve(distinct[is_id], counts[is_id], step, training)
        if len(evicted):
            self._evicted.append(torch.from_numpy(evicted))
        self._counts[:2] += [len(ids), counts[rows == self.unknown_row].sum()]
        return torch.from_numpy(rows[inverse]).to(ids.device)

    def find(self, ids: Tensor) -> Tensor:  # int64 [N], raw -> int64 [N]
        """Return the row of each id, -1 for ids without one; `counts` ignores it. A collective."""
        saved_counts = self._counts.copy()
        rows = self.rows_of(ids, step=0, training=False)
        self._counts = saved_counts
        return rows.where(rows != self.unknown_row, -1)

    def _serve(
        self, ids: np.ndarray, counts: np.ndarray, step: int, training: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of distinct ids [U] in sets of this rank, and rows that ids lost."""
        sets = self._set_index(ids) - self._first_set
        if training:
            rows, admitted, evicted = self._sets.use(sets, ids, counts, step)
            self._counts[2:] += [admitted.sum(), evicted.sum()]
        else:
            rows, evicted = self._sets.find(sets, ids), np.zeros(len(ids), bool)
        table_rows = (sets + self._first_set) * self.rows_per_set + rows
        if training:
            self.admitted = ids[admitted], table_rows[admitted]
        return np.where(rows < 0, self.unknown_row, table_rows), table_rows[evicted]

    def _request_rows(
        self, ids: np.ndarray, counts: np.ndarray, step: int, training: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of distinct ids [U], and rows that ids lost on any rank. A collective."""
        owner = np.searchsorted(self._bounds, self._set_index(ids), side="right") - 1
        order = np.argsort(owner, kind="stable")
        sizes = np.bincount(owner, minlength=self._world_size).tolist()
        pairs = torch.from_numpy(np.stack([ids, counts], axis=1)[order])
        requests, requested_sizes = self._send(pairs, sizes)
        # Several ranks may request the same id.
        distinct, inverse = np.unique(requests[:, 0].numpy(), return_inverse=True)
        totals = np.zeros(len(distinct), np.int64)
        np.add.at(totals, inverse, requests[:, 1].numpy())
        distinct_rows, evicted = self._serve(distinct, totals, step, training)
        served, rows = torch.from_numpy(distinct_rows[inverse]), np.empty(len(ids), np.int64)
        rows[order] = exchange(served, requested_sizes, sizes, self._group).numpy()
        if training:
            sent = torch.from_numpy(evicted).repeat(self._world_size)
            evicted = self._send(sent, [len(evicted)] * self._world_size)[0].numpy()
        return rows, evicted

    def _send(self, values: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
        """Send rank r its `sizes[r]` values; return received values and sizes. A collective."""
        ones = [1] * self._world_size
        received_sizes = exchange(torch.tensor(sizes), ones, ones, self._group).tolist()
        return exchange(values, sizes, received_sizes, self._group), received_sizes

    def take_evicted_rows(self) -> Tensor:
        """Return the rows [N] that ids lost since the last call, the same on all ranks."""
        rows = torch.cat([torch.zeros(0, dtype=torch.int64), *self._evicted])
        self._evicted = []
        return rows

    def counts(self) -> VocabularyCounts:
        """Return the counts since the last call, over all ranks. A collective."""
        totals = torch.from_numpy(np.append(self._counts, (self._sets.last_used >= 0).sum()))
        if self._group is not None:
            dist.all_reduce(totals, group=self._group)
        self._counts[:] = 0
        return VocabularyCounts(*totals.tolist())

    def state_dict(self) -> dict[str, Tensor | ShardedTensor]:
        """Return ids, last uses and scores of all rows, and waiting ids: [S, R]. A collective."""
        sets = self._sets
        arrays = {"ids": sets.ids, "last_used": sets.last_used, "scores": sets.scores}
        if sets.admit_after > 1:
            arrays |= {"waiting_ids": sets.waiting_ids, "waiting_counts": sets.waiting_counts}
        first, group = self._first_set, self._group
        return {
            name: sharded_by_rows(torch.from_numpy(array), first, self.num_sets, group)
            for name, array in arrays.items()
        }


@dataclass(frozen=True)
class UsedRows:
    """A range of rows of the old table, with their entries in `BoundedVocabulary.state_dict`."""

    first: int
    ids: np.ndarray  # int64 [N]
    last_used: np.ndarray  # int64 [N], -1 where a row is free
    scores: np.ndarray  # float64 [N]


def rows_in_resized(
    ranges: Iterable[UsedRows], num_embeddings: int, half_life: float, start: int, stop: int
) -> np.ndarray:
    """Return the old row of each row in `[start, stop)` of the new table, or -1: int64."""
    num_sets, rows_per_set = set_layout(num_embeddings)
    first, last = start // rows_per_set, min(-(-stop // rows_per_set), num_sets)
    rows_by_range, sets, priorities = [], [], []
    for rows in ranges:
        id_sets = (mix64(rows.ids) % np.uint64(num_sets)).astype(np.int64)
        inside = np.flatnonzero((rows.last_used >= 0) & (id_sets >= first) & (id_sets < last))
        with np.errstate(divide="ignore"):  # an old score may have decayed to 0
            decayed = np.log2(rows.scores[inside]) + rows.last_used[inside] / half_life
        rows_by_range.append(rows.first + inside)
        sets.append(id_sets[inside])
        priorities.append(np.stack([decayed, rows.last_used[inside]]))
    old_row, id_sets = np.concatenate(rows_by_range), np.concatenate(sets)
    decayed, recent = np.concatenate(priorities, axis=1)
    order = np.lexsort((old_row, -recent, -decayed, id_sets))
    old_row, id_sets = old_row[order], id_sets[order]
    rank = np.arange(len(id_sets)) - np.searchsorted(id_sets, id_sets)
    old_rows = np.full(max(last - first, 0) * rows_per_set, -1)
    fits = rank < rows_per_set
    old_rows[(id_sets[fits] - first) * rows_per_set + rank[fits]] = old_row[fits]
    result = np.full(stop - start, -1)
    begin = first * rows_per_set
    end = min(stop, begin + len(old_rows))
    result[: max(end - start, 0)] = old_rows[start - begin : end - begin]
    return result
