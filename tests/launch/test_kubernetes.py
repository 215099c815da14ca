"""The Kubernetes job that torchx makes for two nodes of eight GPUs: its manifest, read as YAML."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import HANG_SECONDS

pytest.importorskip("kubernetes", reason="torchx builds pods with it: torchx[kubernetes]")

ROOT = Path(__file__).parents[2]
JOB = """
--nnodes 2 --nproc 8 --cpu 96 --gpu 8 --memMB 800000 --max_retries 3
--image registry.example/recsys:1 --env NCCL_DEBUG=WARN,NCCL_SOCKET_IFNAME=eth0,eth1
--mounts type=volume,src=runs,dst=/runs
-- --config /recipes/shop.yaml --data s3://bucket/shop --out /runs/shop
"""


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The manifest of `torchx run --dryrun -s kubernetes`."""
    torchx = str(Path(sys.executable).parent / "torchx")
    # Without a workspace the image is used as it is; with one, docker would add files to it.
    words = ["run", "--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=training"]
    command = [torchx, *words, "launch/components.py:train", *JOB.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "5"}
    process = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert process.returncode == 0, process.stderr
    return yaml.safe_load(process.stdout.partition("=== SCHEDULER REQUEST ===")[2])


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    pods = [task["template"]["spec"] for task in job["spec"]["tasks"]]
    return [container for pod in pods for container in pod["containers"]]


def test_each_pod_runs_eight_ranks_of_one_job_that_meet_at_the_first_pod(
    job: dict[str, Any],
) -> None:
    endpoints = []
    for container in containers(job):
        shell, option, script = container["command"]
        assert (shell, option) == ("bash", "-c")
        meeting = re.search(
            r"; exec torchrun --rdzv_backend c10d --rdzv_endpoint (\S+) --rdzv_id '(\S+)' "
            r"--nnodes 2 --nproc_per_node 8 .* -m -- recsys\.cli train "
            r"--config /recipes/shop\.yaml --data s3://bucket/shop --out /runs/shop$",
            script,
        )
        assert meeting is not None, script
        endpoints.append(meeting[1])
        assert meeting[2] == job["metadata"]["name"]
    # Volcano names the pods of task train-0 in the second variable.
    assert endpoints == [
        "${TORCHX_RANK0_HOST:=localhost}:29500",
        "${VC_TRAIN_0_HOSTS:=localhost}:29500",
    ]
    assert job["spec"]["plugins"].keys() == {"svc", "env"}
    assert containers(job)[0]["ports"] == [{"containerPort": 29500, "name": "c10d"}]
