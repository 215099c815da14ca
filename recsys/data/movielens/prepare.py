"""MovieLens ratings turned into dataset folders, by the protocols of `protocols`.

A rating of 4 or more is a like. A row has, for each item of its history, whether it was liked, its
stars (as a share of 5) and how long ago it was rated (log10(1 + days) / 2). A folder has the
splits, the items and the schema; a protocol with several datasets makes a folder of such folders,
which share their items on disk.

Shapes: R rows of a split.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.filesystem import whole_folder
from recsys.data.item_parts import COLD_BELOW
from recsys.data.movielens.protocols import (
    Ratings,
    SplitProtocol,
    Splits,
    liked,
    sorted_ratings,
    split_ratings,
)
from recsys.data.movielens.source import read_movielens

ROWS_PER_GROUP = 8192  # small enough that several ranks share a split evenly
ROWS_PER_CHUNK = 16 * ROWS_PER_GROUP  # impressions whose histories are in memory at once
ITEMS_PER_GROUP = 1024  # smaller, since a row may hold a poster

MOST_STARS = 5
SECONDS_PER_DAY = 86_400
PARALLEL = ("history_liked", "history_stars", "history_days")

SCHEMA = """\
target_item: item
group: user
columns:
  user: {{kind: id, num_embeddings: {num_users}}}
  item: {{kind: id, num_embeddings: {num_items}}}
  history: {{kind: sequence, shares: item, parallel: [{parallel}]}}
  liked: {{kind: label}}
items:
  id: item
  columns:
    text: {{kind: text}}
    title: {{kind: text}}
    genres: {{kind: text}}
"""
POSTER_LINE = "    poster: {kind: image}\n"


def prepare_movielens(
    source: Path | None,
    out: Path,
    history_length: int = 20,
    split: SplitProtocol = "global",
) -> dict[str, dict[str, Any]]:
    """Write the dataset folder `out`; it appears complete or not at all.

    Args:
        source: folder with `ratings.csv` and `movies.csv`, or both as `.dat` (MovieLens 1M and
            10M), and, optionally, `items.parquet` (movieId with plot, poster or both). None: the
            bundled sample.
        out: folder to write; must not exist or be empty. With `rolling` it holds the datasets
            `window-1` to `window-5`, with the same items, hard-linked where the disk allows it.
        history_length: longest history of a row.
        split: `global`, one split in time for all users; `user`, each user's ratings split in
            time; `rolling`, the global split at five origins. See `protocols`.

    Returns:
        Per split (`window-1/train` ... for `rolling`): rows, liked (share), users,
        new_users (share of rows by users without a training row), cold and unseen (share of rows
        whose item has few and no training rows of the same dataset).

    Raises:
        ValueError: `out` is in use, a file or column is missing, a value cannot be used, or a
            split would be empty. Names file, column, row and fix.

    Example::

        print(format_summary(prepare_movielens(None, Path("data/movielens_sample"))))
    """
    if history_length < 1:
        raise ValueError(f"history_length is {history_length}; it must be at least 1")
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already; remove it or name another output folder")
    movies, table = read_movielens(source)
    ratings = sorted_ratings(table, history_length)
    datasets = split_ratings(ratings, split)
    with whole_folder(out) as partial:
        _write_datasets(partial, ratings, datasets, movies)
    return {
        str(Path(dataset, name)): figures
        for dataset, splits in datasets.items()
        for name, figures in _summary(ratings, splits, movies.num_rows).items()
    }


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """Return the summary of `prepare_movielens` as a plain text table."""
    width = max(map(len, summary)) + 1
    lines = [
        f"{'split':<{width}}{'rows':>12}{'liked':>9}{'users':>9}{'new users':>11}"
        f"{'cold':>8}{'unseen':>8}"
    ]
    for name, split in summary.items():
        lines.append(
            f"{name:<{width}}{split['rows']:>12,}{split['liked']:>9.2%}{split['users']:>9,}"
            f"{split['new_users']:>11.1%}{split['cold']:>8.1%}{split['unseen']:>8.1%}"
        )
    return "\n".join(lines)


def _write_datasets(
    folder: Path, ratings: Ratings, datasets: dict[str, Splits], movies: pa.Table
) -> None:
    """Write schema, splits and items of each dataset; later ones link to the first items."""
    schema = SCHEMA.format(
        num_users=int(ratings.user[-1]) + 1,
        num_items=movies.num_rows,
        parallel=", ".join(PARALLEL),
    )
    schema += POSTER_LINE if "poster" in movies.column_names else ""
    items = None
    for dataset, splits in datasets.items():
        (folder / dataset).mkdir(exist_ok=True)
        (folder / dataset / "schema.yaml").write_text(schema)
        for name, rows in splits.items():
            _write_split(folder / dataset / name, ratings, rows)
        if items is None:
            items = _write_items(folder / dataset / "items", movies)
        else:
            _link(items, folder / dataset / "items" / items.name)


def _link(file: Path, target: Path) -> None:
    """Hard-link the file, or copy it where the file system has no hard links."""
    target.parent.mkdir()
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def _write_split(
    folder: Path,
    ratings: Ratings,
    rows: np.ndarray,  # [R], int64
) -> None:
    """Write the impressions of some ratings, ordered by time."""
    rows = rows[np.lexsort((ratings.item[rows], ratings.user[rows], ratings.timestamp[rows]))]
    chunks = (rows[at : at + ROWS_PER_CHUNK] for at in range(0, len(rows), ROWS_PER_CHUNK))
    _write_file(folder, (_impressions(ratings, chunk) for chunk in chunks), ROWS_PER_GROUP)


def _write_file(folder: Path, tables: Iterator[pa.Table], rows_per_group: int) -> Path:
    """Write tables one after another into the only file of a new folder."""
    folder.mkdir()
    path = folder / "part-00000.parquet"
    first = next(tables)
    with pq.ParquetWriter(
        path, first.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=rows_per_group)
    return path


def _impressions(
    ratings: Ratings,
    rows: np.ndarray,  # [R], int64
) -> pa.Table:
    """Return the rows of some ratings with their histories."""
    begin = ratings.history_begin[rows]
    lengths = ratings.history_end[rows] - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Histories lie one after another: place p of history n is rating begin[n] + p - offsets[n].
    past = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
    ago = np.repeat(ratings.timestamp[rows], lengths) - ratings.timestamp[past]
    lists = pa.array(offsets, pa.int32())
    stars = ratings.stars[past]
    parallel = (
        liked(stars),
        stars / MOST_STARS,
        # A day is 0.15, a hundred days are 1: the order of magnitude of an age matters.
        (np.log10(1 + ago / SECONDS_PER_DAY) / 2).astype(np.float32),
    )
    return pa.table(
        {
            "user": pa.array(ratings.user[rows], pa.int64()),
            "item": pa.array(ratings.item[rows], pa.int64()),
            "history": pa.ListArray.from_arrays(lists, pa.array(ratings.item[past], pa.int64())),
            **{
                name: pa.ListArray.from_arrays(lists, pa.array(values))
                for name, values in zip(PARALLEL, parallel, strict=True)
            },
            "liked": pa.array(liked(ratings.stars[rows])),
            "timestamp": pa.array(ratings.timestamp[rows]),
        }
    )


def _write_items(folder: Path, movies: pa.Table) -> Path:
    """Write the items' file."""
    columns = {
        "item": pa.array(np.arange(movies.num_rows), pa.int64()),
        "movie_id": movies["movieId"],
        "title": movies["title"],
        "genres": _genres(movies),
        "text": _text(movies),
    }
    if "poster" in movies.column_names:
        columns["poster"] = movies["poster"]
    table = pa.table(columns)
    schema = pa.schema([(n, pa.binary() if n == "poster" else table[n].type) for n in columns])
    starts = range(0, table.num_rows, ITEMS_PER_GROUP)
    groups = (table.slice(at, ITEMS_PER_GROUP).cast(schema) for at in starts)
    return _write_file(folder, groups, ITEMS_PER_GROUP)


