"""Requests of ids alone are scored as `predict` scores the rows that loops over the log give."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.server import FeatureSettings
from recsys.distributed.ranks import joined_ranks
from recsys.serving import Scorer
from recsys.serving.delta import apply_delta, write_delta
from recsys.serving.export import export_run
from recsys.serving.features.package_features import features_file, refresh_features
from recsys.serving.features.source import FeatureSourceError, RedisFeatures
from recsys.serving.new_items.add import add_items
from recsys.training.train import train
from tests.recsys.data.events.test_events_recipes import tiny_config
from tests.recsys.serving.server.served_package import ServedPackage
from tests.recsys.serving.shop_log import DAY, DAYS, Shop, predictions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the first nine days, and its package."""
    folder = tmp_path_factory.mktemp("features")
    data = Shop.of_days(DAYS - 3).write(folder / "shop")
    with joined_ranks("cpu") as ranks:
        train(tiny_config(), str(data), folder / "run", ranks)
        export_run(folder / "run", folder / "package", "fp32", ranks)
    return folder


@pytest.fixture(scope="module")
def base_scorer(folder: Path) -> Scorer:
    """The scorer of the package, whose graph others of the same run take over."""
    return Scorer.load(folder / "package")


def compare(scorer: Scorer, run: Path, shop: Shop, number: int, out: Path) -> None:
    requests = list(shop.requests(number, seed=len(shop.events)))
    columns = pq.read_table(run.parent / "shop" / "data" / "test").schema
    expected = predictions(run, shop, requests, out, columns)
    scores = np.stack([scorer.score(**request) for request in requests])
    assert len(np.unique(scores)) > number
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def test_ids_alone_are_scored_as_the_rows_of_loops_over_the_log(
    folder: Path, base_scorer: Scorer, tmp_path: Path
) -> None:
    compare(base_scorer, folder / "run", Shop.of_days(DAYS - 3), 1000, tmp_path / "first")


def test_after_each_day_features_are_those_of_the_longer_log(
    folder: Path, base_scorer: Scorer, tmp_path: Path
) -> None:
    """A delta takes them from one package to the next."""
    previous = folder / "package"
    for day in (DAYS - 2, DAYS - 1, DAYS):
        shop = Shop.of_days(day)
        newer, applied = tmp_path / f"newer-{day}", tmp_path / f"applied-{day}"
        refresh_features(previous, str(shop.write(tmp_path / f"shop-{day}")), newer)
        write_delta(previous, newer, tmp_path / f"delta-{day}")
        apply_delta(previous, tmp_path / f"delta-{day}", applied)
        previous = applied
        scorer = Scorer.load(applied, previous=base_scorer)
        compare(scorer, folder / "run", shop, 300, tmp_path / f"compared-{day}")


FEW = {"user": "u1", "offer": 0.5, "when": 7}


def test_values_of_candidates_override_those_that_are_looked_up(base_scorer: Scorer) -> None:
    """One value for all candidates is refused, though it was taken in silence once."""
    scorer, shop = base_scorer, Shop.of_days(DAYS - 3)
    items = ["i1", "i2", "i3"]
    expected = scorer.score(FEW, [], items)
    rows = [shop.row({"user": FEW, "history": {}}, item) for item in items]
    names = ("brand", "maker", "cost", "tags", "item_day", "pair_views")
    request = {"item": items, **{name: [row[name] for row in rows] for name in names}}
    np.testing.assert_allclose(scorer.score(FEW, [], request), expected, rtol=0, atol=1e-6)
    changed = scorer.score(FEW, [], request | {"item_day": [500.0, 0.0, 0.0]})
    assert changed[0] != expected[0] and (changed[1:] != expected[1:]).sum() <= 2
    for name in ("cost", "pair_views", "maker_views"):
        with pytest.raises(ValueError, match=rf"user: '{name}' is a column of the items"):
            scorer.score(FEW | {name: 1.0}, [], items)
    assert (scorer.score(FEW | {"city": "Oslo"}, [], items) != expected).any()
    with pytest.raises(ValueError, match="user: lacks 'offer'"):
        scorer.score({"user": "u1", "when": 7}, [], items)


