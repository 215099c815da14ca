"""torchx components that run `recsys train`, its other commands and benchmarks on many ranks.

torchx turns a component into a job of the scheduler named by `-s`: this machine (`local_cwd`),
Slurm, Kubernetes and others. Everything after `--` goes to the command unchanged::

    torchx run -s local_cwd launch/components.py:train --nproc 2 -- \
        --config recsys/recipes/movielens_sample.yaml --data DATA --out RUN

Every node runs torchrun with the same words; the ranks meet at the first node. What differs from
node to node, such as its number of cores, is found out there by a line of shell before torchrun.

The signatures follow torchx: it reads annotations and docstrings to build the command line and
knows only `Optional`, `Dict` and `List` as compound types
(https://pytorch.org/torchx/latest/components/overview.html).
"""

import os
import shlex
import sys
from typing import Dict, List, Optional

import torchx
from torchx.components import dist
from torchx.specs import AppDef


def train(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "recsys-train",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Trains a model: `recsys train` on every rank.

    Args:
        args: arguments of `recsys train`, after `--`
        nproc: ranks per node; on GPU nodes one per GPU
        nnodes: nodes
        cpu: processor cores to ask for per node; -1 leaves that to the scheduler
        gpu: GPUs to ask for per node
        memMB: memory to ask for per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "train",
        args,
        nproc,
        nnodes,
        cpu,
        gpu,
        memMB,
        max_retries,
        rdzv_port,
        name,
        image,
        env,
        mounts,
    )


def evaluate(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "recsys-evaluate",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Measures a trained model: `recsys evaluate` on every rank.

    Args:
        args: arguments of `recsys evaluate`, after `--`
        nproc: ranks per node; need not be the number that trained the model
        nnodes: nodes
        cpu: processor cores to ask for per node; -1 leaves that to the scheduler
        gpu: GPUs to ask for per node
        memMB: memory to ask for per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "evaluate",
        args,
        nproc,
        nnodes,
        cpu,
        gpu,
        memMB,
        max_retries,
        rdzv_port,
        name,
        image,
        env,
        mounts,
    )


def predict(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "recsys-predict",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Scores impressions with a trained model: `recsys predict` on every rank.

    Args:
        args: arguments of `recsys predict`, after `--`
        nproc: ranks per node; need not be the number that trained the model
        nnodes: nodes
        cpu: processor cores to ask for per node; -1 leaves that to the scheduler
        gpu: GPUs to ask for per node
        memMB: memory to ask for per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "predict",
        args,
        nproc,
        nnodes,
        cpu,
        gpu,
        memMB,
        max_retries,
        rdzv_port,
        name,
        image,
        env,
        mounts,
    )


def cache(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "recsys-cache",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Fills the caches of item content: `recsys cache` on every rank.

    Args:
        args: arguments of `recsys cache`, after `--`
        nproc: ranks per node; on GPU nodes one per GPU
        nnodes: nodes
        cpu: processor cores to ask for per node; -1 leaves that to the scheduler
        gpu: GPUs to ask for per node
        memMB: memory to ask for per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "cache",
        args,
        nproc,
        nnodes,
        cpu,
        gpu,
        memMB,
        max_retries,
        rdzv_port,
        name,
        image,
        env,
        mounts,
    )


