"""Choose between the native kernels and the PyTorch reference, and compile the C++ once.

The setting `kernels` chooses. The compiled library is in `TORCH_EXTENSIONS_DIR`, under a hash of
all that decides its content. A module with a kernel names it as `kernel`, and has a method
`kernel_refusal`, which says why PyTorch computes it in every step, or returns None.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from recsys.kernels.operators import FLOATS, is_forward_mode

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpp"
VERSION_SECONDS = 60.0  # the most that a compiler takes to print its version
# No -ffast-math: sums keep the order in which they are written, so that results are equal to the
# last bit in every run and for any number of threads.
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class CompileError(Exception):
    """Says in a line why the kernels could not be compiled or loaded."""


def library_file() -> Path:
    """Return the file of the compiled kernels; without a compiler a CompileError is raised."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    compiler = _compiler()
    version = _run([*compiler, "--version"], VERSION_SECONDS).stdout
    inputs = [*compiler, str(shutil.which(compiler[0])), version, *FLAGS]
    inputs += [torch.__version__, platform.machine(), _processor()]
    inputs += [path.read_text() for path in sorted(SOURCES.rglob("*.*"))]
    digest = hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:16]
    return root / f"recsys_kernels_{digest}" / "kernels.so"


def load_kernels() -> None:
    """Register the C++ kernels with torch; unless a build exists, compile them or CompileError.

    If several processes need the kernels at once, one compiles and the others wait.
    """
    library = library_file()
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with _locked(library.parent / "lock"):
                if not library.exists():
                    _compile(library)
        torch.ops.load_library(str(library))
    except OSError as error:  # also from dlopen
        raise CompileError(_first_line(str(error))) from error


def build_state() -> str:
    """Return a line on the compiled kernels: their file, or why there is none."""
    try:
        library = library_file()
    except CompileError as error:
        return f"none, PyTorch computes in their place: {error}"
    if library.exists():
        return f"compiled, {library}"
    return "not compiled yet; the first job on CPU does it, or `recsys doctor --compile`"


def _locked(file: Path) -> AbstractContextManager[object]:
    """Take a lock that the end of a `with` block, or of the process, releases."""
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for the process that compiles the kernels and holds %s", file)
        return lock.acquire()


def _compiler() -> list[str]:
    command = os.environ.get("CXX", "c++")
    try:
        return shlex.split(command) or ["c++"]
    except ValueError as error:
        raise CompileError(f"CXX is {command!r}: {error}") from error


def _run(command: list[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"}  # the same text in every language
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} took more than {seconds:.0f} s") from error
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
    """Compile each source by a process of its own, as many at once as there are cores, and link."""
    # Imported here, as it imports setuptools, which a process with a build does not need.
    from torch.utils import cpp_extension

    compiler = [*_compiler(), *FLAGS]
    # Torch's headers are system headers to the compiler, which hides their warnings.
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    sources = sorted(SOURCES.rglob("*.cpp"))
    num_cores = len(os.sched_getaffinity(0))
    logger.info(
        f"compiling the kernels by {compiler[0]} on {num_cores} cores, once per machine: up to a "
        "minute of one core"
    )
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=library.parent) as name,
        ThreadPoolExecutor(num_cores) as pool,
    ):
        objects = [Path(name, f"{number}.o") for number in range(len(sources))]
        commands = [
            [*compiler, *includes, "-c", str(source), "-o", str(built)]
            for source, built in zip(sources, objects, strict=True)
        ]
        processes = list(pool.map(_run, commands))
        linked = Path(name, library.name)
        command = [*compiler, "-shared", *map(str, objects), "-o", str(linked), *libraries]
        processes.append(_run([*command, "-ltorch_cpu", "-lc10"]))
        linked.replace(library)
    if warnings := "".join(process.stderr for process in processes).strip():
        logger.warning("%s warns of the kernels:\n%s", compiler[0], warnings)
    seconds = time.monotonic() - start
    logger.info("kernels compiled with %s in %.1f s: %s", compiler[0], seconds, library)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


Kernels = Literal["auto", "torch", "native"]

# Duration of a whole training step without the kernel, relative to one with it.
COSTS = {
    "target_attention": "1.3 to 3 times as long",
    "content_interest": "1.1 to 1.3 times as long",
    "dot_interaction": "1.1 to 1.3 times as long",
    "fusion": "1.1 to 1.2 times as long",
}


class _KernelChoice:
    kernels: Kernels = "auto"
    are_loaded: bool | None = None  # None: not tried yet


def choose_kernels(kernels: Kernels, device: str = "cpu") -> None:
    """Set the kernels of this process; models read it at each call.

    auto: native kernels where they compile; torch: PyTorch; native: kernels, or a ValueError if
    they cannot be compiled. On CUDA PyTorch computes.
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


@cache
def log_refusal(kernel: str, refusal: str) -> None:
    """Log once that PyTorch computes an operator in the place of a kernel, and what that costs."""
    logger.info("no kernel for %s: %s; a step takes %s", kernel, refusal, COSTS[kernel])


def _kernel_refusals(model: nn.Module) -> set[tuple[str, str | None]]:
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "kernel_refusal")]
    return {(module.kernel, module.kernel_refusal()) for module in modules}


def refused_kernels(model: nn.Module) -> list[tuple[str, str]]:
    """Return each operator of a model that its settings leave to PyTorch, and the reason."""
    refusals = _kernel_refusals(model)
    return sorted((kernel, reason) for kernel, reason in refusals if reason is not None)


def prepare_kernels(model: nn.Module, kernels: Kernels, device: str) -> None:
    """Call `choose_kernels`, and compile those of a model before its first step.

    A line of the log names each operator whose settings leave it to PyTorch.
    """
    choose_kernels(kernels, device)
    if kernels == "torch" or device != "cpu":
        return
    for kernel, refusal in refused_kernels(model):
        log_refusal(kernel, refusal)
    if any(refusal is None for _, refusal in _kernel_refusals(model)):
        _are_loaded()


def has_native(*tensors: Tensor) -> bool:
    """Return whether native kernels compute these inputs: on CPU, and no float64.

    The first call loads them. PyTorch computes forward-mode derivatives and graphs of torch.export.
    """
    if _KernelChoice.kernels == "torch" or torch.compiler.is_exporting() or is_forward_mode():
        return False
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return False
    return all(tensor.device.type == "cpu" for tensor in tensors) and _are_loaded()


def has_built(tensor: Tensor) -> bool:
    """Return whether kernels that were compiled before compute this tensor: on CPU."""
    return tensor.device.type == "cpu" and _KernelChoice.kernels != "torch" and _are_built()


@cache
def _are_built() -> bool:
    if _KernelChoice.are_loaded is None and not (state := build_state()).startswith("compiled"):
        logger.info("requests to models with target attention are slower: kernels are %s", state)
        return False
    return _are_loaded()


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


# As torch.compiler.assume_constant_result does, which imports the compiler: half a second.
_are_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]
