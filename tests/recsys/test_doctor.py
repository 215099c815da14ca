"""`recsys doctor`: every broken installation is named with the command that fixes it, extras too.

Installed versions are faked where the packages' metadata is read; nothing is reinstalled.
"""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from recsys import doctor
from recsys.diagnostics.plan.report import find_cluster
from recsys.distributed.ranks import joined_ranks
from recsys.extras import missing_extra

PROJECT_ROOT = Path(__file__).parents[2]
HEALTHY = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu-cpu": "1.8.0",
    **dict.fromkeys(doctor.OTHER_PACKAGES, "1.0"),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Makes the packages of a dict, and no others, look installed, on a machine without GPU."""

    def look_installed(versions: dict[str, str], driver: bool = False) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.setattr(doctor, "nvidia_driver_found", lambda: driver)

    return look_installed


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in HEALTHY.items() if name not in names}


def the_problem() -> doctor.Problem:
    (problem,) = doctor.check_installation()
    return problem


def test_this_installation_works() -> None:
    assert doctor.check_installation() == []
    doctor.require_working_installation()


@pytest.mark.parametrize(
    "wrong", [{"torch": "2.12.0"}, {"torchrec": "1.7.0"}, {"fbgemm-gpu-cpu": "1.9.0"}]
)
def test_a_mismatch_names_the_versions_and_the_install_command(install, wrong: dict) -> None:
    versions = {**HEALTHY, **wrong}
    install(versions)
    problem = the_problem()
    for name, label in (("torch", "torch"), ("torchrec", "torchrec"), ("fbgemm-gpu-cpu", "FBGEMM")):
        assert f"{label} {versions[name]}" in problem.text
    assert problem.fix == (
        f"{sys.executable} -m pip install 'torch==2.13.*' 'fbgemm-gpu-cpu==1.8.*' && "
        f"{sys.executable} -m pip install --no-deps 'torchrec==1.8.*'"
    )


def test_with_a_driver_the_fix_installs_the_cuda_wheel(install) -> None:
    install({**without("fbgemm-gpu-cpu"), "fbgemm-gpu": "1.7.0"}, driver=True)
    assert the_problem().fix == (
        f"{sys.executable} -m pip install 'torch==2.13.*' 'torchrec==1.8.*' 'fbgemm-gpu==1.8.*'"
    )


@pytest.mark.parametrize("driver", [False, True])
def test_both_fbgemm_wheels_at_once_are_a_problem(install, driver: bool) -> None:
    install({**HEALTHY, "fbgemm-gpu": "1.8.0"}, driver)
    problem = the_problem()
    assert "fbgemm-gpu-cpu" in problem.text
    assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && " in problem.fix
    assert ("'fbgemm-gpu==1.8.*'" in problem.fix) == driver


def test_the_cuda_wheel_without_a_driver_is_a_problem(install) -> None:
    install({**without("fbgemm-gpu-cpu"), "fbgemm-gpu": "1.8.0"})
    problem = the_problem()
    assert "NVIDIA driver" in problem.text
    assert problem.fix.index("uninstall") < problem.fix.index("fbgemm-gpu-cpu==1.8.*")


def test_the_cpu_wheel_of_fbgemm_does_not_serve_a_gpu_that_torch_uses(
    install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(HEALTHY, driver=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = the_problem()
    assert "a GPU" in problem.text
    assert "uninstall -y fbgemm-gpu-cpu && " in problem.fix


class DriverWithAGPU:
    """Answers as libnvidia-ml.so.1 with one GPU, or with a code of failure."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def nvmlInit_v2(self) -> int:
        return self.code

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 1
        return 0


DRIVER_TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch):
    """A machine with a GPU that torch does not use: its driver is too old."""

    def init() -> None:
        raise RuntimeError(DRIVER_TOO_OLD)

    def set_code(code: int = 0) -> None:
        monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: DriverWithAGPU(code))

    monkeypatch.setattr(torch.cuda, "init", init)
    set_code()
    return set_code


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_job_does_not_train_on_cpu_beside_a_gpu_that_torch_cannot_use(
    driver, device: str
) -> None:
    with pytest.raises(ValueError, match=f"device is {device}(.|\n)*too old"), joined_ranks(device):
        pass
    with joined_ranks("cpu") as ranks:
        assert ranks.device.type == "cpu"


def test_the_doctor_gives_torchs_reason_for_a_gpu_that_it_cannot_use(driver) -> None:
    assert DRIVER_TOO_OLD in the_problem().text
    assert doctor.main() == 1
    with pytest.raises(ValueError, match="too old"):
        find_cluster("auto", 1, None, None)


