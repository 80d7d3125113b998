"""The RPCs of GRPCInferenceService: `InferenceService`."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import numpy as np

from xlarank.errors import UnavailableError
from xlarank.host import FeatureStore
from xlarank.runtime import Answer
from xlarank.spec import ContentCheck, ModelSpec, RankRequest, RequestOptions
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import LimitConfig
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.parsing import parsing
from xlarank_serving.status import answering, failure_reason
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["Engine", "InferenceService", "Repository"]


class FailureCounter(Protocol):
    """What the service tells an engine's metrics; the engine itself counts what it answers."""

    def record_failure(self, reason: str) -> None: ...


class Engine(Protocol):
    """One ready version of a model."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def version(self) -> int: ...

    @property
    def features(self) -> FeatureStore | None: ...

    @property
    def check(self) -> ContentCheck: ...

    @property
    def metrics(self) -> FailureCounter: ...

    def submit(
        self, request: RankRequest, options: RequestOptions | None = None
    ) -> concurrent.futures.Future[Answer]:
        """Queues a request; DeadlineError, OverloadError, UnavailableError."""
        ...

    def update_rows(self, table: str, rows: np.ndarray, values: np.ndarray) -> int:
        """Writes rows of a table, returns its version; RequestError, UnavailableError."""
        ...


class Repository(Protocol):
    """The models that a server answers for."""

    @property
    def is_ready(self) -> bool: ...

    def engine(self, name: str, version: str) -> Engine:
        """The engine of a version, "" for the latest ready; ModelNotFoundError, UnavailableError."""
        ...

    def models(self) -> list[tuple[str, int, bool]]:
        """Name, version and whether it is ready, for every version."""
        ...

    def close(self) -> None: ...


class InferenceService:
    """Answers the RPCs from a repository. Any thread."""

    def __init__(self, repository: Repository, limits: LimitConfig | None = None) -> None:
        self._repository = repository
        self._limits = limits or LimitConfig()
        # One codec an engine, dropped with it. A lost race builds one twice, and they are equal.
        self._codecs: weakref.WeakKeyDictionary[Engine, ModelCodec] = weakref.WeakKeyDictionary()
        self._is_stopping = False  # set once, read by any thread

    def stop_accepting(self) -> None:
        """From now on nothing is ready, and a ranking request that arrives is answered UNAVAILABLE.

        Those that have arrived are still answered.
        """
        self._is_stopping = True

    def gate(
        self, handlers: dict[str, grpc.RpcMethodHandler], threads: ServerThreads
    ) -> grpc.GenericRpcHandler:
        """The service of `handlers`; it turns ranking requests away from the moment of the stop.

        gRPC itself would leave those that arrive during a stop without an answer, then cancel them, and
        clients retry on UNAVAILABLE only.
        """
        return _Gate(self, grpc.method_handlers_generic_handler(SERVICE_NAME, handlers), threads)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop_accepting` was called."""
        return self._is_stopping

    def handlers(self, threads: ServerThreads) -> dict[str, grpc.RpcMethodHandler]:
        """A handler a method, by name."""
        methods: dict[str, tuple[Callable[[Any, Any], Any], concurrent.futures.ThreadPoolExecutor]] = {
            "ServerLive": (self.server_live, threads.control),
            "ServerReady": (self.server_ready, threads.control),
            "ModelReady": (self.model_ready, threads.control),
            "ServerMetadata": (self.server_metadata, threads.control),
            "ModelMetadata": (self.model_metadata, threads.control),
            "ModelInfer": (self.model_infer, threads.rank),
        }
        return {
            name: grpc.unary_unary_rpc_method_handler(
                on_threads(
                    answering(parsing(getattr(messages, f"{name}Request"), method, self._limits)), pool
                ),
                response_serializer=getattr(messages, f"{name}Response").SerializeToString,
            )
            for name, (method, pool) in methods.items()
        }

    def server_live(self, request: Any, context: grpc.ServicerContext) -> messages.ServerLiveResponse:
        """Whether the process runs."""
        return messages.ServerLiveResponse(live=True)

    def server_ready(self, request: Any, context: grpc.ServicerContext) -> messages.ServerReadyResponse:
        """Whether every model is ready and the server isn't stopping."""
        return messages.ServerReadyResponse(ready=self._repository.is_ready and not self._is_stopping)

    def model_ready(
        self, request: messages.ModelReadyRequest, context: grpc.ServicerContext
    ) -> messages.ModelReadyResponse:
        """False for a version that is loading; ModelNotFoundError for one that doesn't exist."""
        try:
            self._repository.engine(request.name, request.version)
        except UnavailableError:
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=not self._is_stopping)

    def server_metadata(self, request: Any, context: grpc.ServicerContext) -> messages.ServerMetadataResponse:
        """Name and version of the server."""
        return messages.ServerMetadataResponse(name="xlarank", version=_installed_version())

    def model_metadata(
        self, request: messages.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> messages.ModelMetadataResponse:
        """Inputs, outputs and ready versions of a model."""
        engine = self._repository.engine(request.name, request.version)
        versions = [
            version
            for name, version, is_ready in self._repository.models()
            if name == request.name and is_ready
        ]
        response = self._codec(engine).metadata(sorted(versions))
        response.name = request.name
        return response

    def model_infer(
        self, request: messages.ModelInferRequest, context: grpc.ServicerContext
    ) -> messages.ModelInferResponse:
        """Scores one request; a caller who leaves or whose deadline passes cancels it."""
        engine = self._repository.engine(request.model_name, request.model_version)
        try:
            return self._infer(engine, request, context)
        except Exception as error:
            engine.metrics.record_failure(failure_reason(error))
            raise

    def _infer(
        self, engine: Engine, request: messages.ModelInferRequest, context: grpc.ServicerContext
    ) -> messages.ModelInferResponse:
        codec = self._codec(engine)
        outputs = codec.requested_outputs(request)
        future = engine.submit(codec.decode(request, check=engine.check))

        def on_end() -> None:
            future.cancel()  # has no effect once answered

        # If the caller leaves or its deadline passes, the engine needn't run it and this thread needn't
        # wait. If that has happened already, no callback will come.
        if not context.add_callback(on_end):
            on_end()
        answer = future.result()
        return codec.encode_response(request, version=engine.version, outputs=outputs, scores=answer.scores)

    def _codec(self, engine: Engine) -> ModelCodec:
        codec = self._codecs.get(engine)
        if codec is None:
            codec = self._codecs[engine] = ModelCodec(engine.spec, engine.features)
        return codec


class _Gate(grpc.GenericRpcHandler):
    """Looks a method up when its call arrives, before any thread is taken."""

    def __init__(
        self, service: InferenceService, inner: grpc.GenericRpcHandler, threads: ServerThreads
    ) -> None:
        self._service = service
        self._inner = inner
        self._refusal = grpc.unary_unary_rpc_method_handler(on_threads(answering(_refuse), threads.control))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if self._service.is_stopping and handler_call_details.method == f"/{SERVICE_NAME}/ModelInfer":
            return self._refusal
        return self._inner.service(handler_call_details)


def _refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
    raise UnavailableError("the server is stopping")


def _installed_version() -> str:
    try:
        return importlib.metadata.version("xlarank")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
