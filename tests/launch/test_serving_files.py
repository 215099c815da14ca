"""Images of training and serving, and the manifest of serving, read by parsers: none runs."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from jsonargparse import Namespace

from recsys.commands.options import command_parser
from recsys.commands.packages import TOKEN
from recsys.serving.server.http_app import PROBES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "serving"


def parsed(argv: list[str]) -> Namespace:
    """The words as `recsys serve` reads them."""
    return command_parser("serve", argv)[1].parse_args(argv)


def dockerfile(name: str) -> list[dict[str, Any]]:
    return DockerfileParser(
        str(ROOT / "launch" / name / "Dockerfile"), cache_content=True
    ).structure


@pytest.fixture(scope="module")
def image() -> list[dict[str, Any]]:
    return dockerfile("serving")


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    manifest = yaml.safe_load((FOLDER / "inference_service.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    predictor = manifest["spec"]["predictor"]
    (container,) = predictor["containers"]
    return container | {"grace": predictor["terminationGracePeriodSeconds"]}


def arguments_of(image: list[dict[str, Any]], instruction: str) -> list[str]:
    return [entry["value"] for entry in image if entry["instruction"] == instruction]


@pytest.mark.parametrize(
    ("name", "flavor", "options"),
    [("serving", "cpu", "--flavor cpu --extra serve"), ("training", "cuda", '--flavor "$FLAVOR"')],
)
def test_an_image_copies_what_there_is_and_installs_its_flavor(
    name: str, flavor: str, options: str
) -> None:
    image = dockerfile(name)
    copied = [name for value in arguments_of(image, "COPY") for name in value.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)
    *_, run = arguments_of(image, "RUN")
    assert "launch/install.py" in run and options in run
    assert "pip install" not in run and "serve" in project["optional-dependencies"]
    assert (name == "serving") or f"FLAVOR={flavor}" in arguments_of(image, "ARG")


def test_the_image_serves_without_rights_what_kserve_mounts(image: list[dict[str, Any]]) -> None:
    assert arguments_of(image, "USER") == ["1000"]
    (entry,), (command,) = arguments_of(image, "ENTRYPOINT"), arguments_of(image, "CMD")
    assert json.loads(entry)[:2] == ["recsys", "serve"]
    arguments = parsed([*json.loads(entry)[2:], *json.loads(command)])
    assert (arguments.host, parsed(["package"]).host) == ("0.0.0.0", "127.0.0.1")
    assert str(arguments.package) == "/mnt/models"
    assert arguments_of(image, "EXPOSE") == [f"{arguments.port} {arguments.grpc_port}"]


def test_the_manifest_starts_the_server_with_its_own_ports_and_probes(
    container: dict[str, Any],
) -> None:
    arguments = parsed(container["args"])
    assert (str(arguments.package), arguments.name) == ("/mnt/models", "shop")
    assert [entry["containerPort"] for entry in container["ports"]] == [arguments.port]
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert probe["httpGet"]["port"] == arguments.port
        assert probe["httpGet"]["path"] in PROBES
    assert arguments.workers * arguments.threads == int(container["resources"]["limits"]["cpu"])
    names = {entry["name"] for entry in container["env"]}
    assert names == {"STORAGE_URI", TOKEN}
    assert arguments.host == "0.0.0.0"


def test_a_pod_has_the_time_to_lose_its_clients_and_to_answer_them(
    container: dict[str, Any],
) -> None:
    arguments, readiness = parsed(container["args"]), container["readinessProbe"]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert container["grace"] > int(seconds) + arguments.drain + arguments.grace
    assert arguments.drain > readiness["periodSeconds"] * readiness["failureThreshold"]
