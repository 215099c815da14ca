"""Maps the rows of a table of a new run to the rows that the same ids had in another run.

Raw ids decide where a table has a map of them, since a new dataset may number them otherwise; else
ids are rows, and keep them. Rows without an id in the other run have the row -1: they begin anew.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from embeddings.vocabulary.bounded import UsedRows, rows_in_resized
from embeddings.vocabulary.fixed import ExactVocabulary
from recsys.build import Job
from recsys.checkpoint.warm_start.differences import Differences
from recsys.checkpoint.warm_start.source import Source

SETS_PER_READ = 2**16
OldRows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class RowMap:
    """Rows of the other run by those of the new one.

    Attributes:
        is_identity: every row keeps its place, and there are no more and no fewer.
        num_rows: rows of the new table.
        find: called with the range `[start, stop)` of new rows, returns their old rows, int64 [N],
            -1 where there is none; it keeps the last result.
    """

    is_identity: bool
    num_rows: int
    find: OldRows

    @staticmethod
    def same(num_rows: int) -> RowMap:
        """Return the identity."""
        return RowMap.of(True, num_rows, _same)

    @staticmethod
    def of(is_identity: bool, num_rows: int, find: OldRows) -> RowMap:
        """Return a map that keeps its last result, as several tensors of a table need it."""
        return RowMap(is_identity, num_rows, lru_cache(maxsize=1)(find))

    def new_rows(self, old: np.ndarray) -> np.ndarray:  # int64 [N] -> [N], -1: has no place
        """Return the new rows of some old ones; for items, whose ids every rank holds anyway."""
        old_of_new = self.find(0, self.num_rows)
        known = np.flatnonzero(old_of_new >= 0)
        known = known[np.argsort(old_of_new[known])]
        if not len(known):
            return np.full(len(old), -1)
        place = np.searchsorted(old_of_new[known], old).clip(max=len(known) - 1)
        return np.where(old_of_new[known][place] == old, known[place], -1)


def row_map(table: str, source: Source, job: Job, differences: Differences) -> RowMap | None:
    """Return the map of a table, None if there is none; list what differs. A collective."""
    part = f"table '{table}'"
    of_run, of_data = source.schema.vocabulary_of(table), job.schema.vocabulary_of(table)
    old_rows, rows = source.schema.limit(table), job.schema.limit(table)
    leave_out = f"or --warm-start.skip '*.{table}.weight'"
    kinds = tuple(None if of is None else of.kind for of in (of_run, of_data))
    if kinds[0] != kinds[1]:
        differences.refuse(
            part,
            f"its ids were {_words(kinds[0])}, and are {_words(kinds[1])}",
            f"keep the kind of vocabulary, {leave_out}",
        )
        return None
    if of_data is None:
        return _plain(part, old_rows, rows, leave_out, differences)
    if of_data.kind == "exact":
        old, new = source.schema.vocabularies[table], job.schema.vocabularies[table]
        assert isinstance(old, ExactVocabulary) and isinstance(new, ExactVocabulary)
        return _exact(part, old, new, leave_out, differences)
    if of_data.kind == "bounded":
        return _bounded(table, source, job, of_data.half_life, differences)
    assert of_run is not None
    hashes = [(old_rows, of_run.num_hashes, of_run.seed), (rows, of_data.num_hashes, of_data.seed)]
    if hashes[0] != hashes[1]:
        differences.refuse(
            part,
            f"rows, hashes and seed of its vocabulary were {hashes[0]}, and are {hashes[1]}: its "
            "ids have other rows",
            f"set them back, {leave_out}",
        )
        return None
    return RowMap.same(rows)


def _words(kind: str | None) -> str:
    return "rows, without a vocabulary" if kind is None else f"of a vocabulary of kind {kind}"


def _same(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop)


def _plain(
    part: str, old_rows: int, rows: int, leave_out: str, differences: Differences
) -> RowMap | None:
    """Map a table whose ids are rows."""
    if rows < old_rows:
        differences.refuse(
            part,
            f"had {old_rows:,} rows, num_embeddings is {rows:,}",
            f"set it to at least {old_rows:,}, {leave_out}",
        )
        return None

    def find(start: int, stop: int) -> np.ndarray:
        found = np.arange(start, stop)
        return np.where(found < old_rows, found, -1)

    if rows > old_rows:
        differences.add(
            part,
            f"grew from {old_rows:,} to {rows:,} rows",
            f"{rows - old_rows:,} rows with initial values",
        )
    return RowMap.of(rows == old_rows, rows, find)


def _exact(
    part: str, old: ExactVocabulary, new: ExactVocabulary, leave_out: str, differences: Differences
) -> RowMap | None:
    """Map a table by raw id; the row of unknown ids goes to that of the new table."""
    try:
        old_of_new = old.find(new.ids)
    except ValueError as error:
        differences.refuse(part, str(error), f"write ids of one type, {leave_out}")
        return None
    kept = int((old_of_new >= 0).sum())
    if len(old) and not kept:
        differences.refuse(
            part,
            f"none of the run's {len(old):,} ids is among the {len(new):,} of the data",
            f"bring the run's vocabulary into the dataset and extend it, {leave_out}",
        )
        return None

    def find(start: int, stop: int) -> np.ndarray:
        found = np.full(stop - start, -1)
        ids = old_of_new[start:stop]
        found[: len(ids)] = ids
        if start <= new.unknown_row < stop:
            found[new.unknown_row - start] = old.unknown_row
        return found

    is_equal = len(old) == len(new) == kept and old.is_extension_of(new)
    is_identity = is_equal and old.num_embeddings == new.num_embeddings
    if not is_identity:
        moved = int((np.flatnonzero(old_of_new >= 0) != old_of_new[old_of_new >= 0]).sum())
        differences.add(
            part,
            f"{old.num_embeddings:,} rows and {len(old):,} ids before, {new.num_embeddings:,} and "
            f"{len(new):,} now",
            f"{kept:,} ids keep their rows ({moved:,} at another place), {len(new) - kept:,} are "
            f"new with initial values, {len(old) - kept:,} are gone",
        )
    return RowMap.of(is_identity, new.num_embeddings, find)


def _bounded(
    table: str, source: Source, job: Job, half_life: float, differences: Differences
) -> RowMap:
    """Map a table whose ids were learned while training. A collective."""
    old_rows, rows, ranks = source.schema.limit(table), job.schema.limit(table), job.ranks
    if rows == old_rows:
        return RowMap.same(rows)

    def find(start: int, stop: int) -> np.ndarray:
        found = rows_in_resized(_used(source, table), rows, half_life, start, stop)
        if start <= rows - 1 < stop:
            found[rows - 1 - start] = old_rows - 1
        return found

    with ranks.raise_on_all_ranks():
        first, last = (rows * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        own = int((find(first, last) >= 0).sum())
        known = sum(int((used.last_used >= 0).sum()) for used in _used(source, table))
    kept = sum(ranks.gather(own)) - 1  # without the row of unknown ids
    differences.add(
        f"table '{table}'",
        f"{old_rows:,} rows and {known:,} ids before, {rows:,} rows now",
        f"{kept:,} ids keep their rows at another place, {known - kept:,} have no room",
    )
    return RowMap.of(False, rows, find)


def _used(source: Source, table: str) -> Iterator[UsedRows]:
    """Yield the rows of a bounded vocabulary in the checkpoint, in ranges."""
    names = ("ids", "last_used", "scores")
    parts = [source.model.tensor(f"vocabulary.{table}.{name}") for name in names]
    num_sets, rows_per_set = parts[0].size
    for start in range(0, num_sets, SETS_PER_READ):
        stop = min(start + SETS_PER_READ, num_sets)
        values = [part.rows(start, stop).flatten().numpy() for part in parts]
        yield UsedRows(start * rows_per_set, *values)
