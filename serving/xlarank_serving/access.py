"""Who may call what: `Gatekeeper`, which sees every call before a thread or a message of it is taken.

    caller                          may
    anybody                         probes (health, live, ready), and rank where there are no tokens
    with a rank token               everything but administration
    with an admin token             everything

Administrative RPCs are off on the gRPC port unless there are admin tokens; the admin port, which only this
machine reaches, answers them to anybody. A model's name that a client sends is looked up among the models
that are loaded and never becomes part of a path.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

import grpc

from xlarank.errors import AccessError, ConfigError
from xlarank_serving.config import SecurityConfig
from xlarank_serving.layout import RANKING_METHODS, SERVICE_NAME
from xlarank_serving.parsing import refusal_handler
from xlarank_serving.refusals import Refusals
from xlarank_serving.reloading import Reloaded, read_file
from xlarank_serving.threads import ServerThreads

__all__ = ["ADMIN_SERVICE_NAME", "Access", "Authorizer", "Gatekeeper", "access_of", "load_tokens"]

ADMIN_SERVICE_NAME = "xlarank.admin.v1.Admin"
"""Full name of the administrative gRPC service."""

_HEALTH = "/grpc.health.v1.Health/"

_PROBES = frozenset(f"/{SERVICE_NAME}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))

_ADMINISTRATION = frozenset(
    f"/{SERVICE_NAME}/{name}" for name in ("RepositoryModelLoad", "RepositoryModelUnload")
)

_MIN_TOKEN_BYTES = 16
_MAX_TOKENS = 1000


class Access(enum.Enum):
    """What a method takes."""

    PROBE = enum.auto()
    RANK = enum.auto()
    ADMIN = enum.auto()


def access_of(method: str) -> Access:
    """What a method takes, by its full name, as "/inference.GRPCInferenceService/ModelInfer"."""
    if method in _ADMINISTRATION or method.startswith(f"/{ADMIN_SERVICE_NAME}/"):
        return Access.ADMIN
    return Access.PROBE if method in _PROBES or method.startswith(_HEALTH) else Access.RANK


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Digests of the tokens of a file."""

    digests: tuple[bytes, ...]

    def __contains__(self, token: str) -> bool:
        """Compares with every one of them, whether or not it has been found: time tells nothing."""
        digest = _digest(token.encode(errors="replace"))
        found = False
        for own in self.digests:
            found |= hmac.compare_digest(own, digest)
        return found


def load_tokens(what: str, path: Path) -> Tokens:
    """Reads a file of tokens: one a line; empty lines and those that begin with # don't count.

    Raises:
      ConfigError: if it can't be read, has none or too many, or one is short or not of printable ASCII; it
        names the line and doesn't show the token.
    """
    where = f"security: {what}"
    lines = [line.strip() for line in read_file(where, path).splitlines()]
    tokens = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith(b"#")}
    for number, token in tokens.items():
        if len(token) < _MIN_TOKEN_BYTES or not all(33 <= byte < 127 for byte in token):
            raise ConfigError(
                f"{where} {path}: line {number}: expected a token of at least {_MIN_TOKEN_BYTES} printable "
                f"ASCII characters without spaces, got {len(token)} bytes"
            )
    if not 1 <= len(tokens) <= _MAX_TOKENS:
        raise ConfigError(
            f"{where} {path}: expected 1 to {_MAX_TOKENS} tokens, one a line, got {len(tokens)}"
        )
    return Tokens(tuple(_digest(token) for token in tokens.values()))


class Authorizer:
    """Judges callers by the token that they send. Any thread; token files may change."""

    def __init__(self, security: SecurityConfig) -> None:
        """ConfigError if a file of tokens can't be read."""
        self._security = security
        self._rank = _reloaded("tokens", security.tokens)
        self._admin = _reloaded("admin_tokens", security.admin_tokens)

    @property
    def answers_administration(self) -> bool:
        """Whether anybody may administrate over the network."""
        return self._admin is not None

    def asks_for_token(self, access: Access) -> bool:
        """Whether it matters what a caller says of itself."""
        if access is Access.ADMIN:
            return self._admin is not None
        return self._rank is not None and not (access is Access.PROBE and self._security.open_probes)

    def check(self, access: Access, authorization: str | None) -> None:
        """Lets a caller pass or raises.

        Args:
          access: what is asked for.
          authorization: the value of the header, "Bearer TOKEN"; None for none.

        Raises:
          AccessError: if the caller has to say who it is, or may not do this.
        """
        if access is Access.ADMIN:
            self._check_admin(authorization)
        elif self._rank is not None and self.asks_for_token(access):
            token = _token_of(authorization)
            if token not in self._rank.get() and not self._is_admin(token):
                raise AccessError("the token isn't known to the server", is_known_caller=False)

    def check_method(self, method: str, authorization: str | None) -> None:
        """`check` of what a method takes, named in full as for `access_of`."""
        self.check(access_of(method), authorization)

    def check_metrics(self, authorization: str | None) -> None:
        """The same for a reader of /metrics."""
        if not self._security.open_metrics:
            self.check(Access.RANK, authorization)

    def _check_admin(self, authorization: str | None) -> None:
        if self._admin is None:
            raise AccessError(
                "administrative RPCs are off on this port: expected a call on the admin port (--admin-port, "
                "on the server's own machine) or a server with --admin-tokens",
                is_known_caller=True,
            )
        token = _token_of(authorization)
        if self._is_admin(token):
            return
        if self._rank is not None and token in self._rank.get():
            raise AccessError("expected an admin token, got a token that may only rank", is_known_caller=True)
        raise AccessError("the token isn't known to the server", is_known_caller=False)

    def _is_admin(self, token: str) -> bool:
        return self._admin is not None and token in self._admin.get()


class Gatekeeper(grpc.ServerInterceptor):
    """Refuses calls when their headers arrive. A refused call's message is never read."""

    def __init__(self, authorizer: Authorizer, threads: ServerThreads, refusals: Refusals) -> None:
        """
        Args:
          authorizer: judges.
          threads: that the refusals are said on.
          refusals: counts of ranking requests.
        """
        self._authorizer = authorizer
        self._threads = threads
        self._refusals = refusals

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that answers with the refusal."""
        headers = handler_call_details.invocation_metadata or ()
        values = [value for key, value in headers if key == "authorization"]
        try:
            access = access_of(handler_call_details.method)
            if len(values) > 1 and self._authorizer.asks_for_token(access):
                raise AccessError("expected one authorization header, got several", is_known_caller=False)
            value = values[0] if values else None
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            self._authorizer.check(access, text)
        except AccessError as error:
            if handler_call_details.method in RANKING_METHODS:
                self._refusals.count(error)
            return refusal_handler(error, self._threads.refusals)
        return continuation(handler_call_details)


def _reloaded(what: str, path: Path | None) -> Reloaded[Tokens] | None:
    return None if path is None else Reloaded([path], lambda: load_tokens(what, path))


def _token_of(authorization: str | None) -> str:
    if authorization is None:
        raise AccessError(
            "expected a token as metadata 'authorization: Bearer TOKEN', got none", is_known_caller=False
        )
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise AccessError(
            "expected metadata 'authorization: Bearer TOKEN', got another scheme", is_known_caller=False
        )
    return token.strip()


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
