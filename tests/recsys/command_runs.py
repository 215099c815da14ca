"""Runs of the commands as users start them: torchx and torchrun in processes of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.datasets import write_dataset
from tests.ranks import HANG_SECONDS

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recsys" / "recipes" / "tiny.yaml"
# Numbers that no number of ranks and no batch size divides.
NUM_ROWS = {"train": 61, "valid": 25, "test": 23}


@dataclass(frozen=True)
class TrainedRun:
    """A dataset, the run trained on it over two ranks, and what the command printed."""

    data: Path
    run: Path
    output: str


def train_words(data: Path, out: Path, *more: str) -> list[str]:
    """The words of `recsys train` for the tiny recipe, its cache beside the run."""
    words = ["train", "--config", str(TINY), "--data", str(data), "--out", str(out)]
    words += ["--cache", str(out.parent / "cache"), "--batch_size", "8", "--device", "cpu"]
    return [*words, *more]


def run_program(
    program: str, *words: str, seconds: float = HANG_SECONDS
) -> subprocess.CompletedProcess[str]:
    """A program of this environment, in the root of the project."""
    folder = Path(sys.executable).parent
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(folder / program), *words]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
    )


def torchrun(
    world_size: int, *words: str, seconds: float = HANG_SECONDS
) -> subprocess.CompletedProcess[str]:
    """`recsys` on some ranks; `--` keeps torchrun from reading `--run` as its `--run-path`."""
    ranks = ["--standalone", "--nproc-per-node", str(world_size)]
    return run_program("torchrun", *ranks, "-m", "--", "recsys.cli", *words, seconds=seconds)


def torchx(component: str, nproc: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`torchx run` of one of the project's components on this machine."""
    job = ["-s", "local_cwd", f"launch/components.py:{component}", "--nproc", str(nproc)]
    return run_program("torchx", "run", *job, "--", *words)


def assert_same_metrics(report: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to 1e-6, parts such as `cold` too."""
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_metrics(report[name], value)
        else:
            assert report[name] == pytest.approx(value, abs=1e-6), name


def train_by_torchx(folder: Path) -> TrainedRun:
    """Trains the tiny recipe in a folder, or returns what an earlier call has trained there."""
    data, run, output = folder / "data", folder / "run", folder / "output.txt"
    if not output.exists():
        write_dataset(data, NUM_ROWS)
        _, *words = train_words(data, run, "--epochs", "2", "--log_every_steps", "1")
        done = torchx("train", 2, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        output.write_text(done.stdout + done.stderr)
    return TrainedRun(data, run, output.read_text())
