"""The recipes of public logs, and datasets that train as they are prepared."""

import gzip
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, load_config
from recsys.config.server import ServerSettings
from recsys.data.events.prepare import prepare_events
from recsys.data.schema import load_schema
from recsys.diagnostics.dataset.findings import explain_data
from recsys.distributed.ranks import joined_ranks
from recsys.evaluation.predict import predict
from recsys.serving.export import export_run
from recsys.serving.package import REQUEST
from recsys.serving.scorer import Scorer
from recsys.serving.server.input_columns import InputColumns, ScoreArguments
from recsys.serving.server.protocol import RankRequest, parse_message
from recsys.storage.location import Location
from recsys.training.train import train
from tests.recsys.command_runs import ROOT
from tests.recsys.data.events.test_events_bad_inputs import prepare, write_inputs

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


def log_with_texts(folder: Path, texts: Sequence[str]) -> None:
    plays = {
        "user": [f"u{n % 6}" for n in ROWS],
        "item": [f"i{n * n % 31}" for n in ROWS],
        "time": [1_583_378_629 + 7000 * n for n in ROWS],
    }
    pq.write_table(pa.table(plays), folder / "events.parquet")
    games = {"item": [f"i{n}" for n in range(31)]}
    columns = {name: [f"a {name}"] * 31 for name in texts}
    columns["published"] = ["2020-03-05", "2020-03-06", ""] * 10 + ["1999-01-01"]
    pq.write_table(pa.table(games | columns), folder / "items.parquet")


def mind(folder: Path) -> None:
    """Rows of three shown items, of which one is clicked; news that both parts have."""
    for number, name in enumerate(("MINDsmall_train", "MINDsmall_dev")):
        (folder / name).mkdir()
        half = ROWS[number * 30 : number * 30 + 30]
        (folder / name / "behaviors.tsv").write_text(
            "".join(
                f"{n}\tU{n % 5}\t11/{11 + n // 12}/2019 {n % 12 + 1}:05:58 {'PA'[n % 2]}M"
                f"\tN3 N4\tN{n % 4}-1 N{n % 4 + 1}-0 N{n % 4 + 2}-0\n"
                for n in half
            )
        )
        (folder / name / "news.tsv").write_text(
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
    "ifdb": partial(
        log_with_texts, texts=("title", "tags", "description", "author", "genre", "system")
    ),
    "ifdb_next_item": partial(log_with_texts, texts=("title", "tags", "description")),
    "retail": partial(log_with_texts, texts=("description",)),
}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_reads_the_format_of_its_data_set(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    report = prepare_events(RECIPES / f"{name}.yaml", tmp_path / "out", tmp_path)
    rows = sum(split["rows"] for split in report["splits"].values())
    extra_rows = {"microlens": 4, "ifdb": 4, "retail": 4, "mind": 2}.get(name, 0) * len(
        ROWS
    )  # drawn, or shown
    assert rows + sum(report["left_out"].values()) == len(ROWS) + extra_rows
    positive = report["splits"]["train"]["positive"]
    assert positive == 1 if name == "ifdb_next_item" else 0 < positive < 1
    load_schema(Location.of(tmp_path / "out"))


SETTINGS = {
    "epochs": "1",
    "batch_size": "16",
    "validations_per_epoch": "1",
    "best_model_by": "auc",
    "embedding.dim": "4",
    "ranking.ensemble_members": "1",
    "ranking.mlp_units": "[4]",
    "device": "cpu",
}


def tiny_config() -> Config:
    argv = [argument for name, value in SETTINGS.items() for argument in (f"--{name}", value)]
    return load_config(ROOT / "recsys" / "recipes" / "id_only.yaml", argv)


def test_a_prepared_dataset_is_trained_predicted_exported_and_scored(tmp_path: Path) -> None:
    """Of features of every kind: ids, numbers, lists of ids, counts, and lists beside a history."""
    config = write_inputs(tmp_path)
    items = pq.read_table(tmp_path / "items.parquet")
    tags = pa.array([["a"], [], ["b", "a"], None, ["c"], ["b"], [None]])
    brands = pa.array(["x", "y", None, "z", "x", "y", "z"])
    items = items.set_column(1, "brand", brands).append_column("tags", tags)
    pq.write_table(items, tmp_path / "items.parquet")
    config["items"]["columns"]["tags"] = "ids"
    config["histories"]["viewed"]["parallel"] |= {"viewed_age": "age", "viewed_brand": "brand"}
    prepare(
        tmp_path,
        config
        | {
            "context": {"price": {"kind": "dense", "fill": 0.5}},
            "counts": {"item_views": {"of": "item", "actions": "view"}},
            "negatives": {"per_positive": 2},
            "split": {"at": [0.6, 0.8]},
        },
    )
    data, run, package = tmp_path / "data", tmp_path / "run", tmp_path / "package"
    explain_data(str(data))
    with joined_ranks("cpu") as ranks:
        train(tiny_config(), str(data), run, ranks)
        predict(run, [str(data / "test")], tmp_path / "out.parquet", None, ranks, "cpu")
        export_run(run, package, "fp32", ranks)
    check_package(package, pq.read_table(tmp_path / "out.parquet"))


def check_package(package: Path, predictions: pa.Table) -> None:
    """Compare answers to JSON requests with predictions, and the metadata with the file's types."""
    scorer = Scorer.load(package)
    columns = InputColumns(scorer, json.loads((package / REQUEST).read_text()))
    for row in predictions.slice(0, 10).to_pylist():
        body = {
            "user": {name: row[name] for name in columns.user if name not in columns.of_items},
            "history": {name: row[name] for name in columns.history},
            "candidates": {name: [row[name]] for name in (columns.item, *columns.of_items)},
        }
        request = parse_message(RankRequest, json.dumps(body).encode())
        arguments = ScoreArguments(request.user, request.history, request.candidates)
        columns.check(arguments, ServerSettings())
        scores = scorer.score(arguments.user, arguments.history, arguments.candidates)
        expected = [row[f"prediction_{label}"] for label in scorer.labels]
        np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-6)
        looked_up = [name for name in columns.history if scorer.schema.lookup_of_list(name)]
        assert looked_up == ["viewed_brand"]
        history = {name: row[name] for name in columns.history if name not in looked_up}
        again = scorer.score(arguments.user, history, arguments.candidates)
        np.testing.assert_array_equal(again, scores)
    for described in columns.metadata():
        kind = predictions.schema.field(described["name"]).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        assert (described["datatype"] == "BYTES") == pa.types.is_string(kind), described
