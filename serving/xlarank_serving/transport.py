"""gRPC's own settings of a server, and its port: `bind`, `server_options`."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

import grpc

from xlarank.errors import ConfigError
from xlarank_serving.config import ConnectionConfig, LimitConfig
from xlarank_serving.tls import ServerTls

__all__ = ["address_of", "bind", "hang_up", "num_connections", "server_options", "stop_listening"]

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


def hang_up(port: int) -> None:
    """Ends the connections to a port of this process and takes no more: calls on them are UNAVAILABLE.

    For the end, when what was accepted is answered. gRPC's own stop answers CANCELLED, which clients don't
    retry, to each call that arrives before its client has heard of the stop, or that no thread has taken yet:
    https://github.com/grpc/grpc/issues/41785. Nothing is done where a system doesn't list a process's files.
    """
    stop_listening(port)  # first, or clients that were hung up on would be back
    for _, one in _sockets_of(port):
        with contextlib.suppress(OSError):  # its client has just left
            one.shutdown(socket.SHUT_RDWR)


def stop_listening(port: int) -> None:
    """Takes no more connections to a port of this process; those that there are stay, and are answered.

    gRPC has no call for this. Its listening socket is closed by putting another one in its place, which hears
    of nothing: of one that is shut down gRPC would log an error.
    """
    with socket.socket() as deaf:
        for number, one in _sockets_of(port):
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                one.close()
                os.dup2(deaf.fileno(), number, inheritable=False)


def num_connections(port: int) -> int:
    """Connections to a port of this process that are open."""
    return sum(_is_connected(one) for _, one in _sockets_of(port))


def _sockets_of(port: int) -> Iterator[tuple[int, socket.socket]]:
    """File number of each socket of the process whose own port that is, and a copy, closed at the next."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:  # another system
        names = []
    for number in map(int, names):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getsockname()[1] == port:
                    yield number, one
        except OSError:  # closed meanwhile
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
