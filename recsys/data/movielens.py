"""MovieLens ratings turned into a dataset folder, by a protocol that is exact, ties included.

A rating of 4 or more is a like. One split in time for all users: train up to the 0.8 quantile of
the timestamp, valid up to the 0.9 quantile, test after it. A row's history is its user's last
ratings with a STRICTLY smaller timestamp, so that no rating leaks from the row's own second.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.movielens_source import read_movielens
from recsys.metrics import COLD_BELOW

LIKED_FROM = 4.0
QUANTILES = (0.8, 0.9)
ROWS_PER_GROUP = 8192  # small enough that several ranks share a split evenly
ROWS_PER_CHUNK = 16 * ROWS_PER_GROUP  # impressions whose histories are in memory at once
ITEMS_PER_GROUP = 1024  # smaller, as a row may hold a poster

SCHEMA = """\
target_item: item
group: user
columns:
  user: {{kind: id, num_embeddings: {num_users}}}
  item: {{kind: id, num_embeddings: {num_items}}}
  history: {{kind: sequence, shares: item, parallel: [history_liked]}}
  liked: {{kind: label}}
items:
  id: item
  columns:
    text: {{kind: text}}
"""
POSTER_LINE = "    poster: {kind: image}\n"


@dataclass(frozen=True)
class Ratings:
    """All ratings, ordered by user, then timestamp, then item; N ratings.

    The history of rating n is the slice `[history_begin[n], history_end[n])` of the same arrays.
    """

    user: np.ndarray  # int32 [N], dense
    item: np.ndarray  # int32 [N], row of the items file
    liked: np.ndarray  # float32 [N], 1 or 0
    timestamp: np.ndarray  # int64 [N]
    history_begin: np.ndarray  # int64 [N]
    history_end: np.ndarray  # int64 [N]


def prepare_movielens(
    source: Path | None, out: Path, history_length: int = 20
) -> dict[str, dict[str, Any]]:
    """Writes the dataset folder `out`; it appears complete or not at all.

    Args:
        source: folder with `ratings.csv`, `movies.csv` and, optionally, `items.parquet` (movieId
            with plot, poster or both). None: the bundled sample.
        out: folder to write; must not exist or be empty.
        history_length: longest history of a row.

    Returns:
        Per split: rows, liked (share), users, new_users (share of rows by users without a training
        row), cold and unseen (share of rows whose item has few and no training rows).

    Raises:
        ValueError: `out` is in use, a file or column is missing, a value cannot be used, or a
            split would be empty. Names file, column, row and the mend.

    Example::

        print(format_summary(prepare_movielens(None, Path("data/movielens_sample"))))
    """
    if history_length < 1:
        raise ValueError(f"history_length is {history_length}; it must be at least 1")
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    movies, table = read_movielens(source)
    ratings = _sorted_ratings(table, history_length)
    splits = split_by_time(ratings.timestamp)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, rows in splits.items():
            _write_split(partial / name, ratings, rows)
        _write_items(partial / "items", movies)
        schema = SCHEMA.format(num_users=int(ratings.user[-1]) + 1, num_items=movies.num_rows)
        schema += POSTER_LINE if "poster" in movies.column_names else ""
        (partial / "schema.yaml").write_text(schema)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _summary(ratings, splits, movies.num_rows)


def history_ranges(
    user: np.ndarray, timestamp: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each rating's history lies among ratings ordered by user and timestamp.

    Args:
        user: int [N], ascending.
        timestamp: int [N], ascending within a user.
        length: longest history.

    Returns:
        begin and end, int64 [N] each: the last `length` ratings of the same user with a strictly
        smaller timestamp are `[begin, end)`.
    """
    position = np.arange(len(user))
    new_user = np.ones(len(user), dtype=bool)
    new_user[1:] = user[1:] != user[:-1]
    new_moment = new_user.copy()
    new_moment[1:] |= timestamp[1:] != timestamp[:-1]
    user_begin = np.maximum.accumulate(np.where(new_user, position, 0))
    end = np.maximum.accumulate(np.where(new_moment, position, 0))
    return np.maximum(user_begin, end - length), end


