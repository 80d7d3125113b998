"""What keeps a server from starting, found without loading a table, compiling or importing JAX."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xlarank_serving.access import Authorizer
from xlarank_serving.access_log import open_log
from xlarank_serving.config import SecurityConfig
from xlarank_serving.extras import http_server_type, tracer_type
from xlarank_serving.tls import ServerTls

from xlarank.bundle import Bundle, Verify, list_versions, open_bundle
from xlarank.cli.serve_config import (
    NO_REPOSITORY,
    ServeConfig,
    folder_problem,
    port_file_problem,
    port_problems,
)
from xlarank.cli.serve_processes import sharing_problem, temporary_folder_problem
from xlarank.errors import ConfigError, XlarankError
from xlarank.host import FeatureOptions, native_available
from xlarank.runtime.policy_words import policy_warnings

__all__ = ["UNCHECKED", "problems_of", "security_problems", "warnings_of"]

UNCHECKED = (
    "what the bundles' files hold beyond their sizes (`xlarank inspect` reads them), whether programs "
    "compile and give the golden scores, devices, and memory"
)
"""What may yet keep a server from starting, in words."""


def problems_of(config: ServeConfig) -> list[str]:
    """Everything that is wrong, a line each: ports, packages, certificates, tokens, files, policies, bundles,
    feature files."""
    problems = port_problems(config.ports)
    problems += _extras_problems(config)
    problems += security_problems(config.security)
    problems += _path_problems(config)
    versions, wrong = _versions(config)
    problems += wrong
    is_shared = config.processes.num_processes > 1
    if is_shared and (problem := temporary_folder_problem()):
        problems.append(problem)
    problems += _bundle_problems(config.models.repository, versions, is_shared=is_shared)
    problems += feature_problems(config.features.files, versions)
    if not native_available() and not config.models.allow_reference_gather:
        problems.append(
            "the native gather kernel isn't built: build it with `pip install .`, or serve all the same, "
            "slowly, with --allow-reference-gather"
        )
    return problems


def _extras_problems(config: ServeConfig) -> Iterator[str]:
    """Packages that what is asked for needs: the server and this look for them through the same code."""
    for load, is_asked_for in (
        (http_server_type, config.http.port is not None),
        (tracer_type, config.tracing.endpoint is not None),
    ):
        if is_asked_for:
            try:
                load()
            except ConfigError as error:
                yield str(error)


def security_problems(security: SecurityConfig) -> Iterator[str]:
    """Certificates and tokens that the server would refuse: it and this go through the same code."""
    for make, is_asked_for in ((Authorizer, True), (ServerTls, security.has_tls)):
        if is_asked_for:
            try:
                make(security)
            except ConfigError as error:
                yield str(error)


def _path_problems(config: ServeConfig) -> Iterator[str]:
    """Files and folders that are to be written, where that can't be."""
    if problem := port_file_problem(config.server.port_file):
        yield problem
    log = config.access_log.path
    if log is not None and str(log) != "-":
        if log.exists():
            try:
                os.close(open_log(log))
            except ConfigError as error:
                yield str(error)
        elif problem := folder_problem("access_log: path", log, log.parent):
            yield problem
    for what, path in (
        ("models: compile_cache", config.models.compile_cache),
        ("captures: folder", config.captures.folder),
    ):
        if path is not None and (problem := folder_problem(what, path, _existing(path))):
            yield problem


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)


def warnings_of(config: ServeConfig) -> list[str]:
    """What isn't as the policies say, and wouldn't keep a server from starting: it may yet come."""
    repository = config.models.repository
    if config.versions.watch_seconds is None or repository is None:
        return []
    try:
        found = list_versions(repository)
    except XlarankError:
        return []
    warnings: list[str] = []
    for model, numbers in sorted(found.items()):
        policy = config.versions.policy_of(model)
        warnings += policy_warnings(model, policy, policy, policy.wanted(numbers))
    return warnings


def _versions(config: ServeConfig) -> tuple[dict[str, list[int]], list[str]]:
    """The versions of each model that would be served, and what is wrong with the folder."""
    repository = config.models.repository
    if repository is None:
        return {}, [NO_REPOSITORY]
    if not repository.is_dir():
        return {}, [f"repository {repository}: expected a folder of models, found none"]
    try:
        found = list_versions(repository)
    except XlarankError as error:
        return {}, [str(error)]
    if not found and config.versions.watch_seconds is None:  # one that is watched may be empty yet
        return {}, [f"repository {repository}: expected bundles as <model>/<version>, found none"]
    missing: list[str] = []
    try:
        config.versions.check_models(repository, found)
    except ConfigError as error:
        missing.append(str(error))
    wanted = {m: config.versions.policy_of(m).wanted(numbers) for m, numbers in found.items()}
    missing += [
        f"versions: model {model!r}: its policy wants none of the versions {found[model]} in {repository}"
        for model, numbers in sorted(wanted.items())
        if not (numbers or missing) and config.versions.watch_seconds is None
    ]
    return wanted, missing


def _bundle_problems(
    repository: Path | None, versions: Mapping[str, Sequence[int]], *, is_shared: bool
) -> Iterator[str]:
    for model, version in sorted((model, number) for model, own in versions.items() for number in own):
        assert repository is not None
        try:
            bundle = open_bundle(repository / model / str(version), verify=Verify.SIZES)
        except XlarankError as error:
            yield str(error)
            continue
        yield from _bundle_refusals(bundle, model)
        if is_shared and (problem := sharing_problem(bundle)):
            yield problem


def _bundle_refusals(bundle: Bundle, model: str) -> Iterator[str]:
    if bundle.spec.name != model:
        yield f"{bundle.path}: expected model {model!r}, as the folder is named, got {bundle.spec.name!r}"
    if bundle.manifest.refusal:
        yield f"{bundle.path}: was refused when it was compiled: {bundle.manifest.refusal}"


def feature_problems(
    features: Sequence[FeatureOptions], versions: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """Feature files that can't be read, or are of no model among these."""
    seen: set[str] = set()
    for options in features:
        try:
            model, _ = options.open()
        except XlarankError as error:
            yield str(error)
            continue
        if problem := options.model_problem(model, versions or None, seen):
            yield problem
        seen.add(model)
