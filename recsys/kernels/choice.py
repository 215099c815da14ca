"""Choose between the native kernels and the PyTorch reference, and compile the C++ once.

The setting `kernels` chooses. The compiled library is in `TORCH_EXTENSIONS_DIR`, under a hash of
all that decides its content.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from recsys.kernels.operators import FLOATS, is_forward_mode

logger = logging.getLogger(__name__)


SOURCES = Path(__file__).parent / "cpp"
TIME_LIMIT = 180.0  # seconds to compile, and to wait for a process that compiles
# No -ffast-math: sums keep the order in which they are written, so that results are equal to the
# last bit in every run and for any number of threads.
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class CompileError(Exception):
    """Says in a line why the kernels could not be compiled or loaded."""


def load_kernels() -> None:
    """Register the C++ kernels with torch, and compile them first unless a build exists.

    Raises:
        CompileError: no compiler is found, it fails, or it exceeds the time limit.
    """
    library = _folder() / "kernels.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.parent / "lock", timeout=TIME_LIMIT):
                if not library.exists():
                    _compile(library)
        torch.ops.load_library(str(library))
    except Timeout as error:
        raise CompileError(f"another process holds {error.lock_file}") from error
    except OSError as error:  # also from dlopen
        raise CompileError(_first_line(str(error))) from error


def _folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    parts = [*compiler, str(shutil.which(compiler[0])), version, *FLAGS]
    parts += [torch.__version__, platform.machine(), _processor()]
    parts += [path.read_text() for path in sorted(SOURCES.rglob("*.*"))]
    return root / f"recsys_kernels_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _compiler() -> list[str]:
    command = os.environ.get("CXX", "c++")
    try:
        return shlex.split(command) or ["c++"]
    except ValueError as error:
        raise CompileError(f"CXX is {command!r}: {error}") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"}  # the same text in every language
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} took more than {TIME_LIMIT:.0f} s") from error
    except OSError as error:
        raise CompileError(f"C++ compiler '{command[0]}' not found") from error
    if process.returncode:
        raise CompileError(f"{command[0]} failed: {_first_line(process.stderr)}")
    return process


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("cpu family", "flags", "Features", "model\t", "vendor_id")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _compile(library: Path) -> None:
    # Imported here, as it imports setuptools, which a process with a build does not need.
    from torch.utils import cpp_extension

    compiler = _compiler()
    # Headers of torch are those of a system, whose warnings are not ours.
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    sources = sorted(str(path) for path in SOURCES.rglob("*.cpp"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*compiler, *FLAGS, *includes, *sources, "-o", str(built)]
        process = _run([*command, *libraries, "-ltorch_cpu", "-lc10"])
        built.replace(library)
    if process.stderr.strip():
        logger.warning("%s warns of the kernels:\n%s", compiler[0], process.stderr.strip())
    logger.info(
        "kernels compiled with %s in %.1f s: %s", compiler[0], time.monotonic() - start, library
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


Kernels = Literal["auto", "torch", "native"]


class _KernelChoice:
    kernels: Kernels = "auto"
    are_loaded: bool | None = None  # None: not tried yet


def choose_kernels(kernels: Kernels, device: str = "cpu") -> None:
    """Set the kernels of this process; models read it at each call.

    auto: native kernels where they compile; torch: PyTorch; native: kernels or an error. On CUDA
    PyTorch computes.

    Raises:
        ValueError: native kernels cannot be compiled.
    """
    _KernelChoice.kernels = kernels
    if device == "cuda" and kernels != "torch":
        logger.info("kernels is %s: on CUDA PyTorch computes, as kernels exist for CPU", kernels)
    elif kernels == "native" and not _KernelChoice.are_loaded:
        try:
            load_kernels()
        except CompileError as error:
            raise ValueError(
                f"kernels is native, but {error}; install a C++ compiler (Debian: g++; another one "
                "is named by the environment variable CXX), or set kernels to auto or torch"
            ) from error
        _KernelChoice.are_loaded = True


def has_native(*tensors: Tensor) -> bool:
    """Return whether native kernels compute these inputs: on CPU, and no float64.

    The first call loads them. PyTorch computes forward-mode derivatives and graphs of torch.export.
    """
    if _KernelChoice.kernels == "torch" or torch.compiler.is_exporting() or is_forward_mode():
        return False
    if any(part.dtype not in FLOATS for part in tensors):
        return False
    return all(part.device.type == "cpu" for part in tensors) and _are_loaded()


def rounds_products(device: torch.device) -> bool:
    """Return whether autocast asks for products of bfloat16 on this device.

    Kernels then round both factors of their matrix products and add in float32.
    """
    return (
        torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type) == torch.bfloat16
    )


@torch.compiler.assume_constant_result
def _are_loaded() -> bool:
    """Load the kernels at the first call; warn in one line if that is not possible."""
    if _KernelChoice.are_loaded is None:
        try:
            load_kernels()
            _KernelChoice.are_loaded = True
        except CompileError as error:
            logger.warning(
                "native kernels are not used, PyTorch computes in their place: %s", error
            )
            _KernelChoice.are_loaded = False
    return _KernelChoice.are_loaded
