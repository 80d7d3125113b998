"""What keeps a server from starting, found without loading a table, compiling or importing JAX."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from xlarank_serving.access import Authorizer
from xlarank_serving.config import SecurityConfig
from xlarank_serving.tls import ServerTls

from xlarank.bundle import Bundle, Verify, list_versions, open_bundle
from xlarank.cli.serve_config import ServeConfig
from xlarank.errors import ConfigError, XlarankError
from xlarank.host import FeatureFile, native_available

__all__ = ["NO_REPOSITORY", "port_problem", "problems_of"]

NO_REPOSITORY = "expected a repository, named on the command line or as repository in [models] of the file"
"""What is told when nothing says what to serve."""


def problems_of(config: ServeConfig) -> list[str]:
    """Everything that is wrong, a line each: files, certificates, tokens, ports, bundles, feature files."""
    problems = [problem for port in config.server.ports if (problem := port_problem(*port))]
    problems += _security_problems(config.security)
    problems += _path_problems(config)
    versions, wrong = _versions(config.models.repository)
    problems += wrong
    problems += _bundle_problems(config.models.repository, versions)
    problems += _feature_problems([options.path for options in config.features.files], versions)
    if not native_available() and not config.models.allow_reference_gather:
        problems.append(
            "the native gather kernel isn't built: build it with `pip install .`, or serve all the same, "
            "slowly, with --allow-reference-gather"
        )
    return problems


def port_problem(what: str, host: str, port: int) -> str | None:
    """Why a port can't be listened on; None if it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As servers do: else a port that one has just left would look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"{what} port {port} on {host}: expected a free port, got {error.strerror or error}"
    return None


def _security_problems(security: SecurityConfig) -> Iterator[str]:
    """What the server would refuse to start with: it and this go through the same code."""
    for make, is_asked_for in ((Authorizer, True), (ServerTls, security.has_tls)):
        if is_asked_for:
            try:
                make(security)
            except ConfigError as error:
                yield str(error)


def _path_problems(config: ServeConfig) -> Iterator[str]:
    """Files that are to be written, in folders that aren't there."""
    for what, path in (
        ("server: port_file", config.server.port_file),
        ("models: compile_cache", config.models.compile_cache),
    ):
        if path is None:
            continue
        folder = path.parent if what.endswith("_file") else _existing(path)
        if not folder.is_dir():
            yield f"{what} {path}: expected a path in a folder, got none"
        elif not os.access(folder, os.W_OK):
            yield f"{what} {path}: expected a folder that may be written, got {folder}"


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)


def _versions(repository: Path | None) -> tuple[dict[str, int], list[str]]:
    """The version of each model that would be served, and what is wrong with the folder."""
    if repository is None:
        return {}, [NO_REPOSITORY]
    if not repository.is_dir():
        return {}, [f"repository {repository}: expected a folder of models, found none"]
    try:
        versions = {model: numbers[-1] for model, numbers in list_versions(repository).items()}
    except XlarankError as error:
        return {}, [str(error)]
    if not versions:
        return {}, [f"repository {repository}: expected bundles as <model>/<version>, found none"]
    return versions, []


def _bundle_problems(repository: Path | None, versions: dict[str, int]) -> Iterator[str]:
    for model, version in sorted(versions.items()):
        assert repository is not None
        try:
            bundle = open_bundle(repository / model / str(version), verify=Verify.SIZES)
        except XlarankError as error:
            yield str(error)
            continue
        yield from _bundle_refusals(bundle, model)


def _bundle_refusals(bundle: Bundle, model: str) -> Iterator[str]:
    if bundle.spec.name != model:
        yield f"{bundle.path}: expected model {model!r}, as the folder is named, got {bundle.spec.name!r}"
    if bundle.manifest.refusal:
        yield f"{bundle.path}: was refused when it was compiled: {bundle.manifest.refusal}"


def _feature_problems(paths: Sequence[Path], versions: dict[str, int]) -> Iterator[str]:
    seen: set[str] = set()
    for path in paths:
        try:
            model = FeatureFile.open(path).model
        except XlarankError as error:
            yield str(error)
            continue
        if versions and model not in versions:
            yield f"features {path}: was built for model {model!r}; served are {sorted(versions)}"
        if model in seen:
            yield f"features {path}: model {model!r} has a feature file already"
        seen.add(model)
