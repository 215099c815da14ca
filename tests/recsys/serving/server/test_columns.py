"""What is refused before a server starts, and columns of its requests."""

import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recsys.cli import main
from recsys.data.schema import Schema
from recsys.data.schema_columns import Column, IdType, VocabularySettings
from recsys.serving.scorer import Scorer
from recsys.serving.server.grpc_service import _tensors
from recsys.serving.server.input_columns import InputColumns
from recsys.serving.server.protocol import (
    NamedTensor,
    RequestError,
    tensor_from_values,
)


def columns(example: dict[str, Any]) -> InputColumns:
    """Columns of string ids with every vocabulary, beside a table without one."""
    raw: dict[str, Any] = {
        name: Column("id", num_embeddings=9, vocabulary=VocabularySettings(cast(Any, kind)))
        for name, kind in {"item": "exact", "shop": "bounded", "place": "hash"}.items()
    }
    raw["past"] = Column("sequence", shares="item", parallel=["price"])
    raw |= {"user": Column("id", num_embeddings=9), "age": Column("dense")}
    schema = Schema("item", "user", {**raw, "liked": Column("label")})
    for table in ("item", "shop", "place"):
        schema.id_types[table] = IdType("string", "train")
    pooled = ["user", "shop", "place"]
    manifest = SimpleNamespace(pooled=pooled, dense=["age"])
    scorer = SimpleNamespace(schema=schema, manifest=manifest, feature_types={})
    return InputColumns(cast(Scorer, scorer), example)


@pytest.mark.parametrize(
    "example",
    [
        {},
        {"user": {"shop": None, "place": None}, "history": {"past": []}, "candidates": []},
        {"user": {"shop": "a", "place": "b"}, "history": {"past": ["c"]}, "candidates": ["c"]},
    ],
)
def test_string_ids_are_bytes_in_the_metadata_whatever_the_example_has(
    example: dict[str, Any],
) -> None:
    types = {column["name"]: column["datatype"] for column in columns(example).metadata()}
    strings = dict.fromkeys(("item", "shop", "place", "past"), "BYTES")
    assert types == {**strings, "user": "INT64", "age": "FP32", "price": "FP32"}


def test_a_boolean_that_is_crossed_is_one_in_the_metadata() -> None:
    inputs = columns({})
    inputs.user.append("member")  # a column of the files
    inputs.schema.id_types["member"] = IdType("boolean", "train")
    assert {"name": "member", "datatype": "BOOL", "shape": [-1]} in inputs.metadata()


def test_a_tensor_in_json_may_have_null() -> None:
    assert tensor_from_values("shop", "BYTES", [2], ["a", None]).values == ["a", None]
    rows = tensor_from_values("n", "INT64", [2, 2], [[1, None], [None, 2]])
    assert rows.values == [1, None, None, 2]


def test_a_request_of_several_users_is_refused() -> None:
    items, history = (
        NamedTensor("item", (2, 1), ["a", "b"]),
        NamedTensor("past", (1, 2), ["a", "b"]),
    )
    arguments = columns({}).arguments([items, history])
    assert (arguments.candidates, arguments.history) == ({"item": ["a", "b"]}, {"past": ["a", "b"]})
    for name in ("item", "past"):
        two = replace({"item": items, "past": history}[name], shape=(2, 2), values=["a"] * 4)
        tensors = {"item": items, "past": history} | {name: two}
        with pytest.raises(
            RequestError, match=rf"'{name}': shape \[2, 2\]; a request is of one user"
        ):
            columns({}).arguments(tensors.values())


def test_contents_of_two_types_are_refused() -> None:
    fields = [(SimpleNamespace(name=name), [1]) for name in ("int64_contents", "fp32_contents")]
    contents = SimpleNamespace(ListFields=lambda: fields)
    tensor = SimpleNamespace(name="past", datatype="INT64", shape=[1], contents=contents)
    message = SimpleNamespace(raw_input_contents=[], inputs=[tensor])
    with pytest.raises(RequestError, match=r"'past': its contents have \['int64_contents', 'fp32_"):
        _tensors(message)


@pytest.mark.parametrize("data", [[[1], [2, 3, 4]], [[1, 2, 3, 4]], [1, [2, 3], 4]])
def test_a_tensor_whose_lists_differ_from_its_shape_is_refused(data: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"'n'.*\[2, 2\]"):
        tensor_from_values("n", "INT64", [2, 2], data)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0"], "--workers: is 0"),
        (["--max_history", "0"], "--max-history: is 0"),
        (["--drain", "-1"], "--drain: is -1"),
        (["--idle_timeout", "3000000"], "--idle-timeout: is 3000000; give at most"),
        (["--token", ""], "--token"),
        (["--token", "naïve"], "--token"),
    ],
)
def test_a_setting_out_of_range_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "package", *argv]) == 1
    assert message in capsys.readouterr().err


def test_one_port_for_both_protocols_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "package", "--port", "8081"]) == 1
    assert "port and grpc_port are both 8081" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["port", "grpc_port"])
def test_a_port_that_is_taken_is_named(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    argv = ["serve", "package", "--host", "127.0.0.1", "--port", "0", "--grpc_port", "0"]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])

        assert main([*argv, f"--{option}", port]) == 1

    assert f"--{option} {port}" in capsys.readouterr().err