@pytest.mark.parametrize(
    ("code", "hidden", "gpus"),
    [(doctor.NVML_VERSION_MISMATCH, False, 1), (9, False, 0), (0, True, 0)],
    ids=["versions differ", "no kernel module", "hidden by CUDA_VISIBLE_DEVICES"],
)
def test_a_gpu_that_is_not_there_or_hidden_stops_no_job(
    driver, code: int, hidden: bool, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(code)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpus_of_driver() == gpus
    assert (doctor.unusable_gpu() is None) == (gpus == 0)


@pytest.mark.parametrize(
    ("capability", "trains"), [((7, 5), False), ((8, 6), True), ((9, 0), True), ((12, 0), False)]
)
def test_the_doctor_checks_what_fbgemm_has_kernels_for(
    capability: tuple[int, int], trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "FBGEMM_CPU", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(doctor, "untrained_table", lambda device: None)
    problems = doctor._gpu_problems()
    assert (problems == []) == trains
    assert trains or "capability 7.5" in problems[0].text or "capability 12.0" in problems[0].text


def test_the_doctor_trains_a_row_of_a_table(device: str) -> None:
    assert doctor.untrained_table(device) is None
    assert doctor.untrained_table("cuda:99") is not None


@pytest.mark.parametrize("name", ["torch", "torchrec", "fbgemm-gpu-cpu"])
def test_a_missing_package_of_the_triple_is_named(install, name: str) -> None:
    install(without(name))
    problem = the_problem()
    assert problem.text == f"{'FBGEMM' if 'fbgemm' in name else name} not installed"
    assert "pip install 'torch==2.13.*'" in problem.fix


def test_another_missing_package_is_named_with_its_install_command(install) -> None:
    install(without("pyarrow"))
    problem = the_problem()
    assert problem.text == "pyarrow is not installed"
    assert problem.fix == f"{sys.executable} -m pip install pyarrow"


def test_an_import_that_fails_is_reported_with_its_cause(
    install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(HEALTHY)
    real_import = doctor.importlib.import_module

    def import_module(name: str):
        if name == "fbgemm_gpu":
            raise OSError("undefined symbol: _ZN3c10")
        return real_import(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    problem = the_problem()
    assert problem.text == "import fbgemm_gpu fails: OSError: undefined symbol: _ZN3c10"
    assert "--force-reinstall" in problem.fix


def test_a_job_does_not_start_on_a_broken_installation(install) -> None:
    install({**HEALTHY, "torch": "2.12.0"})
    with pytest.raises(RuntimeError, match=r"torch 2\.12\.0(.|\n)*fix: .*pip"):
        doctor.require_working_installation()


def test_the_command_exits_with_1_and_prints_the_fix_of_a_mismatch(
    install, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main() == 0
    assert "Everything" in capsys.readouterr().out
    install({**HEALTHY, "torch": "2.12.0"})
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert f"fix:     {doctor.install_command()}" in printed


def test_the_doctor_works_where_torch_torchrec_and_fbgemm_do_not() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchrec', 'fbgemm_gpu']));"
        "import recsys.doctor; sys.exit(recsys.doctor.main())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1, process.stderr
    assert "problem: import torch" in process.stdout
    assert process.stderr == ""


def test_the_tested_triple_is_the_one_the_project_requires() -> None:
    pyproject = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    torch_minor, torchrec_minor, fbgemm_minor = doctor.TESTED_TRIPLE
    dependencies = pyproject["project"]["dependencies"]
    assert any(line.startswith(f"torch>={torch_minor},") for line in dependencies)
    triple = [f"torchrec=={torchrec_minor}.*", f"fbgemm-gpu=={fbgemm_minor}.*"]
    assert pyproject["dependency-groups"]["torchrec"] == triple


ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_is_missing_is_named_with_the_commands_that_install_it(name: str) -> None:
    error = str(missing_extra(name, "recsys COMMAND", "no module"))
    assert f"pip install 'recsys-em3[{name}]', or in the sources" in error
    assert f"launch/install.py --extra {name}" in error


def test_the_page_of_extras_has_those_of_the_project() -> None:
    page = (ROOT / "launch" / "README.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| .* \|$", page, re.MULTILINE)
    section = [re.findall(r"`([a-z]+)`", row) for row in rows]
    listed = [name for row in section for name in row if row and {*row} <= EXTRAS.keys()]
    assert sorted(listed) == sorted(EXTRAS)
