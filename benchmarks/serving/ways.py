"""Ways to score a request: the exported graph alone, the scorer, HTTP and gRPC."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.serving import Scorer
from recsys.serving.package import REQUEST


def request_for(package: Path, scorer: Scorer, length: int, count: int) -> dict[str, Any]:
    """Return the package's example with random items in histories of L and N candidates."""
    rng, request = np.random.default_rng(0), json.loads((package / REQUEST).read_text())
    items = scorer.read.item_ids(limit=10**9)

    def drawn(number: int) -> list[Any]:
        """Draw items, each as likely as any other."""
        return [items[place] for place in rng.integers(len(items), size=number)]

    for history in scorer.schema.histories:
        request["history"][history.name] = drawn(length)
        for name in history.numbers:
            request["history"][name] = rng.integers(2, size=length).astype(float).tolist()
    return request | {"candidates": drawn(count)}


class HTTPClient:
    """Ranks over one connection that is kept open."""

    def __init__(self, port: int, request: dict[str, Any]) -> None:
        """Connect and write the body once."""
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._body = json.dumps(request)

    def __call__(self) -> bytes:
        """Send the request and return the body of the answer."""
        self._connection.request("POST", "/v1/rank", self._body)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


def grpc_client(port: int, scorer: Scorer, request: dict[str, Any]) -> Callable[[], object]:
    """Return a call of the protocol with its tensors as bytes, by Triton's client."""
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    client = InferenceServerClient(f"127.0.0.1:{port}")
    columns = {**request["user"], **request["history"]}
    columns[scorer.schema.target_item] = request["candidates"]
    inputs = []
    for name, value in columns.items():
        values = np.atleast_1d(value)
        if not len(values) or values.dtype == object:  # nothing is known, which the user leaves out
            continue
        values = values.astype(object) if values.dtype.kind == "U" else values
        inputs.append(InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values)
    return lambda: client.infer("package", inputs)


def graph_call(scorer: Scorer, request: dict[str, Any]) -> Callable[[], object]:
    """Return a call of the exported graph alone, on inputs that are looked up already."""
    arguments = scorer._inputs(scorer.read(**request)).arguments()

    def call() -> object:
        """Run the graph."""
        with torch.inference_mode():
            return scorer._graph(*arguments)

    return call
