"""Changing a server while it serves: `AdminServer`, `AdminClient`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from xlarank.errors import BundleError, ConfigError, RequestError, UnavailableError, UnsupportedError
from xlarank.host import checked_update
from xlarank_serving._proto import admin_pb2 as messages
from xlarank_serving._proto import grpc_service_pb2 as inference_messages
from xlarank_serving.access import ADMIN_SERVICE_NAME as SERVICE_NAME
from xlarank_serving.admin_features import FEATURE_RPCS, MAX_PART_BYTES, FeatureCalls, feature_methods
from xlarank_serving.channel import ClientTls, open_channel, token_metadata
from xlarank_serving.config import ConnectionConfig, LimitConfig
from xlarank_serving.gate import AdminGate
from xlarank_serving.layout import SERVICE_NAME as INFERENCE_SERVICE_NAME
from xlarank_serving.parsing import unary_handler
from xlarank_serving.repository_rpcs import (
    ManagedRepository,
    RepositoryService,
    not_here,
    refused_as_model,
)
from xlarank_serving.service import Engine, Repository
from xlarank_serving.status import error_of_call
from xlarank_serving.threads import AdminThreads, CountingThreadPool
from xlarank_serving.transport import address_of, bind, hang_up, server_options, stop_listening

__all__ = ["SERVICE_NAME", "AdminClient", "AdminServer", "handlers"]

_HOST = "127.0.0.1"
"""Whoever may log in to the machine may change the model; nobody else can."""

_RPCS = {
    "UpdateRows": (messages.UpdateRowsRequest, messages.UpdateRowsResponse),
    "Rollback": (messages.RollbackRequest, messages.RollbackResponse),
    **FEATURE_RPCS,
}

_NUM_THREADS = 2
"""For the index, and for calls that are refused."""

_GRACE_SECONDS = 1.0


def handlers(
    repository: Repository,
    threads: AdminThreads,
    *,
    manager: ManagedRepository | None = None,
    is_one_of_many: bool = False,
    is_ending: Callable[[], bool] = lambda: False,
) -> dict[str, grpc.RpcMethodHandler]:
    """A handler a method of the service, by name; who may call is another's affair.

    In one of many processes on a port rows of tables are updated for all of them; feature stores and the
    choice of versions aren't, and are refused. One that others replace must not take updates any more: its
    versions may be those that nobody asks for.

    Args:
      repository: whose models may be changed.
      threads: that they run on.
      manager: chooses versions; None where nobody does.
      is_one_of_many: whether other processes answer on the same port.
      is_ending: whether calls that come now are UNAVAILABLE.
    """

    def update_rows(request: messages.UpdateRowsRequest, _: grpc.ServicerContext) -> Any:
        return _update_rows(repository, request)

    def rollback(request: messages.RollbackRequest, _: grpc.ServicerContext) -> Any:
        return _rollback(manager, request)

    methods = {"UpdateRows": update_rows, "Rollback": rollback, **feature_methods(repository)}
    if is_one_of_many:
        methods |= dict.fromkeys(("UpdateFeatures", "RemoveFeatures"), _refuse_features)
        methods["Rollback"] = _refuse_rollback

    def unless_ending(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            if is_ending():
                raise UnavailableError(
                    "this process of the server takes no more changes, as it is about to end: connect again, "
                    "to reach one that stays"
                )
            return method(request, context)

        return checked

    return {
        name: unary_handler(messages, name, unless_ending(method), threads.pools[name], types=_RPCS[name])
        for name, method in methods.items()
    }


class AdminServer:
    """What changes a server, on the loopback interface. Listens once constructed.

    The service `xlarank.admin.v1.Admin`, and of the inference service RepositoryIndex, RepositoryModelLoad
    and RepositoryModelUnload, so that Triton's clients can be used.

    Attributes:
      port: where.
    """

    def __init__(
        self,
        repository: Repository,
        port: int,
        *,
        manager: ManagedRepository | None = None,
        is_one_of_many: bool = False,
    ) -> None:
        """
        Args:
          repository: whose models may be changed.
          port: 0 for a free one.
          manager: the same one if models may be loaded, unloaded and rolled back; None for updates alone.
          is_one_of_many: whether other processes listen on this port too.

        Raises:
          ConfigError: if the port is in use.
        """
        self._is_ending = False  # moves one way
        self._threads = CountingThreadPool(_NUM_THREADS, "grpc-admin")
        self._changing = AdminThreads()
        self._server = grpc.server(
            self._threads,
            options=server_options(LimitConfig(), ConnectionConfig(), shares_port=is_one_of_many),
            interceptors=[AdminGate(self._changing, self._threads)],
        )
        services = {
            SERVICE_NAME: handlers(
                repository,
                self._changing,
                manager=manager,
                is_one_of_many=is_one_of_many,
                is_ending=lambda: self._is_ending,
            )
        }
        if manager is not None:
            services[INFERENCE_SERVICE_NAME] = {
                name: unary_handler(inference_messages, name, method, self._changing.pools.get(name))
                for name, method in RepositoryService(manager, manager=manager, is_one_of_many=is_one_of_many)
                .methods()
                .items()
            }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, own) for name, own in services.items()]
        )
        try:
            self.port = bind(self._server, "admin", _HOST, port)
        except ConfigError:
            self._end_threads()
            raise
        self._server.start()

    @property
    def address(self) -> str:
        """host:port."""
        return address_of(_HOST, self.port)

    def stop(self) -> None:
        """Answers what has arrived, then closes the port: a client that calls again reaches another process
        there, if there is one. Idempotent."""
        if self._is_ending:
            return
        stop_listening(self.port)
        self._is_ending = True
        self._threads.wait_until_idle(_GRACE_SECONDS)
        self._changing.wait_until_idle(_GRACE_SECONDS)
        hang_up(self.port)
        self._server.stop(_GRACE_SECONDS).wait()
        self._end_threads()

    def _end_threads(self) -> None:
        self._threads.shutdown()
        self._changing.close()

    def __enter__(self) -> AdminServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class AdminClient:
    """Changes a server on this machine. Any thread; a context manager.

    with AdminClient("127.0.0.1:8003") as admin:
        admin.update_rows("feed", "videos", rows, values)
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = 60.0,
        tls: ClientTls | None = None,
        token: str | None = None,
    ) -> None:
        """
        Args:
          address: host:port of the server's admin port, or of its gRPC port if it has admin tokens.
          timeout: seconds a call may take; None for no limit.
          tls: for the gRPC port of a server with TLS.
          token: an admin token, for the gRPC port.

        Raises:
          ConfigError: if a file of `tls` can't be read.
        """
        self._timeout = timeout
        self._metadata = token_metadata(token)
        self._channel = open_channel(address, tls)
        self._rpcs: dict[str, Any] = {
            name: self._channel.unary_unary(
                f"/{SERVICE_NAME}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            for name, (request, response) in _RPCS.items()
        }
        self._features = FeatureCalls(self._call)

    def update_rows(
        self, model_name: str, table: str, rows: np.ndarray, values: np.ndarray, *, version: str | int = ""
    ) -> int:
        """Writes rows of an updatable table; see `Engine.update_rows`.

        Many rows travel in several calls of at most 16 MiB: a batch may see the first of them and not yet
        the last, and never half a row.

        Args:
          model_name: of the repository.
          table: its name.
          rows: [K] integers, row numbers.
          values: [K, D] floats.
          version: of the model; the newest that answers by default, whatever traffic its labels say. The one
            that takes the first part takes all of them.

        Returns:
          The table's version.

        Raises:
          RequestError: for arrays that aren't as stated, and what the server refuses.
          AccessError: for a missing token, or one that may not do this.
          ModelNotFoundError: if there is no such model or version; one may have ended between two parts.
          UnavailableError: if there is no server, or it or the version is stopping.
        """
        numbers, values = checked_update(f"table {table!r}", rows, values)
        step = max(1, MAX_PART_BYTES // (10 + 4 * values.shape[1]))
        table_version = 0
        for begin in range(0, max(1, len(numbers)), step):
            part = slice(begin, begin + step)
            request = messages.UpdateRowsRequest(
                model_name=model_name,
                model_version=str(version),
                table=table,
                rows=numbers[part].tolist(),
                values=values[part].astype("<f4", copy=False).tobytes(),
            )
            response = self._call("UpdateRows", request)
            version, table_version = response.model_version, response.table_version
        return table_version

    def update_features(
        self,
        model_name: str,
        candidate_ids: Any,
        features: Mapping[str, Any],
        *,
        version: str | int = "",
    ) -> int:
        """Puts rows of candidate features into a model's feature store; see `FeatureStore.update`.

        Many rows travel in several calls of at most 16 MiB: a request may find the first of them and not yet
        the last, and never half a row.

        Args:
          model_name: of the repository.
          candidate_ids: [n] integers.
          features: a value for each stored feature by name, n rows, as `RankRequest` takes them; one with a
            default may be left out, and gets it.
          version: as of `update_rows`.

        Returns:
          The store's version.

        Raises:
          FeatureError: for what can't be sent.
          RequestError: for what the server refuses; parts sent before stay.
          AccessError, ModelNotFoundError, UnavailableError: as `update_rows`.
        """
        return self._features.update(model_name, candidate_ids, features, str(version))

    def remove_features(self, model_name: str, candidate_ids: Any, *, version: str | int = "") -> int:
        """Takes rows out of a model's feature store; returns how many there were.

        Raises as `update_features`.
        """
        return self._features.remove(model_name, candidate_ids, str(version))

    def rollback(self, model_name: str, version: int | None = None) -> int:
        """Goes back to an older version of a model; returns which one serves now.

        Newer ones that are there are left alone until their folder changes, the model is loaded by
        RepositoryModelLoad, or the server starts anew.

        Args:
          model_name: of the repository.
          version: to go back to; by default the next older one than the newest that answers.

        Raises:
          ModelNotFoundError: if there is no such model, or no such older version.
          RequestError: under policy specific, whose config names the versions.
          UnsupportedError: if the server has several processes; says what to do instead.
          AccessError: for a missing token, or one that may not do this.
          UnavailableError: if there is no server, or it is stopping.
          ModelError: if the version can't be served; says why. Nothing has changed then.
        """
        request = messages.RollbackRequest(model_name=model_name, version=version or 0)
        return self._call("Rollback", request).version

    def _call(self, name: str, request: Message) -> Any:
        try:
            return self._rpcs[name](request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from error

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_features(request: Any, _: grpc.ServicerContext) -> Any:
    raise UnsupportedError(
        "feature stores can't be updated in a server of several processes, as each has a store of its own "
        "and a call reaches one of them: build the feature file anew and start the server again, or serve "
        "with --processes 1"
    )


def _refuse_rollback(request: Any, _: grpc.ServicerContext) -> Any:
    raise UnsupportedError(
        "models can't be rolled back in a server of several processes, as a call reaches one of them: "
        "publish the older version again under a number above the others (--watch-seconds finds it), start "
        "the server again with a policy that names the version, or serve with --processes 1"
    )


def _rollback(manager: ManagedRepository | None, request: messages.RollbackRequest) -> Any:
    if manager is None:
        raise not_here("rolled back")
    try:
        with refused_as_model(BundleError):
            version = manager.rollback(request.model_name, request.version or None)
    except ConfigError as error:  # of the server, which the caller asks to do what its config rules out
        raise RequestError(str(error)) from None
    return messages.RollbackResponse(version=version)


def _update_rows(repository: Repository, request: messages.UpdateRowsRequest) -> Any:
    """See the proto file."""
    with repository.lease(request.model_name, request.model_version, by_traffic=False) as engine:
        return _update_rows_of(engine, request)


def _update_rows_of(engine: Engine, request: messages.UpdateRowsRequest) -> Any:
    rows, num_bytes = np.array(request.rows, np.int64), len(request.values)
    if num_bytes % 4 or (num_bytes // 4 % len(rows) if len(rows) else num_bytes):
        raise RequestError(
            f"table {request.table!r}: expected values as float32 of shape [{len(rows)}, D], got "
            f"{num_bytes} bytes"
        )
    values = np.frombuffer(request.values, "<f4").astype(np.float32)
    if len(rows):
        values = values.reshape(len(rows), -1)
    else:  # no row says what D is
        table = engine.spec.table_by_name.get(request.table)
        values = values.reshape(0, 0 if table is None else table.dim)
    version = engine.update_rows(request.table, rows, values)
    return messages.UpdateRowsResponse(model_version=str(engine.version), table_version=version)
