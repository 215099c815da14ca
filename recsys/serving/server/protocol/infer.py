"""Inference of the protocol over HTTP: JSON, with tensors in JSON or as bytes behind it.

Shapes: N candidates, C labels.
"""

from __future__ import annotations

import re

import numpy as np

from recsys.serving.server.protocol.messages import (
    InferRequest,
    InferResponse,
    OutputTensor,
    parsed,
)
from recsys.serving.server.protocol.tensors import Tensor
from recsys.serving.server.refusals import Refusal

JSON_LENGTH = "inference-header-content-length"  # header with the bytes of JSON before tensors
BINARY_SIZE = "binary_data_size"


def read_request(body: bytes, json_length: str | None) -> tuple[InferRequest, list[Tensor]]:
    """Return a request and its tensors.

    Raises:
        Refusal: says what is wrong with it.
    """
    length = len(body)
    if json_length is not None:
        digits = json_length.lstrip("0") or json_length[-1:]
        if not re.fullmatch("[0-9]{1,18}", digits) or int(digits) > len(body):
            raise Refusal(f"{JSON_LENGTH}: '{json_length[:99]}' for a body of {len(body)} bytes")
        length = int(digits)
    request, place, tensors = parsed(InferRequest, body[:length]), length, []
    for given in request.inputs:
        about = given.name, given.datatype, given.shape
        size = given.parameters.get(BINARY_SIZE)
        if size is None:
            if given.data is None:
                raise Refusal(f"input '{given.name}': has no data")
            tensors.append(Tensor.of_values(*about, given.data))
        else:
            if type(size) is not int or not 0 <= size <= len(body) - place:
                raise Refusal(f"input '{given.name}': {BINARY_SIZE} does not fit the body")
            tensors.append(Tensor.of_raw(*about, body[place : place + size]))
            place += size
    if place != len(body):
        raise Refusal(f"the body has {len(body) - place} bytes more than its inputs")
    return request, tensors


def write_response(
    request: InferRequest, head: dict[str, str], columns: dict[str, np.ndarray]
) -> tuple[bytes, int | None]:  # columns: float32 [N] by output
    """Return a body and, if outputs follow its JSON as bytes, the length of the JSON."""
    asked = {output.name: output.parameters for output in request.outputs or ()}
    default = request.parameters.get("binary_data_output", False)
    outputs, raw = [], []
    for name, values in columns.items():
        output = OutputTensor(name=name, shape=[len(values)], datatype="FP32")
        if asked.get(name, {}).get("binary_data", default) is True:
            raw.append(values.astype("<f4").tobytes())
            output.parameters = {BINARY_SIZE: len(raw[-1])}
        else:
            output.data = values.tolist()
        outputs.append(output)
    response = InferResponse(**head, outputs=outputs)
    body = response.model_dump_json(exclude_none=True).encode()
    return b"".join([body, *raw]), len(body) if raw else None
