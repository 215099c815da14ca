"""torchx components that run `recsys train`, `evaluate` and `predict` over many ranks.

torchx turns a component into a job of the scheduler named by `-s`: this machine (`local_cwd`),
Slurm, Kubernetes and others. Everything after `--` goes to the command unchanged::

    torchx run -s local_cwd launch/components.py:train --nproc 2 -- \
        --config recsys/configs/movielens_sample.yaml --data DATA --out RUN

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
        max_retries: how often the scheduler may restart the job
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "train", args, nproc, nnodes, cpu, gpu, memMB, max_retries, name, image, env, mounts
    )


def evaluate(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
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
        max_retries: how often the scheduler may restart the job
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "evaluate", args, nproc, nnodes, cpu, gpu, memMB, max_retries, name, image, env, mounts
    )


def predict(
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = 0,
    memMB: int = -1,
    max_retries: int = 0,
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
        max_retries: how often the scheduler may restart the job
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    return _distributed_job(
        "predict", args, nproc, nnodes, cpu, gpu, memMB, max_retries, name, image, env, mounts
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
    name: str,
    image: str,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
) -> AppDef:
    """The job that runs `recsys COMMAND ARGS` on nnodes × nproc ranks.

    The only place that knows torchx's own component: upstream renames `dist.ddp` to
    `dist.torchrun`.
    """
    if nproc < 1 or nnodes < 1:
        raise ValueError(f"--nproc {nproc} --nnodes {nnodes}: each must be at least 1")
    if 0 < gpu < nproc:
        raise ValueError(
            f"--nproc {nproc} is more than --gpu {gpu}: each rank needs a GPU of its own; "
            f"give --nproc {gpu} or --gpu {nproc}"
        )
    ranks_env = dict(env or {})
    ranks_env.setdefault("OMP_NUM_THREADS", _threads_per_rank(nproc, cpu))
    job = dist.ddp(
        "recsys.cli",
        command,
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
        env=ranks_env,
        max_retries=max_retries,
        mounts=mounts,
    )
    role = job.roles[0]
    role.name = command
    role.args[-1] = f"{_search_path_of_this_environment()}; exec {role.args[-1]}"
    return job


def _threads_per_rank(nproc: int, cpu: int) -> str:
    """Threads of one rank: the caller's OMP_NUM_THREADS, else an equal share of the cores.

    The cores are those asked for, or this machine's where the scheduler decides.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen:
        return chosen
    cores = cpu if cpu > 0 else len(os.sched_getaffinity(0))
    return str(max(1, cores // nproc))


def _search_path_of_this_environment() -> str:
    """Shell code that lets a node find the torchrun of the environment torchx runs in.

    torchx calls `torchrun` by name, so that without an activated environment it would be missing
    or another's. Inside a container the folder does not exist, and the image's own is found.
    """
    folder = shlex.quote(os.path.dirname(sys.executable)).replace("$", "$$")
    # torchx substitutes $NAME in arguments; $$ reaches the shell as $.
    return f'export PATH={folder}:"$$PATH"'
