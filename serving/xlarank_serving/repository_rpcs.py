"""RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload: `RepositoryService`.

The index is everybody's. Loading and unloading change what a server answers, so they are for those who may
log in to its machine, by the administrative port, or have an admin token, by the main port; others are told
so. A model always comes from the server's own folder: what would bring a path, a file or a configuration over
the wire is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grpc

from xlarank.errors import (
    AccessError,
    BundleError,
    ConfigError,
    ModelError,
    RequestError,
    UnsupportedError,
    XlarankError,
)
from xlarank_serving._proto import grpc_service_pb2 as messages

__all__ = [
    "IndexedRepository",
    "ManagedRepository",
    "RepositoryService",
    "VersionState",
    "not_here",
    "refused_as_model",
]

_READY = "READY"


class VersionState(Protocol):
    """One version of a model, as the index tells it."""

    @property
    def model(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def state(self) -> str:
        """READY, LOADING, UNLOADING or UNAVAILABLE."""
        ...

    @property
    def reason(self) -> str:
        """Why it isn't ready; "" if there is nothing to say."""
        ...


class IndexedRepository(Protocol):
    """Models, and versions that may not be ready."""

    def index(self) -> Sequence[VersionState]:
        """Every version there is."""
        ...


class ManagedRepository(IndexedRepository, Protocol):
    """Models that come and go as callers say."""

    def load(self, name: str) -> None:
        """Loads a model, or looks for new versions of it; returns when it is ready. ModelNotFoundError;
        ModelError, ConfigError or BundleError, which say why it can't be served."""
        ...

    def unload(self, name: str) -> None:
        """Answers what was accepted, then frees every version of a model. ModelNotFoundError."""
        ...

    def rollback(self, name: str, version: int | None = None) -> int:
        """Goes back to an older version, the next one by default, and returns it. ModelNotFoundError;
        ConfigError where the policy names versions; ModelError or BundleError, which say why it can't be
        served."""
        ...


class RepositoryService:
    """Answers the repository RPCs. Any thread."""

    def __init__(
        self,
        repository: IndexedRepository,
        *,
        manager: ManagedRepository | None = None,
        is_one_of_many: bool = False,
    ) -> None:
        """
        Args:
          repository: whose models.
          manager: the same one where callers may load and unload; None where they may not.
          is_one_of_many: whether other processes serve on the same port, which a call here wouldn't reach.
        """
        self._is_one_of_many = is_one_of_many
        self._repository = repository
        self._manager = manager

    def methods(self) -> dict[str, Callable[[Any, Any], Any]]:
        """A function a method, by name."""
        return {
            "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
        }

    def index(
        self, request: messages.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> messages.RepositoryIndexResponse:
        """Every version and its state, or those that are ready."""
        _check_repository(request.repository_name)
        response = messages.RepositoryIndexResponse()
        for one in self._repository.index():
            if one.state == _READY or not request.ready:
                response.models.add(
                    name=one.model, version=str(one.version), state=one.state, reason=one.reason
                )
        return response

    def load(
        self, request: messages.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> messages.RepositoryModelLoadResponse:
        """Loads a model of the server's own folder; answers when it is ready."""
        manager = self._manager_for("load")
        _check_repository(request.repository_name)
        _check_parameters(request.parameters)
        with refused_as_model(BundleError, ConfigError):
            manager.load(_checked_name(request.model_name))
        return messages.RepositoryModelLoadResponse()

    def unload(
        self, request: messages.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> messages.RepositoryModelUnloadResponse:
        """Unloads every version of a model; what was accepted is answered."""
        manager = self._manager_for("unload")
        _check_repository(request.repository_name)
        manager.unload(_checked_name(request.model_name))
        return messages.RepositoryModelUnloadResponse()

    def _manager_for(self, verb: str) -> ManagedRepository:
        if self._is_one_of_many:
            raise UnsupportedError(
                f"models can't be {verb}ed one by one in a server of several processes, as a call reaches "
                f"one of them: publish or remove versions in its repository, which it looks at "
                f"(--watch-seconds), or serve with --processes 1"
            )
        if self._manager is None:
            raise not_here(f"{verb}ed")
        return self._manager


def not_here(done: str) -> AccessError:
    """What a caller is told who may not change models on this port: what models can't be, in words."""
    return AccessError(
        f"models can't be {done} on this port; the administrative port of the server answers this call "
        f"(`xlarank serve --admin-port`)",
        is_known_caller=True,
    )


@contextlib.contextmanager
def refused_as_model(*errors: type[XlarankError]) -> Iterator[None]:
    """Has a caller told of these errors as of a version that fails its proof: ModelError."""
    try:
        yield
    except errors as error:
        raise ModelError(str(error)) from None


def _check_repository(name: str) -> None:
    if name:
        raise RequestError(f"repository {name!r}: expected no name, as the server has one repository")


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise RequestError(
                f"parameter {name[:100]!r}: a model is loaded from the server's own folder; no configuration "
                f"and no file comes from a caller"
            )


def _checked_name(name: str) -> str:
    if not name or "/" in name or "\\" in name or "\0" in name or name.startswith("."):
        raise RequestError(f"model {name[:100]!r}: expected the name of a model, as the index has it")
    return name
