"""`recsys prepare movielens`: make datasets of an archive of MovieLens ratings.

Archives are those of https://grouplens.org/datasets/movielens/, `.csv` or `.dat`.
Shapes: N rows of a file.
"""

import os
import shutil
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from recsys.data.events.file_columns import Types, csv_batches
from recsys.data.events.load import load_events_config
from recsys.data.events.prepare import unused_folder, write_datasets
from recsys.data.events.settings import Content, Source, SplitBy
from recsys.data.events.sql import open_engine
from recsys.data.items.images import check_first_image
from recsys.storage.files import atomic_folder
from recsys.storage.location import Location

EVENTS = Path(__file__).parent / "events.yaml"
SAMPLE = Path(__file__).parent / "sample"
ITEMS_PER_GROUP = 1024  # rows of a row group, small, since a row may hold a poster

SplitProtocol = Literal["global", "user", "rolling"]
PROTOCOLS: dict[str, SplitBy] = {"global": "time", "user": "user", "rolling": "windows"}
RATINGS: Types = {
    "userId": pa.int64(),
    "movieId": pa.int64(),
    "rating": pa.float64(),
    "timestamp": pa.int64(),
}
MOVIES: Types = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
# Large types, as all posters together may exceed 2 GiB.
CONTENTS: Types = {"plot": pa.large_string(), "poster": pa.large_binary()}
EXACT = 2**53  # smaller integers of text files are exact in float64
END_OF_TIME = 2**32  # seconds, the year 2106; larger numbers are not in seconds


def prepare_movielens(
    source: Path | None, out: Path, history_length: int = 20, split: SplitProtocol = "global"
) -> dict[str, dict[str, Any]]:
    """Write the dataset folder `out` atomically; return figures of each split.

    `source` is as in `read_movielens`. Splits are at the quantiles 0.8 and 0.9 of time (`global`),
    or of the times of each user (`user`). `rolling` makes five datasets, `window-1` to `window-5`,
    whose global splits are a tenth of the ratings apart.
    """
    if history_length < 1:
        raise ValueError(f"history_length is {history_length}; it must be at least 1")
    out = unused_folder(out)
    movies, ratings = read_movielens(source)
    with atomic_folder(out) as folder:
        tables = folder / "source"
        tables.mkdir()
        _write_tables(tables, movies, ratings)
        config = load_events_config(EVENTS, tables)
        config.histories["history"].length = history_length
        config.split.by = PROTOCOLS[split]
        if "poster" in movies.column_names:
            assert config.items is not None
            config.items.content["poster"] = Content("image")
        with open_engine(folder) as engine:
            splits: dict[str, dict[str, Any]] = write_datasets(engine, config, folder)["splits"]
        shutil.rmtree(tables)
    return splits


def _write_tables(folder: Path, movies: pa.Table, ratings: pa.Table) -> None:
    users = np.unique(ratings["userId"].to_numpy(), return_inverse=True)[1]
    table = ratings.select(["item", "rating", "timestamp"]).add_column(0, "user", pa.array(users))
    pq.write_table(table, folder / "ratings.parquet", compression="lz4")
    has_none = pc.is_in(movies["genres"], pa.array(["", "(no genres listed)"]))
    genres = pc.if_else(has_none, None, movies["genres"])
    columns = {
        "item": pa.array(np.arange(movies.num_rows)),
        "movie_id": movies["movieId"],
        "title": movies["title"],
        "genres": genres,
        "text": _text(movies, genres),
    }
    if "poster" in movies.column_names:
        columns["poster"] = movies["poster"]
    pq.write_table(pa.table(columns), folder / "movies.parquet", ITEMS_PER_GROUP, compression="lz4")


