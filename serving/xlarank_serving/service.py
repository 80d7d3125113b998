"""The RPCs of GRPCInferenceService: `InferenceService`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc
import numpy as np

from xlarank.errors import (
    DeadlineError,
    ModelNotFoundError,
    OverloadError,
    RequestError,
    UnavailableError,
    XlarankError,
)
from xlarank.host import FeatureStore
from xlarank.runtime import Answer, ModelStatistics, Timings
from xlarank.spec import BucketLadder, ContentCheck, ModelSpec, RankRequest, RequestOptions
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.arrival import Arrival, arrival_of
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import LimitConfig
from xlarank_serving.limits import check_request
from xlarank_serving.model_info import config_of, statistics_of
from xlarank_serving.parameters import InferParameters, read_parameters, routing_key
from xlarank_serving.parsing import InferMessage, read_infer_message, unary_handler
from xlarank_serving.refusals import Refusals
from xlarank_serving.repository_rpcs import IndexedRepository, ManagedRepository, RepositoryService
from xlarank_serving.request_record import Observer, RequestRecord
from xlarank_serving.status import failure_reason, status_of
from xlarank_serving.threads import ServerThreads

__all__ = [
    "EXTENSIONS",
    "Engine",
    "InferenceService",
    "RankCall",
    "Repository",
]

_RETRY_SECONDS = 0.25
"""Of a call past max_concurrent_rpcs: nothing predicts when others end, which come by the hundred."""

_MAX_SHOWN_NAME = 128
"""Characters of a name or an id that logs and traces get."""

EXTENSIONS = (
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""Of the protocol, by the names that Triton gives them."""


class EngineMetrics(Protocol):
    """What the service tells an engine's metrics and asks of them; the engine counts what it answers."""

    def record_failure(self, reason: str, seconds: float = 0.0) -> None: ...

    def record_outside(self, seconds: float, wait_seconds: float = 0.0) -> None: ...

    def statistics(self) -> ModelStatistics: ...


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
    def ladder(self) -> BucketLadder: ...

    @property
    def metrics(self) -> EngineMetrics: ...

    def submit(
        self, request: RankRequest, options: RequestOptions | None = None
    ) -> concurrent.futures.Future[Answer]:
        """Queues a request; DeadlineError, OverloadError, UnavailableError."""
        ...

    def update_rows(self, table: str, rows: np.ndarray, values: np.ndarray) -> int:
        """Writes rows of a table, returns its version; RequestError, UnavailableError."""
        ...


class Repository(IndexedRepository, Protocol):
    """The models that a server answers for."""

    @property
    def is_ready(self) -> bool: ...

    def engine(self, name: str, version: str) -> Engine:
        """The engine of a version, "" for the newest ready; ModelNotFoundError, UnavailableError."""
        ...

    def lease(
        self, name: str, version: str, key: str | None = None, *, by_traffic: bool = True
    ) -> contextlib.AbstractContextManager[Engine]:
        """The engine for a request, kept open until the request is submitted; errors as `engine`.

        Without a version the labels' traffic says which, and requests of one key go to one while shares
        stay; not `by_traffic`, as for a change, it is the newest.
        """
        ...

    def overload(self, num_arriving: int) -> OverloadError | None:
        """What a request that comes now is to be refused with unread, beside so many that are being read."""
        ...

    def models(self) -> list[tuple[str, int, bool]]:
        """Name, version and whether it is ready, for every version."""
        ...

    def abandon(self, why: str) -> None:
        """Answers UNAVAILABLE what was accepted and isn't done."""
        ...

    def close(self) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class _Read:
    """How far a request was read."""

    version: str
    """Of the model that took it; the one asked for until then."""

    began_at: float
    """When a thread came to it, on the clock of `time.monotonic`."""

    candidates: int | None = None
    decode_seconds: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RankCall:
    """A ranking request that an engine has taken."""

    request: messages.ModelInferRequest
    """Without its tensors."""

    engine: Engine
    codec: ModelCodec
    parameters: InferParameters
    outputs: list[str]
    future: concurrent.futures.Future[Answer]
    arrival: Arrival
    timeout_at: float
    """When the request's own timeout, or the server's, ends the wait; on the clock of `time.monotonic`."""

    read: _Read

    def cancel(self) -> None:
        """The caller has left: the engine needn't run it, who waits for it needn't wait. Any thread."""
        self.future.cancel()  # has no effect once answered


