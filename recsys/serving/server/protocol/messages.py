"""Messages of the HTTP routes, which are also their description in OpenAPI."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from recsys.serving.server.refusals import Refusal

Value = StrictBool | StrictInt | StrictFloat | StrictStr | None
Message = TypeVar("Message", bound="Strict")


class Strict(BaseModel):
    """A message without further fields."""

    model_config = ConfigDict(extra="forbid")


class RankRequest(Strict):
    """Candidates to rank for a user; see `Scorer.score`."""

    user: dict[str, Value | list[Value]]
    history: list[Value] | dict[str, list[Value] | None] = []
    candidates: Literal["all"] | list[Value] | dict[str, list[Value | list[Value]]]
    top_k: StrictInt | None = None
    by: StrictStr | None = None


class RankResponse(Strict):
    """Candidates, the best one first by the label `by`, with the predictions of each label."""

    id: str
    model_version: str
    by: str
    items: list[Value]
    scores: dict[str, list[float]]


class InputTensor(Strict):
    """An input of the protocol."""

    name: StrictStr
    shape: list[StrictInt]
    datatype: StrictStr
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestedOutput(Strict):
    """An output to return."""

    name: StrictStr
    parameters: dict[str, Any] = {}


class InferRequest(Strict):
    """A request of the protocol."""

    id: StrictStr | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = None


class OutputTensor(BaseModel):
    """An output of the protocol; without data if they follow the JSON as bytes."""

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
    outputs: list[OutputTensor]


class ErrorResponse(BaseModel):
    """Response to a request that is refused: what is wrong with it."""

    error: str


def parsed(kind: type[Message], body: bytes) -> Message:
    """Read a message.

    Raises:
        Refusal: says where the body is no such message.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        lines = [f"{'.'.join(map(str, of['loc']))}: {of['msg']}"[:200] for of in problems[:3]]
        raise Refusal("; ".join(lines)) from error
