"""Takes a model apart into dense weights and a pure function of them: `split_module`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlarank.errors import ConfigError, ModelError
from xlarank.spec import ModelSpec, TaskKind
from xlarank.spec.wording import counted

__all__ = [
    "Apply",
    "DenseModel",
    "drop_intermediates",
    "refused_logit",
    "scores_of",
    "split_function",
    "split_module",
]

Apply = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
"""A model as a function: (params, activations by feature name) -> logits [B] by task name."""


@dataclasses.dataclass(frozen=True)
class DenseModel:
    """The dense part of a model as a pure function of its weights."""

    names: tuple[str, ...]
    """Dotted paths of the weights in the module."""

    params: tuple[np.ndarray, ...]
    """Weights, in the order of `names`."""

    apply: Callable[
        [tuple[jax.Array, ...], tuple[jax.Array, ...], Mapping[str, jax.Array]],
        tuple[dict[str, jax.Array], dict[str, jax.Array]],
    ]
    """(weights, random state, activations) -> (logits by task, what it wrote to its variables by name)."""

    reference: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
    """The model as its author calls it: activations -> logits by task."""

    source: str = ""
    """File and line of the author's function, and its name; empty where it can't be known."""

    random_state: tuple[jax.Array, ...] = ()
    """Keys and counts of the module's random streams. A model that needs them can't be served."""


def split_module(module: nnx.Module) -> DenseModel:
    """Takes a module apart, in evaluation mode (dropout off, batch norm on its running averages).

    Every Variable becomes a weight, but the state of random number generators and what was sown for the
    author to look at (`nnx.Intermediate`): that is taken out of the module.

    Raises:
      ModelError: if the module has no `eval`, isn't an nnx.Module, or holds keys of random numbers.
    """
    if not isinstance(module, nnx.Module):
        raise ModelError(
            f"expected a flax.nnx.Module, got {type(module).__name__}; Linen modules come in through "
            f"flax.nnx.bridge, a function apply(params, features) with its params"
        )
    module.eval()
    drop_intermediates(module)
    graph, rng_state, state = nnx.split(module, nnx.RngState, ...)
    leaves, structure = jax.tree.flatten(state)
    rng_leaves, rng_structure = jax.tree.flatten(rng_state)
    names = _names(state)
    if len(names) != len(leaves):
        raise ModelError(
            f"{type(module).__name__} holds {counted(len(leaves), 'array')} in "
            f"{counted(len(names), 'variable')}"
        )

    def apply(
        params: tuple[jax.Array, ...], random_state: tuple[jax.Array, ...], features: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        own_rng_state = jax.tree.unflatten(rng_structure, list(random_state))
        merged = nnx.merge(graph, own_rng_state, jax.tree.unflatten(structure, list(params)))
        logits = merged(dict(features))  # type: ignore[operator]
        return logits, _changed(merged, names, params)

    return DenseModel(
        names,
        tuple(_as_weight(name, leaf) for name, leaf in zip(names, leaves, strict=True)),
        apply,
        module,
        _line_of(type(module).__call__),  # type: ignore[arg-type]
        tuple(rng_leaves),  # type: ignore[arg-type]
    )


def drop_intermediates(model: object) -> None:
    """Takes what a module's calls have sown out of it: no score depends on it, and each call adds to it."""
    if isinstance(model, nnx.Module):
        nnx.pop(model, nnx.Intermediate)


def split_function(function: Apply, params: Any) -> DenseModel:
    """Takes a plain function's params apart.

    Args:
      function: ``apply(params, features) -> logits by task``, of JAX operations alone.
      params: any pytree of arrays.

    Raises:
      ConfigError: if params hold something that is no array.
      ModelError: if they hold keys of random numbers.
    """
    leaves_by_path, structure = jax.tree_util.tree_flatten_with_path(params)
    names = tuple(".".join(str(_path_key(k)) for k in path) or "params" for path, _ in leaves_by_path)
    for name, (_, leaf) in zip(names, leaves_by_path, strict=True):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, bool)):
            raise ConfigError(f"params: {name!r}: expected an array, got {type(leaf).__name__}")

    def apply(
        weights: tuple[jax.Array, ...], _: tuple[jax.Array, ...], features: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        return function(jax.tree.unflatten(structure, list(weights)), dict(features)), {}

    weights = tuple(_as_weight(name, leaf) for name, (_, leaf) in zip(names, leaves_by_path, strict=True))
    as_jax = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in weights])
    return DenseModel(names, weights, apply, lambda features: function(as_jax, features), _line_of(function))


