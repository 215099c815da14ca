"""Run a benchmark of a suite: `python -m benchmarks SUITE NAME --option ...`.

Without arguments, list the suites.
"""

import runpy
import sys

from recsys.config.parser import with_underscores

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
        "gains": "benchmarks.kernels.gains",
    },
    "quality": {
        "parts": "benchmarks.quality.__main__",
        "field": "benchmarks.peers.__main__",
        "neighbour-scaling": "benchmarks.quality.neighbour_scaling",
        "new-item": "benchmarks.quality.new_item",
        "next-item": "benchmarks.quality.next_item",
        "unseen-shares": "benchmarks.quality.unseen_shares",
    },
    "serving": {
        "latency": "benchmarks.serving.__main__",
        "add-items": "benchmarks.serving.add_items",
        "large-tables": "benchmarks.serving.large_tables",
        "accuracy": "benchmarks.serving.accuracy",
        "indexes": "benchmarks.retrieval",
        "generative": "benchmarks.generative",
    },
    "continual": {"ways": "benchmarks.continual.__main__"},
    "events": {
        "sizes": "benchmarks.events.__main__",
        "days": "benchmarks.events.days",
        "in-time": "benchmarks.events.in_time",
    },
}
OWN_PACKAGES = ("benchmarks", "recsys", "embeddings", "launch", "tests")


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first two arguments name, with the others as its command line."""
    suite, name = [*arguments, "", ""][:2]
    module = SUITES.get(suite, {}).get(name)
    if module is None:
        print("usage: python -m benchmarks SUITE NAME --option ...\n\nThe suites:\n")
        for title, benchmarks in SUITES.items():
            print(f"  {title}: {', '.join(benchmarks)}")
        return 2 if arguments else 0
    sys.argv = [module, *with_underscores(arguments[2:])]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OWN_PACKAGES:
            raise
        print(
            f"error: benchmark {name} needs the package {error.name}, which is not installed; "
            "`make install-dev` installs what benchmarks need",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
