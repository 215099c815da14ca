"""Sets of rows for ids. Shapes: S sets on this rank, R rows per set, N ids, each once."""

import numpy as np

from embeddings.vocabulary.fixed import mix64

BLOCK = 4096  # ids compared with their sets at once: a few megabytes


class RowSets:
    """The ids in some sets of rows, with their counts of uses and the step of the last use."""

    def __init__(
        self,
        num_sets: int,
        rows_per_set: int,
        admit_after: int,
        half_life: float,
        protect_steps: int,
    ) -> None:
        self.admit_after, self.half_life = admit_after, half_life
        self.protect_steps = protect_steps
        shape = (num_sets, rows_per_set)
        self.ids = np.zeros(shape, np.int64)
        self.last_used = np.full(shape, -1, np.int64)  # step; -1 where a row is free
        self.scores = np.zeros(shape, np.float64)  # halved count of uses, as of `last_used`
        # Ids not yet seen often enough wait in slots chosen by hash; a new id overwrites the slot.
        waiting = shape if admit_after > 1 else (num_sets, 0)
        self.waiting_ids = np.zeros(waiting, np.int64)
        self.waiting_counts = np.zeros(waiting, np.int64)

    def find(self, sets: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id in its set, -1 for ids without a row: int64 [N]."""
        rows = np.empty(len(ids), np.int64)
        for start in range(0, len(ids), BLOCK):
            part = slice(start, start + BLOCK)
            rows[part] = (self.ids[sets[part]] == ids[part, None]).argmax(axis=1)
        # argmax gives 0 if nothing is equal, and a free row holds id 0: both mean no row.
        has_row = (self.ids[sets, rows] == ids) & (self.last_used[sets, rows] >= 0)
        return np.where(has_row, rows, -1)

    def use(
        self, sets: np.ndarray, ids: np.ndarray, counts: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count a step's uses of ids and assign rows to the ids that are due for one.

        `sets`, distinct `ids` and their `counts` are int64 [N]; `step` never falls.

        Returns:
            [N] each: row in its set or -1; whether it is new; whether another id lost it.
        """
        rows = self.find(sets, ids)
        has_row = rows >= 0
        at = sets[has_row], rows[has_row]
        self.scores[at] = self._faded(self.scores[at], self.last_used[at], step) + counts[has_row]
        self.last_used[at] = step
        admitted, evicted = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        new = np.flatnonzero(~has_row)
        occurrences = self._seen(sets[new], ids[new], counts[new])
        ripe = occurrences >= self.admit_after
        places, new_rows = self._give_rows(sets[new[ripe]], occurrences[ripe], step)
        new, occurrences = new[ripe][places], occurrences[ripe][places]
        at = sets[new], new_rows
        rows[new], admitted[new], evicted[new] = new_rows, True, self.last_used[at] >= 0
        self.ids[at], self.scores[at], self.last_used[at] = ids[new], occurrences, step
        self._stop_waiting(sets[new], ids[new])
        return rows, admitted, evicted

    def _give_rows(
        self, sets: np.ndarray, occurrences: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Assign rows to ids of sets [N]; those most often `seen` [N] first."""
        order = np.lexsort((-occurrences, sets))
        set_numbers, first, numbers = np.unique(sets[order], return_index=True, return_counts=True)
        turn = np.arange(len(order)) - np.repeat(first, numbers)  # 0, 1, 2 ... within each set
        rows, num_rows = self._by_use(set_numbers, step)
        has_row = turn < np.repeat(num_rows, numbers)
        line = np.repeat(np.arange(len(set_numbers)), numbers)
        return order[has_row], rows[line[has_row], turn[has_row]]

    def _by_use(self, sets: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows [N, R] of sets [N] in order of assignment, and how many are available."""
        last = self.last_used[sets]
        worth = self._faded(self.scores[sets], last, step)
        is_protected = (last >= 0) & (last >= step - self.protect_steps)
        worth[is_protected] = np.inf
        return np.lexsort((last, worth), axis=-1), self.ids.shape[1] - is_protected.sum(axis=1)

    def _faded(
        self,
        scores: np.ndarray,  # [N] or [N, R]
        last_used: np.ndarray,  # as scores
        step: int,
    ) -> np.ndarray:  # as scores
        return scores * np.exp2((last_used - step) / self.half_life)

    def _slots(
        self, sets: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:  # [N], [N] -> [N], [N]
        hashes = mix64(mix64(ids))  # the first mix was used to choose the set
        return sets, (hashes % np.uint64(self.waiting_ids.shape[1])).astype(np.int64)

    def _seen(
        self, sets: np.ndarray, ids: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:  # [N], [N], [N] -> [N]
        """Return the occurrences of ids without a row, this call included, and store them."""
        if self.admit_after == 1:
            return counts
        slots = self._slots(sets, ids)
        occurrences = counts + np.where(
            self.waiting_ids[slots] == ids, self.waiting_counts[slots], 0
        )
        self.waiting_ids[slots] = ids
        self.waiting_counts[slots] = occurrences
        return occurrences

    def _stop_waiting(self, sets: np.ndarray, ids: np.ndarray) -> None:  # [N], [N]
        if self.admit_after == 1:
            return
        sets, slots = self._slots(sets, ids)
        is_waiting = self.waiting_ids[sets, slots] == ids
        self.waiting_counts[sets[is_waiting], slots[is_waiting]] = 0