def split_by_time(timestamp: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of train, valid and test, each int64, ascending; a moment is never cut in two.

    Raises:
        ValueError: a split would be empty.
    """
    first, second = np.quantile(timestamp, QUANTILES, method="lower")
    splits = {
        "train": np.flatnonzero(timestamp <= first),
        "valid": np.flatnonzero((timestamp > first) & (timestamp <= second)),
        "test": np.flatnonzero(timestamp > second),
    }
    for name, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(
                f"ratings, column 'timestamp': the {len(timestamp)} ratings, split after {first} "
                f"and {second}, leave no row for {name}; give ratings at more distinct times"
            )
    return splits


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """The summary of `prepare_movielens` as a plain text table."""
    lines = [
        f"{'split':<6}{'rows':>12}{'liked':>9}{'users':>9}{'new users':>11}{'cold':>8}{'unseen':>8}"
    ]
    for name, split in summary.items():
        lines.append(
            f"{name:<6}{split['rows']:>12,}{split['liked']:>9.2%}{split['users']:>9,}"
            f"{split['new_users']:>11.1%}{split['cold']:>8.1%}{split['unseen']:>8.1%}"
        )
    return "\n".join(lines)


def _sorted_ratings(table: pa.Table, history_length: int) -> Ratings:
    user = np.unique(table["userId"].to_numpy(), return_inverse=True)[1]
    item, timestamp = table["item"].to_numpy(), table["timestamp"].to_numpy()
    order = np.lexsort((item, timestamp, user))
    user, timestamp = user[order].astype(np.int32), timestamp[order]
    liked = (table["rating"].to_numpy()[order] >= LIKED_FROM).astype(np.float32)
    begin, end = history_ranges(user, timestamp, history_length)
    return Ratings(user, item[order].astype(np.int32), liked, timestamp, begin, end)


def _write_split(folder: Path, ratings: Ratings, rows: np.ndarray) -> None:
    folder.mkdir()
    rows = rows[np.lexsort((ratings.item[rows], ratings.user[rows], ratings.timestamp[rows]))]
    chunks = [rows[at : at + ROWS_PER_CHUNK] for at in range(0, len(rows), ROWS_PER_CHUNK)]
    first = _impressions(ratings, chunks[0])
    path = folder / "part-00000.parquet"
    with pq.ParquetWriter(
        path, first.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        writer.write_table(first, row_group_size=ROWS_PER_GROUP)
        for chunk in chunks[1:]:
            writer.write_table(_impressions(ratings, chunk), row_group_size=ROWS_PER_GROUP)


def _impressions(ratings: Ratings, rows: np.ndarray) -> pa.Table:
    begin = ratings.history_begin[rows]
    lengths = ratings.history_end[rows] - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Histories lie one after another: place p of history n is rating begin[n] + p - offsets[n].
    past = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
    lists = pa.array(offsets, pa.int32())
    return pa.table(
        {
            "user": pa.array(ratings.user[rows], pa.int64()),
            "item": pa.array(ratings.item[rows], pa.int64()),
            "history": pa.ListArray.from_arrays(lists, pa.array(ratings.item[past], pa.int64())),
            "history_liked": pa.ListArray.from_arrays(lists, pa.array(ratings.liked[past])),
            "liked": pa.array(ratings.liked[rows]),
            "timestamp": pa.array(ratings.timestamp[rows]),
        }
    )


def _write_items(folder: Path, movies: pa.Table) -> None:
    folder.mkdir()
    columns = {
        "item": pa.array(np.arange(movies.num_rows), pa.int64()),
        "movie_id": movies["movieId"],
        "title": movies["title"],
        "genres": movies["genres"],
        "text": _text(movies),
    }
    if "poster" in movies.column_names:
        columns["poster"] = movies["poster"]
    table = pa.table(columns)
    schema = pa.schema([(n, pa.binary() if n == "poster" else table[n].type) for n in columns])
    with pq.ParquetWriter(
        folder / "part-00000.parquet", schema, compression="zstd", write_page_checksum=True
    ) as writer:
        for at in range(0, table.num_rows, ITEMS_PER_GROUP):
            writer.write_table(table.slice(at, ITEMS_PER_GROUP).cast(schema))


def _text(movies: pa.Table) -> pa.ChunkedArray:
    """`title | genres | plot`, without the parts that a movie lacks."""
    genres = pc.replace_substring(movies["genres"], "|", ", ")
    genres = pc.if_else(pc.equal(genres, "(no genres listed)"), "", genres)
    parts = [movies["title"], genres]
    if "plot" in movies.column_names:
        parts.append(movies["plot"])
    parts = [pc.utf8_trim_whitespace(part.cast(pa.large_string())) for part in parts]
    parts = [pc.if_else(pc.equal(part, ""), None, part) for part in parts]
    text = pc.binary_join_element_wise(
        *parts, pa.scalar(" | ", pa.large_string()), null_handling="skip"
    ).cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _summary(
    ratings: Ratings, splits: dict[str, np.ndarray], num_items: int
) -> dict[str, dict[str, Any]]:
    train = splits["train"]
    item_counts = np.bincount(ratings.item[train], minlength=num_items)
    user_counts = np.bincount(ratings.user[train], minlength=int(ratings.user[-1]) + 1)
    summary = {}
    for name, rows in splits.items():
        counts = item_counts[ratings.item[rows]]
        summary[name] = {
            "rows": len(rows),
            "liked": float(ratings.liked[rows].mean(dtype=np.float64)),
            "users": len(np.unique(ratings.user[rows])),
            "new_users": float((user_counts[ratings.user[rows]] == 0).mean()),
            "cold": float((counts < COLD_BELOW).mean()),
            "unseen": float((counts == 0).mean()),
        }
    return summary
