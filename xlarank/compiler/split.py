"""Splits a Flax module into dense weights and a pure row program (DESIGN: prepare and program)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlarank.errors import ModelError
from xlarank.spec import MASK_SUFFIX, Bucket, FeatureKind, ModelSpec, Signature, TaskKind

__all__ = [
    "DenseModel",
    "RowProgram",
    "program_avals",
    "row_program",
    "scores_of",
    "split_module",
]

RowProgram = Callable[..., dict[str, jax.Array]]
"""(prepared, context leaves, candidate leaves, request_of_row [B]) -> {task: scores [B]}."""


@dataclasses.dataclass(frozen=True)
class DenseModel:
    """The dense part of a model as a pure function of its weights."""

    names: tuple[str, ...]
    """Dotted paths of the weights in the module."""

    params: tuple[np.ndarray, ...]
    """Weights, in the order of `names`."""

    apply: Callable[[tuple[jax.Array, ...], Mapping[str, jax.Array]], dict[str, jax.Array]]
    """(weights, activations) -> logits by task."""


def split_module(module: nnx.Module) -> DenseModel:
    """Takes a module apart, in evaluation mode (dropout off, batch norm on its running averages).

    Every Variable but the state of random number generators becomes a weight.

    Raises:
      ModelError: if the module has no `eval` or isn't an nnx.Module.
    """
    if not isinstance(module, nnx.Module):
        raise ModelError(
            f"expected a flax.nnx.Module, got {type(module).__name__}; Linen modules come in through "
            f"flax.nnx.bridge"
        )
    module.eval()
    graph, rng_state, state = nnx.split(module, nnx.RngState, ...)
    leaves, structure = jax.tree.flatten(state)
    names = tuple(".".join(str(_key(k)) for k in path) for path, _ in nnx.to_flat_state(state))
    if len(names) != len(leaves):
        raise ModelError(f"{type(module).__name__} holds {len(leaves)} arrays in {len(names)} variables")

    def apply(params: tuple[jax.Array, ...], features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # A copy: a module that draws random numbers counts its draws in place, in the trace's own state.
        own_rng_state = jax.tree.map(lambda leaf: leaf, rng_state)
        merged = nnx.merge(graph, own_rng_state, jax.tree.unflatten(structure, list(params)))
        return merged(dict(features))  # type: ignore[operator]

    return DenseModel(names, tuple(_as_weight(leaf) for leaf in leaves), apply)


def _as_weight(leaf: object) -> np.ndarray:
    """As JAX sees it (a Python float is float32); scalars stay scalars."""
    return np.asarray(jnp.asarray(leaf), order="C")


def _key(key: object) -> object:
    return getattr(key, "key", getattr(key, "name", key))


def scores_of(spec: ModelSpec, logits: Mapping[str, jax.Array], num_rows: int) -> dict[str, jax.Array]:
    """Scores [num_rows] float32 by task from a module's answer.

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
                f"{type(logit).__name__}"
            )
        if logit.shape != (num_rows,) or not jnp.issubdtype(logit.dtype, jnp.floating):
            raise ModelError(
                f"model {spec.name!r}: expected logits of task {task.name!r} as floats of shape [B] = "
                f"[{num_rows}], got {logit.dtype} of shape {list(logit.shape)}"
            )
        logit = logit.astype(jnp.float32)
        scores[task.name] = jax.nn.sigmoid(logit) if task.kind is TaskKind.BINARY else logit
    return scores


def row_program(model: DenseModel, spec: ModelSpec, signature: Signature, bucket: Bucket) -> RowProgram:
    """The plain form: every context is expanded to its rows, then the module runs at B rows.

    Args:
      model: weights and module.
      spec: features and tasks.
      signature: layout of the leaves.
      bucket: B and Q.
    """

    def program(prepared, context, candidates, request_of_row):
        leaves = {
            leaf.name: _expand(array, request_of_row, bucket)
            for leaf, array in zip(signature.context_leaves, context, strict=True)
        }
        leaves |= {
            leaf.name: array for leaf, array in zip(signature.candidate_leaves, candidates, strict=True)
        }
        features: dict[str, jax.Array] = {}
        for feature in spec.features:
            slot = signature.slots[feature.name]
            if feature.kind is FeatureKind.SEQUENCE:
                features[feature.name] = leaves[slot.leaf]
                features[feature.name + MASK_SUFFIX] = leaves[slot.leaf + MASK_SUFFIX]
            else:
                features[feature.name] = leaves[slot.leaf][:, slot.begin : slot.end]
        return scores_of(spec, model.apply(prepared, features), bucket.rows)

    return program


def _expand(leaf: jax.Array, request_of_row: jax.Array, bucket: Bucket) -> jax.Array:
    """[Q, ...] -> [B, ...]."""
    if bucket.requests == 1:
        return jnp.broadcast_to(leaf, (bucket.rows, *leaf.shape[1:]))
    return leaf.at[request_of_row].get(mode="promise_in_bounds")


def program_avals(
    model: DenseModel, signature: Signature, bucket: Bucket
) -> tuple[tuple, tuple, tuple, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a row program's four arguments."""

    def leaf_avals(leaves):
        return tuple(jax.ShapeDtypeStruct(leaf.shape(bucket), np.dtype(leaf.dtype)) for leaf in leaves)

    params = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in model.params)
    request_of_row = jax.ShapeDtypeStruct((bucket.rows,), np.dtype(np.int32))
    return (
        params,
        leaf_avals(signature.context_leaves),
        leaf_avals(signature.candidate_leaves),
        request_of_row,
    )