def _text(movies: pa.Table, genres: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = [movies["title"], pc.replace_substring(genres, "|", ", ")]
    if "plot" in movies.column_names:
        texts.append(movies["plot"])
    texts = [pc.utf8_trim_whitespace(column.cast(pa.large_string())) for column in texts]
    texts = [pc.if_else(pc.equal(column, ""), None, column) for column in texts]
    separator = pa.scalar(" | ", pa.large_string())
    text = pc.binary_join_element_wise(*texts, separator, null_handling="skip").cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def read_movielens(source: Path | None) -> tuple[pa.Table, pa.Table]:
    """Return movies, sorted by movieId, and ratings, with the movie's row as column `item`.

    The folder `source` has `ratings` and `movies`, `.csv` or `.dat`, and maybe `items.parquet`
    (movieId with plot, poster or both). None: the bundled sample.
    """
    folder, suffix = (SAMPLE, "parquet") if source is None else (Path(source), "csv")
    if (folder / "ratings.dat").is_file() and not (folder / "ratings.csv").is_file():
        suffix = "dat"
    ratings_path, movies_path = folder / f"ratings.{suffix}", folder / f"movies.{suffix}"
    movies = _read_movies(movies_path, MOVIES).sort_by("movieId")
    ratings = _read(ratings_path, RATINGS)
    stars, times = ratings["rating"].to_numpy(), ratings["timestamp"].to_numpy()
    item = pc.index_in(ratings["movieId"], movies["movieId"])
    refuse = partial(_refuse, ratings_path, ratings)
    refuse("rating", ~((stars >= 0) & (stars <= 5)), "{} is outside [0, 5]; scale to five stars")
    refuse(
        "timestamp",
        (times < 0) | (times >= END_OF_TIME),
        "{} is no time in seconds since 1970; convert it (milliseconds are divided by 1000)",
    )
    refuse(
        "userId",
        _repeats(ratings, ["userId", "movieId", "timestamp"]),
        "user {} has rated this movie at this time before; keep one of the rows",
    )
    reason = f"movie {{}} is not in {movies_path.name}; add it there or remove its ratings"
    refuse("movieId", item.is_null().to_numpy(), reason)
    if source is not None and os.path.lexists(contents := folder / "items.parquet"):
        movies = _add_contents(movies, contents)
    return movies, ratings.append_column("item", item.cast(pa.int64()))


def _add_contents(movies: pa.Table, path: Path) -> pa.Table:
    """Add the columns plot and poster of `path`, if present, by movieId; null for other movies."""
    try:
        available = [name for name in CONTENTS if name in pq.read_schema(path).names]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {error}; write it again as Parquet, or remove it") from error
    if not available:
        raise ValueError(f"{path}: has neither a column 'plot' nor 'poster'; add one or remove it")
    contents = _read_movies(path, {"movieId": pa.int64()} | {n: CONTENTS[n] for n in available})
    rows = pc.index_in(movies["movieId"], contents["movieId"])
    for name in available:
        column = contents[name].combine_chunks()
        if name == "poster":
            check_first_image([(column, f"{path}: column '{name}'")])
        movies = movies.append_column(name, column.take(rows))
    return movies


def _read_movies(path: Path, types: Types) -> pa.Table:
    table = _read(path, types)
    reason = "movie {} occurs a second time; keep one row per movie"
    _refuse(path, table, "movieId", _repeats(table, ["movieId"]), reason)
    return table


def _read(path: Path, types: Types) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the source folder must hold it")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
        elif path.suffix == ".dat":
            table = _read_dat(path, types)
        else:  # all numbers as float64, so that Arrow's errors name the row
            kinds = {n: k if pa.types.is_string(k) else pa.float64() for n, k in types.items()}
            batches = csv_batches(Location.of(path), Source(str(path)), list(types), kinds)
            table = pa.Table.from_batches(batches, pa.schema(kinds))
        table = pa.table({name: table[name].cast(kind) for name, kind in types.items()})
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path}: {error}; correct the file or fetch it again") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: no rows; the file is empty, fetch it again")
    for name in (name for name in types if name not in ("genres", *CONTENTS)):
        is_null = table[name].is_null().to_numpy()
        _refuse(path, table, name, is_null, "no value; fill it or drop the row")
        if path.suffix == ".csv" and types[name] == pa.int64():
            is_rounded = abs(table[name].to_numpy()) >= EXACT
            _refuse(
                path, table, name, is_rounded, f"a number of {EXACT:,} or more; make it smaller"
            )
    return table


def _read_dat(path: Path, types: Types) -> pa.Table:
    """Read a file of MovieLens 1M or 10M: fields between `::`, no header, UTF-8 or Latin-1."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        content = content.decode("latin-1").encode()
    # Arrow accepts only one character as separator; \x1f occurs in no title.
    return pa_csv.read_csv(
        BytesIO(content.replace(b"::", b"\x1f")),
        # With several threads, Arrow does not report the row of a bad value.
        pa_csv.ReadOptions(use_threads=False, column_names=list(types)),
        pa_csv.ParseOptions(delimiter="\x1f", quote_char=False),
        pa_csv.ConvertOptions(column_types=types),
    )


def _repeats(table: pa.Table, names: list[str]) -> np.ndarray:  # bool [N]
    """Return which rows equal an earlier row in these columns."""
    keys = [table[name].to_numpy() for name in names]
    order = np.lexsort(keys)  # stable: the first of equal rows stays first
    repeats = np.zeros(len(order), bool)
    repeats[order[1:]] = np.all([np.diff(key[order]) == 0 for key in keys], axis=0)
    return repeats


def _refuse(path: Path, table: pa.Table, column: str, wrong: np.ndarray, reason: str) -> None:
    """Raise a ValueError for the first `wrong` row [N]; its value replaces `{}` in `reason`."""
    if wrong.any():
        row = int(wrong.argmax())
        value, first = table[column][row].as_py(), {".csv": 2, ".dat": 1}.get(path.suffix, 0)
        header = " (the header is row 1)" if path.suffix == ".csv" else ""
        location = f"column '{column}', row {row + first}{header}"
        raise ValueError(f"{path}: {location}: {reason.format(value)}")
