"""The methods of gRPC: Open Inference Protocol v2, described by `open_inference.proto`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc.aio import ServicerContext
from grpc_tools import protoc

from recsys.serving.server.http_app import INTERNAL, model_metadata
from recsys.serving.server.metrics import ID_HEADER, RequestLog
from recsys.serving.server.protocol import (
    NamedTensor,
    RequestError,
    tensor_from_bytes,
    tensor_from_values,
)
from recsys.serving.server.scoring_service import ScoringService

logger = logging.getLogger(__name__)

PROTOCOL = Path(__file__).with_name("open_inference.proto")
SERVICE = "inference.GRPCInferenceService"
RETRY = ("grpc-retry-pushback-ms", "1000")  # what Retry-After is over HTTP
PROBES = ("ServerLive", "ServerReady")  # they send no token


def grpc_server(scoring: ScoringService, address: str) -> grpc.aio.Server:
    """Return a server that is not started yet."""
    settings = scoring.settings
    options = [
        ("grpc.max_receive_message_length", settings.max_body),
        ("grpc.server_handshake_timeout_ms", 1000 * settings.read_timeout),
        ("grpc.max_connection_idle_ms", 1000 * settings.idle_timeout),
        ("grpc.so_reuseport", 1),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_handlers(InferenceService(scoring)),))
    server.add_insecure_port(address)
    return server


def _handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    with TemporaryDirectory() as folder:
        out = Path(folder, "descriptors")
        options = [f"-I{PROTOCOL.parent}", f"--descriptor_set_out={out}", PROTOCOL.name]
        code = protoc.main(["protoc", *options])
        assert code == 0, PROTOCOL
        files = FileDescriptorSet.FromString(out.read_bytes()).file
    pool = DescriptorPool()  # not the default one: clients in this process may use its names
    for file in files:
        pool.Add(file)
    handlers = {}
    for method in pool.FindServiceByName(SERVICE).methods:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        # As a stream of one message: gRPC waits for a single message without a time limit.
        handlers[method.name] = grpc.stream_unary_rpc_method_handler(
            service.handler(method.name, request, response),
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class InferenceService:
    """The methods of the protocol, with token, request id, codes of errors, log and metrics."""

    def __init__(self, scoring: ScoringService) -> None:
        self._scoring = scoring

    def handler(self, name: str, request: Any, response: Any) -> Callable[..., Any]:
        async def respond(messages: AsyncIterator[bytes], context: ServicerContext) -> Any:
            metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
            log, code = RequestLog(f"grpc {name}", metadata.get(ID_HEADER, "")), "OK"
            context.set_trailing_metadata(((ID_HEADER, log.id),))
            try:
                if name not in PROBES:
                    self._scoring.require_token(metadata.get("authorization", ""))
                message = await self._read_message(messages, request)
                return response(**await self._fields(name, message, log.id))
            except RequestError as error:
                code, problem = error.code, str(error)
                if code == "UNAVAILABLE":
                    context.set_trailing_metadata(((ID_HEADER, log.id), RETRY))
            except Exception:
                logger.exception("request %s failed", log.id)
                code, problem = "INTERNAL", INTERNAL
            finally:
                log.end(code)
            return await context.abort(grpc.StatusCode[code], problem)

        return respond

    async def _read_message(self, messages: AsyncIterator[bytes], kind: Any) -> Any:
        seconds = self._scoring.settings.read_timeout
        try:
            async with asyncio.timeout(seconds):
                return kind.FromString(await anext(aiter(messages)))
        except TimeoutError as error:
            raise RequestError(f"the request was not complete after {seconds} s", 408) from error
        except StopAsyncIteration as error:
            raise RequestError("the request has no message") from error
        except DecodeError as error:
            raise RequestError(f"the request is no {kind.DESCRIPTOR.name}: {error}") from error

    async def _fields(self, name: str, message: Any, request_id: str) -> dict[str, Any]:
        if name == "ServerLive":
            return {"live": True}
        if name == "ServerMetadata":
            return {"name": "recsys", "version": version("recsys-em3")}
        if name == "ModelMetadata":
            package = self._scoring.require_model(message.name, message.version)
            return model_metadata(message.name, package)
        if name == "ModelInfer":
            return await self._infer(message, request_id)
        if name == "ModelReady":
            self._scoring.require_model(message.name, message.version)
        self._scoring.require_ready()
        return {"ready": True}

    async def _infer(self, message: Any, request_id: str) -> dict[str, Any]:
        package = self._scoring.require_model(message.model_name, message.model_version)
        labels = [output.name for output in message.outputs]
        scores = await self._scoring.infer(package, labels, _tensors(message))
        return {
            "model_name": message.model_name,
            "model_version": package.version,
            "id": message.id or request_id,
            "parameters": {"features_version": {"string_param": package.scorer.features_version}},
            "outputs": [
                {"name": label, "datatype": "FP32", "shape": [len(values)]}
                for label, values in scores.items()
            ],
            "raw_output_contents": [values.astype("<f4").tobytes() for values in scores.values()],
        }


def _tensors(message: Any) -> list[NamedTensor]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise RequestError(f"raw_input_contents: {len(raw)} for {len(message.inputs)} inputs")
    tensors = []
    for number, tensor in enumerate(message.inputs):
        header = tensor.name, tensor.datatype, list(tensor.shape)
        if raw:
            tensors.append(tensor_from_bytes(*header, raw[number]))
        else:
            fields = tensor.contents.ListFields()
            if len(fields) > 1:
                names = [field.name for field, _ in fields]
                raise RequestError(f"input '{tensor.name}': its contents have {names}; give one")
            tensors.append(tensor_from_values(*header, fields[0][1] if fields else []))
    return tensors
