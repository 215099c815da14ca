"""One server answers real clients, refuses bad requests in words, and exchanges its package."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from recsys.serving import Scorer
from recsys.serving.package import MANIFEST, digest_of, read_manifest, write_manifest
from tests.ranks import HANG_SECONDS
from tests.recsys.serving.server.many_calls import describe_calls
from tests.recsys.serving.server.served_package import TOKEN, Response, ServedPackage
from tests.recsys.serving.serving_runs import requests

MODEL, RANK, INFER = "/v2/models/shop", "/v1/rank", "/v2/models/shop/infer"
BEARER = {"authorization": f"Bearer {TOKEN}"}
CALLS = 12  # of each route and phase
OPTIONS = ("--max_candidates", "40", "--max_text", "30", "--max_body", "9000")


@pytest.fixture(scope="module")
def server(
    package_run: tuple[Path, Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedPackage]:
    """A server of a link to the package, with a token and small limits."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "package").symlink_to(package_run[1])
    server = ServedPackage(folder / "package", folder / "log", *OPTIONS)
    yield server
    assert server.end() == 0


@pytest.fixture(scope="module")
def scorer(package_run: tuple[Path, Path, np.ndarray]) -> Scorer:
    return Scorer.load(package_run[1])


@pytest.fixture(scope="module")
def request_of_user(package_run: tuple[Path, Path, np.ndarray]) -> dict[str, Any]:
    """A request for a user with a history."""
    rows = requests(package_run[0] / "data")
    request = next(request for request in rows if request["history"]["history"])
    request["user"] |= {"when": str(request["user"]["when"])}
    return request | {"candidates": list(range(30))}


def tensors(client: Any, request: dict[str, Any], **options: Any) -> list[Any]:
    """The inputs of a request for a client of Triton."""
    columns = {name: np.atleast_1d(value) for name, value in request["user"].items()}
    columns |= {name: np.asarray(value) for name, value in request["history"].items()}
    columns["item"] = np.asarray(request["candidates"])
    inputs = []
    for name, values in columns.items():
        values = values.astype(object) if values.dtype.kind == "U" else values
        inputs.append(client.InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values, **options)
    return inputs


def by_json(server: ServedPackage, request: dict[str, Any]) -> np.ndarray:
    inputs = [
        {
            "name": tensor.name(),
            "shape": tensor.shape(),
            "datatype": tensor.datatype(),
            "data": tensor._get_tensor()["data"],
        }
        for tensor in tensors(tritonclient.http, request, binary_data=False)
    ]
    return np.array(server.call(INFER, {"inputs": inputs}).content["outputs"][0]["data"])


def by_http(server: ServedPackage, request: dict[str, Any]) -> np.ndarray:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}")
    inputs = tensors(tritonclient.http, request)
    return client.infer("shop", inputs, headers={**BEARER}).as_numpy("liked")  # it adds some


def by_grpc(server: ServedPackage, request: dict[str, Any]) -> np.ndarray:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    inputs = tensors(tritonclient.grpc, request)
    return client.infer("shop", inputs, headers=BEARER).as_numpy("liked")


def by_curl(server: ServedPackage, request: dict[str, Any]) -> np.ndarray:
    url = f"http://127.0.0.1:{server.port}{RANK}"
    argv = ["curl", "-s", url, "-H", f"authorization: {BEARER['authorization']}", "-d", "@-"]
    process = subprocess.run(argv, input=json.dumps(request), capture_output=True, text=True)
    response = json.loads(process.stdout)
    assert response["scores"]["liked"] == sorted(response["scores"]["liked"], reverse=True)
    order = np.argsort([request["candidates"].index(item) for item in response["items"]])
    return np.array(response["scores"]["liked"])[order]


@pytest.mark.parametrize("client", [by_json, by_http, by_grpc, by_curl])
def test_each_client_gets_the_scores_of_the_scorer(
    server: ServedPackage,
    scorer: Scorer,
    request_of_user: dict[str, Any],
    client: Callable[[ServedPackage, dict[str, Any]], np.ndarray],
) -> None:
    expected = scorer.score(**request_of_user)[:, 0]

    np.testing.assert_allclose(client(server, request_of_user), expected, rtol=0, atol=1e-6)


def test_the_first_of_all_items_are_ranked(
    server: ServedPackage, scorer: Scorer, request_of_user: dict[str, Any]
) -> None:
    scores = scorer.score(**request_of_user)[:, 0]

    response = server.call(RANK, request_of_user | {"candidates": "all", "top_k": 3}).content

    assert response["items"] == np.argsort(-scores)[:3].tolist()
    assert response["model_version"] == digest_of(scorer.manifest)[:12]