def benchmark(
    *args: str,
    nproc: int = 1,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "recsys-benchmark",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Measures: `python -m benchmarks.NAME` on every rank.

    Args:
        args: the benchmark's name, such as throughput, and its arguments, after `--`
        nproc: ranks per node; 1 for benchmarks that start ranks themselves (ladder, scaling)
        nnodes: nodes
        cpu: processor cores to ask for per node; -1 leaves that to the scheduler
        gpu: GPUs to ask for per node
        memMB: memory to ask for per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    if not args or args[0].startswith("-"):
        raise ValueError(
            "name a benchmark first after `--`: benchmark ... -- throughput --out FOLDER"
        )
    return _distributed_job(
        "benchmark",
        args[1:],
        nproc,
        nnodes,
        cpu,
        gpu,
        memMB,
        max_retries,
        rdzv_port,
        name,
        image,
        env,
        mounts,
        words=(f"benchmarks.{args[0]}",),
    )


def _distributed_job(
    command: str,
    args: tuple[str, ...],
    nproc: int,
    nnodes: int,
    cpu: int,
    gpu: int,
    mem_mb: int,
    max_retries: int,
    rdzv_port: int,
    name: str,
    image: str,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    words: Optional[tuple[str, ...]] = None,
) -> AppDef:
    """The job that runs `recsys COMMAND ARGS`, or `python -m WORDS ARGS`, on nnodes × nproc ranks.

    The only place that knows torchx's own component: upstream renames `dist.ddp` to
    `dist.torchrun`.
    """
    _check_counts(nproc, nnodes, gpu, max_retries)
    if gpu > 0:
        # torchx asks Slurm for GPUs per task but leaves the number of tasks open, which Slurm
        # refuses. sbatch, which torchx starts from here, reads the GPUs of each node from this.
        os.environ["SBATCH_GPUS"] = str(gpu)
    env = {**_torchrun_environment(nnodes, max_retries), **(env or {})}
    job = dist.ddp(
        *(words or ("recsys.cli", command)),
        *args,
        # `-m -- recsys.cli ...`: without `--` torchrun takes options of ours that begin like its
        # own for abbreviations, `--run` for `--run-path`, even behind the module.
        m="--",
        name=name,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=mem_mb,
        j=f"{nnodes}x{nproc}",
        env={key: value for key, value in env.items() if "," not in value},
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    role = job.roles[0]
    role.name = command
    role.args[-1] = f"{_node_setup(nproc, cpu, env)}exec {role.args[-1]}"
    return job


def _check_counts(nproc: int, nnodes: int, gpu: int, max_retries: int) -> None:
    if nproc < 1 or nnodes < 1 or max_retries < 0:
        raise ValueError(
            f"--nproc {nproc} --nnodes {nnodes} --max_retries {max_retries}: the first two must be "
            "at least 1, the last at least 0"
        )
    if 0 < gpu < nproc:
        raise ValueError(
            f"--nproc {nproc} is more than --gpu {gpu}: each rank needs a GPU of its own; "
            f"give --nproc {gpu} or --gpu {nproc}"
        )


def _torchrun_environment(nnodes: int, max_retries: int) -> Dict[str, str]:
    """Options of torchrun that torchx's component does not pass on."""
    # The same as --max-restarts; torchx tells its retries to the scheduler only.
    options = {"PET_MAX_RESTARTS": str(max_retries)}
    if nnodes > 1:
        # The store that torchrun lends to the ranks is announced to the nodes of the first start
        # alone: one that comes back waits for it in vain, and then all nodes end. With this, rank
        # 0 makes a new store in each start.
        options["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return options


def _node_setup(nproc: int, cpu: int, env: Dict[str, str]) -> str:
    """Shell code that each node runs before torchrun.

    It finds the torchrun of the environment torchx runs in: torchx calls it by name, so that
    without an activated environment it would be missing or another's. Inside a container the
    folder does not exist, and the image's own is found. It sets variables whose value has a comma,
    where Slurm's `--export=NAME=VALUE,...` would end it. And it shares the node's cores, or those
    asked for, among the ranks; the number of threads that is set already wins.
    """
    cores = str(cpu) if cpu > 0 else "$(nproc)"
    lines = [
        f'export PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH"',
        *(f"export {key}={shlex.quote(value)}" for key, value in env.items() if "," in value),
        f"threads=$(( {cores} > {nproc} ? {cores} / {nproc} : 1 ))",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"',
    ]
    # torchx substitutes $NAME in arguments; $$ reaches the shell as $.
    return "".join(f"{line}; " for line in lines).replace("$", "$$")
