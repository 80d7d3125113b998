"""The protocol over HTTP, as an ASGI app: `http_app`.

    GET   v2                                                server metadata
    GET   v2/health/live, v2/health/ready                   200, or 400 when not
    GET   v2/models/stats                                   statistics of every model
    GET   v2/models/MODEL[/versions/VERSION]                metadata
    GET   v2/models/MODEL[/versions/VERSION]/ready          200, or 400 when not
    GET   v2/models/MODEL[/versions/VERSION]/config         configuration
    GET   v2/models/MODEL[/versions/VERSION]/stats          statistics
    POST  v2/models/MODEL[/versions/VERSION]/infer          scores
    POST  v2/repository/index                               versions and their states
    POST  v2/repository/models/MODEL/load, .../unload       200, for callers with an admin token

Every request becomes the message that gRPC would have brought and is answered by the same methods; an error
is `{"error": text}` with the text that gRPC's caller would get, under the code that `status` has for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import math
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from xlarank.errors import AccessError, OverloadError, RequestError, UnavailableError
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.arrival import Arrival
from xlarank_serving.http_bodies import Bodies
from xlarank_serving.http_messages import HEADER_LENGTH, encode_response, json_of, parse_object, parse_request
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.parsing import InferMessage
from xlarank_serving.repository_rpcs import IndexedRepository, ManagedRepository, RepositoryService
from xlarank_serving.service import InferenceService, RankCall
from xlarank_serving.status import http_status_of, let_go, log_internal, retry_after_ms
from xlarank_serving.threads import ServerThreads

__all__ = ["Authorize", "http_app", "refusing"]

Authorize = Callable[[str, str | None], None]
"""Raises AccessError if the bearer of an Authorization header (None: there is none) may not call a gRPC
method, named in full."""

_BODY_CODES = {
    408: grpc.StatusCode.CANCELLED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.UNIMPLEMENTED,
}
"""What gRPC's callers get where a body is refused."""

_NOT_READY = 400  # the protocol asks for a 4xx


def http_app(
    service: InferenceService,
    repository: IndexedRepository,
    threads: ServerThreads,
    *,
    max_body_bytes: int,
    max_bodies_bytes: int,
    max_receive_seconds: float,
    authorize: Authorize | None = None,
    manager: ManagedRepository | None = None,
    is_one_of_many: bool = False,
) -> Starlette:
    """The app.

    Args:
      service: answers.
      repository: has the index.
      threads: that the answers are made on.
      max_body_bytes: largest request; 413 beyond.
      max_bodies_bytes: of all requests together that are being received or answered; 429 beyond.
      max_receive_seconds: longest that a body may take to come; 408 beyond.
      authorize: who may call what; everybody everything by default.
      manager: loads and unloads models for those who may; None where nobody may.
      is_one_of_many: see `RepositoryService`.
    """
    bodies = Bodies(max_body_bytes, max_bodies_bytes, max_receive_seconds)
    administration = RepositoryService(repository, manager=manager, is_one_of_many=is_one_of_many)
    app = _App(service, administration, threads, bodies, authorize)
    routes = [
        app.get("/v2", "ServerMetadata", app.server_metadata),
        app.get("/v2/health/live", "ServerLive", service.server_live),
        app.get("/v2/health/ready", "ServerReady", service.server_ready),
        app.get("/v2/models/stats", "ModelStatistics", service.model_statistics),
        app.post("/v2/repository/index", "RepositoryIndex", app.repository.index),
        app.post("/v2/repository/models/{model_name}/load", "RepositoryModelLoad", app.repository.load),
        app.post("/v2/repository/models/{model_name}/unload", "RepositoryModelUnload", app.repository.unload),
    ]
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            app.get(prefix, "ModelMetadata", service.model_metadata),
            app.get(f"{prefix}/ready", "ModelReady", service.model_ready),
            app.get(f"{prefix}/config", "ModelConfig", service.model_config),
            app.get(f"{prefix}/stats", "ModelStatistics", service.model_statistics),
            app.infer(f"{prefix}/infer"),
        ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _on_http_error})


