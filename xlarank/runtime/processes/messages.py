"""What supervisor, holders and workers tell each other: frozen data over a Unix socket, `open_link`."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xlarank.spec.versions import ModelPolicy, VersionStatus

__all__ = [
    "AskMetrics",
    "Complete",
    "Failed",
    "Hello",
    "LastMetrics",
    "MetricsText",
    "Order",
    "Policies",
    "Ready",
    "Retire",
    "Stop",
    "SuccessorEnded",
    "Version",
    "VersionsElsewhere",
    "WorkerEnded",
    "WorkerStarted",
    "open_link",
]

Version = tuple[str, int]
"""Name of a model, and a version's number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """To a holder: which tables to hold, for whom."""

    generation: int
    """Its number, ascending."""

    versions: tuple[Version, ...]
    """What its workers serve."""

    num_workers: int
    """k."""

    is_beside: bool
    """Whether others serve meanwhile: then files are read by one thread of low priority."""

    served: tuple[Version, ...] = ()
    """What those serve: its programs are in the compile cache."""

    link: Path
    """Socket of the supervisor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
    """The first word of a holder or worker."""

    generation: int
    pid: int
    index: int | None
    """Of a worker, in [0, k); None of a holder."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A worker serves."""

    addresses: Mapping[str, Any]
    """What its ready line says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A holder or a worker can't start."""

    reason: str
    version: Version | None
    """Whose fault it is, as far as can be told."""

    is_death: bool = False
    """Whether a process died for no reason that is known: `version` is what it was at then, perhaps not at
    fault."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    """A holder has forked a worker."""

    index: int
    pid: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerEnded:
    """A worker has ended; its holder forks another unless the holder itself is to end."""

    index: int
    pid: int
    why: str
    """Such as "signal 9 (SIGKILL)"."""

    is_restarted: bool
    """Whether another is forked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuccessorEnded:
    """A holder that was forked from this one has ended, or could not be forked."""

    generation: int
    why: str


@dataclasses.dataclass(frozen=True)
class Complete:
    """All workers of a holder serve."""


@dataclasses.dataclass(frozen=True)
class AskMetrics:
    """To a worker: answer with MetricsText."""


@dataclasses.dataclass(frozen=True)
class MetricsText:
    """Prometheus's text of one worker."""

    text: bytes


@dataclasses.dataclass(frozen=True)
class LastMetrics:
    """The same of a worker that has answered its last request."""

    text: bytes


@dataclasses.dataclass(frozen=True)
class Policies:
    """To a worker: its first word, and what has changed since. Who gets which version."""

    models: tuple[ModelPolicy, ...]
    """One a model that it serves."""


@dataclasses.dataclass(frozen=True)
class VersionsElsewhere:
    """To a worker, which knows of no versions but those that it has: all others."""

    awaited: tuple[VersionStatus, ...]
    """Those that failed, that new processes are loading, or that wait for others."""

    idle: tuple[VersionStatus, ...] = ()
    """Those that nobody asks for."""

    unserved: tuple[str, ...] = ()
    """Models none of whose versions is served, though they were there at the start or have been served."""


@dataclasses.dataclass(frozen=True)
class Retire:
    """To a holder: fork nobody anew. To a worker: end once no client is left."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """To a holder: fork nobody anew. To a worker: answer what was accepted, and end."""


def open_link(path: Path, hello: Hello) -> Connection:
    """Connects to the supervisor and says who it is."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(str(path))
        link = Connection(opened.detach())
    link.send(hello)
    return link
