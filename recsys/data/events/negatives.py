"""Draw negatives for rows whose first label is 1, from items that existed at the row's time.

Items are numbered in the order in which they became known. So items known at a time are a prefix of
the catalogue, and events by then are a prefix of the log. `by: popularity` draws an event and takes
its item; smoothing adds uniform draws of items. Shapes: P positives of a chunk, D draws, N items of
the catalogue, E events of the log, T pairs of a user and an item.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.vocabulary.fixed import integer_ids, mix64
from recsys.data.events.history_values import chunks_by_key, key_numbers
from recsys.data.events.samples import WEIGHT, Conditions
from recsys.data.events.settings import EventsConfig, Negatives
from recsys.data.events.sql import FOREVER, SqlEngine, aligned, listed, quoted

ATTEMPTS = 16  # rejected draws after which the remaining items are listed
TAKEN_ITEM, HELD_OUT, POSITIVE = range(3)  # kinds of rows of a chunk
# Column of samples: 0 for rows of the log, 1 drawn for train, 2 drawn for valid and test.
DRAWN_AS = "drawn_as"
BLOCK = "/block"  # number of a positive's split, 0 for train; the / avoids names of a dataset


@dataclass(frozen=True)
class KnownItems:
    """Items or events to draw from, as files, in the order in which they became known."""

    folder: Path

    @staticmethod
    def of_catalogue(engine: SqlEngine) -> KnownItems:
        """Write and return the items of the stage `catalogue`, in order of their numbers."""
        items = KnownItems(engine.work / "known_items")
        items.append(engine, "SELECT since, inumber FROM catalogue ORDER BY inumber")
        return items

    def append_events(self, engine: SqlEngine, config: EventsConfig, events: str) -> None:
        """Write the item of each event of a stage."""
        query = f"SELECT s.{config.arrival} AS since, c.inumber FROM {events} s JOIN catalogue c "
        self.append(engine, f"{query} ON s.iid = c.iid ORDER BY 1, 2")

    def append(self, engine: SqlEngine, query: str) -> None:
        """Append the rows of a query, which became known after all earlier rows."""
        rows = engine.work / f"{self.folder.name}_rows"
        engine.write(query, rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "since").open("ab") as times, (self.folder / "item").open("ab") as item:
            for file in sorted(rows.glob("*.parquet")):
                for batch in pq.ParquetFile(file).iter_batches():
                    times.write(batch["since"].to_numpy().astype(np.int64).data)
                    item.write(batch["inumber"].to_numpy().astype(np.int64).data)

    def cut(self, number: int) -> None:
        """Truncate to the first `number` entries; a killed call may have written more."""
        for file in (self.folder / "since", self.folder / "item"):
            if file.exists():
                os.truncate(file, number * np.dtype(np.int64).itemsize)

    @cached_property
    def times(self) -> np.ndarray:  # int64 [E], ascending
        return self._mapped("since")

    @cached_property
    def item(self) -> np.ndarray:  # int64 [E]
        return self._mapped("item")

    def _mapped(self, name: str) -> np.ndarray:  # int64 [E]
        file = self.folder / name
        return np.memmap(file, np.int64, "r") if file.stat().st_size else np.zeros(0, np.int64)


class Pairs:
    """Pairs of user and item with the time from which each counts, int64 [T] each."""

    def __init__(
        self, user: np.ndarray, item: np.ndarray, time: np.ndarray, num_items: int
    ) -> None:
        order = np.lexsort([item, user])
        self.user, self.item, self.time = user[order], item[order], time[order]
        self.num_items = num_items

    def among(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Return which of the given pairs [D] are among these at the given times: bool [D]."""
        if not len(self.user):
            return np.zeros(len(user), bool)
        keys = self.user * self.num_items + self.item
        indices = np.searchsorted(keys, user * self.num_items + item).clip(max=len(keys) - 1)
        return (keys[indices] == user * self.num_items + item) & (self.time[indices] <= time)

    def items_of(self, user: int, time: int) -> np.ndarray:
        """Return a user's items that count at a time, ascending."""
        begin, end = np.searchsorted(self.user, [user, user + 1])
        return self.item[begin:end][self.time[begin:end] <= time]


@dataclass(frozen=True)
class ItemPool:
    """Items, events and users' own items so far, from which negatives are drawn."""

    items: KnownItems
    events: KnownItems | None  # None unless draws are by popularity
    taken: str  # SQL of users' own items: `uid`, `iid` and `since`
    block: str = "0"  # SQL of a number that repeated train rows share


