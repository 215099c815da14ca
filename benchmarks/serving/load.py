"""An open load on a server whose package is exchanged again and again.

Requests start at random times, and their latency counts from the time at which they are due.
"""

import asyncio
import itertools
import json
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import aiohttp
import numpy as np
import psutil
import torch

from benchmarks.serving.server import served
from recsys.serving.exported_graph import COMPILED, CONFIG, WEIGHTS, compile_graph
from recsys.serving.package import GRAPH, MANIFEST, read_manifest, write_manifest

SCALE = 1.01  # of the other package's weights
NEAR = 3.0  # seconds after an exchange in which requests are counted apart, too
RESIDENT_EVERY = 2.0  # seconds


@dataclass
class Load:
    """Requests to a server, its memory, and the exchanges of its package.

    link: what the server serves. scores: the different scores of answers by version.
    latencies: due time and milliseconds to its answer. resident: seconds and megabytes.
    """

    process: psutil.Process
    url: str
    body: str
    link: Path
    swap_every: float
    latencies: list[tuple[float, float]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Counter[str]] = field(default_factory=dict)
    resident: list[tuple[float, float]] = field(default_factory=list)
    start: float = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self.start

    async def run(self, times: list[float]) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            self.start = time.perf_counter()
            background = [
                asyncio.create_task(coroutine) for coroutine in (self._exchange(), self._watch())
            ]
            tasks = []
            for due in times:
                await asyncio.sleep(max(0.0, due - self._now()))
                tasks.append(asyncio.create_task(self._send(session, due)))
            await asyncio.gather(*tasks)
            for task in background:
                task.cancel()

    async def _send(self, session: aiohttp.ClientSession, due: float) -> None:
        try:
            async with session.post(self.url, data=self.body) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self.failed[type(error).__name__] += 1
            return
        self.latencies.append((due, (self._now() - due) * 1e3))
        if response.status != 200:
            self.failed[str(response.status)] += 1
            return
        ranked = json.loads(content)
        scores = json.dumps([ranked["items"], ranked["scores"]])
        self.scores.setdefault(ranked["model_version"], Counter())[scores] += 1

    async def _exchange(self) -> None:
        for package in itertools.cycle([self.link.with_name("copy"), self.link.resolve()]):
            await asyncio.sleep(self.swap_every)
            (new_link := self.link.with_name("new")).symlink_to(package)
            new_link.replace(self.link)

    async def _watch(self) -> None:
        while True:
            self.resident.append((self._now(), self.process.memory_info().rss / 1e6))
            await asyncio.sleep(RESIDENT_EVERY)


def arrivals(seconds: float, rate: float) -> np.ndarray:  # float64 [requests]
    """Return random times, the same in each run, with `rate` of them per second."""
    return np.cumsum(np.random.default_rng(0).exponential(1 / rate, int(seconds * rate)))


def ratio_of_constant_times(seconds: float, rate: float, share: float) -> float:
    """Return p99 / p50 of the same arrivals if each takes the same time: waiting alone (M/D/1)."""
    service_time = share / rate
    waiting = np.cumsum(service_time - np.diff(arrivals(seconds, rate), prepend=0.0))
    durations = waiting - np.minimum.accumulate(waiting) + service_time  # Lindley's recursion
    return float(np.percentile(durations, 99) / np.percentile(durations, 50))


def load(
    package: Path, request: dict[str, Any], seconds: float, rate: float, swap_every: float
) -> dict[str, Any]:
    """Send requests to a server whose package is exchanged; return what was seen.

    `rate` is the mean number of requests per second, `swap_every` the seconds between exchanges.
    """
    times = arrivals(seconds, rate)
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        link, copy = Path(folder, "package"), Path(folder, "copy")
        _write_scaled_package(package, copy)
        link.symlink_to(package.absolute())
        with served(link, verify="true") as (pid, port, _):
            url = f"http://127.0.0.1:{port}/v1/rank"
            sent = Load(psutil.Process(pid), url, json.dumps(request), link, swap_every)
            asyncio.run(sent.run(times.tolist()))
    due, latencies = np.array(sent.latencies).T
    is_near = (due > swap_every) & (due % swap_every < NEAR)
    return {
        "seconds": seconds,
        "rate": rate,
        "requests": len(times),
        "failed": dict(sent.failed),
        "versions": {version: counts.total() for version, counts in sent.scores.items()},
        "different_scores": {version: len(counts) for version, counts in sent.scores.items()},
        "p50": float(np.percentile(latencies, 50)),
        "p99": float(np.percentile(latencies, 99)),
        "p99_near_exchanges": float(np.percentile(latencies[is_near], 99))
        if is_near.any()
        else None,
        "p99_elsewhere": float(np.percentile(latencies[~is_near], 99)),
        "resident_mb": [[round(moment, 1), round(mb, 1)] for moment, mb in sent.resident],
    }


def _write_scaled_package(package: Path, copy: Path) -> None:
    """Write a package with other weights and other vectors of items, as a run that trained on."""
    shutil.copytree(package, copy)
    manifest = read_manifest(copy, verify=False)
    for name in (MANIFEST, GRAPH):
        (copy / name).unlink()
    _scale_weights(package / GRAPH, copy / GRAPH)
    if manifest.compiled:
        (copy / COMPILED).unlink()
        program = torch.export.load(copy / GRAPH)
        compile_graph(program, copy / COMPILED, True)
    table = copy / "tables" / f"{manifest.target_item}.vectors"
    if manifest.tables[manifest.target_item]["stored_as"] == "fp32":
        table.write_bytes((np.fromfile(table, np.float32) * np.float32(SCALE)).tobytes())
    write_manifest(copy, replace(manifest, created=f"{manifest.created}, again"))


def _scale_weights(graph: Path, out: Path) -> None:
    """Write a graph with larger parameters in float32; statistics, such as counts, stay."""
    state = torch.export.load(graph).state_dict
    with ZipFile(graph) as source, ZipFile(out, "w") as target:
        (config,) = (name for name in source.namelist() if name.endswith(f"{WEIGHTS}{CONFIG}"))
        scaled = {
            config.replace(CONFIG, record["path_name"])
            for name, record in json.loads(source.read(config))["config"].items()
            if record["is_param"] and state[name].dtype == torch.float32
        }
        for name in source.namelist():
            content = source.read(name)
            if name in scaled:
                content = (np.frombuffer(content, np.float32) * np.float32(SCALE)).tobytes()
            target.writestr(name, content)