def _line_of(function: Callable) -> str:
    if not hasattr(function, "__code__"):  # an object with __call__
        function = getattr(type(function), "__call__", function)  # noqa: B004, its class's is what runs
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno} ({code.co_name})"


def _changed(
    merged: nnx.Module, names: tuple[str, ...], params: tuple[jax.Array, ...]
) -> dict[str, jax.Array]:
    """What a call wrote to its module's variables, new ones too, but for what it sowed to be looked at."""
    _, _, _, after = nnx.split(merged, nnx.RngState, nnx.Intermediate, ...)
    before = dict(zip(names, params, strict=True))
    leaves = zip(_names(after), jax.tree.leaves(after), strict=False)
    return {name: leaf for name, leaf in leaves if before.get(name) is not leaf}


def _names(state: nnx.State) -> tuple[str, ...]:
    """Dotted paths of variables, in the order of their leaves."""
    return tuple(".".join(str(_key(k)) for k in path) for path, _ in nnx.to_flat_state(state))


def _as_weight(name: str, leaf: object) -> np.ndarray:
    """As JAX sees it (a Python float is float32); scalars stay scalars."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ModelError(
            f"weight {name!r}: expected numbers, got a key of random numbers, {leaf.dtype}; a score must be "
            f"the same each time: leave it out, or keep jax.random.key_data(key) and wrap it in the model"
        )
    return np.asarray(jnp.asarray(leaf), order="C")


def _key(key: object) -> object:
    return getattr(key, "key", getattr(key, "name", key))


def _path_key(key: object) -> object:
    return getattr(key, "idx", _key(key))


def refused_logit(spec: ModelSpec, logits: Mapping[str, Any], num_rows: int) -> jax.Array | None:
    """Of an answer that `scores_of` refuses, the array that it refuses; None where it is no array at all."""
    first = next(
        (a for a in (logits.get(task.name) for task in spec.tasks) if not _is_logit(a, num_rows)), None
    )
    return first if isinstance(first, jax.Array) else None


def _is_logit(value: Any, num_rows: int) -> bool:
    is_array = isinstance(value, jax.Array) and value.shape == (num_rows,)
    return is_array and bool(jnp.issubdtype(value.dtype, jnp.floating))


def scores_of(spec: ModelSpec, logits: Mapping[str, jax.Array], num_rows: int) -> dict[str, jax.Array]:
    """Scores [num_rows] float32 by task from a model's answer.

    Raises:
      ModelError: if a task is missing or a logit isn't floating point [num_rows].
    """
    if not isinstance(logits, Mapping):
        raise ModelError(
            f"model {spec.name!r}: expected a dict of logits by task, got {type(logits).__name__}"
        )
    scores: dict[str, jax.Array] = {}
    for task in spec.tasks:
        if task.name not in logits:
            raise ModelError(
                f"model {spec.name!r}: task {task.name!r} is missing from its answer {sorted(logits)}"
            )
        logit = logits[task.name]
        if not isinstance(logit, jax.Array):
            raise ModelError(
                f"model {spec.name!r}: expected logits of task {task.name!r} as an array [B], got "
                f"{type(logit).__name__}; make it of the features, with jnp"
            )
        if not _is_logit(logit, num_rows):
            raise ModelError(
                f"model {spec.name!r}: expected logits of task {task.name!r} as floats of shape [B] = "
                f"[{num_rows}], got {logit.dtype} of shape {list(logit.shape)}"
            )
        logit = logit.astype(jnp.float32)
        scores[task.name] = jax.nn.sigmoid(logit) if task.kind is TaskKind.BINARY else logit
    return scores