class InferenceService:
    """Answers the RPCs from a repository. Any thread.

    Attributes:
      limits: of ranking requests.
      refusals: counts of requests that failed before an engine had them.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        default_timeout_seconds: float = math.inf,
        limits: LimitConfig | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """
        Args:
          repository: answers.
          limits: how much a ranking request may hold; `LimitConfig()` by default.
          observers: told of every ranking request that was read, or should have been: answered or refused.
          default_timeout_seconds: longest that a request may take which names no `timeout`, or a longer one.
        """
        self._repository = repository
        self._default_timeout_seconds = default_timeout_seconds
        self.limits = limits or LimitConfig()
        self.refusals = Refusals()
        self._observers = tuple(observers)
        # One codec an engine, dropped with it. A lost race builds one twice, and they are equal.
        self._codecs: weakref.WeakKeyDictionary[Engine, ModelCodec] = weakref.WeakKeyDictionary()
        # Calls on threads of the ranking pool that wait for their engine. Single operations need no lock.
        self._waiting: set[RankCall] = set()
        self._num_open: Callable[[], int] = lambda: 0
        self._num_stalled: Callable[[], int] = lambda: 0
        self._is_stopping = False  # set once, read by any thread

    def stop_accepting(self) -> None:
        """From now on nothing is ready, and a ranking request that arrives is answered UNAVAILABLE.

        Those that have arrived are still answered.
        """
        self._is_stopping = True

    @property
    def is_stopping(self) -> bool:
        """Whether `stop_accepting` was called."""
        return self._is_stopping

    @property
    def is_observed(self) -> bool:
        """Whether anybody is told of requests."""
        return bool(self._observers)

    def count_open(self, num_open: Callable[[], int], num_stalled: Callable[[], int]) -> None:
        """Says how to count the calls that ranking threads are at or that wait for one: those that don't wait
        for their engine, and aren't stalled before they have come, are on their way to it."""
        self._num_open, self._num_stalled = num_open, num_stalled

    def refusal(self) -> XlarankError | None:
        """What a ranking request that comes now is answered unread; None if it is to be read."""
        refusal = self._refusal()
        if refusal is not None:
            self.refusals.count(refusal)
        return refusal

    def _refusal(self) -> XlarankError | None:
        if self._is_stopping:
            return UnavailableError("the server is stopping")
        num_open = self._num_open()
        overload = self._repository.overload(max(0, num_open - self._num_stalled() - len(self._waiting)))
        if overload is None and num_open >= self.limits.max_concurrent_rpcs:
            return OverloadError(
                f"the server has {num_open} ranking calls in progress or waiting for a thread; "
                f"max_concurrent_rpcs is {self.limits.max_concurrent_rpcs}",
                retry_after_seconds=_RETRY_SECONDS,
            )
        return overload

    def handlers(
        self,
        threads: ServerThreads,
        *,
        manager: ManagedRepository | None = None,
        is_one_of_many: bool = False,
    ) -> dict[str, grpc.RpcMethodHandler]:
        """A handler a method, by name.

        Args:
          threads: that they run on.
          manager: loads and unloads models for callers; None where they may not.
          is_one_of_many: see `RepositoryService`.
        """
        administration = RepositoryService(self._repository, manager=manager, is_one_of_many=is_one_of_many)
        methods: dict[str, Callable[[Any, Any], Any]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "ModelInfer": self.model_infer,
            **administration.methods(),
        }
        return {
            name: unary_handler(
                messages, name, method, threads.pool_of(name), read=bytes if name == "ModelInfer" else None
            )
            for name, method in methods.items()
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
        """Name and version of the server, and what it serves beyond the protocol's core."""
        return messages.ServerMetadataResponse(
            name="xlarank", version=_installed_version(), extensions=EXTENSIONS
        )

    def model_metadata(
        self, request: messages.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> messages.ModelMetadataResponse:
        """Inputs, outputs and ready versions of a model."""
        return self._metadata(self._repository.engine(request.name, request.version))

    def model_config(
        self, request: messages.ModelConfigRequest, context: grpc.ServicerContext
    ) -> messages.ModelConfigResponse:
        """How a model is served, in the words of Triton's configuration."""
        engine = self._repository.engine(request.name, request.version)
        config = config_of(
            self._metadata(engine),
            engine.spec,
            engine.ladder,
            versions=self._ready_versions(engine.spec.name),
            default_timeout_seconds=self._default_timeout_seconds,
        )
        return messages.ModelConfigResponse(config=config)

    def model_statistics(
        self, request: messages.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> messages.ModelStatisticsResponse:
        """What models did: one version, or every ready one of a model, or of all models."""
        if request.version:
            engines = [self._repository.engine(request.name, request.version)]
        else:
            engines = self._ready_engines(request.name)
        return messages.ModelStatisticsResponse(
            model_stats=[
                statistics_of(engine.spec.name, engine.version, engine.metrics.statistics())
                for engine in engines
            ]
        )

    def read(self, data: bytes, arrival: Arrival) -> InferMessage:
        """A ranking request of its bytes; RequestError for one that is malformed or too large."""
        try:
            return read_infer_message(data, self.limits)
        except RequestError as error:
            self.tell_unreadable(messages.ModelInferRequest(), arrival, error)
            raise

    def tell_unreadable(
        self, request: messages.ModelInferRequest, arrival: Arrival, error: RequestError
    ) -> None:
        """Counts a request that `begin` can't be given.

        Args:
          request: what is known of it.
          arrival: how it came.
          error: what its caller is told.
        """
        self.refusals.count(error)
        self._observe(request, _Read(request.model_version, time.monotonic()), arrival, error=error)

    def model_infer(self, data: bytes, context: grpc.ServicerContext) -> messages.ModelInferResponse:
        """Scores one request; a caller who leaves or whose deadline passes cancels it."""
        arrival = arrival_of(context, is_traced=self.is_observed)
        call = self.begin(self.read(data, arrival), arrival)
        # If the caller leaves or its deadline passes, the engine needn't run it and this thread needn't
        # wait. If that has happened already, no callback will come.
        if not context.add_callback(call.cancel):
            call.cancel()
        return self.answer(call)

    def begin(self, message: InferMessage, arrival: Arrival) -> RankCall:
        """Reads a request and hands it to its engine; doesn't wait.

        Args:
          message: of ModelInfer.
          arrival: how it came.

        Raises:
          RequestError: for what is wrong with it; ModelNotFoundError.
          DeadlineError, OverloadError, UnavailableError: the engine doesn't take it.
        """
        request = message.request
        read = _Read(request.model_version, time.monotonic())
        has_engine = False
        try:
            check_request(request, self.limits)
            key = routing_key(request.parameters) or request.id or None
            with self._repository.lease(request.model_name, request.model_version, key) as engine:
                has_engine = True
                try:
                    return self._submit(engine, message, read, arrival)
                except Exception as error:
                    engine.metrics.record_failure(failure_reason(error), time.monotonic() - arrival.at)
                    raise
        except Exception as error:
            if not has_engine:
                self.refusals.count(error)
            self._observe(request, read, arrival, error=error)
            raise

    def _submit(self, engine: Engine, message: InferMessage, read: _Read, arrival: Arrival) -> RankCall:
        """Reads a request, noting in `read` how far that went, and hands it to its engine."""
        read.version = str(engine.version)
        request = message.request
        codec = self._codec(engine)
        parameters = read_parameters(request.parameters, engine.spec)
        timeout_seconds = min(parameters.timeout_seconds, self._default_timeout_seconds)
        timeout_at = arrival.at + timeout_seconds
        if read.began_at > timeout_at:
            raise DeadlineError(
                f"model {engine.spec.name!r}: expected an answer within the timeout of "
                f"{timeout_seconds * 1e3:g} ms, the request had waited "
                f"{(read.began_at - arrival.at) * 1e3:.3f} ms to be read"
            )
        outputs = codec.requested_outputs(request, parameters)
        rank_request = codec.read(message, check=engine.check)
        options = RequestOptions(
            priority=parameters.priority,
            deadline=min(timeout_at, arrival.ends_at),
            affinity_key=parameters.affinity_key,
            arrived_at=arrival.at,
        )
        read.candidates = rank_request.num_candidates
        read.decode_seconds = time.monotonic() - read.began_at
        future = engine.submit(rank_request, options)
        head = message.without_tensors()
        return RankCall(head, engine, codec, parameters, outputs, future, arrival, timeout_at, read)

    def answer(self, call: RankCall) -> messages.ModelInferResponse:
        """`finish` on a thread of the ranking pool."""
        self._waiting.add(call)
        try:
            return self.finish(call)
        finally:
            self._waiting.discard(call)

    def finish(self, call: RankCall) -> messages.ModelInferResponse:
        """Waits for the answer and writes it.

        Raises:
          DeadlineError: if it didn't come in time; the engine drops the request then.
          CancelledError: if the caller left.
          XlarankError: whatever else the engine answered.
        """
        try:
            answer = _answer(call)
            response = call.codec.encode_response(
                call.request,
                version=call.engine.version,
                outputs=call.outputs,
                parameters=call.parameters,
                answer=answer,
                decode_seconds=call.read.decode_seconds or 0.0,
            )
        except Exception as error:
            call.engine.metrics.record_failure(failure_reason(error), time.monotonic() - call.arrival.at)
            self._observe(call.request, call.read, call.arrival, error=error)
            raise
        outside = time.monotonic() - call.read.began_at - answer.timings.total
        wait = call.read.began_at - call.arrival.at
        call.engine.metrics.record_outside(max(0.0, outside), max(0.0, wait))
        self._observe(call.request, call.read, call.arrival, timings=answer.timings)
        return response

    def _observe(
        self,
        request: messages.ModelInferRequest,
        read: _Read,
        arrival: Arrival,
        *,
        timings: Timings | None = None,
        error: Exception | None = None,
    ) -> None:
        """Tells the observers of a request, if there are any."""
        if not self._observers:
            return
        status, message = ("OK", "") if error is None else _status(error)
        record = RequestRecord(
            ended_at=time.time(),
            model=request.model_name[:_MAX_SHOWN_NAME],
            version=read.version[:_MAX_SHOWN_NAME],
            id=request.id[:_MAX_SHOWN_NAME],
            candidates=read.candidates,
            status=status,
            message=message,
            total_seconds=time.monotonic() - arrival.at,
            wait_seconds=max(0.0, read.began_at - arrival.at),
            decode_seconds=read.decode_seconds,
            timings=timings,
            transport=arrival.transport,
            trace_parent=arrival.trace_parent,
        )
        for observe in self._observers:
            observe(record)

    def _metadata(self, engine: Engine) -> messages.ModelMetadataResponse:
        return self._codec(engine).metadata(self._ready_versions(engine.spec.name))

    def _ready_versions(self, name: str) -> list[int]:
        return sorted(
            version for own, version, is_ready in self._repository.models() if own == name and is_ready
        )

    def _ready_engines(self, name: str) -> list[Engine]:
        """Of a model, or of all if none is named; ModelNotFoundError, UnavailableError if it has none."""
        engines = []
        for own, version, is_ready in sorted(self._repository.models()):
            if is_ready and name in ("", own):
                try:
                    engines.append(self._repository.engine(own, str(version)))
                except (ModelNotFoundError, UnavailableError):
                    continue  # went away meanwhile
        return engines if engines or not name else [self._repository.engine(name, "")]

    def _codec(self, engine: Engine) -> ModelCodec:
        codec = self._codecs.get(engine)
        if codec is None:
            codec = self._codecs[engine] = ModelCodec(
                engine.spec,
                engine.features,
                max_candidates=self.limits.max_candidates,
                max_joined_bytes=self.limits.max_message_mib << 20,
            )
        return codec


def _status(error: Exception) -> tuple[str, str]:
    code, message = status_of(error)
    return code.name, message


def _answer(call: RankCall) -> Answer:
    if call.timeout_at == math.inf:
        return call.future.result()
    try:
        return call.future.result(max(0.0, call.timeout_at - time.monotonic()))
    except TimeoutError:
        if call.future.done() and not call.future.cancelled():
            return call.future.result()  # it came just now, or it is the engine's own error
        call.cancel()
        waited = time.monotonic() - call.arrival.at
        raise DeadlineError(
            f"model {call.engine.spec.name!r}: expected an answer within the timeout of "
            f"{(call.timeout_at - call.arrival.at) * 1e3:g} ms, got none in {waited * 1e3:.1f} ms"
        ) from None


def _installed_version() -> str:
    try:
        return importlib.metadata.version("xlarank")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
