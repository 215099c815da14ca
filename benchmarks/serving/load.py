"""An open load on a server whose package is exchanged again and again.

Requests start at random times that do not wait for answers, and their seconds count from the time
at which they should start: a server that falls behind shows it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch

from benchmarks.serving.server import served
from recsys.serving.package import GRAPH, MANIFEST, read_manifest, write_manifest


def load(
    package: Path, request: dict[str, Any], seconds: float, rate: float, swap_every: float
) -> dict[str, Any]:
    """Send requests to a server whose package is exchanged; return what was seen.

    Args:
        package: the package; a copy with another graph takes turns with it.
        request: the request.
        seconds: how long.
        rate: requests per second on average, at random times.
        swap_every: seconds between exchanges.
    """
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        link, copy = Path(folder, "package"), Path(folder, "copy")
        _write_another(package, copy)
        link.symlink_to(package.absolute())
        with served(link) as (pid, port, _):
            process = psutil.Process(pid)
            before = process.memory_info().rss
            seen = asyncio.run(_open_load(port, request, seconds, rate, link, swap_every))
            return {
                **seen,
                "rate": rate,
                "resident_mb": [round(of / 1e6) for of in (before, process.memory_info().rss)],
            }


def _write_another(package: Path, copy: Path) -> None:
    """Write a package with a graph of other weights, which a server must load anew."""
    shutil.copytree(package, copy, copy_function=os.link)
    manifest, program = read_manifest(copy, verify=False), torch.export.load(copy / GRAPH)
    for path in (copy / MANIFEST, copy / GRAPH):
        path.unlink()  # the link, not the file of the other package
    with torch.no_grad():
        next(weight for weight in program.state_dict.values() if weight.is_floating_point()).mul_(2)
    torch.export.save(program, copy / GRAPH)
    write_manifest(copy, replace(manifest, created=f"{manifest.created}, again"))


async def _open_load(
    port: int, request: dict[str, Any], seconds: float, rate: float, link: Path, swap_every: float
) -> dict[str, Any]:
    """Send requests at times that do not wait for answers."""
    times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, int(seconds * rate)))
    body, url = json.dumps(request), f"http://127.0.0.1:{port}/v1/rank"
    taken, failed, versions = list[float](), Counter[str](), Counter[str]()
    start = time.perf_counter()

    async def send(session: aiohttp.ClientSession, due: float) -> None:
        """Send a request and note its milliseconds since it was due."""
        try:
            async with session.post(url, data=body) as response:
                answer = await response.json()
            taken.append((time.perf_counter() - start - due) * 1e3)
            versions[answer.get("model_version", f"status {response.status}")] += 1
            if response.status != 200:
                failed[str(response.status)] += 1
        except (aiohttp.ClientError, OSError) as error:
            failed[type(error).__name__] += 1

    async def exchange() -> None:
        """Exchange the package for ever."""
        packages = itertools.cycle([link.with_name("copy"), link.resolve()])
        for package in packages:
            await asyncio.sleep(swap_every)
            (new := link.with_name("new")).symlink_to(package)
            new.replace(link)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        exchanging, tasks = asyncio.create_task(exchange()), []
        for due in times.tolist():
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(session, due)))
        await asyncio.gather(*tasks)
        exchanging.cancel()
    return {
        "seconds": seconds,
        "requests": len(times),
        "failed": dict(failed),
        "versions": dict(versions),
        "p50": float(np.percentile(taken, 50)),
        "p99": float(np.percentile(taken, 99)),
    }
