"""A bounded vocabulary of another size: which rows of the old table its ids have in the new one.

The set of an id depends on the number of sets, so a table of another size has the ids in other
rows. Where a set of the new table has too few, its most used ids get them, as in training.

Shapes: N rows of the old table, S sets of the new one, R rows per set.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from embeddings.vocabulary.bounded import rows_of_sets
from embeddings.vocabulary.fixed import mix64


@dataclass(frozen=True)
class UsedRows:
    """A range of rows of the old table, with the entries of `BoundedVocabulary.state_dict`."""

    first: int
    ids: np.ndarray  # int64 [N]
    last_used: np.ndarray  # int64 [N], -1 where a row is free
    scores: np.ndarray  # float64 [N]


def rows_in_resized(
    used: Iterable[UsedRows], num_embeddings: int, half_life: float, start: int, stop: int
) -> np.ndarray:
    """Return the old row of each row `[start, stop)` of the new table, -1 where none: int64.

    `used` are the rows of the old table, in ranges; `half_life` is that of the new vocabulary.

    Example::

        import numpy as np
        from embeddings.vocabulary.resized import UsedRows, rows_in_resized

        used = UsedRows(0, np.array([7, 0]), np.array([3, -1]), np.array([1.0, 0.0]))
        rows_in_resized([used], 5, half_life=100.0, start=0, stop=5)  # id 7: [0, -1, -1, -1, -1]
    """
    num_sets, rows_per_set = rows_of_sets(num_embeddings)
    first, last = start // rows_per_set, min(-(-stop // rows_per_set), num_sets)
    places, sets, worth = [], [], []
    for rows in used:
        own = (mix64(rows.ids) % np.uint64(num_sets)).astype(np.int64)
        inside = np.flatnonzero((rows.last_used >= 0) & (own >= first) & (own < last))
        with np.errstate(divide="ignore"):  # a use long ago may have faded to 0
            faded = np.log2(rows.scores[inside]) + rows.last_used[inside] / half_life
        places.append(rows.first + inside)
        sets.append(own[inside])
        worth.append(np.stack([faded, rows.last_used[inside]]))
    place, own = np.concatenate(places), np.concatenate(sets)
    faded, recent = np.concatenate(worth, axis=1)
    order = np.lexsort((place, -recent, -faded, own))
    place, own = place[order], own[order]
    turn = np.arange(len(own)) - np.searchsorted(own, own)
    found = np.full(max(last - first, 0) * rows_per_set, -1)
    fits = turn < rows_per_set
    found[(own[fits] - first) * rows_per_set + turn[fits]] = place[fits]
    result = np.full(stop - start, -1)
    begin = first * rows_per_set
    end = min(stop, begin + len(found))
    result[: max(end - start, 0)] = found[start - begin : end - begin]
    return result
