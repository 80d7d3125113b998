"""How a server listens, what it accepts and from whom. Each class is a section of the server's config file.

Nothing heavy is imported here: the command line makes its flags of these classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xlarank.errors import ConfigError
from xlarank.spec.fields import to_number

__all__ = [
    "AccessLogConfig",
    "ConnectionConfig",
    "HttpConfig",
    "LimitConfig",
    "ProcessesConfig",
    "SecurityConfig",
    "ServerConfig",
    "TracingConfig",
]

_MAX_PORT = 2**16 - 1

_MAX_PROCESSES = 256

# gRPC counts bytes and milliseconds in 32 bits.
_MAX_MIB = 2047
_MAX_KIB = 2**20
_MAX_SECONDS = 2_000_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens and how it ends."""

    host: str = "127.0.0.1"
    """Address of the gRPC and HTTP ports. The default can't be reached from other machines; 0.0.0.0 can."""

    port: int = 8001
    """gRPC; 0 for a free one."""

    http_port: int = 8002
    """/metrics; 0 for a free one."""

    admin_port: int | None = None
    """Administrative RPCs (update rows), on 127.0.0.1 alone; 0 for a free one."""

    port_file: Path | None = None
    """File to write the ready line's JSON object to once ready, for scripts; an earlier run's is removed at
    the start."""

    num_threads: int = dataclasses.field(default=64, metadata={"flag": "threads"})
    """Requests in decode, in the queue or running at a time; each waits on a thread."""

    stream_idle_seconds: float = 600.0
    """A ModelStreamInfer without a request under way, or that doesn't take an answer, is ended after this
    time, as it holds one of 64 places, and so is a silent or unread stream of reflection; 0 for no limit.
    Who doesn't read has less while others are refused for want of a place, and while the server stops."""

    grace_seconds: float = dataclasses.field(default=30.0, metadata={"flag": "grace"})
    """How long a stop waits for accepted requests."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.host.removeprefix("[").removesuffix("]"))
        if not self.host:
            raise ConfigError("server: host must be an address to listen on; was ''")
        for name in ("port", "http_port", "admin_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= _MAX_PORT:
                raise ConfigError(f"server: {name} must be in [0, {_MAX_PORT}]; was {port}")
        _check_range(self, "server", "num_threads", 1)
        _check_range(self, "server", "stream_idle_seconds", 0, _MAX_SECONDS)
        _check_range(self, "server", "grace_seconds", 0, _MAX_SECONDS)

    @property
    def ports(self) -> list[tuple[str, str, int]]:
        """What each port is for, its address and its number; those that are off are left out."""
        ports = [("grpc", self.host, self.port), ("http", self.host, self.http_port)]
        return ports if self.admin_port is None else [*ports, ("admin", "127.0.0.1", self.admin_port)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """Whether one process serves, or several that share ports and tables."""

    num_processes: int = dataclasses.field(default=1, metadata={"flag": "processes"})
    """Server processes, each with its own devices; one that dies is started again."""

    devices: tuple[str, ...] = dataclasses.field(default=(), metadata={"flag": "process-devices"})
    """CUDA_VISIBLE_DEVICES of each process, such as the UUID of a MIG slice; by default each sees all."""

    def __post_init__(self) -> None:
        _check_range(self, "processes", "num_processes", 1, _MAX_PROCESSES)
        object.__setattr__(self, "devices", tuple(self.devices))
        if self.devices and len(self.devices) != self.num_processes:
            raise ConfigError(
                f"processes: devices names those of each process: expected {self.num_processes}, got "
                f"{len(self.devices)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """How much a caller may send. What is beyond is refused before it is parsed or allocated."""

    max_concurrent_rpcs: int = 1024
    """Ranking calls in progress or waiting for a thread; past this they are RESOURCE_EXHAUSTED."""

    max_message_mib: int = 64
    """Largest request, and most that its candidate ids add from a feature store."""

    max_structure_mib: int = 4
    """Of it, most that isn't raw contents: names, shapes, parameters, tensors sent typed, JSON. Parsed, that
    takes many times as much memory; raw contents stay as they are."""

    max_candidates: int = 65536
    """Candidates of a ranking request, all of which run on one device."""

    max_inputs: int = 4096
    """Input tensors of a request."""

    max_parameters: int = 64
    """Parameters of a request."""

    max_id_bytes: int = 1024
    """Length of a request's id and of its model's name and version."""

    max_receive_seconds: float = 10.0
    """Longest time from a request's first byte to its last."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            most = _MAX_MIB if field.name.endswith("_mib") else None
            least = 0.1 if field.name == "max_receive_seconds" else 1
            _check_range(self, "limits", field.name, least, most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionConfig:
    """How long clients may stay connected, and how many of them. Seconds are 0 for no limit."""

    max_connections: int = 8192
    """Open connections; one more is closed at once. An idle one takes no thread, only memory."""

    max_streams: int = 2048
    """Calls at a time on one connection; more of them wait in the client. Above max_concurrent_rpcs, so that
    overload is answered rather than hidden."""

    max_metadata_kib: int = 16
    """Headers of a call."""

    keepalive_seconds: float = 60.0
    """A silent client is asked whether it is still there."""

    keepalive_timeout_seconds: float = 20.0
    """How long it has to answer before it is disconnected and its calls are cancelled."""

    min_ping_seconds: float = 10.0
    """A client that asks so more often is disconnected."""

    max_idle_seconds: float = 3600.0
    """A connection without calls is closed after this time."""

    max_age_seconds: float | None = dataclasses.field(default=None, metadata={"none": "auto"})
    """A connection is closed when it is so old and its calls are answered, so that clients come back to the
    newest certificate, or to another process that serves on this port; auto: 60 with several processes, else
    no limit."""

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_streams"):
            _check_range(self, "connections", name, 1)
        _check_range(self, "connections", "max_metadata_kib", 1, _MAX_KIB)
        for field in dataclasses.fields(self):
            if field.name.endswith("_seconds") and getattr(self, field.name) is not None:
                _check_range(self, "connections", field.name, 0, _MAX_SECONDS)
        if not self.keepalive_timeout_seconds:
            raise ConfigError("connections: keepalive_timeout_seconds must be > 0; was 0.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """Who may call. By default anybody who reaches the port may rank and nobody may administrate."""

    tls_certificate: Path | None = None
    """PEM file of the server's certificate chain: turns TLS on for gRPC and HTTP. Read again when it
    changes."""

    tls_key: Path | None = None
    """PEM file of the certificate's private key."""

    client_ca: Path | None = None
    """PEM file of authorities: clients must show a certificate of one of them (mutual TLS)."""

    tokens: Path | None = None
    """File of bearer tokens, one a line: callers must send one. Read again when it changes."""

    admin_tokens: Path | None = None
    """The same for administrative RPCs, which the gRPC port then answers too. These tokens may rank as
    well."""

    open_probes: bool = True
    """Whether health, ServerLive, ServerReady and ModelReady are answered without a token."""

    open_metrics: bool = False
    """Whether /metrics is answered without a token."""

    plain_http: bool = False
    """Whether the HTTP port stays without TLS, for scrapers that have none."""

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            came, missing = ("tls_certificate", "tls_key")[:: 1 if self.tls_key is None else -1]
            raise ConfigError(f"security: expected {missing} beside {came}, got none")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ConfigError(
                "security: client_ca asks clients for certificates, which takes TLS: expected "
                "tls_certificate and tls_key, got none"
            )

    @property
    def has_tls(self) -> bool:
        """Whether the gRPC port speaks TLS."""
        return self.tls_certificate is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The protocol over HTTP, for curl and for clients without gRPC. Needs the extra xlarank[http]."""

    port: int | None = dataclasses.field(default=None, metadata={"flag": "rest-port"})
    """Where, beside gRPC's; 0 for a free one, none for gRPC alone."""

    max_connections: int = dataclasses.field(default=1024, metadata={"flag": "rest-max-connections"})
    """One more closes the one that has been without a request longest; if all others have one, its own is
    answered 429."""

    max_body_mib: int = dataclasses.field(default=64, metadata={"flag": "rest-max-body-mib"})
    """Largest request; 413 beyond. All that are being received or answered may have 16 times as much
    together; 429 beyond."""

    max_receive_seconds: float = dataclasses.field(
        default=30.0, metadata={"flag": "rest-max-receive-seconds"}
    )
    """Longest that a request's header may take to come, and then its body; the connection is closed beyond,
    for a body with a 408."""

    idle_seconds: int = dataclasses.field(default=60, metadata={"flag": "rest-idle-seconds"})
    """How long a connection without a request, or whose client doesn't read its answer, stays open."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= _MAX_PORT:
            raise ConfigError(f"http: port must be in [0, {_MAX_PORT}]; was {self.port}")
        for name in ("max_connections", "max_body_mib", "idle_seconds"):
            _check_range(self, "http", name, 1)
        _check_range(self, "http", "max_receive_seconds", 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccessLogConfig:
    """One line of JSON for each ranking request that was read or couldn't be: answered, failed or refused.
    What is refused unread (overload, a stop, no token, too many bytes) has none."""

    path: Path | None = dataclasses.field(default=None, metadata={"flag": "access-log"})
    """File to append to, - for the standard output; none by default. It may be moved away while in use."""

    share: float = dataclasses.field(default=1.0, metadata={"flag": "access-log-share"})
    """Of the requests answered; those that fail are all written."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"access_log: share must be in [0, 1]; was {self.share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """OpenTelemetry traces of requests. Needs the extra xlarank[otel]."""

    endpoint: str | None = dataclasses.field(default=None, metadata={"flag": "otlp-endpoint"})
    """Collector of OTLP over gRPC, such as http://localhost:4317; none by default."""

    share: float = dataclasses.field(default=0.01, metadata={"flag": "trace-share"})
    """Of the requests without a caller's trace; those with one do as it says."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"tracing: share must be in [0, 1]; was {self.share}")


def _check_range(config: Any, section: str, name: str, least: float, most: float | None = None) -> None:
    value = to_number(section, name, getattr(config, name))
    if value < least or (most is not None and value > most):
        bound = f">= {least}" if value < least else f"<= {most}"
        raise ConfigError(f"{section}: {name} must be {bound}; was {value}")
