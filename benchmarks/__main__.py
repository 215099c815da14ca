"""Run a benchmark of a suite: `python -m benchmarks SUITE NAME --option ...`.

`python -m benchmarks` lists the suites. A benchmark's module also runs by itself, such as
`python -m benchmarks.compare`.
"""

from __future__ import annotations

import runpy
import sys

SUITES = {
    "speed": {
        "compare": "benchmarks.compare",
        "throughput": "benchmarks.throughput",
        "ladder": "benchmarks.ladder",
        "scaling": "benchmarks.scaling",
        "loader": "benchmarks.loader",
        "sequences": "benchmarks.sequences",
    },
    "kernels": {
        "operators": "benchmarks.kernels.operators",
        "steps": "benchmarks.kernels.__main__",
    },
    "quality": {
        "parts": "benchmarks.quality.__main__",
        "field": "benchmarks.peers.__main__",
    },
    "serving": {
        "latency": "benchmarks.serving.__main__",
        "add-items": "benchmarks.serving.add_items",
        "large-tables": "benchmarks.serving.large_tables",
        "accuracy": "benchmarks.serving.accuracy",
        "indexes": "benchmarks.retrieval",
    },
    "continual": {"ways": "benchmarks.continual.__main__"},
    "events": {
        "sizes": "benchmarks.events.__main__",
        "in-time": "benchmarks.events.in_time",
    },
}


def main(words: list[str]) -> None:
    """Run the benchmark that the first two words name, with the others as its command line."""
    suite, name, *options = [*words, "", ""]
    module = SUITES.get(suite, {}).get(name)
    if module is None:
        names = "\n".join(
            f"  {suite}: {', '.join(benchmarks)}" for suite, benchmarks in SUITES.items()
        )
        raise SystemExit(f"python -m benchmarks SUITE NAME --option ...; suites:\n{names}")
    sys.argv = [module, *options[: len(words) - 2]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
