"""Open Inference Protocol v2 over HTTP: messages, and tensors in JSON or as bytes after it.

Shapes: N candidates. The values of a tensor are flat, in row-major order.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

JSON_LENGTH = "inference-header-content-length"  # header with the bytes of JSON before tensors
BINARY_SIZE = "binary_data_size"
BYTES = "BYTES"
NUMPY_TYPES = {
    name.upper().replace("FLOAT", "FP"): np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
GRPC_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


class RequestError(Exception):
    """A request is refused; the client gets the text, an HTTP `status` or a gRPC `code`."""

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.status, self.code = status, GRPC_CODES[status]


class StrictMessage(BaseModel):
    """A message without further fields, whose values have the declared types."""

    model_config = ConfigDict(extra="forbid", strict=True)


Value = bool | int | float | str | None
Message = TypeVar("Message", bound=StrictMessage)


class RankRequest(StrictMessage):
    """Candidates to rank for a user; see `Scorer.score`."""

    user: dict[str, Value | list[Value]]
    history: list[Value] | dict[str, list[Value] | None] = []
    candidates: Literal["all"] | list[Value] | dict[str, list[Value | list[Value]]]
    top_k: int | None = None
    by: str | None = None


class Ranking(BaseModel):
    """Candidates, the best one first by the label `by`, with the predictions of each label."""

    by: str
    items: list[Value]
    scores: dict[str, list[float]]


class RankResponse(Ranking):
    """A ranking, with the versions of the package and of the features that were looked up."""

    id: str
    model_version: str
    features_version: str


class BatchRequest(StrictMessage):
    """Requests of several users, which one package answers."""

    requests: list[RankRequest]


class ErrorResponse(BaseModel):
    """The error of a refused request."""

    error: str


class BatchResponse(BaseModel):
    """A ranking of each request, or why it is refused, in their order."""

    id: str
    model_version: str
    features_version: str
    results: list[Ranking | ErrorResponse]


class ItemsRequest(StrictMessage):
    """New or changed items: id, content and features by column; images are in base64."""

    items: list[dict[str, Value | list[Value | list[Value]]]]


class ItemsResponse(BaseModel):
    """Numbers of items, and the version of the package that has them, which answers from now on."""

    id: str
    model_version: str
    new: int
    changed: int
    unchanged: int
    features: int


class InputTensor(StrictMessage):
    """An input of the protocol; without data if its values follow the JSON as bytes."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Value | list[Value]] | None = None


class RequestedOutput(StrictMessage):
    """An output to return."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(StrictMessage):
    """A request of the protocol."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None


