"""Create a virtual environment and install this project into it, with wheels for this machine.

pip alone cannot do this on a CPU machine: torchrec requires `fbgemm-gpu`, which needs an NVIDIA
driver. This script needs only the standard library: `python3 launch/install.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
STAMP_NAME = "recsys-install.json"
PYTHON = Path("bin", "python")  # in a virtual environment
FIRST_IMPORT = """
import torch, fbgemm_gpu, torchrec
from importlib.metadata import version
print(f"torch {torch.__version__}, torchrec {version('torchrec')}, FBGEMM {fbgemm_gpu.__version__}")
"""
# Needs no driver, unlike the import of FBGEMM.
CUDA_BUILDS = """
import torch
from importlib.metadata import version
if torch.version.cuda is None or version("fbgemm-gpu").endswith("+cpu"):
    builds = "--index-url https://download.pytorch.org/whl/cu130, or another of pytorch.org"
    raise SystemExit(f"torch {torch.__version__} or FBGEMM is no build for CUDA; give {builds}")
"""
NO_DRIVER = "not imported: FBGEMM for CUDA needs an NVIDIA driver, and this machine has none"
WITHOUT_DEPENDENCIES = ("encoders", "clients")  # extras
DEVELOPMENT_EXTRAS = ("clients", "dev", "docs", "serve")


class InstallError(Exception):
    """Explains the failure and its fix to the person who runs the installation."""


def nvidia_driver_found() -> bool:
    """Return whether this machine has a working NVIDIA driver: its library or its tool runs."""
    try:
        return bool(ctypes.CDLL("libnvidia-ml.so.1"))
    except OSError:
        return succeeds(["nvidia-smi"])


def choose_flavor(requested: str, installed: str | None) -> str:
    """Return "cpu" or "cuda"; "auto" keeps what is installed, so that an explicit flavor lasts."""
    if requested != "auto":
        return requested
    return installed or ("cuda" if nvidia_driver_found() else "cpu")


def requirement_name(requirement: str) -> str:
    """Return the distribution that a requirement names: "torch" of "torch>=2.13,<2.14"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def for_cpu(requirement: str) -> str:
    """Replace FBGEMM by its CPU distribution in a requirement."""
    return re.sub(r"^fbgemm[-_.]gpu(?![-_.\w])", "fbgemm-gpu-cpu", requirement)


def installation_stages(
    pyproject: dict[str, Any],
    flavor: str,
    extras: Collection[str] = (),
    index_url: str | None = None,
    root: Path = PROJECT_ROOT,
) -> dict[str, list[str]]:
    """Return the arguments of `pip install` for the project of a pyproject.toml, by stage in order.

    Extras are those of the project and its dependency groups, such as `dev`; another one is an
    InstallError. `index_url` is for torch, and on CUDA for FBGEMM.
    """
    project = pyproject["project"]
    groups = project["optional-dependencies"] | pyproject["dependency-groups"]
    lines = [*groups.pop("torchrec"), *project["dependencies"]]
    required = {requirement_name(line): line for line in lines}
    unknown = {*extras} - groups.keys()
    if unknown:
        raise InstallError(f"--extra {min(unknown)}: there are {', '.join(sorted(groups))}")
    first = [required["torch"]]
    # Without dependencies: the CUDA wheel of FBGEMM, unused frameworks, other clients.
    names = {"encoders", *extras}
    no_deps = [line for name in WITHOUT_DEPENDENCIES if name in names for line in groups[name]]
    if flavor == "cuda":
        first.append(required["fbgemm-gpu"])
    else:
        no_deps.append(required.pop("torchrec"))
    with_deps = [for_cpu(line) if flavor == "cpu" else line for line in required.values()]
    with_deps += [line for name in sorted(names - {*WITHOUT_DEPENDENCIES}) for line in groups[name]]
    index = ["--index-url", index_url] if index_url else []
    return {
        "torch" if flavor == "cpu" else "torch and FBGEMM for CUDA": [*index, *first],
        # On a CPU machine pip would report FBGEMM's CUDA distribution as missing.
        "dependencies": ["--no-warn-conflicts", *with_deps],
        "torchrec and encoders" if flavor == "cpu" else "encoders": ["--no-deps", *no_deps],
        # Once more quiet: setuptools warns of each editable installation.
        "this project": ["--quiet", "--no-deps", "--editable", str(root)],
    }


