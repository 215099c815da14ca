"""Recipes of public data sets, on a few rows in the format that each data set documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.data.events.prepare import prepare_events
from recsys.data.filesystem import Location
from recsys.data.movielens.prepare import prepare_movielens
from recsys.data.movielens.source import read_movielens
from recsys.data.schema import load_schema
from tests.recsys.data.movielens.movielens_sources import tied_ratings, write_source

RECIPES = Path(__file__).parents[4] / "recsys" / "recipes" / "events"
ROWS = range(60)


def lines(header: str, row: Callable[[int], str]) -> str:
    return "\n".join([header, *map(row, ROWS)]).strip() + "\n"


def text(name: str, header: str, row: Callable[[int], str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines(header, row))

    return write


def movielens(folder: Path) -> None:
    text(
        "ratings.csv",
        "userId,movieId,rating,timestamp",
        lambda n: f"{n % 5 + 1},{n % 7 + 1},{n % 10 / 2 + 0.5},{964982703 + 97 * n}",
    )(folder)
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f'{n},"Film, The {n} (1995)",Comedy|Drama\n' for n in range(1, 9))
    )


def yambda(folder: Path) -> None:
    (folder / "flat" / "50m").mkdir(parents=True)
    columns = {
        "uid": pa.array([n % 4 * 100 for n in ROWS], pa.uint32()),
        "timestamp": pa.array([n * 5 for n in ROWS], pa.uint32()),
        "item_id": pa.array([n % 9 for n in ROWS], pa.uint32()),
        "is_organic": pa.array([n % 2 for n in ROWS], pa.uint8()),
    }
    pq.write_table(pa.table(columns), folder / "flat" / "50m" / "likes.parquet")
    columns["played_ratio_pct"] = pa.array([n % 11 * 10 for n in ROWS], pa.uint16())
    columns["track_length_seconds"] = pa.array([180 for n in ROWS], pa.uint32())
    pq.write_table(pa.table(columns), folder / "flat" / "50m" / "listens.parquet")


FORMATS: dict[str, Callable[[Path], None]] = {
    "movielens": movielens,
    "movielens_dat": text(
        "ratings.dat", "", lambda n: f"{n % 5 + 1}::{n % 7 + 1}::{n % 5 + 1}::{978300760 + 97 * n}"
    ),
    "amazon_reviews": text(
        "All_Beauty.csv",
        "user_id,parent_asin,rating,timestamp",
        lambda n: f"AGKHLEW2SOWHNMFQ{n % 4},B00YQ6X8E{n % 3},{n % 5 + 1}.0,{1588687728923 + n}",
    ),
    "microlens": text(
        "MicroLens-100k_pairs.csv",
        "user,item,timestamp",
        lambda n: f"{n % 6 + 1},{n * n % 31 + 1},{1583378629552 + 7000 * n}",
    ),
    "kuairec": text(
        "data/big_matrix.csv",
        "user_id,video_id,play_duration,video_duration,time,timestamp,date,watch_ratio",
        lambda n: (
            f"{n % 3},{n % 8},13838,{10867 + n},2020-07-05 00:{n:02}:23.438,"
            f"{1593878903.438 + 60 * n},20200705,{n % 7 / 2}"
        ),
    ),
    "yambda": yambda,
}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_reads_the_format_of_its_data_set(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    report = prepare_events(RECIPES / f"{name}.yaml", tmp_path / "out", tmp_path)
    rows = sum(split["rows"] for split in report["splits"].values())
    drawn = 4 * len(ROWS) if name == "microlens" else 0
    assert rows + report["left_out"].get("no item left to draw", 0) == len(ROWS) + drawn
    assert 0 < report["splits"]["train"]["positive"] < 1
    load_schema(Location.of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("split", "by"), [("global", "time"), ("user", "user"), ("rolling", "windows")]
)
def test_movielens_through_events_is_what_its_adapter_writes(
    split: str, by: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_source(source, *tied_ratings(0))
    prepare_movielens(source, tmp_path / "adapter", 7, split)
    movies, ratings = read_movielens(source)
    table = pa.table(
        {
            "userId": np.unique(ratings["userId"], return_inverse=True)[1],
            "movieId": ratings["item"],
            "rating": ratings["rating"],
            "timestamp": ratings["timestamp"],
        }
    )
    pq.write_table(table, tmp_path / "ratings.parquet")
    pq.write_table(pa.table({"movieId": np.arange(movies.num_rows)}), tmp_path / "movies.parquet")
    content = yaml.safe_load((RECIPES / "movielens.yaml").read_text())
    content["events"]["rating"]["path"] = "ratings.parquet"
    content["items"] = {"path": "movies.parquet", "id": "movieId"}
    content["histories"]["history"]["length"] = 7
    content["split"], content["drop"] = {"by": by}, {"duplicates": False}
    content["vocabulary"] = {"kind": "rows"}
    content["output"] = {"time": "timestamp", "time_unit": "s"}
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    prepare_events(tmp_path / "events.yaml", tmp_path / "events")
    for name in ("train", "valid", "test"):
        files = list((tmp_path / "adapter").rglob(f"{name}/*.parquet"))
        assert len(files) == (5 if split == "rolling" else 1)
        for file in files:
            other = tmp_path / "events" / file.relative_to(tmp_path / "adapter")
            assert pq.read_table(other).equals(pq.read_table(file))
