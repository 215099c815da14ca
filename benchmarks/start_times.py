"""Processor time until a command answers: help, errors of arguments and files, and the doctor.

    python -m benchmarks.start_times

Each command runs in its own process. The measure is processor time, user and system, on which other
programs of the machine have less influence than on wall-clock time.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, ROOT, Result, write_result

RECIPE = "recsys/recipes/tiny.yaml"
TRAIN = f"train --config {RECIPE} --data none --out none"
# Command lines, and the most seconds that each may take.
BARS = {
    "--help": 1.0,
    "train --help": 1.0,
    f"{TRAIN} --batchsize 3": 1.0,
    f"{TRAIN} --batch_size 0": 1.0,
    TRAIN: 1.0,
    "evaluate --run none": 1.0,
    "prepare movielens --source none --out none": 1.0,
    "doctor": 4.0,
}


def cpu_seconds(words: str) -> float:
    """Return the processor time of one command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "recsys.cli", *words.split()]
    subprocess.run(command, cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_times(rounds: int = 5, results: Path = RESULTS) -> bool:
    """Measure every command and return whether all pass.

    Args:
        rounds: runs of each command, of which the median counts.
        results: folder of the page.
    """
    for words in BARS:
        cpu_seconds(words)  # reads the files that later runs find in memory
    seconds = {words: median(cpu_seconds(words) for _ in range(rounds)) for words in BARS}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(list(seconds), list(seconds.values()))
        axes.set_xlabel("seconds of processor time")

    rows = [
        (f"`recsys {words}`", f"{value:.2f}", f"{BARS[words]:g}", _verdict(words, value))
        for words, value in seconds.items()
    ]
    columns = ("command", "seconds of processor time", "bar", "")
    records = [
        {"benchmark": "start_times", "command_line": words, "seconds": value, "bar": BARS[words]}
        for words, value in seconds.items()
    ]
    write_result(Result("start_times", "Start of commands", records, columns, rows, draw), results)
    return all(value < BARS[words] for words, value in seconds.items())


def _verdict(words: str, value: float) -> str:
    return "pass" if value < BARS[words] else "miss"


if __name__ == "__main__":
    sys.exit(0 if auto_cli(start_times, as_positional=False) else 1)
