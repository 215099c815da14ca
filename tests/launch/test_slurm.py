"""A training job under a real Slurm: two nodes, one lost on the way, from torchx to the metrics."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datasets import write_dataset
from tests.launch.slurm_cluster import SlurmCluster, slurm_cluster, why_no_cluster
from tests.ranks import HANG_SECONDS

ROOT = Path(__file__).parents[2]
NUM_ROWS = {"train": 403, "valid": 41, "test": 37}
EPOCHS, STEPS_PER_EPOCH = 3, 26  # of eight rows on each of two ranks


pytestmark = pytest.mark.long


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    if reason := why_no_cluster(tmp_path):
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster


def submit(cluster: SlurmCluster, folder: Path, *argv: str) -> str:
    """Submits `recsys train` on two nodes, from an empty folder; the job's number."""
    (folder / "empty").mkdir()
    torchx = Path(sys.executable).parent / "torchx"
    scheduler = f"-s slurm -cfg partition=debug,job_dir={folder}/job"
    component = f"{ROOT}/launch/components.py:train --nnodes 2 --nproc 1"
    # Once it is submitted torchx asks `sacct` how the job is, which fails without accounting.
    script = f"{torchx} run {scheduler} {component} {' '.join(argv)} || true"
    printed = cluster.run(["bash", "-c", f"cd {folder}/empty; {script}"], OMP_NUM_THREADS="1")
    return printed.strip().removeprefix("slurm://torchx/")


def test_a_job_trains_on_two_nodes_and_goes_on_after_the_loss_of_one(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "data", NUM_ROWS)
    run = tmp_path / "run"
    paths = f"--config {ROOT}/recsys/recipes/tiny.yaml --data file://{tmp_path}/data --out {run}"
    settings = (
        f"--epochs {EPOCHS} --patience 9 --batch_size 8 --device cpu --cache {tmp_path}/cache"
    )
    resources = ("--cpu", "1", "--gpu", "2", "--memMB", "2000")
    job = submit(cluster, tmp_path, *resources, "--", paths, settings, "--checkpoint.every_steps 3")

    described = cluster.run(["scontrol", "show", "job", job])
    assert described.count("ReqTRES=cpu=1,mem=2000M,node=1") == 2
    assert described.count("TresPerTask=cpu=1,gres/gpu=2") == 2

    deadline = time.monotonic() + HANG_SECONDS
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, output(tmp_path / "job")
        time.sleep(0.1)
    lost = cluster.machines[1]
    lost.lose()
    cluster.wait_for_state(lost, "down*")
    lost.come_back()
    cluster.start_node(lost)
    cluster.wait_for_job(job)

    assert "Restarts=1" in cluster.run(["scontrol", "show", "job", job])
    assert "after step" in output(tmp_path / "job")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["train"]["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert metrics["test"]["num_samples"] == NUM_ROWS["test"]


def output(job_dir: Path) -> str:
    """What the job wrote, node by node."""
    return "".join(path.read_text() for path in sorted(job_dir.glob("slurm-*")))
