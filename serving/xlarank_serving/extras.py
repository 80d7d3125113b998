"""What needs packages beyond gRPC's, loaded by those who ask for it: `http_server_type`, `tracer_type`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xlarank.errors import ConfigError

if TYPE_CHECKING:
    from xlarank_serving.http_server import HttpServer
    from xlarank_serving.tracing import Tracer

__all__ = ["http_server_type", "tracer_type"]


def http_server_type() -> type[HttpServer]:
    """`HttpServer`, of the extra `http`; ConfigError where that isn't installed."""
    try:
        from xlarank_serving.http_server import HttpServer
    except ImportError as error:
        raise ConfigError(
            f"http: expected {error.name} to be installed, for the protocol over HTTP: pip install "
            f"'xlarank[http]'"
        ) from error
    return HttpServer


def tracer_type() -> type[Tracer]:
    """`Tracer`, of the extra `otel`; ConfigError where that isn't installed."""
    try:
        from xlarank_serving.tracing import Tracer
    except ImportError as error:
        raise ConfigError(
            f"tracing: expected {error.name} to be installed: pip install 'xlarank[otel]'"
        ) from error
    return Tracer
