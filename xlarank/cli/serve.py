"""`xlarank serve`: a repository over gRPC until SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from xlarank.cli.table_memory import add_table_memory, table_progress
from xlarank.errors import ConfigError

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank serve /models --devices 2 --host 0.0.0.0
  xlarank serve /models --features /data/feed.features

When every model is ready it prints one line, "ready: grpc HOST:PORT http HOST:PORT models NAME/VERSION ..."
(with --json an object with these keys), and serves until SIGTERM or SIGINT; then it takes no more requests,
answers those it has accepted, and ends. A second signal ends it at once.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve the models of a repository over gRPC",
        description="Serves the latest version of every model in a repository (Open Inference Protocol).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="folder of <model>/<version> bundles")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for all"
    )
    parser.add_argument("--port", type=int, default=8001, help="gRPC port (%(default)s); 0 for a free one")
    parser.add_argument(
        "--http-port", type=int, default=8002, help="port of /metrics (%(default)s); 0 for a free one"
    )
    parser.add_argument(
        "--admin-port",
        type=int,
        help="port of the administrative RPCs (update rows), on 127.0.0.1 alone (none); 0 for a free one",
    )
    parser.add_argument(
        "--port-file", type=Path, help="write the ready line's JSON object here once ready, for scripts"
    )
    parser.add_argument(
        "--devices", type=_devices, default=None, metavar="all|N", help="devices to serve on (all)"
    )
    parser.add_argument("--host-threads", type=int, help="threads of the gather (CPUs, 4 at most)")
    parser.add_argument("--compile-cache", type=Path, help="folder of compiled code")
    parser.add_argument(
        "--no-bundle-code",
        action="store_true",
        help="leave compiled code in bundles untouched; compile programs/",
    )
    add_table_memory(parser)
    parser.add_argument(
        "--allow-reference-gather", action="store_true", help="serve without the native kernel, slowly"
    )
    parser.add_argument(
        "--features",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="candidate features by id, of `xlarank features build`; once for each model that has some",
    )
    parser.add_argument(
        "--feature-misses",
        choices=["error", "default", "fetch"],
        default="error",
        help="what becomes of ids that aren't there: refused, defaults, or (fetch) read from the file into a "
        "cache in memory (%(default)s)",
    )
    parser.add_argument(
        "--feature-memory", type=int, metavar="BYTES", help="most bytes of the cache of fetch (1 GiB)"
    )
    parser.add_argument("--threads", type=int, default=64, help="requests worked on at a time (%(default)s)")
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="longest stop (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until a signal; returns what it served.

    Raises:
      ConfigError: for a port in use, or options or a repository that can't be served.
      BundleError: if a bundle is damaged.
    """
    from xlarank_serving.admin import AdminServer
    from xlarank_serving.server import RankingServer, ServerConfig, stop_on_signals

    from xlarank.host import MissPolicy
    from xlarank.runtime import FeatureOptions, Metrics, ModelRepository

    args.host = args.host.removeprefix("[").removesuffix("]")
    config = ServerConfig(
        host=args.host,
        port=args.port,
        http_port=args.http_port,
        num_threads=args.threads,
        grace_seconds=args.grace,
    )
    misses = MissPolicy(args.feature_misses)
    features = [
        FeatureOptions(path=path, misses=misses, memory_bytes=args.feature_memory) for path in args.features
    ]
    for what, port in (("grpc", args.port), ("http", args.http_port)):
        _check_free(what, args.host, port)
    if args.admin_port is not None:
        _check_free("admin", "127.0.0.1", args.admin_port)
    metrics = Metrics()
    with table_progress() as on_table_bytes:
        repository = ModelRepository.open(
            args.repository,
            num_devices=args.devices,
            host_threads=args.host_threads,
            compile_cache=args.compile_cache,
            use_bundle_code=not args.no_bundle_code,
            table_memory=args.table_memory,
            allow_reference_gather=args.allow_reference_gather,
            metrics=metrics,
            features=features,
            on_progress=lambda step: print(f"loading {step}", file=sys.stderr, flush=True),
            on_table_bytes=on_table_bytes,
        )
    with stop_on_signals() as stop:
        try:
            server = RankingServer(repository, metrics.text, config)
        except ConfigError:
            repository.close()
            raise
        with server, contextlib.ExitStack() as stack:
            models = [f"{name}/{version}" for name, version, _ in repository.models()]
            ready = {"grpc": server.address, "http": server.http_address, "models": models}
            if args.admin_port is not None:
                ready["admin"] = stack.enter_context(AdminServer(repository, args.admin_port)).address
            if args.port_file is not None:
                _write_whole(args.port_file, json.dumps(ready))
            if getattr(args, "json", False):
                print(json.dumps(ready), flush=True)
            else:
                print(
                    f"ready: grpc {ready['grpc']} http {ready['http']} models {' '.join(models)}", flush=True
                )
            stop.wait()
    return ready


def _check_free(what: str, host: str, port: int) -> None:
    """Refuses a port in use before models load; binding it for good, after that, refuses a late comer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As servers do: else a port that one has just left would look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{what} port {port} on {host}: expected a free port, got {error.strerror or error}"
        ) from error


def _devices(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected all or a number >= 1, got {text!r}")
    return int(text)


def _write_whole(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
