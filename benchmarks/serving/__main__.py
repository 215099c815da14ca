"""Measure latency of a package (exported graph, scorer, HTTP, gRPC), and of a server under load.

    python -m benchmarks.serving --package packages/movielens
    python -m benchmarks.serving --package packages/movielens --load_seconds 300

One thread scores. Scorer and server start several times, as equal processes differ by milliseconds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli

from benchmarks.results import RESULTS, Result, write_result
from benchmarks.serving.load import NEAR, load, ratio_of_constant_times
from benchmarks.serving.server import (
    HTTPClient,
    graph_call,
    grpc_client,
    latencies,
    request_for,
    served,
)
from recsys.serving import Scorer

GRAPH, SCORER, REST, GRPC = "exported graph", "scorer", "HTTP, JSON", "gRPC"
MAX_TIMES_THE_GRAPH, MAX_MILLISECONDS_OF_HTTP, MAX_TIMES_THE_MEDIAN = 1.3, 3.0, 5.0


def serving(
    package: Path,
    history: int = 200,
    candidates: int = 500,
    rounds: int = 100,
    starts: int = 5,
    load_seconds: float = 0,
    share: float = 0.7,
    swap_every: float = 20,
    results: Path = RESULTS,
) -> None:
    """Measure the latencies in turns, then the load, and write table and plot.

    Args:
        package: a package of `recsys export`.
        history: items of the user's histories.
        candidates: items to rank.
        rounds: requests of each way after each start.
        starts: how often scorer and server are started.
        load_seconds: length of the load; 0: none.
        share: rate of the load as a share of the rate of HTTP, one request after the other.
        swap_every: seconds between exchanges of the package under load.
        results: folder to write to.
    """
    torch.set_num_threads(1)
    scorer = Scorer.load(package)
    request = request_for(package, scorer, history, candidates)
    times = [_latencies_of_start(package, request, rounds) for _ in range(starts)]
    observed = None
    if load_seconds:
        rate = share * 1e3 / float(np.mean([start_times[REST] for start_times in times]))
        observed = load(package, request, load_seconds, rate, swap_every)
        observed["constant"] = ratio_of_constant_times(load_seconds, rate, share)
    write_result(_result(scorer, request, times, observed, swap_every), results)


def _latencies_of_start(
    package: Path, request: dict[str, Any], rounds: int
) -> dict[str, np.ndarray]:
    scorer = Scorer.load(package)
    with served(package) as (_, port, grpc_port):
        calls: dict[str, Callable[[], object]] = {
            GRAPH: graph_call(scorer, request),
            SCORER: lambda: scorer.score(**request),
            REST: HTTPClient(port, request),
            GRPC: grpc_client(grpc_port, scorer, request),
        }
        return latencies(calls, rounds)


def _result(
    scorer: Scorer,
    request: dict[str, Any],
    starts: list[dict[str, np.ndarray]],
    observed: dict[str, Any] | None,
    swap_every: float,
) -> Result:
    times = {
        name: np.concatenate([start_times[name] for start_times in starts]) for name in starts[0]
    }

    p50 = {name: float(np.median(values)) for name, values in times.items()}
    p99 = {name: float(np.percentile(values, 99)) for name, values in times.items()}
    differences = sorted(
        float(np.median(start_times[REST]) - np.median(start_times[SCORER]))
        for start_times in starts
    )
    history = request["history"].get(scorer.schema.history, ())
    manifest = scorer.manifest
    kinds = ["compiled"] * bool(manifest.compiled) + ["bf16"] * (manifest.precision == "bf16")
    model = f"{manifest.ranking}, {len(history)} history items"
    reading = [
        f"{model}, {len(request['candidates'])} candidates, one thread, {len(starts)} starts of "
        f"scorer and server. The scorer takes {p50[SCORER] / p50[GRAPH]:.2f} times the graph (aim: "
        f"at most {MAX_TIMES_THE_GRAPH}). HTTP adds {float(np.median(differences)):.2f} ms, "
        f"median of starts ({differences[0]:.2f} to {differences[-1]:.2f}; aim: at most "
        f"{MAX_MILLISECONDS_OF_HTTP})."
    ]
    if observed:
        reading.append(_reading_of_load(observed, swap_every))
    return Result(
        name="_".join(["serving", *kinds]),
        title=f"Latency of a package{', ' * bool(kinds)}{', '.join(kinds)}: one user, one thread",
        records=[
            {
                "way": name,
                "p50": p50[name],
                "p99": p99[name],
                "p50_of_starts": [float(np.median(start_times[name])) for start_times in starts],
                "load": observed if name == REST else None,
            }
            for name in times
        ],
        columns=["way", "p50, ms", "p99, ms"],
        rows=[[name, f"{p50[name]:.2f}", f"{p99[name]:.2f}"] for name in times],
        reading=reading,
    )


def _reading_of_load(observed: dict[str, Any], swap_every: float) -> str:
    near_p99 = observed["p99_near_exchanges"]
    near_text = "" if near_p99 is None else f" ({near_p99:.1f} within {NEAR:g} s of an exchange)"
    megabytes = [resident for _, resident in observed["resident_mb"]]
    later = [resident for moment, resident in observed["resident_mb"] if moment > swap_every + NEAR]
    growth = f"{later[0]:.0f} MB after the first exchange, " if later else ""
    mixed = sum(number - 1 for number in observed["different_scores"].values())
    p50, p99 = observed["p50"], observed["p99"]
    return (
        f"{observed['rate']:.1f} requests per second at random times for "
        f"{observed['seconds']:.0f} s, an exchange every {swap_every:g} s: "
        f"{observed['requests']:,} requests, failed: {observed['failed'] or 'none'}; "
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms{near_text}, {p99 / p50:.1f} times p50 (aim: at most "
        f"{MAX_TIMES_THE_MEDIAN}; {observed['constant']:.1f} if each request took the same time, "
        f"of waiting alone); {len(observed['versions'])} versions of the package answered, "
        f"{mixed or 'no'} answers with scores of neither. Resident memory: {megabytes[0]:.0f} MB "
        f"before requests, {growth}{megabytes[-1]:.0f} MB at the end, at most "
        f"{max(megabytes):.0f} MB."
    )


if __name__ == "__main__":
    auto_cli(serving, as_positional=False)
