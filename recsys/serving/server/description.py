"""The routes' own description in OpenAPI, with the model and the columns of the package."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from recsys.serving.server.columns import Columns
from recsys.serving.server.protocol.messages import InferRequest, RankRequest
from recsys.serving.server.served import Served

PART = "#/components/schemas/{model}"  # where a part of a message is described
TYPES = {"BOOL": "boolean", "INT64": "integer", "FP32": "number", "BYTES": "string"}


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body that a route itself reads, as it may be partly bytes and has a limit."""
    content = {"application/json": {"schema": {"$ref": PART.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, name: str, served: Served) -> None:
    """Complete the description that the application keeps: messages, model and columns.

    `served` is the package at the start; one that replaces it may have other columns.
    """
    document, columns = app.openapi(), served.columns
    parts = document["components"]["schemas"]
    for kind in (InferRequest, RankRequest):
        schema = kind.model_json_schema(ref_template=PART)
        parts |= schema.pop("$defs", {})
        parts[kind.__name__] = schema
    types = {
        of["name"]: _value_of(of["name"], of["datatype"], columns) for of in columns.described()
    }
    user = {
        each: _list_of(types[each]) if each in columns.lists else types[each]
        for each in columns.user
    }
    history = {each: _list_of(types[each]) for each in columns.history}
    one = {"type": "object", "additionalProperties": False}
    parts["RankRequest"]["properties"] |= {
        "user": {**one, "properties": user, "required": columns.user},
        "history": {**one, "properties": history, "required": columns.history},
        "candidates": {"anyOf": [{"const": "all"}, _list_of(types[columns.item])]},
        "by": {"enum": [*served.scorer.labels, None]},
    }
    parts["InputTensor"]["properties"]["name"]["enum"] = list(types)
    for routes in document["paths"].values():
        for route in routes.values():
            for parameter in route.get("parameters", ()):
                known = {"name": name, "model_version": served.version}[parameter["name"]]
                parameter["schema"] = {"type": "string", "examples": [known]}
                if parameter["name"] == "name":
                    parameter["schema"] = {"const": name}


def _value_of(name: str, datatype: str, columns: Columns) -> dict[str, Any]:
    """Describe a value of a column, with its range if ids are rows of a table."""
    schema: dict[str, Any] = {"type": TYPES[datatype]}
    if (value := columns.example.get(name)) not in (None, []):
        schema["examples"] = [value[0] if isinstance(value, list) else value]
    known = columns.schema
    column = known.columns.get(name)
    if column is None or name in known.transforms:
        return schema
    if known.vocabulary_of(name) is not None:
        types = [schema["type"], "null"]  # the unknown id
        return schema if name == columns.item else schema | {"type": types}
    if column.kind in ("id", "ids", "sequence"):  # rows of a table
        schema |= {"minimum": 0, "maximum": known.limit(name) - 1}
    return schema


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}
