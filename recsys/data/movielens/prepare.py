"""`recsys prepare movielens`: MovieLens ratings turned into dataset folders.

`source` reads and checks the archive; `recsys prepare events` turns it into samples, with the
settings in `events.yaml` in this folder. A rating of 4 or more is a like. For each item of its
history, a row has whether the user liked it, its stars (as a share of 5) and its age
(log10(1 + days) / 2). The history holds the user's last ratings with a strictly smaller timestamp.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import format_splits, run_stages, unused_folder
from recsys.data.events.settings import Content, EventsConfig, SplitBy
from recsys.data.filesystem import whole_folder
from recsys.data.movielens.source import read_movielens

EVENTS = Path(__file__).parent / "events.yaml"
ITEMS_PER_GROUP = 1024  # small, since a row may hold a poster

SplitProtocol = Literal["global", "user", "rolling"]
PROTOCOLS: dict[str, SplitBy] = {"global": "time", "user": "user", "rolling": "windows"}


def prepare_movielens(
    source: Path | None, out: Path, history_length: int = 20, split: SplitProtocol = "global"
) -> dict[str, dict[str, Any]]:
    """Write the dataset folder `out`; it appears complete or not at all.

    Args:
        source: folder with `ratings.csv` and `movies.csv`, or both as `.dat` (MovieLens 1M and
            10M), and, optionally, `items.parquet` (movieId with plot, poster or both). None: the
            bundled sample.
        out: folder to write; must not exist or be empty. With `rolling` it holds the datasets
            `window-1` to `window-5`, with the same items, hard-linked where the disk allows it.
        history_length: longest history of a row.
        split: `global`, all ratings split at the quantiles 0.8 and 0.9 of time; `user`, each
            user's ratings split in time, so that users need 7 ratings or more; `rolling`, the
            global split at five origins, a tenth of the ratings apart.

    Returns:
        Per split (`window-1/train` ... for `rolling`): rows, positive (share of likes), users,
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
    if split not in PROTOCOLS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(PROTOCOLS)}")
    out = unused_folder(out)
    movies, ratings = read_movielens(source)
    with whole_folder(out) as partial:
        tables = partial / "source"
        tables.mkdir()
        _write_tables(tables, movies, ratings)
        config = _config(tables, history_length, split, "poster" in movies.column_names)
        report = run_stages(config, partial)
        shutil.rmtree(tables)
    splits: dict[str, dict[str, Any]] = report["splits"]
    return splits


def format_summary(summary: dict[str, dict[str, Any]]) -> str:
    """Return the summary of `prepare_movielens` as a plain text table."""
    return format_splits(summary, "liked")


def _config(folder: Path, history_length: int, split: SplitProtocol, posters: bool) -> EventsConfig:
    """Return the settings of `events.yaml` for these tables and options."""
    config = load_events_config(EVENTS, folder)
    assert config.items is not None
    config.histories["history"].length = history_length
    config.split.by = PROTOCOLS[split]
    if posters:
        config.items.content["poster"] = Content("image")
    return config


def _write_tables(folder: Path, movies: pa.Table, ratings: pa.Table) -> None:
    """Write ratings and movies with the rows of users and movies as ids."""
    users = np.unique(ratings["userId"].to_numpy(), return_inverse=True)[1]
    table = ratings.select(["item", "rating", "timestamp"]).add_column(0, "user", pa.array(users))
    pq.write_table(table, folder / "ratings.parquet", compression="lz4")
    columns = {
        "item": pa.array(np.arange(movies.num_rows)),
        "movie_id": movies["movieId"],
        "title": movies["title"],
        "genres": _genres(movies),
        "text": _text(movies),
    }
    if "poster" in movies.column_names:
        columns["poster"] = movies["poster"]
    pq.write_table(pa.table(columns), folder / "movies.parquet", ITEMS_PER_GROUP, compression="lz4")


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