def test_clients_read_the_metadata(server: ServedPackage) -> None:
    http_client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}")
    grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")

    assert http_client.is_server_live() and http_client.is_server_ready()
    assert grpc.is_server_live() and grpc.is_server_ready()
    metadata = http_client.get_model_metadata("shop", headers=BEARER)
    assert metadata["outputs"] == [{"name": "liked", "datatype": "FP32", "shape": [-1]}]
    types = {column["name"]: column["datatype"] for column in metadata["inputs"]}
    assert (types["item"], types["city"], types["price"]) == ("INT64", "BYTES", "FP32")
    inputs = grpc.get_model_metadata("shop", headers=BEARER).inputs
    assert {column.name: column.datatype for column in inputs} == types
    version = metadata["versions"][0]
    assert http_client.is_model_ready("shop", version, headers=BEARER)
    assert grpc.is_model_ready("shop", version, headers=BEARER)
    assert not http_client.is_model_ready("shop", "1", headers=BEARER)
    assert http_client.get_server_metadata(headers=BEARER)["name"] == "recsys"


def tensor(name: str, datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (RANK, b"{", 400, "JSON"),
        (RANK, {"user": {}}, 400, "candidates"),
        (RANK, {"user": {}, "candidates": [1]}, 400, "lacks 'price'"),
        (RANK, {"user": {}, "candidates": list(range(41))}, 400, "41 .* 40"),
        (RANK, {"user": {"city": "x" * 31}, "candidates": [1]}, 400, "city.* 31 .* 30"),
        (RANK, {"user": {}, "candidates": [1], "by": "bought"}, 400, "bought"),
        (RANK, b" " * 9001, 413, "9000"),
        (INFER, {"inputs": [tensor("item", "INT64", [2], [1])]}, 400, "item.*1 .*2"),
        (INFER, {"inputs": [tensor("item", "INT65", [1], [1])]}, 400, "INT65"),
        (INFER, {"inputs": [tensor("item", "INT64", [1], [1])] * 2}, 400, "item.*twice"),
        ("/v2/models/other/infer", {"inputs": []}, 404, "other"),
        ("/v1/rank", None, 405, "Not Allowed"),
    ],
)
def test_a_bad_request_is_refused_with_what_is_wrong(
    server: ServedPackage, path: str, body: Any, status: int, message: str
) -> None:
    response: Response = server.call(path, body)

    assert response.status == status, response.body
    assert list(response.content) == ["error"]
    assert re.search(message, response.content["error"]), response.content


def test_errors_of_grpc_have_the_codes_of_the_protocol(
    server: ServedPackage, request_of_user: dict[str, Any]
) -> None:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    inputs = tensors(tritonclient.grpc, request_of_user)
    for model, model_inputs, headers, code in [
        ("other", inputs, BEARER, "NOT_FOUND"),
        ("shop", inputs[:-1], BEARER, "INVALID_ARGUMENT"),
        ("shop", inputs, {}, "UNAUTHENTICATED"),
        ("shop", inputs, {"authorization": "Bearer else"}, "UNAUTHENTICATED"),
    ]:
        with pytest.raises(InferenceServerException) as error:
            client.infer(model, model_inputs, headers=headers)
        assert error.value.status() == f"StatusCode.{code}"


def test_bytes_that_do_not_fit_their_tensors_are_refused(server: ServedPackage) -> None:
    described = {"name": "city", "datatype": "BYTES", "shape": [1]}
    for size, sent in [(8, b"\x09\0\0\0Rome"), (9, b"\x04\0\0\0Rome"), (6, b"\x02\0\0\0\xff\xff")]:
        head = json.dumps({"inputs": [described | {"parameters": {"binary_data_size": size}}]})
        length = {"Inference_Header_Content_Length": str(len(head))}
        response = server.call(INFER, head.encode() + sent, **length)
        assert response.status == 400 and "city" in response.content["error"], response
    assert server.call(INFER, b"{}", Inference_Header_Content_Length="3").status == 400


def test_a_server_without_encoders_takes_no_items(server: ServedPackage) -> None:
    response = server.call("/v1/items", {"items": [{"item": 7}]})
    assert response.status == 404 and "--encoders" in response.content["error"]


def test_requests_without_the_token_are_refused_but_for_probes(server: ServedPackage) -> None:
    assert server.call("/v2/health/ready", authorization="").status == 200
    for path, body in [(RANK, {}), (MODEL, None), ("/metrics", None), ("/openapi.json", None)]:
        response = server.call(path, body, authorization="Bearer else")
        assert (response.status, list(response.content)) == (401, ["error"])


