"""Components of torchx: their jobs, and what they print for Kubernetes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx.specs import AppDef, macros
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import get_component

from tests.ranks import HANG_SECONDS

COMPONENTS = Path(__file__).parents[2] / "launch" / "components.py"
FAKE_COMMAND = """
import os, signal, sys
if "--kill-once" in sys.argv and os.environ["RANK"] == "1":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {sys.argv[1:]}", flush=True)
print(f"threads {os.environ['OMP_NUM_THREADS']}, python {sys.executable}", flush=True)
if "--fail" in sys.argv and os.environ["RANK"] == "1":
    raise ValueError("rank 1 says why")
"""


def component(command: str, *arguments: str) -> AppDef:
    """The job torchx makes of `torchx run launch/components.py:COMMAND ARGUMENTS`."""
    component = get_component(f"{COMPONENTS}:{command}")
    return materialize_appdef(component.fn, list(arguments))


def run_torchx(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs torchx on this machine in a folder with a stand-in for the project."""
    (folder / "recsys").mkdir()
    (folder / "recsys" / "__init__.py").touch()
    (folder / "recsys" / "cli.py").write_text(FAKE_COMMAND)
    (folder / "launch").mkdir()
    shutil.copy(COMPONENTS, folder / "launch")
    torchx = Path(sys.executable).parent / "torchx"
    # As after `.venv/bin/torchx` without activation: the environment's folder is not on PATH.
    env = {**os.environ, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "3"}
    env.pop("PYTHONPATH", None)
    command = [str(torchx), "run", "-s", "local_cwd", *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "cache"])
def test_each_component_runs_its_command_with_everything_after_the_dashes(command: str) -> None:
    job = component(command, "--nproc", "4", "--nnodes", "2", "--", "--out", "my run", "--lr", "1")
    (role,) = job.roles
    assert (job.name, role.name, role.num_replicas) == (f"recsys-{command}", command, 2)
    assert role.args[-1].endswith(f" -m -- recsys.cli {command} --out 'my run' --lr 1")
    assert " --nnodes 2 --nproc_per_node 4 " in role.args[-1]


def test_a_benchmark_is_named_first_and_runs_as_a_module() -> None:
    job = component("benchmark", "--nproc", "2", "--", "throughput", "--out", "my run")
    assert (job.name, job.roles[0].name) == ("recsys-benchmark", "benchmark")
    assert job.roles[0].args[-1].endswith(" -m -- benchmarks.throughput --out 'my run'")
    assert " --nproc_per_node 1 " in component("benchmark", "--", "ladder").roles[0].args[-1]


def test_resources_image_environment_and_retries_reach_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBATCH_GPUS", "")  # restored after the test
    job = component(
        "train",
        *("--nproc", "8", "--gpu", "8", "--cpu", "96", "--memMB", "64000"),
        *("--image", "registry/recsys:1", "--env", "A=1,B=2", "--max_retries", "3"),
        *("--name", "experiment/seed1", "--mounts", "type=bind,src=/data,dst=/mnt,readonly"),
    )
    (role,) = job.roles
    resource = role.resource
    assert (resource.cpu, resource.gpu, resource.memMB) == (96, 8, 64000)
    assert (role.image, role.max_retries, job.name) == ("registry/recsys:1", 3, "seed1")
    assert (role.env["A"], role.env["B"]) == ("1", "2")
    assert role.mounts[0].dst_path == "/mnt"
    assert os.environ["SBATCH_GPUS"] == "8"  # of each node; without it sbatch refuses the job


def test_a_job_in_an_image_says_how_many_gpus_its_containers_get() -> None:
    with pytest.raises(ValueError, match=r"without --gpu.*give --gpu 4, .*--gpu 0"):
        component("train", "--nproc", "4", "--image", "registry/recsys:1")
    role = component("train", "--image", "registry/recsys:1", "--gpu", "0").roles[0]
    assert role.resource.gpu == 0


def test_a_scheduler_is_asked_for_no_more_than_the_user_asks_for() -> None:
    resource = component("train").roles[0].resource
    assert (resource.cpu, resource.gpu, resource.memMB) == (-1, 0, -1)


def variable_of_ranks(name: str, *arguments: str, cores: int = 2, **env: str) -> str:
    """What a variable is for the ranks on a node of so many cores, where `env` is set already."""
    role = component("train", *arguments).roles[0]
    role = macros.Values("", app_id="job", replica_id="0", rank0_env="FIRST").apply(role)
    before_torchrun, _ = role.args[-1].split("exec torchrun")
    script = f"nproc() {{ echo {cores}; }}; {before_torchrun} echo ${name}"
    env = {"PATH": "/usr/bin:/bin", **role.env, **env}
    return subprocess.check_output(["bash", "-c", script], env=env, text=True).strip()


def test_ranks_share_the_cores_of_their_node() -> None:
    def threads(*arguments: str) -> str:
        return variable_of_ranks("OMP_NUM_THREADS", *arguments, cores=12)

    assert threads("--nproc", "4") == "3"
    assert threads("--nproc", "16") == "1"
    assert threads("--nproc", "4", "--cpu", "96") == "24"


def test_the_users_number_of_threads_wins() -> None:
    assert variable_of_ranks("OMP_NUM_THREADS", OMP_NUM_THREADS="5") == "5"
    assert variable_of_ranks("OMP_NUM_THREADS", "--env", "OMP_NUM_THREADS=7") == "7"


def test_a_value_with_commas_reaches_the_ranks_without_slurms_list_of_variables() -> None:
    arguments = ("--env", "NCCL_SOCKET_IFNAME=eth0,eth1,A=1")
    assert variable_of_ranks("NCCL_SOCKET_IFNAME", *arguments) == "eth0,eth1"
    declared = component("train", *arguments).roles[0].env
    assert declared["A"] == "1"
    assert not any("," in value for value in declared.values())


def test_torchrun_restarts_as_often_as_the_scheduler() -> None:
    assert component("train").roles[0].env["PET_MAX_RESTARTS"] == "0"
    role = component("train", "--max_retries", "3").roles[0]
    assert (role.env["PET_MAX_RESTARTS"], role.max_retries) == ("3", 3)


def test_several_nodes_meet_at_the_port_of_the_first() -> None:
    role = component("train", "--nnodes", "2", "--rdzv_port", "29700").roles[0]
    assert " --rdzv_endpoint $${${rank0_env}:=localhost}:29700 " in role.args[-1]
    assert " --rdzv_endpoint localhost:0 " in component("train").roles[0].args[-1]


def test_a_negative_number_of_retries_is_refused() -> None:
    with pytest.raises(ValueError, match="--max_retries -1"):
        component("train", "--max_retries", "-1")


def test_a_failing_rank_fails_the_job_and_shows_its_cause(tmp_path: Path) -> None:
    process = run_torchx(tmp_path, "launch/components.py:evaluate", "--", "--fail")
    assert process.returncode != 0
    assert "ValueError: rank 1 says why" in process.stderr


def test_a_job_whose_rank_is_killed_is_restarted(tmp_path: Path) -> None:
    job = ("launch/components.py:train", "--nproc", "2", "--max_retries", "1")
    process = run_torchx(tmp_path, *job, "--", "--out", "a $b c", "--kill-once")
    assert process.returncode == 0, process.stderr
    assert "exitcode: -9" in process.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2: ['train', '--out', 'a $b c', '--kill-once']" in process.stderr
    assert f"threads 3, python {sys.executable}" in process.stderr


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
    argv = ["run", "--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=training"]
    command = [torchx, *argv, "launch/components.py:train", *JOB.split()]
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
