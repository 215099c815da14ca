"""Runs of the commands as users start them: torchx, torchrun and `recsys` in their own processes.

What does not test a launcher itself takes `run_recsys`, whose ranks are forked from a server that
has imported the libraries: each rank that torchrun starts spends some seconds on that.
"""

import copy
import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recsys.cli import main
from recsys.config import Config, load_config
from tests.datasets import write_dataset
from tests.ranks import HANG_SECONDS, forking_server

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


def train_argv(data: Path, out: Path, *options: str) -> list[str]:
    """The words of `recsys train` for the tiny recipe, its cache beside the run."""
    argv = ["train", "--config", str(TINY), "--data", str(data), "--out", str(out)]
    argv += ["--cache", str(out.parent / "cache"), "--batch_size", "8", "--device", "cpu"]
    return [*argv, *options]


def tiny_config(cache: Path | str, *argv: str) -> Config:
    """The tiny recipe with some settings, which is read once: that takes 0.1 s."""
    return replace(copy.deepcopy(_tiny_config(argv)), cache=str(cache))


@functools.cache
def _tiny_config(argv: tuple[str, ...]) -> Config:
    return load_config(TINY, argv)


def page_code(page: str, name: str) -> str:
    """The Python block of a folder's page that defines a class."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    (code,) = (block for block in blocks if f"class {name}" in block)
    return code


def program(name: str, *argv: str, folder: Path = ROOT, **variables: str) -> dict[str, Any]:
    """Arguments of `subprocess` for a program of this environment."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    executable = shutil.which(name, path=env["PATH"])
    return {"args": [executable, *argv], "cwd": folder, "env": env, "text": True}


def run_program(
    name: str, *argv: str, seconds: float = HANG_SECONDS, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment."""
    arguments = program(name, *argv, folder=folder, **variables)
    return subprocess.run(**arguments, capture_output=True, timeout=seconds)


def run_recsys(
    *argv: str,
    ranks: int = 1,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`recsys` alone or on some ranks, in an environment as torchrun makes it.

    A first word that ends in .py is a script, which runs in its place.
    """
    # The store of the ranks is held here, as torchrun's agent does.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = forking_server()
    with tempfile.TemporaryDirectory(prefix="recsys_") as name:
        processes = []
        for rank in range(ranks):
            env = {**os.environ, **(environment or {}), "GLOO_SOCKET_IFNAME": "lo"}
            if ranks > 1:
                env |= rank_environment(rank, ranks, store.port)
            arguments = (list(argv), env, folder, Path(name, str(rank)))
            processes.append(context.Process(target=run_rank, args=arguments, daemon=True))
        for process in processes:
            process.start()
        for process in processes:
            process.join(HANG_SECONDS)
            process.kill()
            process.join()
        output, errors = (
            "".join(Path(name, f"{rank}.{kind}").read_text() for rank in range(ranks))
            for kind in ("out", "err")
        )
    codes = [process.exitcode or 0 for process in processes]
    return subprocess.CompletedProcess(argv, max(codes, key=abs), output, errors)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives to a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def run_rank(argv: list[str], env: dict[str, str], folder: Path, output: Path) -> None:
    """The process of one rank."""
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    torch.set_num_threads(1)
    if argv[0].endswith(".py"):
        sys.path.insert(0, str(folder))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.exit(main(argv))


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
        _, *argv = train_argv(data, run, "--epochs", "2", "--log_every_steps", "1")
        job = ["-s", "local_cwd", "launch/components.py:train", "--nproc", "2"]
        process = run_program("torchx", "run", *job, "--", *argv)
        assert process.returncode == 0, process.stdout + process.stderr
        output.write_text(process.stdout + process.stderr)
    return TrainedRun(data, run, output.read_text())
