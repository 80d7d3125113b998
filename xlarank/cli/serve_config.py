"""Everything that `xlarank serve` may be told: `ServeConfig`."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlarank_serving.config import (
    AccessLogConfig,
    ConnectionConfig,
    HttpConfig,
    LimitConfig,
    ProcessesConfig,
    SecurityConfig,
    ServerConfig,
    TracingConfig,
)

from xlarank.errors import ConfigError
from xlarank.host import FeatureOptions, MissPolicy, TableMemory
from xlarank.spec import CaptureConfig, FaultConfig, PlatformOptions, QueueConfig
from xlarank.spec.versions import VersionOptions

__all__ = [
    "NO_REPOSITORY",
    "FeaturesConfig",
    "ModelsConfig",
    "ServeConfig",
    "TablesConfig",
    "folder_problem",
    "listening_address",
    "port_file_problem",
    "port_problem",
    "port_problems",
]

_MAX_THREADS = 1024
"""Of devices, each of which has one, and of the gather."""

NO_REPOSITORY = "expected a repository, named on the command line or as repository in [models] of the file"
"""What is told when nothing says what to serve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """What is served, and on what."""

    repository: Path | None = dataclasses.field(default=None, metadata={"flag": None})
    """Folder of <model>/<version> bundles."""

    devices: int | None = dataclasses.field(default=None, metadata={"none": "all"})
    """Devices to serve on, of JAX's default platform: its accelerators where there are some."""

    platforms: tuple[str, ...] = dataclasses.field(default=(), metadata={"flag": "platform"})
    """Instead of that, JAX's platforms to serve on, such as cuda and cpu together; behind a name may stand
    how many of its devices (of cpu so many are made) and what a second of each costs: the cheapest device
    that meets a request's deadline takes it. As in cpu,devices=2,cost=0.1."""

    host_threads: int | None = dataclasses.field(default=None, metadata={"none": "auto"})
    """Threads of the gather; auto for the CPUs over the processes, 4 at most."""

    compile_cache: Path | None = None
    """Folder of compiled code."""

    bundle_code: bool = True
    """Whether compiled code in bundles is used; else programs/ is compiled."""

    allow_reference_gather: bool = False
    """Whether to serve without the native kernel, slowly."""

    def __post_init__(self) -> None:
        for name in ("devices", "host_threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_THREADS:  # each device has one
                raise ConfigError(f"models: {name} must be in [1, {_MAX_THREADS}]; was {value}")
        object.__setattr__(self, "platforms", tuple(self.platforms))
        names = [options.name for options in self.platform_options]
        if len(set(names)) < len(names):
            raise ConfigError(f"models: platforms: expected each once, got {names}")
        if self.platforms and self.devices is not None:
            raise ConfigError(
                f"models: devices are those of JAX's default platform; with platforms say it of each, as in "
                f"{names[0]},devices={self.devices}"
            )

    @property
    def platform_options(self) -> tuple[PlatformOptions, ...]:
        """One a platform."""
        return tuple(PlatformOptions.parse(text) for text in self.platforms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Where embedding tables are kept."""

    memory: TableMemory | None = dataclasses.field(
        default=None, metadata={"flag": "table-memory", "none": "auto"}
    )
    """huge: read into huge pages; mmap: used from their files, shared between processes and larger than
    memory if need be; auto: huge where the kernel has such pages and the tables fit."""

    def __post_init__(self) -> None:
        if self.memory is not None:
            object.__setattr__(self, "memory", TableMemory.named(self.memory))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Candidate features by id, from files of `xlarank features build` or sources of one's own."""

    paths: tuple[Path, ...] = dataclasses.field(default=(), metadata={"flag": "features"})
    """Feature files, one for each model that has some, read when a version of it loads; behind a path may
    stand options of that file alone, as in
    feed.features,misses=fetch,memory_bytes=500000000,max_age_seconds=60. Or a model's name and a function
    that makes a source of its spec, for fetch alone, and the features that requests bring, as in
    films,source=catalogue:open_catalogue,without=place+hour with a catalogue.py in this folder."""

    misses: MissPolicy = dataclasses.field(default=MissPolicy.ERROR, metadata={"flag": "feature-misses"})
    """What becomes of ids that aren't there: refused (error), defaults (default), or read from the file
    or source into a cache in memory (fetch)."""

    memory_bytes: int | None = dataclasses.field(default=None, metadata={"flag": "feature-memory"})
    """Most bytes of the cache of fetch, in each process; 1 GiB by default."""

    max_age_seconds: float | None = dataclasses.field(default=None, metadata={"flag": "feature-max-age"})
    """After so long a row of the cache of fetch is read again; never for its age by default."""

    fetch_timeout_ms: float | None = dataclasses.field(
        default=None, metadata={"flag": "feature-fetch-timeout-ms"}
    )
    """Most that a request waits for fetch, which is UNAVAILABLE then; 100 by default."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "misses", MissPolicy(self.misses))
        has_cache = MissPolicy.FETCH in (self.misses, *(file.misses for file in self.files))
        for field in ("memory_bytes", "max_age_seconds", "fetch_timeout_ms"):
            if getattr(self, field) is not None and not has_cache:
                raise ConfigError(
                    f"features: {field} is for the cache of misses 'fetch'; misses is {self.misses.value!r}"
                )

    @property
    def files(self) -> tuple[FeatureOptions, ...]:
        """One a path, or source, each with its options."""
        return tuple(
            FeatureOptions.parse(
                str(path),
                misses=self.misses,
                memory_bytes=self.memory_bytes,
                max_age_seconds=self.max_age_seconds,
                fetch_timeout_ms=self.fetch_timeout_ms,
            )
            for path in self.paths
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The server's config: a field is a section of the file, and its class says what may stand there."""

    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    processes: ProcessesConfig = dataclasses.field(default_factory=ProcessesConfig)
    limits: LimitConfig = dataclasses.field(default_factory=LimitConfig)
    connections: ConnectionConfig = dataclasses.field(default_factory=ConnectionConfig)
    security: SecurityConfig = dataclasses.field(default_factory=SecurityConfig)
    http: HttpConfig = dataclasses.field(default_factory=HttpConfig)
    access_log: AccessLogConfig = dataclasses.field(default_factory=AccessLogConfig)
    tracing: TracingConfig = dataclasses.field(default_factory=TracingConfig)
    models: ModelsConfig = dataclasses.field(default_factory=ModelsConfig)
    versions: VersionOptions = dataclasses.field(default_factory=VersionOptions)
    tables: TablesConfig = dataclasses.field(default_factory=TablesConfig)
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    queue: QueueConfig = dataclasses.field(default_factory=QueueConfig)
    faults: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    captures: CaptureConfig = dataclasses.field(default_factory=CaptureConfig)

    def __post_init__(self) -> None:
        if self.processes.num_processes > 1 and self.connections.max_age_seconds == 0:
            raise ConfigError(
                "connections: max_age_seconds must be > 0 with several processes, as a connection stays "
                "with one of them until its end, and a new version waits for it; was 0.0"
            )

    @property
    def ports(self) -> list[tuple[str, str, int]]:
        """What each port is for, its address and its number; those that are off are left out."""
        rest = self.http.port
        return self.server.ports + ([] if rest is None else [("rest", self.server.host, rest)])


def port_file_problem(path: Path | None) -> str | None:
    """Why a port file can't be written; None if it can, or there is none."""
    if path is None:
        return None
    if path.is_dir():
        return f"server: port_file {path}: expected a file, got a folder"
    return folder_problem("server: port_file", path, path.parent)


def folder_problem(what: str, path: Path, folder: Path) -> str | None:
    """Why a file can't be made in a folder, in words of the path that is to be there; None if it can."""
    if not folder.is_dir():
        return f"{what} {path}: expected a path in a folder, got none"
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone don't tell, as in /proc
    except OSError as error:
        return f"{what} {path}: expected a folder that may be written, got {folder}: {error.strerror}"
    return None


def listening_address(host: str, port: int) -> tuple[int, Any]:
    """Family and address of a socket that listens there; OSError for a host that isn't known."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:  # a label that is empty, too long, or no IDNA
        raise OSError(f"no host has such a name: {error}") from None
    return family, address


def port_problem(what: str, host: str, port: int) -> str | None:
    """Why a port can't be listened on; None if it can."""
    try:
        family, address = listening_address(host, port)
        with socket.socket(family) as probe:
            # As servers do: else a port that one has just left would look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"{what} port {port} on {host}: expected a free port, got {error.strerror or error}"
    return None


def port_problems(ports: Sequence[tuple[str, str, int]]) -> list[str]:
    """Why ports of one server can't be listened on, a line each; see `ServeConfig.ports`."""
    problems: list[str | None] = []
    for index, (what, host, port) in enumerate(ports):
        same = [of for of, at, number in ports[:index] if number == port != 0 and _overlap(at, host)]
        if same:
            problems.append(
                f"{what} port {port} on {host}: expected a port of its own, got that of {same[0]}"
            )
        else:
            problems.append(port_problem(what, host, port))
    return [problem for problem in problems if problem is not None]


def _overlap(host: str, other: str) -> bool:
    """Whether one of two addresses is the other, or all of them."""
    resolved = []
    for name in (host, other):
        try:
            info = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            return False  # `port_problem` tells
        resolved.append(ipaddress.ip_address(str(info[0][4][0]).partition("%")[0]))
    return resolved[0] == resolved[1] or any(address.is_unspecified for address in resolved)
