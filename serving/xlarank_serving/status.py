"""The one place where exceptions become gRPC codes, and codes become exceptions again."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from xlarank.errors import (
    AccessError,
    DeadlineError,
    ModelError,
    ModelNotFoundError,
    OverloadError,
    RequestError,
    UnavailableError,
    UnsupportedError,
    XlarankError,
)
from xlarank.runtime.complaints import Complaints

__all__ = [
    "answering",
    "answering_stream",
    "error_of",
    "error_of_call",
    "failure_reason",
    "http_status_of",
    "let_go",
    "log_internal",
    "retry_after_ms",
    "status_of",
]

_complaints = Complaints(logging.getLogger(__name__))

# First match wins, so a subclass stands before its base.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    (UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelError, grpc.StatusCode.FAILED_PRECONDITION),  # of loads: ranking raises none
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (concurrent.futures.CancelledError, grpc.StatusCode.CANCELLED),
)

# Who says who it is may still not do everything.
_ACCESS_CODES = {True: grpc.StatusCode.PERMISSION_DENIED, False: grpc.StatusCode.UNAUTHENTICATED}

_ERRORS: dict[grpc.StatusCode, Callable[[str], XlarankError]] = {
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.FAILED_PRECONDITION: ModelError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: functools.partial(AccessError, is_known_caller=True),
}

# As Triton answers over HTTP where it knows the status; what isn't here is 500.
_HTTP_CODES = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
}

_FAILURE_REASONS = {
    grpc.StatusCode.UNAVAILABLE: "REJECTED",
    grpc.StatusCode.DEADLINE_EXCEEDED: "REJECTED",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "REJECTED",
    grpc.StatusCode.CANCELLED: "CANCELED",
    grpc.StatusCode.INTERNAL: "BACKEND",
}

_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata that gRPC's own retries obey (proposal A6)."""

_MAX_DETAIL_BYTES = 2000
"""A status travels as an HTTP/2 header, where a byte outside printable ASCII takes three; past 8 KiB the
client would get RESOURCE_EXHAUSTED instead of the message."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Code and details that a client gets for an exception.

    An exception that isn't xlarank's own is INTERNAL. Details are cut to fit into a gRPC header.
    """
    if isinstance(error, AccessError):
        return _ACCESS_CODES[error.is_known_caller], _cut(str(error))
    for error_type, code in _CODES:
        if isinstance(error, error_type):
            return code, _cut(str(error) or code.name.lower().replace("_", " "))
    return grpc.StatusCode.INTERNAL, _cut(f"internal error: {type(error).__name__}: {error}")


def http_status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status code and text that a client gets for an exception."""
    code, details = status_of(error)
    return _HTTP_CODES.get(code, 500), details


def failure_reason(error: BaseException) -> str:
    """The label under which `nv_inference_request_failure` counts an exception."""
    return _FAILURE_REASONS.get(status_of(error)[0], "OTHER")


def error_of(code: grpc.StatusCode, details: str) -> XlarankError:
    """The exception that a client raises for a status: inverse of `status_of` as far as there is one."""
    error_type = _ERRORS.get(code)
    return error_type(details) if error_type else XlarankError(f"{code.name}: {details}")


def error_of_call(call: Any) -> XlarankError:
    """The same for a call that failed, with the time that the server asks a client to wait."""
    error = error_of(call.code(), call.details() or "")
    if isinstance(error, OverloadError):
        pushback = str(dict(call.trailing_metadata() or ()).get(_PUSHBACK, ""))
        if pushback.isdecimal():
            error.retry_after_seconds = int(pushback) / 1e3
    return error


def let_go(error: BaseException) -> None:
    """For whoever has told a caller of an exception: its traceback is dropped.

    An exception of a future has the frames in its traceback that waited for it, and they have the future: in
    such a cycle request and engine, with its tables, would stay until the collector comes by.
    """
    error.__traceback__ = None


def retry_after_ms(error: BaseException) -> int | None:
    """How long a client should wait before it asks again; None where an error doesn't say."""
    if isinstance(error, OverloadError):
        return max(1, round(error.retry_after_seconds * 1e3))
    return None


def answering(method: Callable[[Any, Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Wraps an RPC method so that its exceptions reach the client as statuses and the server goes on.

    INTERNAL is logged with its traceback, see `log_internal`.
    """

    @functools.wraps(method)
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except Exception as error:
            _abort(context, error)

    return answer


def answering_stream(
    method: Callable[[Any, Any], Iterator[Any]],
) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    """As `answering`, for a method that answers a stream."""

    @functools.wraps(method)
    def answer(requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(requests, context)
        except Exception as error:
            _abort(context, error)

    return answer


def log_internal(details: str, error: Exception) -> None:
    """Of a request that is answered INTERNAL: a client may send such by the thousand."""
    _complaints.add("request failed: %s", details, error=error)


def _abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    code, details = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log_internal(details, error)
    if (milliseconds := retry_after_ms(error)) is not None:
        context.set_trailing_metadata(((_PUSHBACK, str(milliseconds)),))
    let_go(error)
    context.abort(code, details)


def _cut(details: str) -> str:
    data = details.encode(errors="replace")
    if len(data) <= _MAX_DETAIL_BYTES:
        return data.decode()
    return data[:_MAX_DETAIL_BYTES].decode(errors="ignore") + "..."
