"""torchx components that run `recsys` commands and benchmarks on many ranks.

torchx reads options from signature and docstring (pytorch.org/torchx/latest/components);
`_component` copies those of `_job`. Arguments after `--` go to the command unchanged.
"""

import inspect
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, Dict, List, Optional

import torchx
from torchx.components import dist
from torchx.specs import AppDef


def _job(  # noqa: D417 - components copy the arguments, without the name of the role
    role_name: str,
    *args: str,
    nproc: int = 2,
    nnodes: int = 1,
    cpu: int = -1,
    gpu: int = -1,
    memMB: int = -1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    name: str = "",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> AppDef:
    """Run `python -m ARGS` on nnodes × nproc ranks.

    Only this function uses torchx's own component, since upstream renames `dist.ddp` to
    `dist.torchrun`.

    Args:
        args: arguments of the command, after `--`
        nproc: ranks per node, on GPU nodes one per GPU; may differ from the number that trained the
            model
        nnodes: number of nodes
        cpu: processor cores to request per node; -1 leaves that to the scheduler
        gpu: GPUs to request per node; -1 requests none, and is refused with an image of one's own,
            whose containers have only the GPUs that are requested
        memMB: memory to request per node, in MB; -1 leaves that to the scheduler
        max_retries: how often torchrun restarts all ranks after one failed, and the scheduler the
            job after torchrun failed or a node was lost (local_cwd: torchrun alone)
        rdzv_port: port of the first node where the nodes meet; jobs that share that node need
            different ones
        name: name of the job, `experiment/run` or `run`
        image: container image with this project installed; unused by local_cwd and slurm
        env: environment of the ranks, e.g. OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        mounts: what to mount into containers, e.g. type=bind,src=/data,dst=/data,readonly
    """
    _check_counts(nproc, nnodes, gpu, max_retries)
    if gpu < 0 and image != torchx.IMAGE:
        raise ValueError(
            f"--image {image} without --gpu: its containers would have no GPU; give --gpu {nproc}, "
            "one per rank, or --gpu 0 to train on processors"
        )
    if gpu > 0:
        # torchx requests GPUs without a number of tasks, which Slurm refuses; this is per node.
        os.environ["SBATCH_GPUS"] = str(gpu)
    # The same as --max-restarts; torchx passes its retries to the scheduler only.
    variables = {"PET_MAX_RESTARTS": str(max_retries)}
    if nnodes > 1:
        # Else a restarted node waits for the TCP store of torchrun's first start, which is gone.
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    variables |= env or {}
    job = dist.ddp(
        *args,
        # Without `--` torchrun reads options of the command as abbreviations of its own options.
        m="--",
        name=name,
        image=image,
        cpu=cpu,
        gpu=max(gpu, 0),
        memMB=memMB,
        j=f"{nnodes}x{nproc}",
        env={key: value for key, value in variables.items() if "," not in value},
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    role = job.roles[0]
    role.name = role_name
    role.args[-1] = f"{_node_setup(nproc, cpu, variables)}exec {role.args[-1]}"
    return job


def _component(**defaults: Any) -> Callable[[Callable[..., AppDef]], Callable[..., AppDef]]:
    def with_options(component: Callable[..., AppDef]) -> Callable[..., AppDef]:
        component_defaults = {"name": f"recsys-{component.__name__}", **defaults}
        _, *options = inspect.signature(_job).parameters.values()  # without the role's name
        component.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                option.replace(default=component_defaults.get(option.name, option.default))
                for option in options
            ]
        )
        _, arguments = (_job.__doc__ or "").split("    Args:")
        component.__doc__ = f"{component.__doc__}\n\n    Args:{arguments}"
        return component

    return with_options


@_component()
def train(*args: str, **options: Any) -> AppDef:
    """Train a model: `recsys train` on every rank."""
    return _job("train", "recsys.cli", "train", *args, **options)


@_component()
def evaluate(*args: str, **options: Any) -> AppDef:
    """Measure a trained model: `recsys evaluate` on every rank."""
    return _job("evaluate", "recsys.cli", "evaluate", *args, **options)


@_component()
def predict(*args: str, **options: Any) -> AppDef:
    """Score impressions with a trained model: `recsys predict` on every rank."""
    return _job("predict", "recsys.cli", "predict", *args, **options)


@_component()
def cache(*args: str, **options: Any) -> AppDef:
    """Fill the caches of item content: `recsys cache` on every rank."""
    return _job("cache", "recsys.cli", "cache", *args, **options)


@_component(nproc=1)  # ladder and scaling start ranks themselves
def benchmark(*args: str, **options: Any) -> AppDef:
    """Measure: `python -m benchmarks.NAME` on every rank; the name is the first of `args`."""
    if not args or args[0].startswith("-"):
        raise ValueError(
            "no benchmark is named; name one after `--`: benchmark -- throughput --out FOLDER"
        )
    return _job("benchmark", f"benchmarks.{args[0]}", *args[1:], **options)


def _check_counts(nproc: int, nnodes: int, gpu: int, max_retries: int) -> None:
    counts = {"nproc": (nproc, 1), "nnodes": (nnodes, 1), "max_retries": (max_retries, 0)}
    for name, (value, minimum) in counts.items():
        if value < minimum:
            raise ValueError(f"--{name} {value}; set at least {minimum}")
    if 0 < gpu < nproc:
        raise ValueError(
            f"--nproc {nproc} is more than --gpu {gpu}: each rank needs a GPU of its own; "
            f"give --nproc {gpu} or --gpu {nproc}"
        )


def _node_setup(nproc: int, cpu: int, env: Dict[str, str]) -> str:
    """Return shell code that sets PATH, variables with a comma, and threads per rank."""
    cores = str(cpu) if cpu > 0 else "$(nproc)"
    lines = [
        f'export PATH={shlex.quote(os.path.dirname(sys.executable))}:"$PATH"',
        *(f"export {key}={shlex.quote(value)}" for key, value in env.items() if "," in value),
        f"threads=$(( {cores} > {nproc} ? {cores} / {nproc} : 1 ))",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"',
    ]
    # torchx substitutes $NAME in arguments; $$ reaches the shell as $.
    return "".join(f"{line}; " for line in lines).replace("$", "$$")