@dataclass(frozen=True)
class DrawNegatives:
    """A function from sorted chunks of users' positives and own items to drawn samples."""

    settings: Negatives
    pool: ItemPool
    values: dict[str, float | None]  # labels, weight and late columns of drawn samples
    columns: list[str]
    schema: pa.Schema

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for chunk in chunks_by_key(batches, ["uid"]):
            yield from self._samples(chunk).cast(self.schema).to_batches()

    def _samples(self, chunk: pa.Table) -> pa.Table:
        draws = Draws(self.settings, self.pool, chunk)
        index, nth = np.nonzero(draws.items >= 0)
        positives, drawn = draws.positives, draws.items[index, nth]
        samples = chunk.select(self.columns).take(pa.array(positives.rows[index]))
        columns = {name: samples[name] for name in samples.column_names}
        # Distinct from all other positions; rows of files have positions of at least 0.
        role = positives.role[index]
        position = positives.position[index] * draws.number + nth
        columns["position"] = pa.array(-(2 * position + role))
        for name, value in self.values.items():
            columns[name] = pa.array([value] * len(index), pa.float64())
        return pa.table({**columns, "inumber": pa.array(drawn), DRAWN_AS: pa.array(role)})


class Positives:
    """Rows of a chunk that get negatives, int64 [P] each.

    rows, user: numbers in the chunk. block: 0 or the day in train, else the number of the split.
    role: value of `DRAWN_AS`. key: hash of user, item and time, uint64.
    """

    def __init__(self, chunk: pa.Table) -> None:
        self.rows = np.flatnonzero(chunk["kind"].to_numpy() == POSITIVE)
        self.user = key_numbers(chunk, ["uid"])[self.rows]
        samples = chunk.take(pa.array(self.rows))
        self.item, self.time, self.position = _numbers(samples, "inumber", "ts", "position")
        self.block, self.role = _numbers(samples, BLOCK, DRAWN_AS)
        key = mix64(mix64(integer_ids(samples["uid"])) + mix64(integer_ids(samples["iid"])))
        copies = _copy_numbers(key, self.time, self.block).astype(np.uint64)
        self.key = mix64(key + mix64(self.time) + copies)

    def split_user(self, user: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return a distinct number for each pair of user and block."""
        return user * (1 + self.block.max(initial=0)) + block


def _numbers(table: pa.Table, *names: str) -> tuple[np.ndarray, ...]:
    return tuple(table[name].to_numpy() for name in names)


def _copy_numbers(key: np.ndarray, time: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Return how many earlier rows have the same user, item, time and block, mostly 0."""
    order = np.lexsort([block, time, key])
    changes = [np.diff(values[order]) != 0 for values in (key, time, block)]
    starts = np.flatnonzero(np.concatenate([[True], np.logical_or.reduce(changes)])[: len(key)])
    copies = np.empty(len(key), np.int64)
    copies[order] = np.arange(len(key)) - np.repeat(starts, np.diff([*starts, len(key)]))
    return copies


class Draws:
    """Draws items for the positives of a chunk: `items` int64 [P, number], -1 if none is left."""

    def __init__(self, settings: Negatives, pool: ItemPool, chunk: pa.Table) -> None:
        self.number, self._smoothing = settings.per_positive, settings.events_per_item
        self._events, self._size = pool.events, len(pool.items.times)  # N
        positives = self.positives = Positives(chunk)
        user, (item, time) = key_numbers(chunk, ["uid"]), _numbers(chunk, "inumber", "ts")
        rows = chunk["kind"].to_numpy() == TAKEN_ITEM
        self._taken = Pairs(user[rows], item[rows], time[rows], self._size)
        # In valid and test, a user's positives of the same split are never drawn, at any time.
        rows = chunk["kind"].to_numpy() == HELD_OUT
        split_user = positives.split_user(user[rows], chunk[BLOCK].to_numpy()[rows])
        always = np.full(rows.sum(), -FOREVER)
        self._held_out = Pairs(split_user, item[rows], always, self._size)
        self._split_user = positives.split_user(positives.user, positives.block)
        self._num_items = np.searchsorted(pool.items.times, positives.time, side="right")  # [P]
        self._num_events = np.zeros_like(self._num_items)  # [P]
        if pool.events is not None:
            self._num_events = np.searchsorted(pool.events.times, positives.time, side="right")
        nth = np.arange(self.number, dtype=np.uint64) + np.uint64(settings.seed << 20)
        self._noise = mix64(positives.key[:, None] + mix64(nth))  # uint64 [P, number]
        self.items = np.full(self._noise.shape, -1)
        for attempt in range(ATTEMPTS):
            if not self._draw_open(attempt):
                return
        self._draw_left()

    def _bits(self, attempt: int, index: np.ndarray, nth: np.ndarray) -> np.ndarray:
        noise = mix64(self._noise[index, nth] + np.uint64(attempt))
        return (noise >> np.uint64(1)).astype(np.int64)

    def _is_item(
        self, bits: np.ndarray, num_events: np.ndarray, num_items: np.ndarray
    ) -> np.ndarray:  # bits, num_events, num_items [D]
        """Choose by smoothing which draws are of items instead of events: bool [D]."""
        below_one = (mix64(bits.astype(np.uint64)) >> np.uint64(12)) / 2.0**52
        smoothed = self._smoothing * num_items
        return below_one * (num_events + smoothed) < smoothed

    def _draw_open(self, attempt: int) -> bool:
        """Try each open draw once; return whether there was an open draw."""
        is_any = self._num_events + self._smoothing * self._num_items > 0
        index, nth = np.nonzero((self.items < 0) & is_any[:, None])
        bits = self._bits(attempt, index, nth)
        num_events, num_items = self._num_events[index], self._num_items[index]
        is_item = self._is_item(bits, num_events, num_items)
        drawn = bits % np.where(is_item, num_items, num_events)
        if self._events is not None:
            drawn[~is_item] = self._events.item[drawn[~is_item]]
        positives, time = self.positives, self.positives.time[index]
        refused = drawn == positives.item[index]
        refused |= self._taken.among(positives.user[index], drawn, time)
        refused |= self._held_out.among(self._split_user[index], drawn, time)
        self.items[index[~refused], nth[~refused]] = drawn[~refused]
        # Of equal items of a positive, keep the first.
        order = np.argsort(self.items, axis=1, kind="stable")
        ordered = np.take_along_axis(self.items, order, axis=1)
        repeated = np.zeros(ordered.shape, bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        np.put_along_axis(self.items, order, np.where(repeated, -1, ordered), axis=1)
        return len(index) > 0

    def _draw_left(self) -> None:
        """Draw for each open draw from an exact list of the remaining items."""
        index, nth = np.nonzero(self.items < 0)
        bits = self._bits(ATTEMPTS, index, nth)
        counts, counted = np.zeros(self._size, np.int64), 0
        ends = counts  # cumulative numbers of events of the remaining items
        for draw in np.argsort(self.positives.time[index], kind="stable"):
            p, n = index[draw], nth[draw]
            refused = self._refused(p)
            if self._events is not None:
                new = self._events.item[counted : self._num_events[p]]
                counts += np.bincount(new, minlength=self._size)
                counted = self._num_events[p]
                weights = counts.copy()
                weights[refused] = 0
                ends = weights.cumsum()
            refused = refused[refused < self._num_items[p]]
            num_left = self._num_items[p] - len(refused)
            if self._is_item(bits[draw : draw + 1], ends[-1], num_left).item():
                # The item of number `rank` among the remaining: add the refused items before it.
                rank = bits[draw] % num_left
                num_refused = np.searchsorted(refused - np.arange(len(refused)), rank, side="right")
                self.items[p, n] = rank + num_refused
            elif ends[-1]:
                self.items[p, n] = np.searchsorted(ends, bits[draw] % ends[-1], side="right")

    def _refused(self, index: int) -> np.ndarray:
        positives, time = self.positives, self.positives.time[index]
        refused = [
            self.items[index][self.items[index] >= 0],
            [positives.item[index]],
            self._taken.items_of(positives.user[index], time),
            self._held_out.items_of(self._split_user[index], time),
        ]
        return np.unique(np.concatenate(refused).astype(np.int64))


def add_negatives(
    engine: SqlEngine, config: EventsConfig, datasets: Conditions, pool: ItemPool | None = None
) -> tuple[Conditions, dict[str, int]]:
    """Make the stage `drawn`: `rows`, and drawn samples for rows whose first label is 1.

    With `pool`, the stage `catalogue` exists; otherwise both are made from the log. Returns the
    conditions of the splits with their draws, and how many draws found no item left.
    """
    settings = config.negatives
    assert settings is not None
    pool = pool or _item_pool(engine, config)
    schema = engine.schema("rows")
    columns = [name for name in schema.names if name != "iid"]
    values: dict[str, float | None] = {f"l_{name}": 0.0 for name in config.labels}
    values |= {f"late_{name}": None for name in config.late}
    if config.weight is not None:
        values[WEIGHT] = config.weight.drawn
    added_columns = [pa.field("inumber", pa.int64()), pa.field(DRAWN_AS, pa.int64())]
    draw_schema = pa.schema([*map(schema.field, columns), *added_columns])
    draw = DrawNegatives(settings, pool, values, columns, draw_schema)
    positive_rows = _positive_rows(next(iter(values)), datasets)
    query = _chunk_query(columns, positive_rows, datasets, pool)
    engine.add_mapped("draws", query, ["uid"], ["kind", "position"], draw)
    engine.add(
        "drawn",
        f"SELECT {listed(columns)}, iid, 0 AS {DRAWN_AS} FROM rows UNION ALL SELECT "
        f"{listed(columns)}, c.iid, {DRAWN_AS} FROM draws d JOIN catalogue c "
        "ON d.inumber = c.inumber",
    )
    positives = sum(engine.count_rows(rows) for rows in positive_rows)
    missing = positives * settings.per_positive - engine.count_rows("draws")
    other = {"train": 2, "valid": 1, "test": 1}
    conditions = {
        dataset: {split: f"{sql} AND {DRAWN_AS} <> {other[split]}" for split, sql in splits.items()}
        for dataset, splits in datasets.items()
    }
    return conditions, {"no item left to draw": missing} if missing else {}


def _item_pool(engine: SqlEngine, config: EventsConfig) -> ItemPool:
    """Make the stage `catalogue` of numbered items; return the item pool of the log."""
    engine.add("catalogue", numbered_items(item_times(config, "clean_events")))
    events = None
    if config.negatives is not None and config.negatives.by == "popularity":
        events = KnownItems(engine.work / "known_events")
        events.append_events(engine, config, "clean_events")
    pairs = f"SELECT uid, iid, min({config.arrival}) AS since FROM clean_events GROUP BY uid, iid"
    return ItemPool(KnownItems.of_catalogue(engine), events, pairs)


def item_times(config: EventsConfig, events: str) -> str:
    """Return SQL of `iid` and `times`: its first event or time of a valid snapshot, if earlier."""
    times = f"SELECT iid, min({config.arrival}) AS since FROM {events} GROUP BY iid"
    has_snapshots = config.items is not None and config.items.valid_from is not None
    available = "valid_from" if has_snapshots else None
    if config.available_from is not None:
        available = "available_from"
        if has_snapshots:  # a snapshot without a value says that the item exists
            available = "greatest(valid_from, coalesce(available_from, valid_from))"
    if available is not None:
        times += (
            f" UNION ALL SELECT id AS iid, {available} AS since FROM item_snapshots "
            f"WHERE {available} < valid_until"
        )
    return f"SELECT iid, min(since) AS since FROM ({times}) GROUP BY iid"


def numbered_items(items: str, first: int = 0) -> str:
    """Return SQL of items in the order of `times`, with numbers `inumber` from `first` on."""
    number = f"CAST(row_number() OVER (ORDER BY since, iid) + {first - 1} AS BIGINT)"
    return f"SELECT iid, since, {number} AS inumber FROM ({items})"


def _chunk_query(
    columns: list[str], positive_rows: tuple[str, str], datasets: Conditions, pool: ItemPool
) -> str:
    """Return SQL of each user's own items, held-out positives, and positives to draw for."""
    train_rows, held_out_rows = positive_rows
    # Rows that are valid in one dataset and test in the one before get one block number.
    held_out = [splits[split] for split in ("test", "valid") for splits in datasets.values()]
    cases = " ".join(f"WHEN {sql} THEN {number}" for number, sql in enumerate(held_out, 1))
    block = f"CASE {cases} ELSE 0 END"
    later = f"SELECT DISTINCT uid, iid, {block} AS block, 0 AS since FROM {held_out_rows}"
    row = {name: quoted(name) for name in columns}
    pair = {"uid": "r.uid", "ts": "r.since"}

    def rows_of(source: str, values: dict[str, str], kind: int, block: str, role: int) -> str:
        return (
            f"SELECT {aligned(columns, values)}, r.iid, c.inumber, {kind} AS kind, {block} AS "
            f"{quoted(BLOCK)}, {role} AS {DRAWN_AS} FROM (SELECT * FROM {source}) r "
            "JOIN catalogue c ON r.iid = c.iid"
        )

    queries = [
        rows_of(train_rows, row, POSITIVE, pool.block, 1),
        rows_of(held_out_rows, row, POSITIVE, block, 2),
        rows_of(f"({pool.taken})", pair, TAKEN_ITEM, "0", 0),
        rows_of(f"({later})", pair, HELD_OUT, "r.block", 0),
    ]
    return " UNION ALL ".join(queries)


def _positive_rows(label: str, datasets: Conditions) -> tuple[str, str]:
    """Return SQL, to follow FROM, of positive rows in train, and in valid or test."""
    train = [splits["train"] for splits in datasets.values()]
    held_out = [splits[split] for splits in datasets.values() for split in ("valid", "test")]
    in_train, in_held_out = (" OR ".join(f"({sql})" for sql in s) for s in (train, held_out))
    is_positive = f"rows WHERE {quoted(label)} = 1"
    return f"{is_positive} AND ({in_train})", f"{is_positive} AND ({in_held_out})"
