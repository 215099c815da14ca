"""Seconds from `recsys package add-items` to the first answer that has the items.

    python -m benchmarks.serving.add_items --package packages/movielens --data data/movielens

Items of the dataset get a new text; the time ends when the server ranks by it. The answer must be
that of a scorer that loads the package afterwards. Exits with 1 if the median is above the aim.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, ROOT, Result, write_result
from benchmarks.serving.server import served
from recsys.data.schema import load_schema
from recsys.serving import Scorer
from recsys.serving.package import REQUEST
from recsys.storage.location import Location

MAX_SECONDS = 10.0
TOLERANCE = 1e-6
WAIT_SECONDS = 0.05  # between requests


def add_items(
    package: Path, data: Path, items: int = 100, rounds: int = 3, results: Path = RESULTS
) -> bool:
    """Add items to the package of a running server and return whether the aim is reached.

    Args:
        package: a package of a model that reads texts.
        data: the dataset of its run.
        items: how many items each command adds.
        rounds: commands that are measured, each with other texts.
        results: folder for the figures.
    """
    records = []
    with TemporaryDirectory(dir=package.parent) as folder:
        copy = Path(folder, "package")
        shutil.copytree(package, copy, copy_function=os.link)
        with served(copy, "true") as (_, port, _):
            for number in range(rounds):
                file = Path(folder, f"{number}.parquet")
                ids = _write_items(data, items, number, file)
                records.append(_measure(copy, file, ids, port))
    write_result(_result(records, items), results)
    return median(record["seconds"] for record in records) < MAX_SECONDS


def _write_items(data: Path, count: int, number: int, file: Path) -> list[Any]:
    """Write items of the dataset with other texts; return their ids."""
    name = _id_column(data)
    table = pq.read_table(data / "items").slice(0, count)
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type) and field.name != name:
            texts = [f"edition {number} of {text}" for text in table[field.name].to_pylist()]
            table = table.set_column(index, field, pa.array(texts, field.type))
    pq.write_table(table, file)
    return table[name].to_pylist()


def _id_column(data: Path) -> str:
    items = load_schema(Location.of(str(data))).items
    assert items is not None
    return items.id


def _measure(package: Path, file: Path, ids: list[Any], port: int) -> dict[str, Any]:
    """Run the command; return its seconds, and those until the server answers with the items."""
    request = json.loads((package / REQUEST).read_text()) | {"candidates": ids}
    old_response, usage = _ranked(port, request), resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [sys.executable, "-m", "recsys.cli", "package", "add-items", str(package)]
    start = time.perf_counter()
    command = subprocess.Popen([*arguments, "--items", str(file)], cwd=ROOT)
    ended = None
    while True:
        response, seconds = _ranked(port, request), time.perf_counter() - start
        if ended is None and command.poll() is not None:
            assert command.returncode == 0, arguments
            ended = seconds
        if response["model_version"] != old_response["model_version"]:
            break
        time.sleep(WAIT_SECONDS)
    command.wait()
    end_usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    _require_equal(Scorer.load(package), request, response, old_response)
    return {
        "benchmark": "add_items",
        "seconds": seconds,
        "command_seconds": seconds if ended is None else ended,
        "cpu_seconds": end_usage.ru_utime + end_usage.ru_stime - usage.ru_utime - usage.ru_stime,
    }


def _ranked(port: int, request: dict[str, Any]) -> dict[str, Any]:
    url, body = f"http://127.0.0.1:{port}/v1/rank", json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
        return json.loads(response.read())


def _require_equal(
    scorer: Scorer, request: dict[str, Any], response: dict[str, Any], old_response: dict[str, Any]
) -> None:
    label = scorer.labels[0]
    expected = dict(zip(request["candidates"], scorer.score(**request)[:, 0], strict=True))
    scores = np.array(response["scores"][label])
    expected_scores = np.array([expected[item] for item in response["items"]])
    assert np.abs(scores - expected_scores).max() <= TOLERANCE, (
        "other scores than those of the package"
    )
    assert response["scores"] != old_response["scores"], "the items have their content of before"


def _result(records: list[dict[str, Any]], items: int) -> Result:
    seconds = [record["seconds"] for record in records]

    rows = [
        [
            str(index + 1),
            f"{record['seconds']:.1f}",
            f"{record['command_seconds']:.1f}",
            f"{record['cpu_seconds']:.1f}",
        ]
        for index, record in enumerate(records)
    ]
    verdict = "reached" if median(seconds) < MAX_SECONDS else "missed"
    reading = [
        f"{items} items per command, beside a server with one thread; scores equal those of a "
        f"scorer that loads the package afterwards. Median {median(seconds):.1f} s, aim: "
        f"below {MAX_SECONDS:g} s, {verdict}."
    ]
    columns = ["round", "first answer, s", "command, s", "processor time of the command, s"]
    title = "Items added to the package of a running server"
    return Result("add_items", title, records, columns, rows, None, reading)


if __name__ == "__main__":
    sys.exit(0 if auto_cli(add_items, as_positional=False) else 1)