def test_an_old_count_is_scored_as_none(folder: Path, base_scorer: Scorer, tmp_path: Path) -> None:
    package = shutil.copytree(folder / "package", tmp_path / "package")
    schema = package / "schema.yaml"
    schema.write_text(schema.read_text().replace("item_views: all", "item_views: 48h"))
    scorer = Scorer.load(package, verify=False, previous=base_scorer)
    end = 1 + max(event["time"] for event in Shop.of_days(DAYS - 3).events) + 1e-6
    scorer.read.clock = lambda: end + 2 * DAY - 1
    fresh = scorer.score(FEW, [], ["i1"])
    np.testing.assert_array_equal(fresh, base_scorer.score(FEW, [], ["i1"]))
    scorer.read.clock = lambda: end + 2 * DAY + 1
    zero = scorer.score(FEW, [], {"item": ["i1"], "item_views": [0.0]})
    assert scorer.score(FEW, [], ["i1"]) == zero != fresh


def test_new_items_come_with_features(folder: Path, base_scorer: Scorer, tmp_path: Path) -> None:
    """Columns that are not given stay as they are; bad values change nothing."""
    package = shutil.copytree(folder / "package", tmp_path / "package")
    new = {
        "item": ["i1", "new"],
        "brand": ["b", "a"],
        "cost": [3.0, None],
        "item_views": [9.0, 0.0],
    }
    pq.write_table(pa.table(new), tmp_path / "new.parquet")
    assert add_items(package, str(tmp_path / "new.parquet")).features == 2
    scorer = Scorer.load(package, previous=base_scorer)
    values = {name: column for name, column in new.items() if name != "item"}
    rows = [Shop.of_days(DAYS - 3).row({"user": FEW, "history": {}}, item) for item in ("i1", "x")]
    buys = [Shop.of_days(DAYS - 3).count("buy", DAYS, "user", "brand")["u1", b] for b in "ba"]
    request = {"item": new["item"], **values, "brand_buys": buys}
    expected = base_scorer.score(FEW, [], request | {"maker": [row["maker"] for row in rows]})
    np.testing.assert_array_equal(scorer.score(FEW, [], new["item"]), expected)
    pq.write_table(pa.table({"item": ["i2"], "cost": [float("inf")]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet: column 'cost', item 'i2': .*inf"):
        add_items(package, str(tmp_path / "bad.parquet"))
    pq.write_table(pa.table({"item": ["i2"], "brand": [7]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet: column 'brand' has type int64, but string"):
        add_items(package, str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.parquet").unlink()
    with pytest.raises(ValueError, match=r"bad.parquet: no such Parquet file"):
        add_items(package, str(tmp_path / "bad.parquet"))
    assert scorer.score(FEW, [], []).shape == (0, 1)
    newer = tmp_path / "newer"
    refresh_features(package, str(folder / "shop" / "data"), newer)
    again = Scorer.load(newer, previous=base_scorer)
    np.testing.assert_array_equal(again.score(FEW, [], ["new"]), expected[1:])
    np.testing.assert_array_equal(again.score(FEW, [], ["i1"]), base_scorer.score(FEW, [], ["i1"]))


def test_features_are_added_whatever_type_of_text_has_the_ids(
    folder: Path, base_scorer: Scorer, tmp_path: Path
) -> None:
    package = shutil.copytree(folder / "package", tmp_path / "package")
    new = pa.array(["new"])
    columns = [new, new.cast(pa.large_string()), pa.array(["i1"]).dictionary_encode()]
    for cost, ids in enumerate(columns):
        pq.write_table(pa.table({"item": ids, "cost": [float(cost)]}), tmp_path / "new.parquet")
        assert add_items(package, str(tmp_path / "new.parquet")).features == 1
    features = Scorer.load(package, previous=base_scorer).read.features
    assert features is not None
    table = next(table for table in base_scorer.schema.features if table.by == ["item"])
    costs = features.read(table, [pa.array(["new", "i1"])])["cost"].to_pylist()
    assert costs == [1.0, 2.0]
    pq.write_table(pa.table({"item": ["i1", None], "cost": [1.0, 2.0]}), tmp_path / "new.parquet")
    with pytest.raises(ValueError, match=r"new.parquet: column 'item', row 1: null"):
        add_items(package, str(tmp_path / "new.parquet"))


def test_features_of_types_that_requests_cannot_read_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "shop" / "data" / "features", tmp_path / "features")
    [file] = (tmp_path / "features" / "item").glob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    for column, kind in (("item_views@", pa.timestamp("us")), ("cost", pa.string())):
        index = table.column_names.index(column)
        pq.write_table(table.set_column(index, column, table[column].cast(kind)), file)
        with pytest.raises(ValueError, match=rf"features/item: column '{column}'.* type "):
            refresh_features(folder / "package", str(tmp_path), tmp_path / "out")
    later = table.set_column(0, "item", table["item"].cast(pa.large_string()))
    pq.write_table(table.slice(0, 5), file)
    pq.write_table(later.slice(5), file.with_name("z.parquet"))
    refresh_features(folder / "package", str(tmp_path), tmp_path / "out")


def test_features_by_ids_of_another_type_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shop" / "data" / "features", tmp_path / "features")
    [file] = (tmp_path / "features" / "item").glob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    pq.write_table(table.set_column(0, "item", pa.array(range(len(table)))), file)
    with pytest.raises(ValueError, match=r"features/item: column 'item'.* these ids are int64"):
        refresh_features(folder / "package", str(tmp_path), tmp_path / "out")


def test_features_of_added_items_take_the_types_of_a_later_day(
    folder: Path, base_scorer: Scorer, tmp_path: Path
) -> None:
    package = shutil.copytree(folder / "package", tmp_path / "package")
    pq.write_table(pa.table({"item": ["new"], "tags": [["p", "q"]]}), tmp_path / "new.parquet")
    add_items(package, str(tmp_path / "new.parquet"))
    shutil.copytree(folder / "shop" / "data" / "features", tmp_path / "features")
    [file] = (tmp_path / "features" / "item").glob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    tags = table["tags"].cast(pa.large_list(pa.large_string()))
    index = table.column_names.index("tags")
    pq.write_table(table.set_column(index, "tags", tags), file)
    refresh_features(package, str(tmp_path), tmp_path / "newer")
    scores = [
        Scorer.load(path, previous=base_scorer).score(FEW, [], ["new", "i1"])
        for path in (package, tmp_path / "newer")
    ]
    np.testing.assert_array_equal(*scores)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServedPackage]:
    """A server of the package that takes small batches."""
    server = ServedPackage(folder / "package", folder / "log", "--max_batch", "30")
    yield server
    assert server.end() == 0


def test_a_server_takes_ids_alone(base_scorer: Scorer, server: ServedPackage) -> None:
    scorer = base_scorer
    for request in Shop.of_days(DAYS - 3).requests(20, 1):
        content = server.call("/v1/rank", request).content
        scores = np.sort(scorer.score(**request)[:, 0])[::-1]
        np.testing.assert_allclose(content["scores"]["bought"], scores, atol=1e-6)
        assert content["features_version"] == scorer.features_version != ""
    answer = server.call("/v1/rank", request | {"user": request["user"] | {"cost": 1.0}})
    assert answer.status == 400 and b"'cost' is a column of the items" in answer.body
    inputs = [
        {"name": "item", "shape": [1], "datatype": "BYTES", "data": ["i1"]},
        {"name": "user", "shape": [1], "datatype": "BYTES", "data": ["u1"]},
        {"name": "offer", "shape": [1], "datatype": "FP32", "data": [0.5]},
        {"name": "when", "shape": [1], "datatype": "INT64", "data": [7]},
        {"name": "cost", "shape": [1], "datatype": "FP32", "data": [3.0]},
    ]
    content = server.call("/v2/models/shop/infer", {"inputs": inputs}).content
    expected = scorer.score(FEW, [], {"item": ["i1"], "cost": [3.0]})
    np.testing.assert_allclose(content["outputs"][0]["data"], expected[0], atol=1e-6)
    assert content["parameters"] == {"features_version": scorer.features_version}


def test_a_batch_answers_each_request_or_says_why_not(server: ServedPackage) -> None:
    """One version of the package answers all."""
    requests = list(Shop.of_days(DAYS - 3).requests(20, 3))
    alone = [server.call("/v1/rank", request).content for request in requests]
    bad = requests[0] | {"by": "loved"}
    answer = server.call("/v1/rank/batch", {"requests": [*requests, bad, bad | {"by": None}]})
    assert answer.headers["x-request-id"] == answer.content["id"]
    *results, refused, last = answer.content["results"]
    for content, result in zip(alone, results, strict=True):
        assert result == {name: content[name] for name in ("by", "items", "scores")}
        assert content["model_version"] == answer.content["model_version"]
    assert last == results[0] and "'loved' is none of the labels" in refused["error"]
    answer = server.call("/v1/rank/batch", {"requests": requests * 2})
    assert answer.status == 400 and "are 40; the limit is 30" in answer.content["error"]


def test_drift_is_counted_by_column_beside_the_shares_of_training(
    folder: Path, server: ServedPackage
) -> None:
    def counts(metric: str) -> dict[str, float]:
        lines = server.call("/metrics").body.decode().splitlines()
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(metric)
        }

    def change(column: str, kind: str) -> tuple[float, float]:
        names = [
            f'recsys_column_{counter}_total{{column="{column}",kind="{kind}"}}'
            for counter in ("values", "drift")
        ]
        numbers = [new_counts.get(name, 0) - old_counts.get(name, 0) for name in names]
        return numbers[0], numbers[1]

    old_counts = counts("recsys_column")
    user = {"user": "nobody", "offer": None, "when": 10 * DAY}
    server.call("/v1/rank", {"user": user, "candidates": ["i1", "unseen", "i2"]})
    new_counts = counts("recsys_column")
    assert change("user", "unknown") == (1, 1)
    assert change("item", "unknown") == (3, 1)
    assert change("offer", "null") == (1, 1)
    assert change("when", "out_of_range") == (1, 1)
    assert change("item_views", "out_of_range")[0] == 3
    rows = pq.read_table(folder / "shop" / "data" / "train")
    shares = counts("recsys_training_share")
    expected = rows["brand"].null_count / len(rows)
    name = 'recsys_training_share{column="brand",kind="null"}'
    assert shares[name] == pytest.approx(expected) and expected > 0.1


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The address of a Redis server that this test starts."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    path = tmp_path / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", ""]
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, cwd=tmp_path)
    while not path.exists():
        time.sleep(0.02)
    yield f"unix://{path}"
    process.kill()
    process.wait()


def test_features_come_from_redis(folder: Path, base_scorer: Scorer, redis: str) -> None:
    """They are those of the store alone, and a store that does not answer is no bad request."""
    package = folder / "package"
    settings = FeatureSettings("redis", {"url": redis, "timeout": 5.0})
    scorer = Scorer.load(package, features=settings, previous=base_scorer)
    requests = list(Shop.of_days(DAYS - 3).requests(50, 2))
    store = scorer.read.features
    assert isinstance(store, RedisFeatures)
    for table in scorer.schema.features:
        with pa.memory_map(str(features_file(package, table))) as file:
            store.write(table, pa.ipc.open_file(file).read_all())
    for request in requests:
        np.testing.assert_array_equal(scorer.score(**request), base_scorer.score(**request))
    [items] = [table for table in scorer.schema.features if table.by == ["item"]]
    assert scorer.features_version == ""
    import_module("redis").Redis.from_url(redis).set("recsys:version", "today")
    store.write(items, pa.table({"item": ["i1"], "cost": [99.0]}))
    changed = base_scorer.score(FEW, [], {"item": ["i1"], "cost": [99.0]})
    np.testing.assert_array_equal(scorer.score(FEW, [], ["i1"]), changed)
    assert scorer.features_version == "today"
    missing_store = FeatureSettings("redis", {"url": redis + ".gone"})
    with pytest.raises(FeatureSourceError, match=r"Redis: .*send the request again"):
        Scorer.load(package, features=missing_store, previous=base_scorer).score(FEW, [], ["i1"])
