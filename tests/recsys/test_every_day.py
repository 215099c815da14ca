"""Five days by three commands: no request fails, and killed commands change no bit."""

import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.server import ServerSettings
from recsys.serving import Scorer
from recsys.serving.new_items.add import add_items
from recsys.serving.server.scoring_service import LoadedPackage
from tests.recsys.day_chain import COMMANDS, assert_same_days, run_day
from tests.recsys.serving.server.served_package import ServedPackage

DAYS = range(1, 6)
PAUSE = 0.1  # seconds between two requests
NEW_ITEMS = 10  # a day
Versions = tuple[str, str]  # of package and features


@dataclass
class Load:
    """Requests of ids alone, by a thread of its own; the answers in the order of time."""

    server: ServedPackage
    example: dict[str, Any]
    responses: list[tuple[dict[str, Any], int, Any]] = field(default_factory=list)
    is_over: bool = False

    def run(self) -> None:
        random = np.random.default_rng(0)
        while not self.is_over:
            request = self.example | {"candidates": random.integers(0, 35, 5).tolist()}
            request["user"] = request["user"] | {"user": f"u{random.integers(15)}"}
            response = self.server.call("/v1/rank", request)
            self.responses.append((request, response.status, response.content))
            time.sleep(PAUSE)


def wait_for_version(server: ServedPackage, version: str) -> None:
    while server.call("/v2/models/shop").content["versions"] != [version]:
        time.sleep(0.05)


def keep(package: Path, folder: Path) -> Path:
    """Copy a package that is served; return the copy, named by its version."""
    version = LoadedPackage.load(ServerSettings(str(package), verify=False)).version
    return Path(shutil.copytree(package.resolve(), folder / version))


@dataclass
class FiveDays:
    """The chain beside a server: answers, packages by version, and versions in order."""

    folder: Path
    load: Load
    versions: list[str]
    new_versions: list[list[str]]  # versions that answer with a new item, by day
    seconds: list[float]  # of processors, from sending a new item to its score


def processor_seconds(server: ServedPackage) -> float:
    """Seconds that the server's processes have run, which other programs do not change much."""
    first = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (first, *first.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def live_through(folder: Path, server: ServedPackage, load: Load) -> FiveDays:
    """The days from the first on, whose package is served already."""
    newest, versions, new_versions = folder / "packages" / "newest", list[str](), list[list[str]]()
    seconds: list[float] = []
    for day in DAYS:
        if day != DAYS[0]:
            run_day(folder, day)
        versions.append(keep(newest, folder / "served").name)
        wait_for_version(server, versions[-1])
        new_versions.append([])
        for number in range(NEW_ITEMS):
            item = {"item": 100 * day + number, "title": f"new on day {day}, {number}"}
            started = processor_seconds(server)
            response = server.call("/v1/items", {"items": [item]})
            ranked = server.call("/v1/rank", load.example | {"candidates": [item["item"]]})
            seconds.append(processor_seconds(server) - started)
            assert {response.status, ranked.status} == {200}, response.body
            assert ranked.content["model_version"] == response.content["model_version"]
            new_versions[-1].append(keep(newest, folder / "served").name)
            assert new_versions[-1][-1] == response.content["model_version"]
        versions += new_versions[-1]
    return FiveDays(folder, load, versions, new_versions, seconds)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> FiveDays:
    """Five days; a server follows the packages from the first one on, and takes new items."""
    folder = tmp_path_factory.mktemp("days")
    newest = folder / "packages" / "newest"
    run_day(folder, DAYS[0])
    server = ServedPackage(newest, folder / "log", "--encoders", "true")
    load = Load(server, json.loads((newest / "request.json").read_text()))
    thread = threading.Thread(target=load.run, daemon=True)
    thread.start()
    try:
        days = live_through(folder, server, load)
    finally:
        load.is_over = True
        thread.join()
        assert server.end() == 0
    return days


@pytest.mark.long
def test_every_request_of_five_days_is_answered_by_one_version(days: FiveDays) -> None:
    scorers = {name: Scorer.load(days.folder / "served" / name) for name in days.versions}
    order = {name: number for number, name in enumerate(days.versions)}
    assert [status for _, status, _ in days.load.responses if status != 200] == []
    numbers = [order[content["model_version"]] for _, _, content in days.load.responses]
    assert numbers == sorted(numbers) and {numbers[0], numbers[-1]} == {0, len(order) - 1}
    for request, _, content in days.load.responses:
        scorer = scorers[content["model_version"]]
        assert content["features_version"] == scorer.features_version
        scores = np.sort(scorer.score(**request)[:, 0])[::-1]
        np.testing.assert_allclose(content["scores"]["bought"], scores, rtol=0, atol=1e-6)


@pytest.mark.long
def test_fifty_new_items_answer_under_load_by_less_than_a_second_of_processors(
    days: FiveDays,
) -> None:
    print(np.quantile(days.seconds, [0.5, 0.95, 1]))
    assert len(days.seconds) == 50 and np.quantile(days.seconds, 0.95) < 1


@pytest.mark.long
def test_new_items_of_each_day_have_the_content_that_the_command_encodes(
    days: FiveDays, tmp_path: Path
) -> None:
    for day, new_versions in zip(DAYS, days.new_versions, strict=True):
        old_version = days.versions[days.versions.index(new_versions[0]) - 1]
        package = shutil.copytree(days.folder / "served" / old_version, tmp_path / old_version)
        ids = [100 * day + number for number in range(NEW_ITEMS)]
        titles = [f"new on day {day}, {number}" for number in range(NEW_ITEMS)]
        pq.write_table(pa.table({"item": ids, "title": titles}), tmp_path / "new.parquet")
        add_items(package, str(tmp_path / "new.parquet"))
        request = days.load.example | {"candidates": ids}
        served = Scorer.load(days.folder / "served" / new_versions[-1])
        scores = served.score(**request)
        np.testing.assert_allclose(scores, Scorer.load(package).score(**request), atol=1e-6)
        assert len(np.unique(scores[:, 0])) == NEW_ITEMS


@pytest.mark.long
def test_days_whose_commands_are_killed_have_the_same_bits(days: FiveDays, tmp_path: Path) -> None:
    commands = COMMANDS * len(DAYS)
    killed = 0
    for day in DAYS:
        killed = run_day(tmp_path, day, days.folder, commands, killed=killed)
    assert killed == commands
    pristine = [days.folder / "served" / name for name in days.versions[:: 1 + NEW_ITEMS]]
    assert_same_days(days.folder, tmp_path, pristine)
