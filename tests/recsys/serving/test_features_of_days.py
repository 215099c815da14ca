"""A server that follows packages of days answers as `predict` does on rows of loops over the log.

The days are made by `prepare events --until`, and their models and packages by `continual`.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys.checkpoint.partitions import ContinualFolder
from recsys.config import Config
from recsys.config.server import ServerSettings
from recsys.data.events.daily import prepare_days
from recsys.distributed.job import environment_without_rank
from recsys.distributed.ranks import joined_ranks
from recsys.serving.server.scoring_service import LoadedPackage
from recsys.training.continual import walk
from recsys.training.continual.partitions import PartitionRange
from tests.recsys.command_runs import run_recsys
from tests.recsys.data.events.test_events_recipes import tiny_config
from tests.recsys.serving.server.served_package import ServedPackage
from tests.recsys.serving.shop_log import CONFIG, DAYS, START, Shop, predictions
from tests.recsys.test_every_day import wait_for_version

DAY, REQUESTS, UPDATES = 86_400, 1000, 3


def name_of(day: int) -> str:
    """The date of a day of the shop."""
    return str(np.datetime64(START // DAY + day, "D"))


def deliver(shop: Shop, days: range, folder: Path) -> None:
    """Write the events of some days, and the items and users up to the last of them."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    for day in days:
        events = [e for e in shop.events if e["time"] // DAY == START // DAY + day]
        pq.write_table(pa.Table.from_pylist(events), folder / "log" / f"{name_of(day)}.parquet")
    pq.write_table(pa.Table.from_pylist(shop.items), folder / "items.parquet")
    users = {"id": [*shop.cities], "city": [*shop.cities.values()]}
    pq.write_table(pa.table(users), folder / "users.parquet")
    config = CONFIG | {"events": {"log": CONFIG["events"]["log"] | {"path": "log"}}}
    del config["split"]
    (folder / "events.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def learn(folder: Path, config: Config, last: int) -> Path:
    """Prepare the days up to the last one, and train on this; return its run."""
    prepare_days(folder / "events.yaml", folder / "data", name_of(last), None)
    with joined_ranks("cpu") as ranks:
        span = PartitionRange(f"date={name_of(DAYS - UPDATES - 1)}", None)
        data, run = str(folder / "data"), folder / "run"
        walk.train_continually(config, data, run, ranks, span)
    return ContinualFolder(folder / "run").run_of(f"date={name_of(last)}")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings with packages, which a process that has all imports writes."""

    def export(command: list[str], **_: Any) -> Any:
        return run_recsys(*command[3:], folder=tmp_path, environment=environment_without_rank())

    monkeypatch.setattr(walk, "subprocess", SimpleNamespace(run=export))
    config = tiny_config()
    packages = str(tmp_path / "packages")
    return replace(config, continual=replace(config.continual, packages=packages, keep=9))


def scores_of(server: ServedPackage, requests: list[dict[str, Any]], version: str) -> np.ndarray:
    """The scores of candidates in the order of requests, [R, N, 1], all by one version."""
    scores = []
    for request in requests:
        content = server.call("/v1/rank", request).content
        assert content["model_version"] == version
        by_item = dict(zip(content["items"], content["scores"]["bought"], strict=True))
        scores.append([[by_item[item]] for item in request["candidates"]])
    return np.array(scores)


@pytest.mark.long
def test_ids_alone_are_answered_as_rows_of_loops_before_and_after_three_days(
    tmp_path: Path, config: Config
) -> None:
    newest, server = tmp_path / "packages" / "newest", None
    try:
        for day in range(DAYS - UPDATES - 1, DAYS):
            shop = Shop.of_days(day + 1)
            shop.end = START + (day + 1) * DAY  # counts are those of the end of the day
            deliver(shop, range(day + 1) if server is None else range(day, day + 1), tmp_path)
            run = learn(tmp_path, config, day)
            version = LoadedPackage.load(ServerSettings(str(newest), verify=False)).version
            server = server or ServedPackage(newest, tmp_path / "server.log")
            wait_for_version(server, version)
            requests = list(shop.requests(REQUESTS, seed=day))
            types = pq.read_schema(next((tmp_path / "data" / "train").glob("*/*.parquet")))
            expected = predictions(run, shop, requests, tmp_path / f"compared-{day}", types)
            scores = scores_of(server, requests, version)
            assert len(np.unique(scores)) > REQUESTS
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    finally:
        assert server is None or server.end() == 0
