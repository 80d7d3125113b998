"""Folders of a repository: `<repository>/<model>/<version>/`, version an ascending integer."""

from __future__ import annotations

import os
import re
from pathlib import Path

from xlarank.bundle.manifest import MANIFEST_FILE
from xlarank.errors import BundleError, ModelNotFoundError

__all__ = ["latest_version", "list_versions", "resolve_bundle", "version_of", "versions_in"]

_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def list_versions(
    repository: Path | str, unreadable: dict[str, BundleError] | None = None
) -> dict[str, list[int]]:
    """Models of a repository and their versions, both ascending.

    Hidden folders (a writer's unfinished ones among them), folders that are no plain integer >= 1 and
    models without a version are left out.

    Args:
      repository: the folder.
      unreadable: takes, by name, why folders in it can't be listed (lost+found, say); they are left out. By
        default the first of them raises.

    Raises:
      BundleError: if the folder can't be listed.
    """
    repository = Path(repository)
    try:
        folders = sorted(p for p in repository.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise BundleError(f"{repository}: no repository: {error.strerror}") from error
    versions: dict[str, list[int]] = {}
    for folder in folders:
        try:
            versions[folder.name] = versions_in(folder)
        except BundleError as error:
            if unreadable is None:
                raise
            unreadable[folder.name] = error
    return {model: found for model, found in versions.items() if found}


def versions_in(folder: Path) -> list[int]:
    """Versions in a model's folder, ascending; none if the folder isn't there."""
    try:
        versions = ((version_of(path), path) for path in folder.iterdir())
        return sorted(version for version, path in versions if version is not None and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(f"{folder}: can't be listed: {error.strerror}") from error


def version_of(path: Path) -> int | None:
    """The version that a folder's name is; None if it is no plain integer >= 1."""
    name = os.path.basename(os.path.abspath(path))  # of "." too; a link's name, not its target's
    return int(name) if _VERSION.fullmatch(name) else None


def latest_version(repository: Path | str, model: str) -> int:
    """Highest version of a model.

    Raises:
      ModelNotFoundError: if the repository has none.
      BundleError: if the repository can't be listed.
    """
    models = list_versions(repository)
    if model not in models:
        raise ModelNotFoundError(f"repository {repository} has no model {model!r}; it has {sorted(models)}")
    return models[model][-1]


def resolve_bundle(path: Path | str) -> Path:
    """The version folder that a path means.

    Args:
      path: a version's folder, or a model's, which means its highest version.

    Raises:
      BundleError: if it is neither; says what it is.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise BundleError(f"{path}: expected the folder of a bundle or of a model, found {found}")
    if (path / MANIFEST_FILE).exists():
        return path
    if versions := versions_in(path):
        return path / str(versions[-1])
    if version_of(path) is not None:
        raise BundleError(f"{path}: {MANIFEST_FILE} is missing: no bundle, or a damaged one")
    if models := list_versions(path):
        raise BundleError(
            f"{path}: expected a bundle or a model, found a repository; name one of its models: "
            f"{', '.join(str(path / model) for model in models)}"
        )
    raise BundleError(f"{path}: expected a bundle or a model, found neither {MANIFEST_FILE} nor versions")
