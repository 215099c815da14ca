"""Small MovieLens sources for the tests of the adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Rating = tuple[int, int, float, int]  # userId, movieId, rating, timestamp


def write_source(folder: Path, ratings: list[Rating], movies: list[tuple[int, str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    lines = [
        "movieId,title,genres",
        *(f'{id_},"{title}",{genres}' for id_, title, genres in movies),
    ]
    (folder / "movies.csv").write_text("\n".join(lines) + "\n")
    return folder


def tied_ratings(seed: int) -> tuple[list[Rating], list[tuple[int, str, str]]]:
    """400 ratings by 5 users at only 40 moments, in random order: nearly every time is a tie."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(5 * 80)
    rows = [
        (int(pair % 5) * 10 + 3, int(pair // 5) * 7 + 2, float(rng.integers(1, 11)) / 2, int(time))
        for pair, time in zip(pairs, rng.integers(100, 140, len(pairs)), strict=True)
    ]
    return rows, [(index * 7 + 2, f"movie {index}", "Drama") for index in range(80)]


def read_split(out: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(out / split).to_pylist()