class _App:
    def __init__(
        self,
        service: InferenceService,
        repository: RepositoryService,
        threads: ServerThreads,
        bodies: Bodies,
        authorize: Authorize | None,
    ) -> None:
        self.repository = repository
        self._service = service
        self._threads = threads
        self._bodies = bodies
        self._authorize = authorize

    def server_metadata(self, request: Any, context: Any) -> messages.ServerMetadataResponse:
        """gRPC's, and the extension that HTTP alone has."""
        metadata = self._service.server_metadata(request, context)
        metadata.extensions.append("binary_tensor_data")
        return metadata

    def get(self, path: str, method: str, function: Callable[[Any, Any], Any]) -> Route:
        """A route that asks by its path alone."""

        async def answer(request: Request) -> Response:
            message = getattr(messages, f"{method}Request")(**request.path_params)
            return _response(method, await self._run(method, function, message))

        return Route(path, self._answering(method, answer), methods=["GET"])

    def post(self, path: str, method: str, function: Callable[[Any, Any], Any]) -> Route:
        """A route whose body is a JSON object of settings, or empty."""

        async def answer(request: Request) -> Response:
            message = getattr(messages, f"{method}Request")(**request.path_params)
            async with self._bodies.received(request) as body:
                if body:
                    _set_from_json(message, body)
            return _response(method, await self._run(method, function, message))

        return Route(path, self._answering(method, answer), methods=["POST"])

    def infer(self, path: str) -> Route:
        """A route that ranks."""

        async def answer(request: Request) -> Response:
            arrival = Arrival(
                at=time.monotonic(), trace_parent=request.headers.get("traceparent"), transport="http"
            )
            if (refusal := self._service.refusal()) is not None:
                raise refusal
            async with contextlib.AsyncExitStack() as stack:
                try:
                    body = await stack.enter_async_context(self._bodies.received(request))
                except HTTPException as error:
                    self._service.refusals.count_as(_BODY_CODES[error.status_code])
                    raise
                except OverloadError as error:
                    self._service.refusals.count(error)
                    raise
                ranking = _Ranking(self._service, request, body, arrival)
                loop = asyncio.get_running_loop()
                watch = asyncio.create_task(_wait_for_disconnect(request, ranking.cancel))
                try:
                    content, header_length = await loop.run_in_executor(self._threads.rank, ranking.run)
                finally:
                    watch.cancel()
            if header_length is None:
                return Response(content, media_type="application/json")
            headers = {HEADER_LENGTH: str(header_length)}
            return Response(content, media_type="application/octet-stream", headers=headers)

        return Route(path, self._answering("ModelInfer", answer), methods=["POST"])

    def _answering(
        self, method: str, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Refuses who may not call, and answers exceptions."""

        @functools.wraps(endpoint)
        async def answer(request: Request) -> Response:
            try:
                if self._authorize is not None:
                    self._authorize(f"/{SERVICE_NAME}/{method}", request.headers.get("authorization"))
                return await endpoint(request)
            except HTTPException:
                raise
            except AccessError as error:
                if method == "ModelInfer":
                    self._service.refusals.count(error)
                return _error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except asyncio.CancelledError:  # by the server's stop, after its grace
                return refusing(UnavailableError("the server is stopping"))
            except Exception as error:
                return _error_response(error)

        return answer

    async def _run(self, method: str, function: Callable[[Any, Any], Any], message: Any) -> Any:
        if (refusal := self._threads.administration.refusal(method)) is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads.pool_of(method), function, message, None)


class _Ranking:
    """One infer request, run on a thread and cancelled from the event loop."""

    def __init__(self, service: InferenceService, request: Request, body: bytes, arrival: Arrival) -> None:
        self._service = service
        self._arrival = arrival
        self._header_length = request.headers.get(HEADER_LENGTH)
        self._path = request.path_params
        self._body = body
        self._lock = threading.Lock()
        self._call: RankCall | None = None  # guarded by _lock
        self._is_cancelled = False  # guarded by _lock; moves one way

    def run(self) -> tuple[bytes, int | None]:
        """The body of the answer, and how much of it is JSON if tensors follow."""
        if self._service.is_stopping:  # since its headers came
            raise UnavailableError("the server is stopping")
        model, version = self._path["name"], self._path.get("version", "")
        try:
            request = parse_request(
                self._body, self._header_length, self._service.limits, model=model, version=version
            )
        except RequestError as error:
            named = messages.ModelInferRequest(model_name=model, model_version=version)
            self._service.tell_unreadable(named, self._arrival, error)
            raise
        call = self._service.begin(InferMessage(request.message), self._arrival)
        with self._lock:
            self._call = call
            is_cancelled = self._is_cancelled
        if is_cancelled:
            call.cancel()
        try:
            response = self._service.answer(call)
        except concurrent.futures.CancelledError:  # asyncio would take it for a cancellation of its own task
            raise ClientDisconnect from None
        return encode_response(response, request)

    def cancel(self) -> None:
        """The caller has left."""
        with self._lock:
            self._is_cancelled = True
            call = self._call
        if call is not None:
            call.cancel()


async def _wait_for_disconnect(request: Request, on_disconnect: Callable[[], None]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    on_disconnect()


def _set_from_json(message: Any, body: bytes) -> None:
    """Settings of a repository request; an unknown one is let pass, as parameters are."""
    settings = parse_object(body)
    repository = settings.get("repository_name", "")
    if type(repository) is not str:
        raise RequestError(f"expected 'repository_name' to be a string, got {repository!r:.100}")
    message.repository_name = repository.encode(errors="replace").decode()
    if isinstance(message, messages.RepositoryModelLoadRequest):
        parameters = settings.get("parameters", {})
        if not isinstance(parameters, dict):
            raise RequestError(f"expected 'parameters' to be a JSON object, got {parameters!r:.100}")
        for name in parameters:  # their values don't matter: see `RepositoryService`
            message.parameters[name.encode(errors="replace").decode()].SetInParent()
    if "ready" in settings and isinstance(message, messages.RepositoryIndexRequest):
        if type(settings["ready"]) is not bool:
            raise RequestError(f"expected 'ready' to be a bool, got {settings['ready']!r:.100}")
        message.ready = settings["ready"]


def _response(method: str, message: Any) -> Response:
    if method == "ServerLive":
        return Response(status_code=200 if message.live else _NOT_READY)
    if method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        return Response(status_code=200)
    if method in ("ServerReady", "ModelReady"):
        return Response(status_code=200 if message.ready else _NOT_READY)
    content = json_of(message)
    if method == "ModelConfig":
        content = content["config"]
    elif method == "RepositoryIndex":
        content = content["models"]
    return JSONResponse(content)


def refusing(error: Exception) -> Response:
    """An ASGI app that answers everything with an error, and closes the connection."""
    response = _error_response(error)
    response.headers["Connection"] = "close"
    return response


def _error_response(error: Exception) -> Response:
    code, details = http_status_of(error)
    if code == 500:
        log_internal(details, error)
    headers = {}
    if (milliseconds := retry_after_ms(error)) is not None:
        headers = {"Retry-After": str(math.ceil(milliseconds / 1e3)), "Retry-After-Ms": str(milliseconds)}
    elif code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    let_go(error)
    return JSONResponse({"error": details}, code, headers)


async def _on_http_error(_: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths, other methods, bodies that are too large."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