def digest_of_inputs(root: Path = PROJECT_ROOT) -> str:
    """Return a hash of the files that determine the packages: pyproject.toml and this file."""
    inputs = (root / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(inputs).hexdigest()


@dataclass(frozen=True)
class Stamp:
    """Description of an environment and whether its installation is complete; kept inside it."""

    flavor: str
    python: str  # full version; another version cannot use the environment's packages
    location: str  # scripts in an environment name its folder
    digest: str  # hash of the files that determine the packages
    extras: tuple[str, ...] = ()
    complete: bool = False

    def serves(self, target: Stamp) -> bool:
        is_complete = replace(self, extras=target.extras) == replace(target, complete=True)
        return is_complete and {*target.extras} <= {*self.extras}

    def is_same_kind(self, target: Stamp) -> bool:
        """Return whether the wanted packages can be installed on top of the present ones."""
        ours = (self.flavor, self.python, self.location)
        return ours == (target.flavor, target.python, target.location)


def read_stamp(environment: Path) -> Stamp | None:
    """Read the stamp of an earlier call, or return None if it is absent or not readable."""
    try:
        stamp = json.loads((environment / STAMP_NAME).read_text())
        extras = DEVELOPMENT_EXTRAS if stamp.pop("dev", False) else stamp.get("extras", ())
        return Stamp(**stamp | {"extras": tuple(extras)})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write_stamp(environment: Path, stamp: Stamp) -> None:
    """Write the purpose of the environment, before the work (incomplete) and after it."""
    (environment / STAMP_NAME).write_text(json.dumps(asdict(stamp), indent=2) + "\n")


def make_environment(environment: Path, start_over: bool) -> None:
    """Create the virtual environment, or complete or replace an existing one."""
    if (environment / "pyvenv.cfg").exists():
        if not start_over and succeeds([str(environment / PYTHON), "-m", "pip", "--version"]):
            return
    elif environment.exists() and any(environment.iterdir()):
        raise InstallError(f"--venv {environment}: is no virtual environment; name another folder")
    # The pip that Python brings is as old as Python; a new one resolves three times as fast.
    command = [sys.executable, "-m", "venv", "--clear", "--upgrade-deps", str(environment)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise InstallError(
            f"{' '.join(command)} failed:\n{(process.stdout + process.stderr).strip()}\n"
            "On Debian and Ubuntu the module venv has its own package: apt install python3-venv"
        )


def succeeds(command: list[str]) -> bool:
    """Return whether the command can be run and exits with 0."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def install_stage(environment: Path, title: str, arguments: list[str]) -> None:
    """Run one call of pip and pass its messages through; raises an InstallError if it fails."""
    # -I: PYTHONPATH and the user's own site-packages must not pass for installed packages.
    command = [str(environment / PYTHON), "-I", "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", *arguments]
    code = subprocess.run(command).returncode
    if code != 0:
        raise InstallError(
            f"pip exited with {code} while installing {title}; its message is above. "
            "The next call goes on from here.\nThe command was: " + " ".join(command)
        )


def check_imports(environment: Path, flavor: str) -> str:
    """Import the three packages that must match, and return their versions as text."""
    code = FIRST_IMPORT
    if flavor == "cuda":
        code = CUDA_BUILDS + (code if nvidia_driver_found() else f"print({NO_DRIVER!r})")
    command = [str(environment / PYTHON), "-I", "-W", "ignore", "-c", code]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise InstallError(
            f"the installed packages cannot be used:\n{process.stderr.strip()}\nStart over: "
            f"rm -r {environment}, then {sys.executable} {Path(__file__)} --flavor {flavor} ..."
        )
    return process.stdout.strip()


def compile_kernels(environment: Path) -> None:
    """Compile the kernels for CPU, so that no job waits for it; print why where none can be."""
    code = "from recsys.kernels.choice import load_kernels; load_kernels()"
    command = [str(environment / PYTHON), "-I", "-W", "ignore", "-c", code]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        cause = process.stderr.strip().splitlines()[-1]
        print(f"none, PyTorch computes in their place: {cause} ...", end=" ", flush=True)


def timed(title: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """Print a title, call a step, print its seconds, and return its result."""
    print(f"  {title} ...", end=" ", flush=True)
    started = time.monotonic()
    result = step(*arguments)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return result


def install(environment: Path, flavor: str, extras: Collection[str], index_url: str | None) -> None:
    """Bring the environment to the wanted state; an InstallError names cause and fix."""
    import tomllib  # here, because an older Python lacks it

    stamp = read_stamp(environment)
    flavor = choose_flavor(flavor, stamp.flavor if stamp else None)
    python, digest = platform.python_version(), digest_of_inputs()
    target = Stamp(flavor, python, str(environment), digest, tuple(sorted({*extras})))
    if stamp is not None and stamp.serves(target):
        return
    start_over = stamp is not None and not stamp.is_same_kind(target)
    if stamp is not None and not start_over:
        target = replace(target, extras=tuple(sorted({*extras, *stamp.extras})))
    pyproject = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    stages = installation_stages(pyproject, flavor, target.extras, index_url)
    print(f"Installing into {environment} (flavor {flavor}, Python {python})")
    timed("virtual environment", make_environment, environment, start_over)
    write_stamp(environment, target)
    for title, stage_arguments in stages.items():
        timed(title, install_stage, environment, title, stage_arguments)
    versions = timed("first import", check_imports, environment, flavor)
    if flavor == "cpu":
        timed("kernels", compile_kernels, environment)
    write_stamp(environment, replace(target, complete=True))
    print(f"Installed: {versions}. Its Python: {environment / PYTHON}")


def main(arguments: list[str] | None = None) -> int:
    """Install as the command line asks; return 0 if the environment is ready, else 1."""
    if sys.version_info < (3, 11):  # noqa: UP036, as this file runs on any Python
        print(f"Python {platform.python_version()} at {sys.executable} is too old: 3.11 or newer")
        print("is needed, e.g. python3.12 launch/install.py or make PYTHON=python3.12 install")
        return 1
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--venv", default=".venv", help="folder of the environment")
    flavors = "which wheels; auto: the environment's, else cuda with an NVIDIA driver, else cpu"
    add("--flavor", choices=["auto", "cpu", "cuda"], default="auto", help=flavors)
    extra = "an extra of pyproject.toml to install, too, such as serve; can be repeated"
    add("--extra", metavar="NAME", action="append", default=[], help=extra)
    add("--dev", action="store_true", help="also install what tests and linters need")
    index = "index of torch, with cuda also of FBGEMM, e.g. https://download.pytorch.org/whl/cpu"
    add("--index-url", metavar="URL", help=index)
    options = parser.parse_args(arguments)
    try:
        extras = [*options.extra, *(DEVELOPMENT_EXTRAS if options.dev else ())]
        install(Path(options.venv).absolute(), options.flavor, extras, options.index_url)
        return 0
    except InstallError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
