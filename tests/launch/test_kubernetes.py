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


def test_two_pods_start_together_under_volcano(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    assert (job["spec"]["schedulerName"], job["spec"]["queue"]) == ("volcano", "training")
    tasks = job["spec"]["tasks"]
    assert [task["name"] for task in tasks] == ["train-0", "train-1"]
    assert [(task["replicas"], task["minAvailable"]) for task in tasks] == [(1, 1), (1, 1)]


def test_each_pod_gets_its_image_gpus_cores_and_memory(job: dict[str, Any]) -> None:
    for container in containers(job):
        assert container["image"] == "registry.example/recsys:1"
        limits = {"cpu": "96000m", "memory": "800000M", "nvidia.com/gpu": "8"}
        assert container["resources"]["limits"] == limits
        assert container["resources"]["requests"]["nvidia.com/gpu"] == "8"


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


def test_the_environment_is_what_the_user_gives_not_that_of_the_submitting_shell(
    job: dict[str, Any],
) -> None:
    for container in containers(job):
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert env["NCCL_DEBUG"] == "WARN"
        assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert "OMP_NUM_THREADS" not in env
        script = container["command"][2]
        assert "export NCCL_SOCKET_IFNAME=eth0,eth1; " in script
        assert "threads=$(( 96 > 8 ? 96 / 8 : 1 )); " in script


def test_runs_are_on_the_volume_that_all_pods_mount(job: dict[str, Any]) -> None:
    for task, container in zip(job["spec"]["tasks"], containers(job)):
        (mount,) = [entry for entry in container["volumeMounts"] if entry["mountPath"] == "/runs"]
        (volume,) = [
            entry for entry in task["template"]["spec"]["volumes"] if entry["name"] == mount["name"]
        ]
        assert volume["persistentVolumeClaim"]["claimName"] == "runs"
        assert not mount["readOnly"]


def test_a_failed_rank_is_restarted_in_its_pod_and_a_failed_or_evicted_pod_restarts_the_job(
    job: dict[str, Any],
) -> None:
    assert job["spec"]["maxRetry"] == 3
    for task, container in zip(job["spec"]["tasks"], containers(job)):
        assert {"name": "PET_MAX_RESTARTS", "value": "3"} in container["env"]
        assert task["template"]["spec"]["restartPolicy"] == "Never"
        policies = {policy["event"]: policy["action"] for policy in task["policies"]}
        assert policies == {"PodFailed": "RestartJob", "PodEvicted": "RestartJob"}