def test_a_request_keeps_its_id_in_response_and_log(
    server: ServedPackage, request_of_user: dict[str, Any]
) -> None:
    response = server.call(RANK, request_of_user, x_request_id="my-request.1")
    other = server.call(RANK, request_of_user, x_request_id="two words")

    assert response.headers["x-request-id"] == response.content["id"] == "my-request.1"
    assert other.headers["x-request-id"] not in ("", "two words")
    server.wait_for("my-request.1")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request") == "my-request.1"]
    assert (line["route"], line["status"]) == ("POST /v1/rank", "200")


def test_metrics_count_requests_and_candidates(
    server: ServedPackage, request_of_user: dict[str, Any]
) -> None:
    names = ("recsys_request_seconds_count", "recsys_request_candidates_sum")
    old_values = [server.metric(name) for name in names]

    server.call(RANK, request_of_user)

    new_values = [server.metric(name) for name in names]
    assert new_values[0] - old_values[0] >= 2 and new_values[1] - old_values[1] == 30
    assert server.metric("recsys_package_workers") == 1


def changed_package(package: Path, out: Path) -> Path:
    """A package with other vectors of items, so that its scores differ."""
    shutil.copytree(package, out)
    table = out / "tables" / "item.vectors"
    vectors = np.frombuffer(table.read_bytes(), np.float32)
    table.write_bytes((2 * vectors + 0.5).astype(np.float32).tobytes())
    (out / MANIFEST).unlink()
    write_manifest(out, replace(read_manifest(package), created="tomorrow"))
    return out


def link(server_link: Path, package: Path) -> None:
    """Exchange a link at once."""
    new = server_link.with_name("new")
    new.symlink_to(package)
    os.replace(new, server_link)


def test_a_package_is_exchanged_without_a_failed_or_a_mixed_response(
    server: ServedPackage,
    request_of_user: dict[str, Any],
    package_run: tuple[Path, Path, np.ndarray],
    tmp_path: Path,
) -> None:
    first, location = package_run[1], server.log.parent / "package"
    second = changed_package(first, tmp_path / "second")
    expected = {}
    for package in (first, second):
        scorer = Scorer.load(package)
        version = digest_of(scorer.manifest)[:12]
        expected[version] = scorer.score(**request_of_user)[:, 0]
    responses: list[Response] = []
    enough = threading.Event()

    def send() -> None:
        while not enough.wait(0.02):
            responses.append(server.call(RANK, request_of_user))

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for version, package in reversed(list(zip(expected, (first, second)))):
            link(location, package)
            server.wait_for(f"serving version {version}")
    finally:
        enough.set()
        for thread in threads:
            thread.join()

    assert {response.status for response in responses} == {200}
    assert {response.content["model_version"] for response in responses} == set(expected)
    for content in (response.content for response in responses):
        scores = expected[content["model_version"]][content["items"]]
        np.testing.assert_allclose(content["scores"]["liked"], scores, rtol=0, atol=1e-6)


def test_a_damaged_package_is_not_served(
    server: ServedPackage,
    request_of_user: dict[str, Any],
    package_run: tuple[Path, Path, np.ndarray],
    tmp_path: Path,
) -> None:
    path, old = server.log.parent / "package", server.call(RANK, request_of_user).content
    damaged = changed_package(package_run[1], tmp_path / "damaged")
    table = damaged / "tables" / "item.vectors"
    table.write_bytes(table.read_bytes()[::-1])

    link(path, damaged)

    server.wait_for(str(table))
    new = server.call(RANK, request_of_user).content
    assert (new["model_version"], new["scores"]) == (old["model_version"], old["scores"])
    assert server.metric("recsys_reload_failures_total") >= 1
    link(path, package_run[1])


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_and_the_others_answer(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path, request_of_user: dict[str, Any]
) -> None:
    server = ServedPackage(package_run[1], tmp_path / "log", "--workers", "2")
    try:
        server.wait_for(r"(?s)(ready, version.*){2}")
        assert server.metric("recsys_package_workers") == 2
        workers = [
            process
            for process in psutil.Process(server.process.pid).children()
            if "spawn_main" in " ".join(process.cmdline())
        ]
        assert len(workers) == 2

        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].wait(HANG_SECONDS)

        assert server.call(RANK, request_of_user).status == 200
        server.wait_for(r"(?s)(ready, version.*){3}")
        assert server.metric("recsys_package_workers") == 2
        assert {server.call(RANK, request_of_user).status for _ in range(20)} == {200}
    finally:
        server.end()


@pytest.mark.long
def test_no_call_that_the_description_allows_or_forbids_fails_inside(
    package_run: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    package = shutil.copytree(package_run[1], tmp_path / "package")  # which takes items
    server = ServedPackage(package, tmp_path / "log", "--encoders", "true")
    try:
        number, _ = describe_calls(server, tmp_path, CALLS)
    finally:
        server.end()
    assert number > 100
