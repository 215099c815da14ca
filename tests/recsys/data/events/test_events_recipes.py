"""Recipes of public data sets, on a few rows in the format that each data set documents."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.events.prepare import prepare_events
from recsys.data.schema import load_schema
from recsys.storage.location import Location

RECIPES = Path(__file__).parents[4] / "recsys" / "recipes" / "events"
ROWS = range(60)


def lines(header: str, row: Callable[[int], str]) -> str:
    return "\n".join([header, *map(row, ROWS)]).strip() + "\n"


def text(name: str, header: str, row: Callable[[int], str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if name.endswith(".gz") else open
        with opened(folder / name, "wt") as file:
            file.write(lines(header, row))

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
        "timestamp": pa.array([n * 50_000 for n in ROWS], pa.uint32()),
        "item_id": pa.array([n % 9 for n in ROWS], pa.uint32()),
        "is_organic": pa.array([n % 2 for n in ROWS], pa.uint8()),
    }
    pq.write_table(pa.table(columns), folder / "flat" / "50m" / "likes.parquet")
    columns["played_ratio_pct"] = pa.array([n % 11 * 10 for n in ROWS], pa.uint16())
    columns["track_length_seconds"] = pa.array([180 for n in ROWS], pa.uint32())
    pq.write_table(pa.table(columns), folder / "flat" / "50m" / "listens.parquet")


def ifdb(folder: Path) -> None:
    plays = {
        "user": [f"u{n % 6}" for n in ROWS],
        "item": [f"i{n * n % 31}" for n in ROWS],
        "time": [1_583_378_629 + 7000 * n for n in ROWS],
    }
    pq.write_table(pa.table(plays), folder / "events.parquet")
    games = {"item": [f"i{n}" for n in range(31)]}
    texts = {name: [f"a {name}"] * 31 for name in ("title", "tags", "description")}
    pq.write_table(pa.table(games | texts), folder / "items.parquet")


def mind(folder: Path) -> None:
    """Rows of three shown items, of which one is clicked; news that both parts have."""
    for place, part in enumerate(("MINDsmall_train", "MINDsmall_dev")):
        (folder / part).mkdir()
        half = ROWS[place * 30 : place * 30 + 30]
        (folder / part / "behaviors.tsv").write_text(
            "".join(
                f"{n}\tU{n % 5}\t11/{11 + n // 12}/2019 {n % 12 + 1}:05:58 {'PA'[n % 2]}M"
                f"\tN3 N4\tN{n % 4}-1 N{n % 4 + 1}-0 N{n % 4 + 2}-0\n"
                for n in half
            )
        )
        (folder / part / "news.tsv").write_text(
            "".join(
                f'N{n}\tsports\tgolf\tThe "best{n}\tAn abstract\thttps://x/y.html\t[]\t[]\n'
                for n in range(7)
            )
        )


FORMATS: dict[str, Callable[[Path], None]] = {
    "movielens": movielens,
    "movielens_dat": text(
        "ratings.dat", "", lambda n: f"{n % 5 + 1}::{n % 7 + 1}::{n % 5 + 1}::{978300760 + 97 * n}"
    ),
    "amazon_reviews": text(
        "All_Beauty.csv.gz",
        "user_id,parent_asin,rating,timestamp",
        lambda n: f"AGKHLEW2SOWHNMFQ{n % 4},B00YQ6X8E{n % 3},{n % 5 + 1}.0,{1588687728923 + n}",
    ),
    "microlens": text(
        "MicroLens-100k_pairs.csv",
        "user,item,timestamp",
        lambda n: f"{n % 6 + 1},{n * n % 31 + 1},{1583378629552 + 7000 * n}",
    ),
    "mind": mind,
    "kuairec": text(
        "data/big_matrix.csv",
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio",
        lambda n: (
            f"{n % 3},{n % 8},13838,{10867 + n},2020-07-05 00:{n:02}:23{('.438', '.4', '')[n % 3]},"
            f"20200705,{1593878903.438 + 60 * n},{n % 7 / 2}"
        ),
    ),
    "yambda": yambda,
    "ifdb": ifdb,
}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_reads_the_format_of_its_data_set(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    report = prepare_events(RECIPES / f"{name}.yaml", tmp_path / "out", tmp_path)
    rows = sum(split["rows"] for split in report["splits"].values())
    extra_rows = {"microlens": 4, "ifdb": 4, "mind": 2}.get(name, 0) * len(ROWS)  # drawn, or shown
    assert rows + sum(report["left_out"].values()) == len(ROWS) + extra_rows
    assert 0 < report["splits"]["train"]["positive"] < 1
    load_schema(Location.of(tmp_path / "out"))
