"""`xlarank serve --processes k`: the supervisor, and what the processes below it run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from xlarank.bundle import Bundle, Verify, list_versions, open_bundle
from xlarank.cli.lines import say
from xlarank.cli.serve_config import NO_REPOSITORY, ServeConfig, listening_address
from xlarank.cli.serve_file import ConfigFile
from xlarank.cli.table_memory import table_lines
from xlarank.errors import ConfigError, XlarankError
from xlarank.host import TableMemory
from xlarank.runtime.background import in_background
from xlarank.runtime.compile_helper import CompileHelper
from xlarank.runtime.processes.holder import Holder
from xlarank.runtime.processes.messages import Failed, Hello, Order, Version, open_link
from xlarank.runtime.processes.supervised import Supervised, WorkerRequests
from xlarank.runtime.program_key import program_key
from xlarank.runtime.tables import HeldTables, LoadedTables, load_tables, memory_beside

__all__ = ["hold_and_serve", "load_for_workers", "serve_with_processes", "sharing_problem"]

_log = logging.getLogger(__name__)

_MAX_AGE_SECONDS = 60.0
"""Of connections, unless the config says."""

_PREFIX = "xlarank-"
"""Of a folder of ours among temporary files."""

_MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path on Linux, without its end; see unix(7)."""

_MAX_LOADING_THREADS = 4

