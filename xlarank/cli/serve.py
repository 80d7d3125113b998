"""`xlarank serve`: a repository over gRPC until SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, NoReturn

from xlarank.cli.log_levels import server_log
from xlarank.cli.sections import add_flags, config_text, options_of, read_sections
from xlarank.cli.serve_config import ServeConfig, port_file_problem, port_problems
from xlarank.cli.serve_file import ConfigFile
from xlarank.errors import ConfigError

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank serve /models --devices 2 --host 0.0.0.0
  xlarank serve /models --features /data/feed.features
  xlarank serve --config server.toml --check

Every option may stand in a TOML file, in the section that its group below is named after; a flag goes before
the file. --print-config writes such a file, with all there is and what each option means.

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
    (repository,) = (option for option in options_of(ServeConfig) if option.name == "repository")
    parser.add_argument(
        "repository",
        type=Path,
        nargs="?",
        help=f"{repository.doc.removesuffix('.')}; needed unless the file names it",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the options below")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the config, certificates, tokens, ports and bundles, tell every problem, and end: with "
        "status 0 if there is none. Of bundles it reads the manifests and compares files' sizes, not what "
        "they hold; it compiles nothing and looks at no device",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the config as a TOML file, and end"
    )
    add_flags(parser, ServeConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until a signal; returns what it served, or what --check and --print-config found.

    Raises:
      ConfigError: for a port in use, or options or a repository that can't be served.
      BundleError: if a bundle is damaged.
      SystemExit: with 1 if --check finds a problem.
    """
    if args.repository is not None:  # a positional one can't be left out of the namespace
        setattr(args, "models.repository", args.repository)
    read = functools.partial(read_sections, ServeConfig, args, args.config)
    if args.check:
        return _check(*read(), is_json=args.json)
    file = ConfigFile(args.config, read)
    if args.print_config:
        text = config_text(file.config)
        print(text, end="")
        return {"config": text} if args.json else {}
    with server_log():
        return _serve(file, is_json=args.json)


def _check(config: ServeConfig | None, problems: list[str], *, is_json: bool) -> dict[str, Any]:
    from xlarank.cli.serve_check import UNCHECKED, problems_of, warnings_of  # imports gRPC: takes a while

    warnings: list[str] = []
    if config is not None:
        problems, warnings = problems_of(config), warnings_of(config)
    for line in (*problems, *(f"warning: {warning}" for warning in warnings)):
        print(f"xlarank serve: {line}", file=sys.stderr)
    result = {"ok": not problems, "problems": problems, "warnings": warnings, "unchecked": UNCHECKED}
    if problems:
        if is_json:
            print(json.dumps(result), flush=True)
        raise SystemExit(1)
    if not is_json:
        print(f"ok; not checked: {UNCHECKED}")
    return result


def _serve(file: ConfigFile, *, is_json: bool) -> dict[str, Any]:
    config = file.config
    _raise_file_limit()
    # Before models load; binding the ports for good, after that, refuses a late comer.
    if wrong := port_problems(config.ports):
        raise ConfigError(wrong[0])
    if problem := port_file_problem(config.server.port_file):
        raise ConfigError(problem)
    from xlarank.cli.serve_check import feature_problems, security_problems  # imports gRPC

    for problem in security_problems(config.security):
        raise ConfigError(problem)
    if config.server.port_file is not None:
        _remove(config.server.port_file)
    if config.processes.num_processes > 1:
        from xlarank.bundle import list_versions
        from xlarank.cli.serve_processes import serve_with_processes

        repository = config.models.repository
        if config.features.files and repository is not None and config.versions.watch_seconds is None:
            # At the start alone: later a model may be gone that a file is for.
            for problem in feature_problems(config.features.files, list_versions(repository)):
                raise ConfigError(problem)
        return serve_with_processes(file, lambda ready: _announce(config, ready, is_json=is_json))
    return _serve_alone(file, is_json=is_json)


def _serve_alone(file: ConfigFile, *, is_json: bool) -> dict[str, Any]:
    from xlarank.cli.serve_start import bound_stop, followed_policies, running_server

    config = file.config
    if config.processes.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.processes.devices[0]
    with running_server(config) as running, followed_policies(file, running.repository):
        _announce(config, running.ready, is_json=is_json)
        running.stop.wait()
        bound_stop(config)
    if running.repository.has_left_work:
        _end_at_once(running.ready, is_json=is_json)
    return running.ready


def _end_at_once(ready: dict[str, Any], *, is_json: bool) -> NoReturn:
    """Everything is answered, and a thread is left that Python would wait for."""
    if is_json:
        print(json.dumps(ready), flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _announce(config: ServeConfig, ready: dict[str, Any], *, is_json: bool) -> None:
    """Tells people and scripts that the server answers, and where."""
    if config.server.port_file is not None:
        _write_whole(config.server.port_file, json.dumps(ready))
    if is_json:
        print(json.dumps(ready), flush=True)
    else:
        models = " ".join(ready["models"])
        print(f"ready: grpc {ready['grpc']} http {ready['http']} models {models}", flush=True)


def _raise_file_limit() -> None:
    """A connection is an open file; shells still hand out 1,024 of a limit that is far above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems call a limit what they don't allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _remove(path: Path) -> None:
    """Of an earlier server: whoever waits for it waits for this one's."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"server: port_file {path}: can't be removed: {error.strerror}") from error


def _write_whole(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