def _genres(movies: pa.Table) -> pa.ChunkedArray:
    """Return genres such as `Comedy|Drama`; null for a movie without genres."""
    has_none = pc.is_in(movies["genres"], pa.array(["", "(no genres listed)"]))
    return pc.if_else(has_none, None, movies["genres"])


def _text(movies: pa.Table) -> pa.ChunkedArray:
    """Return `title | genres | plot`, without the parts that a movie lacks."""
    parts = [movies["title"], pc.replace_substring(_genres(movies), "|", ", ")]
    if "plot" in movies.column_names:
        parts.append(movies["plot"])
    parts = [pc.utf8_trim_whitespace(part.cast(pa.large_string())) for part in parts]
    parts = [pc.if_else(pc.equal(part, ""), None, part) for part in parts]
    text = pc.binary_join_element_wise(
        *parts, pa.scalar(" | ", pa.large_string()), null_handling="skip"
    ).cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _summary(ratings: Ratings, splits: Splits, num_items: int) -> dict[str, dict[str, Any]]:
    """Compute the figures of each split."""
    train = splits["train"]
    item_counts = np.bincount(ratings.item[train], minlength=num_items)
    user_counts = np.bincount(ratings.user[train], minlength=int(ratings.user[-1]) + 1)
    summary = {}
    for name, rows in splits.items():
        counts = item_counts[ratings.item[rows]]
        summary[name] = {
            "rows": len(rows),
            "liked": float(liked(ratings.stars[rows]).mean(dtype=np.float64)),
            "users": len(np.unique(ratings.user[rows])),
            "new_users": float((user_counts[ratings.user[rows]] == 0).mean()),
            "cold": float((counts < COLD_BELOW).mean()),
            "unseen": float((counts == 0).mean()),
        }
    return summary
