"""Start and memory of a server whose package has tables of gigabytes.

    python -m benchmarks.serving.large_tables --package packages/movielens

Measures seconds and resident memory of a server started with `--verify false`, and whether two
workers share the pages that both have read. Exits with 1 if an aim is missed.
"""

import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.results import RESULTS, Result, write_result
from benchmarks.serving.server import served
from recsys.serving.package import MANIFEST, REQUEST, read_manifest, write_manifest
from recsys.serving.vector_file import VectorFileShape, write_vectors

MAX_SECONDS, MAX_GB, MIN_SHARED = 5.0, 1.5, 0.9
ROWS_PER_BLOCK = 2**20
ROWS_READ = 20_000  # of the large table, by requests
SCHEMA = "schema.yaml"


@dataclass(frozen=True)
class Mapped:
    """Kilobytes of a file that a process has in memory, and its share of them."""

    resident: int
    proportional: int


def enlarged(package: Path, out: Path, column: str, gigabytes: float) -> int:
    """Write a package with a large table for a column of the user; return its number of rows."""
    shutil.copytree(package, out, copy_function=os.link)
    manifest = read_manifest(out, verify=False)
    old_shape = VectorFileShape(**manifest.tables[column])
    num_rows = int(gigabytes * 1e9 / old_shape.row_bytes)
    shape = VectorFileShape(num_rows, old_shape.dim, old_shape.stored_as)
    path = out / "tables" / f"{column}.vectors"
    for file in (path, out / SCHEMA, out / MANIFEST):
        content = file.read_bytes() if file.name == SCHEMA else b""
        file.unlink()  # the link, not the file of the other package
        if content:
            schema = yaml.safe_load(content)
            schema["schema"]["columns"][column]["num_embeddings"] = num_rows
            file.write_text(yaml.safe_dump(schema, sort_keys=False))
    block = torch.randn(min(ROWS_PER_BLOCK, num_rows), old_shape.dim) / 100

    def blocks() -> Iterator[Tensor]:
        for start in range(0, num_rows, len(block)):
            yield block[: num_rows - start]

    write_vectors(path, shape, blocks())
    manifest.tables[column] = asdict(shape)
    write_manifest(out, manifest)
    return num_rows


def mapped(process: psutil.Process, file: Path) -> Mapped:
    """Return how much of a file a process has in memory."""
    maps = [mapping for mapping in process.memory_maps(grouped=True) if mapping.path == str(file)]
    return Mapped(
        sum(mapping.rss for mapping in maps) // 1024, sum(mapping.pss for mapping in maps) // 1024
    )


def large_tables(
    package: Path,
    column: str = "user",
    gigabytes: float = 4,
    rounds: int = 3,
    results: Path = RESULTS,
) -> bool:
    """Measure start, memory and sharing, and return whether the aims are reached.

    Args:
        package: a package of `recsys export`.
        column: a column of the user without a map of ids, whose table becomes large.
        gigabytes: bytes of that table.
        rounds: starts of the server, of which the median counts.
        results: folder for the figures.
    """
    with TemporaryDirectory(dir=package.parent) as folder:
        large = Path(folder, "large").absolute()
        num_rows = enlarged(package, large, column, gigabytes)
        starts = [_start(large) for _ in range(rounds)]
        shared = _shared(large, column, num_rows)
    record: dict[str, Any] = {
        "benchmark": "large_tables",
        "gigabytes": gigabytes,
        "seconds": float(np.median([start["seconds"] for start in starts])),
        "resident_gb": max(start["resident_gb"] for start in starts),
        **shared,
    }
    record["passes"] = (
        record["seconds"] < MAX_SECONDS
        and record["resident_gb"] < MAX_GB
        and record["shared"] >= MIN_SHARED
    )
    write_result(_result(record), results)
    return bool(record["passes"])


def _start(package: Path) -> dict[str, float]:
    """Start a server; return the seconds until it is ready, and its gigabytes then."""
    start = time.perf_counter()
    with served(package) as (pid, _, _):
        seconds = time.perf_counter() - start
        process = psutil.Process(pid)
        return {"seconds": seconds, "resident_gb": process.memory_info().rss / 1e9}


def _shared(package: Path, column: str, num_rows: int) -> dict[str, float]:
    """Let two workers read the same rows; return the share of the pages that they share."""
    request = json.loads((package / REQUEST).read_text())
    rows = np.random.default_rng(0).integers(num_rows, size=ROWS_READ)
    item = read_manifest(package, verify=False).target_item
    candidates = request["candidates"][:1] * 500
    del request["user"][column]
    file = package / "tables" / f"{column}.vectors"
    with served(package, workers=2) as (pid, port, _):
        workers = [
            child
            for child in psutil.Process(pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        while min(mapped(worker, file).resident for worker in workers) < 4 * ROWS_READ * 0.9:
            for first in range(0, ROWS_READ, len(candidates)):
                ids = rows[first : first + len(candidates)].tolist()
                columns = {item: candidates[: len(ids)], column: ids}
                _rank(port, request | {"candidates": columns})
        memory_maps = [mapped(worker, file) for worker in workers]
        memory = [worker.memory_full_info() for worker in workers]
    resident, proportional = (
        sum(getattr(mapping, name) for mapping in memory_maps)
        for name in ("resident", "proportional")
    )
    # Pages that two processes share count half in each.
    return {
        "table_mb_read": resident / len(memory_maps) / 1e3,
        "shared": 2 * (1 - proportional / resident),
        "two_workers_gb": sum(usage.pss for usage in memory) / 1e9,
    }


def _rank(port: int, request: dict[str, Any]) -> None:
    url, body = f"http://127.0.0.1:{port}/v1/rank", json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body)) as response:
        response.read()


def _result(record: dict[str, Any]) -> Result:
    aims = [
        ("start of the server, s", record["seconds"], f"< {MAX_SECONDS:g}"),
        ("resident before any request, GB", record["resident_gb"], f"< {MAX_GB:g}"),
        ("share of read pages in memory once, two workers", record["shared"], f">= {MIN_SHARED}"),
        ("proportional memory of both workers after reading, GB", record["two_workers_gb"], ""),
    ]
    rows = [[name, f"{value:.2f}", aim] for name, value, aim in aims]
    reading = [
        f"A table of {record['gigabytes']:g} GB in the package, `--verify false`; both workers "
        f"have read {record['table_mb_read']:.0f} MB of it. "
        f"{'All aims are reached' if record['passes'] else 'An aim is missed'}."
    ]

    title = "A server of large tables"
    return Result("large_tables", title, [record], ["", "value", "aim"], rows, None, reading)


if __name__ == "__main__":
    sys.exit(0 if auto_cli(large_tables, as_positional=False) else 1)
