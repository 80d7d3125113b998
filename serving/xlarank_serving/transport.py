"""gRPC's own settings of a server, and its port: `bind`, `server_options`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import grpc

from xlarank.errors import ConfigError
from xlarank_serving.config import ConnectionConfig, LimitConfig
from xlarank_serving.tls import ServerTls

__all__ = ["address_of", "bind", "num_connections", "server_options", "stop_listening"]

_MIB = 2**20
_KIB = 2**10
_MS = 1000

_HANDSHAKE_MS = 10_000
"""Of TLS and HTTP/2. gRPC's default, two minutes, is long for a connection that says nothing."""

_AGE_GRACE_MS = 60_000
"""After max_age_seconds calls may still end for so long."""

_FOREVER_MS = 2**31 - 1


def server_options(
    limits: LimitConfig, connections: ConnectionConfig, *, shares_port: bool = False
) -> list[tuple[str, int]]:
    """Channel arguments of a server, which may share its port with other processes."""
    timeout_ms = _milliseconds(connections.keepalive_timeout_seconds)
    metadata_bytes = connections.max_metadata_kib * _KIB
    return [
        ("grpc.so_reuseport", int(shares_port)),  # by default a second server would share the port silently
        ("grpc.max_receive_message_length", limits.max_message_mib * _MIB),
        ("grpc.max_send_message_length", -1),
        # Both, or gRPC refuses at random between them.
        ("grpc.max_metadata_size", metadata_bytes),
        ("grpc.absolute_max_metadata_size", metadata_bytes),
        ("grpc.max_concurrent_streams", connections.max_streams),
        ("grpc.max_allowed_incoming_connections", connections.max_connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.keepalive_time_ms", _milliseconds(connections.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # gRPC waits for the answer to any ping for the longer of the two.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(connections.min_ping_seconds * _MS)),
        ("grpc.max_connection_idle_ms", _milliseconds(connections.max_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(connections.max_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
    ]


def address_of(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.Server, what: str, host: str, port: int, tls: ServerTls | None = None) -> int:
    """Has a server listen.

    Args:
      server: not started.
      what: the port's name in messages.
      host: address.
      port: 0 for a free one.
      tls: None for plain HTTP/2.

    Returns:
      The port.

    Raises:
      ConfigError: if it is in use or the address can't be had.
    """
    reason = "it can't be bound"
    try:
        if tls is None:
            bound = server.add_insecure_port(address_of(host, port))
        else:
            bound = server.add_secure_port(address_of(host, port), tls.grpc_credentials())
    except RuntimeError as error:
        bound, reason = 0, str(error)
    if not bound:
        raise ConfigError(f"{what} port {port} on {host}: expected a free port, got: {reason}")
    return bound


def stop_listening(port: int) -> None:
    """Takes no more connections to a port; those that there are stay, and the server goes on answering.

    gRPC has no call for this: its own stop cancels what arrives before clients have heard of it. So the
    socket is told, behind its back; it logs that it closes its acceptor.
    """
    for one in _sockets_of(port):
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            one.shutdown(socket.SHUT_RD)


def num_connections(port: int) -> int:
    """Connections to a port of this process that are open."""
    return sum(_is_connected(one) for one in _sockets_of(port))


def _sockets_of(port: int) -> Iterator[socket.socket]:
    """Every socket of the process whose own port that is; closed, with nothing done to it, at the next."""
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getsockname()[1] == port:
                    yield one
        except OSError:  # no socket, or closed meanwhile
            continue


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def _milliseconds(seconds: float | None) -> int:
    """0 seconds are no limit, nor is None: who serves alone needs none."""
    return max(1, round(seconds * _MS)) if seconds else _FOREVER_MS