_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def serve_with_processes(file: ConfigFile, announce: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Serves until a signal; returns what it served first.

    Args:
      file: that says two processes or more, and free ports.
      announce: told where it answers once all of them do.

    Raises:
      XlarankError: for ports, options or a repository that can't be served.
    """
    from xlarank_serving.server import metrics_server, stop_on_signals
    from xlarank_serving.transport import address_of

    from xlarank.runtime.processes.supervisor import Supervisor
    from xlarank.runtime.processes.version_plan import VersionPlan

    config = file.config
    repository = config.models.repository
    if repository is None:
        raise ConfigError(NO_REPOSITORY)
    if not repository.is_dir():
        raise ConfigError(f"repository {repository}: expected a folder of models, found none")
    if problem := temporary_folder_problem():
        raise ConfigError(problem)
    if config.versions.watch_seconds is None:
        config.versions.check_models(repository, list_versions(repository))
    ready: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        config, ports = stack.enter_context(_reserved(config))
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True))
        )

        def on_ready(versions: tuple[Version, ...]) -> None:
            ready["models"] = [f"{model}/{version}" for model, version in versions]
            announce(ready)

        supervisor = Supervisor(
            VersionPlan(repository, config.versions),
            lambda order: _spawn(config, order, folder),
            num_workers=config.processes.num_processes,
            folder=folder,
            watch_seconds=config.versions.watch_seconds,
            grace_seconds=config.server.grace_seconds,
            on_ready=on_ready,
            changed_policies=file.changed_policies,
        )
        stack.enter_context(contextlib.closing(supervisor))
        stop = stack.enter_context(stop_on_signals())
        metrics = metrics_server(supervisor.metrics_text, config.server, config.security)
        stack.callback(metrics.close)
        ready |= {
            "grpc": address_of(config.server.host, ports["grpc"]),
            "http": address_of(config.server.host, metrics.port),
        }
        if "rest" in ports:
            ready["rest"] = address_of(config.server.host, ports["rest"])
        if "admin" in ports:
            ready["admin"] = address_of("127.0.0.1", ports["admin"])
        supervisor.run(stop)
    return ready


@contextlib.contextmanager
def _reserved(config: ServeConfig) -> Iterator[tuple[ServeConfig, dict[str, int]]]:
    """The config with ports that are the server's until the end of the block, and those of the workers.

    Nobody listens on a reserved port, so that a client is refused rather than left waiting.
    """
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        for what, host, port in config.ports:
            if what == "http":
                continue
            family, address = listening_address(host, port)
            reserved = stack.enter_context(socket.socket(family))
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(address)
            ports[what] = reserved.getsockname()[1]
        server = dataclasses.replace(config.server, port=ports["grpc"], admin_port=ports.get("admin"))
        http = dataclasses.replace(config.http, port=ports.get("rest"))
        connections = config.connections
        if connections.max_age_seconds is None:
            connections = dataclasses.replace(connections, max_age_seconds=_MAX_AGE_SECONDS)
        yield dataclasses.replace(config, server=server, http=http, connections=connections), ports


def _spawn(config: ServeConfig, order: Order, folder: Path) -> int:
    """A holder in a fresh process, in which nothing was started: not a fork of the one that has threads."""
    orders = folder / f"order-{order.generation}"
    orders.write_bytes(pickle.dumps((config, order)))
    # -P: what lies in the current folder isn't Python's.
    command = [sys.executable, "-P", "-m", "xlarank.cli.serve_holder", str(orders)]
    # numpy's BLAS would start threads, and nobody here multiplies matrices.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    # A session of its own: a signal from the terminal is for the supervisor, which tells the others.
    return os.posix_spawn(sys.executable, command, environment, setsid=True)


def hold_and_serve(orders: Path) -> int:
    """What a holder runs, and those that it forks; returns its exit status.

    Args:
      orders: file that the supervisor has written for it; it is removed.
    """
    config, order = pickle.loads(orders.read_bytes())
    orders.unlink()
    compiled: set[str] = set()  # keys of programs that versions here have had; forks inherit it

    def load(version: Version, is_beside: bool, others: Sequence[Mapping[str, TableMemory]]) -> LoadedTables:
        _compile(config, version, compiled, is_beside=is_beside and version not in order.served)
        return load_for_workers(config, version, is_beside, others)

    def work(
        order: Order,
        index: int,
        tables: Mapping[Version, LoadedTables],
        is_again: bool,
        say_ready: Callable[[], None],
    ) -> int:
        if is_again:
            tables = _there(config, tables)
        return _work(config, order, index, HeldTables(tables, is_beside=order.is_beside), say_ready)

    return Holder(load, work, is_current=functools.partial(_is_current, config)).run(order)


def _is_current(config: ServeConfig, version: Version, tables: LoadedTables) -> bool:
    """Whether a version's folder holds the bundle that tables are of; the log says so if it doesn't."""
    assert config.models.repository is not None
    model, number = version
    path = config.models.repository / model / str(number)
    is_same = _is_same(path, tables)
    if not is_same:
        _log.warning("%s: was replaced by another bundle: its tables are loaded, row updates are gone", path)
    return is_same


def _is_same(path: Path, tables: LoadedTables) -> bool:
    """Whether a folder holds the bundle that tables are of. What can't be read replaces nothing."""
    try:
        return tables.are_of(open_bundle(path, verify=Verify.SIZES))
    except XlarankError:
        return True


def _there(config: ServeConfig, tables: Mapping[Version, LoadedTables]) -> Mapping[Version, LoadedTables]:
    """Those of versions whose bundles are there; all of them if none is, as it may be the repository that
    isn't. A process that is started again would never serve if it had to load what was removed or replaced
    since."""
    repository = config.models.repository
    assert repository is not None
    gone = {}
    for version, loaded in tables.items():
        path = repository / version[0] / str(version[1])
        if not path.is_dir():
            gone[version] = "was removed"
        elif not _is_same(path, loaded):
            gone[version] = "was replaced by another bundle"
    if not gone or len(gone) == len(tables):
        return tables
    for (model, number), why in gone.items():
        where = repository / model / str(number)
        _log.error("%s: %s; a process that is started again doesn't serve it", where, why)
    return {version: loaded for version, loaded in tables.items() if version not in gone}


def load_for_workers(
    config: ServeConfig, version: Version, is_beside: bool, others: Sequence[Mapping[str, TableMemory]]
) -> LoadedTables:
    """A version's tables, for the processes that are forked later.

    Args:
      config: of the server.
      version: in its repository.
      is_beside: whether others serve meanwhile.
      others: where the tables of the model's other versions are; see `memory_beside`.

    Raises:
      XlarankError: if several processes can't serve it, files are damaged, or memory doesn't suffice.
    """
    assert config.models.repository is not None
    model, number = version
    bundle = open_bundle(config.models.repository / model / str(number), verify=Verify.SIZES)
    if problem := sharing_problem(bundle):
        raise ConfigError(problem)
    say(f"loading {model} {number}: tables")
    threads = config.models.host_threads or min(_MAX_LOADING_THREADS, len(os.sched_getaffinity(0)))

    def read(num_threads: int) -> LoadedTables:
        return load_tables(
            bundle,
            memory_beside(config.tables.memory, others),
            num_threads=num_threads,
            platforms=[_platform(config, bundle)],
            num_processes=config.processes.num_processes,
            on_bytes=table_lines(),
            is_for_forks=True,
        )

    return in_background(lambda: read(1)) if is_beside else read(threads)


def _platform(config: ServeConfig, bundle: Bundle) -> str:
    """Of the devices of a worker: what forks them has no JAX to ask. Those that are named are accelerators;
    else it is as where the bundle was compiled."""
    is_cpu = bundle.manifest.fingerprint.get("device_kind", "cpu") == "cpu"
    return "cpu" if is_cpu and not config.processes.devices else "gpu"


def _compile(config: ServeConfig, version: Version, compiled: set[str], *, is_beside: bool) -> None:
    """Has the compile cache filled beside those that serve: the new ones are to serve too, without LLVM. At a
    first start the first worker fills it."""
    models = config.models
    assert models.repository is not None
    model, number = version
    bundle = open_bundle(models.repository / model / str(number), verify=Verify.SIZES)
    key = program_key(bundle)
    if not is_beside or key in compiled:
        compiled.add(key)
        return
    say(f"loading {model} {number}: programs")
    helper = CompileHelper(
        num_devices=models.devices,
        platforms=models.platform_options,
        use_bundle_code=models.bundle_code,
        compile_cache=models.compile_cache,
    )
    # Of each kind that the processes have: slices of one GPU, perhaps, that differ.
    for visible in sorted(set(config.processes.devices)) or [None]:
        seconds = helper.compile(bundle.path, {} if visible is None else {_VISIBLE_DEVICES: visible})
        _log.info("%s: a process of its own has compiled it in %.1f s", bundle.path, seconds)
    compiled.add(key)


def temporary_folder_problem() -> str | None:
    """Why processes can't meet in a folder for temporary files; None if they can."""
    folder = tempfile.gettempdir()
    # Behind the prefix a random word of eight characters.
    most = _MAX_SOCKET_PATH - len(f"/{_PREFIX}12345678/link")
    if len(os.fsencode(folder)) <= most:
        return None
    return (
        f"processes: num_processes: expected a folder for temporary files of at most {most} characters, in "
        f"which there is room for the name of a socket, got {folder}: set TMPDIR to another"
    )


def sharing_problem(bundle: Bundle) -> str | None:
    """Why several processes can't serve a bundle; None if they can."""
    on_devices = {placement.table for placement in bundle.manifest.placements}
    both = sorted(on_devices & {table.name for table in bundle.spec.tables if table.updatable})
    if not both:
        return None
    return (
        f"{bundle.path}: tables {both} are updatable and devices hold rows of them, which an update in "
        f"another process wouldn't reach: compile with --device-table-bytes 0, or serve with --processes 1"
    )


def _work(
    config: ServeConfig, order: Order, index: int, held: HeldTables, say_ready: Callable[[], None]
) -> int:
    """What a worker runs."""
    if config.processes.devices:
        os.environ[_VISIBLE_DEVICES] = config.processes.devices[index]
    from xlarank_serving.server import SIGNAL_SECONDS, StopRequest

    from xlarank.cli.serve_start import bound_stop, running_server

    supervised = Supervised(
        open_link(order.link, Hello(generation=order.generation, pid=os.getpid(), index=index))
    )
    policies = supervised.first_policies()
    if policies is None:
        return 1  # nobody would bring it new versions
    config = dataclasses.replace(config, versions=dataclasses.replace(config.versions, models=policies))
    retire = StopRequest()
    try:
        with running_server(
            config, held, on_drained=lambda metrics: supervised.say_last(metrics.text())
        ) as running:
            running.metrics.register(WorkerRequests(index, lambda: running.metrics.num_successes))
            supervised.start(
                running.ready,
                running.metrics.text,
                running.repository.show_elsewhere,
                running.repository.set_policies,
                stop=running.stop,
                retire=retire,
            )
            say_ready()
            while not (running.stop.is_set() or retire.is_set()):
                wait([running.stop.fileno(), retire.fileno()], SIGNAL_SECONDS)
            if not running.stop.is_set():
                running.retire(running.stop.wait)
            bound_stop(config)
    except XlarankError as error:
        supervised.tell(Failed(reason=str(error), version=held.loading))
        return 1
    except Exception as error:
        supervised.tell(Failed(reason=f"{type(error).__name__}: {error}", version=held.loading))
        raise
    return 0
