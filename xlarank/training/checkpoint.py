"""Checkpoints on disk.

<directory>/
  params/                  Orbax: every variable of the ranker but its random state
  spec.json                the fitted ModelSpec
  config.toml              copy of the config that was trained
  validation.safetensors   labelled validation requests, golden requests for the compiler
  training.json            loss by epoch
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from xlarank.bundle.requests import write_requests
from xlarank.errors import ConfigError
from xlarank.spec import ModelSpec
from xlarank.spec.config import ModelConfig
from xlarank.training.data import RankingData
from xlarank.training.ranker import Ranker, make_ranker
from xlarank.training.trainer import TrainedModel

__all__ = ["VALIDATION_FILE", "check_destination", "epochs_as_json", "load_ranker", "restore", "save"]

VALIDATION_FILE = "validation.safetensors"
"""Requests and the group "labels", as `xlarank.bundle.requests` reads them."""

_NUM_REQUESTS = 64
_PARAMS, _SPEC, _CONFIG, _REPORT = "params", "spec.json", "config.toml", "training.json"


def save(directory: Path | str, config: ModelConfig, trained: TrainedModel, validation: RankingData) -> None:
    """Writes a checkpoint; one that was there before is replaced once the new one is whole.

    Args:
      directory: where to; created with its parents.
      config: what was trained.
      trained: by `xlarank.training.trainer.train`.
      validation: up to 64 of its requests, evenly spread, go beside the parameters.

    Raises:
      ConfigError: when the directory holds something else than a checkpoint.
    """
    check_destination(directory)
    directory = Path(directory).absolute()
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(staging / _PARAMS, _tree(trained.ranker))
    (staging / _SPEC).write_text(json.dumps(trained.spec.to_dict()), encoding="utf-8")
    (staging / _CONFIG).write_bytes(config.path.read_bytes())
    report = {
        "best_epoch": trained.best_epoch,
        "seconds": trained.seconds,
        "epochs": epochs_as_json(trained),
    }
    (staging / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    sample = validation.sample(_NUM_REQUESTS)
    write_requests(
        staging / VALIDATION_FILE,
        list(sample.requests(trained.spec)),
        {"labels": sample.labels_of(trained.spec)},
    )
    if directory.exists():
        shutil.rmtree(directory)
    staging.rename(directory)


def check_destination(directory: Path | str) -> None:
    """Raises ConfigError when a checkpoint can't be written there: nothing is trained in vain.

    The directory may be missing, empty, or hold a checkpoint to replace.
    """
    directory = Path(directory).absolute()
    for parent in (directory, *directory.parents):
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"{directory}: expected a folder, {parent} is a file")
    if directory.exists() and not (directory / _SPEC).is_file() and not _is_empty(directory):
        raise ConfigError(
            f"{directory}: expected an empty folder or a checkpoint to replace, got something else"
        )


def epochs_as_json(trained: TrainedModel) -> list[dict[str, Any]]:
    """The epochs' reports as JSON values; what isn't finite is None."""
    return [_finite(dataclasses.asdict(epoch)) for epoch in trained.epochs]


def restore(
    config: ModelConfig, directory: Path | str
) -> tuple[nnx.Module, ModelSpec, dict[str, np.ndarray]]:
    """Reads a checkpoint back, parted as the compiler takes it.

    Args:
      config: the one that was trained, or one that differs in training and data only.
      directory: written by `save`.

    Returns:
      The model in evaluation mode, the fitted spec, and the tables by name, each [R, D] float32.

    Raises:
      ConfigError: when there is no checkpoint, or it is of another config.
    """
    spec, ranker = load_ranker(config, directory)
    return ranker.model, spec, ranker.embeddings.to_numpy()


def load_ranker(config: ModelConfig, directory: Path | str) -> tuple[ModelSpec, Ranker]:
    """Reads a checkpoint back, tables and model in one; see `restore`."""
    directory = Path(directory).absolute()
    if not (directory / _SPEC).is_file() or not (directory / _PARAMS).is_dir():
        raise ConfigError(
            f"{directory}: no checkpoint here; expected {_SPEC} and {_PARAMS}/ of `xlarank train`"
        )
    try:
        spec = ModelSpec.from_dict(json.loads((directory / _SPEC).read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{directory / _SPEC}: expected JSON: {error}") from error
    spec.check_fitted()
    _check_same_model(config, spec, directory)
    # Every value is replaced: the generator that takes least time to compile will do.
    with jax.default_prng_impl("rbg"):
        ranker = make_ranker(config, spec)
    ranker.eval()
    expected = _flatten(_tree(ranker))
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(directory / _PARAMS).item_metadata.tree  # type: ignore[union-attr]
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        arrays = _flatten(checkpointer.restore(directory / _PARAMS, restore_args=as_numpy))
    for name in sorted(set(expected) | set(arrays)):
        want, got = (_describe(tree.get(name)) for tree in (expected, arrays))
        if want != got:
            raise ConfigError(
                f"{directory}: parameter {'/'.join(name)}: config {config.path} makes {want}, the checkpoint "
                f"has {got}; use the config that was trained"
            )
    for path, variable in _variables(ranker).items():
        if path in arrays:
            variable[...] = jax.numpy.asarray(arrays[path])
    return spec, ranker


def _variables(ranker: Ranker) -> dict[tuple[str, ...], nnx.Variable]:
    """The ranker's own variables by path, random state left out: serving draws nothing."""
    _, _, state = nnx.split(ranker, nnx.RngState, ...)
    return {
        tuple(str(key) for key in path): variable
        for path, variable in nnx.to_flat_state(state)
        if variable[...].size  # Orbax refuses arrays without elements
    }


def _tree(ranker: Ranker) -> dict[str, Any]:
    """Nested dict of host arrays, which restore on any device."""
    tree: dict[str, Any] = {}
    for path, variable in _variables(ranker).items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = np.asarray(variable[...])
    return tree


def _flatten(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: array
        for key, branch in tree.items()
        for path, array in _flatten(branch, (*prefix, key)).items()
    }


def _check_same_model(config: ModelConfig, spec: ModelSpec, directory: Path) -> None:
    """Refuses a config whose inputs or answers are not those of the checkpoint."""
    for kind, ours, theirs in (
        ("model", [config.spec.name], [spec.name]),
        ("features", _features(config.spec), _features(spec)),
        ("tables", [(t.name, t.dim) for t in config.spec.tables], [(t.name, t.dim) for t in spec.tables]),
        ("tasks", list(config.spec.tasks), list(spec.tasks)),
    ):
        if ours != theirs:
            differing = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
            a, b = differing[0] if differing else (ours, theirs)
            raise ConfigError(
                f"{directory}: {kind} differ: config {config.path} has {a}, the checkpoint {b}; use the "
                f"config that was trained"
            )


def _features(spec: ModelSpec) -> list[tuple[Any, ...]]:
    """What fitting leaves as it is."""
    return [
        (f.name, f.kind.value, f.scope.value, f.dtype.value, f.width, f.table, f.max_length)
        for f in spec.features
    ]


def _describe(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype} of shape {list(array.shape)}"


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())
