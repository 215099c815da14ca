"""The methods of gRPC: Open Inference Protocol v2, described by `open_inference.proto`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
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

from recsys.serving.server.engine import Engine
from recsys.serving.server.http_app import INTERNAL, model_metadata
from recsys.serving.server.protocol.tensors import Tensor
from recsys.serving.server.refusals import Incomplete, Refusal
from recsys.serving.server.request_log import ID_HEADER, RequestLog

logger = logging.getLogger(__name__)

PROTOCOL = Path(__file__).with_name("open_inference.proto")
SERVICE = "inference.GRPCInferenceService"
OPEN = ("ServerLive", "ServerReady")  # probes send no token
Method = Callable[[Any, str], Awaitable[dict[str, Any]]]


def grpc_server(engine: Engine, address: str) -> grpc.aio.Server:
    """Return a server that is not started yet."""
    settings = engine.settings
    options = [
        ("grpc.max_receive_message_length", settings.limits.max_body),
        ("grpc.server_handshake_timeout_ms", 1000 * settings.read_timeout),
        ("grpc.max_connection_idle_ms", 1000 * settings.idle_timeout),
        ("grpc.so_reuseport", 1),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_handlers(InferenceService(engine)),))
    server.add_insecure_port(address)
    return server


def _handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """Return the handlers of the protocol's methods, read from its description."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "descriptors")
        words = [f"-I{PROTOCOL.parent}", f"--descriptor_set_out={out}", PROTOCOL.name]
        code = protoc.main(["protoc", *words])
        assert code == 0, PROTOCOL
        files = FileDescriptorSet.FromString(out.read_bytes()).file
    pool = DescriptorPool()
    for file in files:
        pool.Add(file)
    handlers = {}
    for method in pool.FindServiceByName(SERVICE).methods:
        sent, returned = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        # As a stream of one message: gRPC would wait for it without a limit on the time.
        handlers[method.name] = grpc.stream_unary_rpc_method_handler(
            service.answer_of(method.name, sent, returned),
            response_serializer=returned.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class InferenceService:
    """The answers of the methods: each takes a message and the request's id, and returns fields."""

    def __init__(self, engine: Engine) -> None:
        """Keep what answers the requests."""
        self._engine = engine
        self._methods: dict[str, Method] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model,
            "ModelInfer": self._infer,
        }

    def answer_of(self, name: str, sent: Any, returned: Any) -> Callable[..., Any]:
        """Return a method with token, request id, codes of errors, log line and metrics."""
        method = self._methods[name]

        async def answer(messages: AsyncIterator[bytes], context: ServicerContext) -> Any:
            """Answer one request."""
            metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
            log, code = RequestLog(f"grpc {name}", metadata.get(ID_HEADER, "")), "OK"
            context.set_trailing_metadata(((ID_HEADER, log.id),))
            try:
                if name not in OPEN:
                    self._engine.require_token(metadata.get("authorization", ""))
                return returned(**await method(await self._first(messages, sent), log.id))
            except Refusal as error:
                code, problem = error.code, str(error)
            except Exception:
                logger.exception("request %s failed", log.id)
                code, problem = "INTERNAL", INTERNAL
            finally:
                log.end(code)
            return await context.abort(grpc.StatusCode[code], problem)

        return answer

    async def _first(self, messages: AsyncIterator[bytes], kind: Any) -> Any:
        """Return the only message of a request.

        Raises:
            Refusal: it did not arrive in time, or is no such message.
        """
        seconds = self._engine.settings.read_timeout
        try:
            async with asyncio.timeout(seconds):
                return kind.FromString(await anext(aiter(messages)))
        except TimeoutError as error:
            raise Incomplete(f"the request was not complete after {seconds} s") from error
        except StopAsyncIteration as error:
            raise Refusal("the request has no message") from error
        except DecodeError as error:
            raise Refusal(f"the request is no {kind.DESCRIPTOR.name}: {error}") from error

    async def _live(self, message: Any, request_id: str) -> dict[str, Any]:
        return {"live": True}

    async def _ready(self, message: Any, request_id: str) -> dict[str, Any]:
        self._engine.require_ready()
        return {"ready": True}

    async def _server(self, message: Any, request_id: str) -> dict[str, Any]:
        return {"name": "recsys", "version": version("recsys-em3")}

    async def _model_ready(self, message: Any, request_id: str) -> dict[str, Any]:
        self._engine.require_model(message.name, message.version)
        self._engine.require_ready()
        return {"ready": True}

    async def _model(self, message: Any, request_id: str) -> dict[str, Any]:
        served = self._engine.require_model(message.name, message.version)
        return model_metadata(message.name, served)

    async def _infer(self, message: Any, request_id: str) -> dict[str, Any]:
        served = self._engine.require_model(message.model_name, message.model_version)
        wanted = [output.name for output in message.outputs]
        columns = await self._engine.infer(served, wanted, _tensors(message))
        return {
            "model_name": message.model_name,
            "model_version": served.version,
            "id": message.id or request_id,
            "outputs": [
                {"name": name, "datatype": "FP32", "shape": [len(values)]}
                for name, values in columns.items()
            ],
            "raw_output_contents": [values.astype("<f4").tobytes() for values in columns.values()],
        }


def _tensors(message: Any) -> list[Tensor]:
    """Return the inputs of a request."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise Refusal(f"raw_input_contents: {len(raw)} for {len(message.inputs)} inputs")
    tensors = []
    for number, given in enumerate(message.inputs):
        about = given.name, given.datatype, list(given.shape)
        if raw:
            tensors.append(Tensor.of_raw(*about, raw[number]))
        else:
            lists = [list(values) for _, values in given.contents.ListFields()]
            tensors.append(Tensor.of_values(*about, lists[0] if lists else []))
    return tensors