class OutputTensor(BaseModel):
    """An output of the protocol; without data if its values follow the JSON as bytes."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[float] | None = None


class InferResponse(BaseModel):
    """A response of the protocol."""

    model_config = ConfigDict(protected_namespaces=())
    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any] = {}
    outputs: list[OutputTensor]


def parse_message(kind: type[Message], body: bytes) -> Message:
    """Parse a JSON body; a RequestError says where it is no such message."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        lines = [f"{'.'.join(map(str, line['loc']))}: {line['msg']}"[:200] for line in problems[:3]]
        raise RequestError("; ".join(lines)) from error


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a request, whose types the parser of training checks."""

    name: str
    shape: tuple[int, ...]
    values: list[Any]  # flat


def tensor_from_values(
    name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]
) -> NamedTensor:
    """Return a tensor of values, flat or nested as the shape; null is an unknown id."""
    size, values = _num_values(name, datatype, shape), list(data)
    if any(isinstance(row, list) for row in data):
        widths = {len(row) if isinstance(row, list) else None for row in data}
        if len(shape) == 1 or len(data) != shape[0] or widths != {shape[1]}:
            raise RequestError(f"input '{name}': its lists do not have the shape {list(shape)}")
        values = [value for row in data for value in row]
    if len(values) != size:
        raise RequestError(f"input '{name}': has {len(values)} values for shape {list(shape)}")
    texts = [_text(name, value) if isinstance(value, bytes) else value for value in values]
    return NamedTensor(name, tuple(shape), texts)


def tensor_from_bytes(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> NamedTensor:
    """Return a tensor of raw bytes; a RequestError says that they do not fit type and shape."""
    size = _num_values(name, datatype, shape)
    if datatype == BYTES:
        values = [_text(name, text) for text in _strings(name, raw)]
        fits = len(values) == size
    else:
        dtype = NUMPY_TYPES[datatype]
        fits = len(raw) == size * dtype.itemsize
        values = np.frombuffer(raw, dtype).tolist() if fits else []
    if not fits:
        raise RequestError(f"input '{name}': {len(raw)} bytes do not fit {datatype} {list(shape)}")
    return NamedTensor(name, tuple(shape), values)


def _num_values(name: str, datatype: str, shape: Sequence[int]) -> int:
    if datatype != BYTES and datatype not in NUMPY_TYPES:
        choices = [*NUMPY_TYPES, BYTES]
        raise RequestError(f"input '{name}': datatype '{datatype[:99]}' is none of {choices}")
    if not 1 <= len(shape) <= 2 or min(shape) < 0:
        raise RequestError(f"input '{name}': shape {list(shape)[:9]}; give one or two sizes")
    return math.prod(shape)


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"input '{name}': a string is not UTF-8") from error


def _strings(name: str, raw: bytes) -> Iterator[bytes]:
    """Yield strings, each after its length in four bytes."""
    offset = 0
    while offset < len(raw):
        start = offset + 4
        offset = start + int.from_bytes(raw[offset:start], "little")
        if offset > len(raw) or start > len(raw):
            raise RequestError(f"input '{name}': its bytes end within a string")
        yield raw[start:offset]


def read_infer_request(
    body: bytes, json_length: str | None
) -> tuple[InferRequest, list[NamedTensor]]:
    """Return a request and its tensors; a RequestError says what is wrong with it.

    `json_length` is the header that tells how many bytes of the body are JSON.
    """
    offset = len(body)
    if json_length is not None:
        digits = json_length.lstrip("0") or json_length[-1:]
        if not re.fullmatch("[0-9]{1,18}", digits) or int(digits) > len(body):
            raise RequestError(
                f"{JSON_LENGTH}: '{json_length[:99]}' for a body of {len(body)} bytes"
            )
        offset = int(digits)
    request, tensors = parse_message(InferRequest, body[:offset]), []
    for tensor in request.inputs:
        header = tensor.name, tensor.datatype, tensor.shape
        size = tensor.parameters.get(BINARY_SIZE)
        if size is None:
            if tensor.data is None:
                raise RequestError(f"input '{tensor.name}': has no data")
            tensors.append(tensor_from_values(*header, tensor.data))
        else:
            if type(size) is not int or not 0 <= size <= len(body) - offset:
                raise RequestError(f"input '{tensor.name}': {BINARY_SIZE} does not fit the body")
            tensors.append(tensor_from_bytes(*header, body[offset : offset + size]))
            offset += size
    if offset != len(body):
        raise RequestError(f"the body has {len(body) - offset} bytes more than its inputs")
    return request, tensors


def write_infer_response(
    request: InferRequest, head: dict[str, Any], scores: dict[str, np.ndarray]
) -> tuple[bytes, int | None]:  # scores: float32 [N] by label
    """Return a body and, if outputs follow its JSON as bytes, the length of the JSON."""
    parameters = {output.name: output.parameters for output in request.outputs or ()}
    default = request.parameters.get("binary_data_output", False)
    outputs, raw = [], []
    for name, values in scores.items():
        output = OutputTensor(name=name, shape=[len(values)], datatype="FP32")
        if parameters.get(name, {}).get("binary_data", default) is True:
            raw.append(values.astype("<f4").tobytes())
            output.parameters = {BINARY_SIZE: len(raw[-1])}
        else:
            output.data = values.tolist()
        outputs.append(output)
    response = InferResponse(**head, outputs=outputs)
    body = response.model_dump_json(exclude_none=True).encode()
    return b"".join([body, *raw]), len(body) if raw else None
