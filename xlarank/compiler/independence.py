"""Finds the operation through which one row of a batch reaches another."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.split import RowProgram
from xlarank.compiler.tracing import inner_jaxpr, source_of, trace
from xlarank.spec import Bucket, Scope, Signature

__all__ = ["find_crossing"]

_MAX_TRIES = 8


@dataclasses.dataclass(frozen=True)
class _Runs:
    """One value in three runs: untouched, with one row poisoned, with another row poisoned."""

    clean: Any
    first: Any
    second: Any

    def each(self) -> tuple[Any, Any, Any]:
        return self.clean, self.first, self.second

    def is_crossed(self) -> bool:
        """Whether some element changed in both runs: it depends on two rows."""
        clean = np.asarray(self.clean)
        return bool((_differs(clean, self.first) & _differs(clean, self.second)).any())


def find_crossing(
    program: RowProgram,
    prepared: Sequence[jax.Array],
    signature: Signature,
    bucket: Bucket,
    leaves: Mapping[str, np.ndarray],
    scope: Scope,
) -> str:
    """Runs the program op by op with one row poisoned, then another; the first value that both reach is it.

    Args:
      program: of the bucket.
      prepared: its weights.
      signature: layout of the leaves.
      bucket: B and Q.
      leaves: a valid, full batch.
      scope: whether candidates or contexts are poisoned.

    Returns:
      The operation's name, the shapes it reads and writes and the line of the model's source.
    """
    num = bucket.rows if scope is Scope.CANDIDATE else bucket.requests
    victim = num // 2
    # Rows may be mixed in groups only, so several second victims are tried, nearest first.
    others = sorted(set(range(num)) - {victim}, key=lambda row: abs(row - victim))[:_MAX_TRIES]

    def arguments(row: int | None) -> list[Any]:
        batch = dict(leaves)
        for leaf in signature.leaves:
            if row is not None and leaf.scope is scope and leaf.dtype == "float32":
                batch[leaf.name] = np.array(leaves[leaf.name])
                batch[leaf.name][row] = np.nan
        context = tuple(batch[leaf.name] for leaf in signature.context_leaves)
        candidate = tuple(batch[leaf.name] for leaf in signature.candidate_leaves)
        return [tuple(prepared), context, candidate, batch["request_of_row"]]

    closed = trace("", program, tuple(arguments(None)))
    clean, first = jax.tree.leaves(arguments(None)), jax.tree.leaves(arguments(victim))
    for other in others:
        second = jax.tree.leaves(arguments(other))
        runs = [_Runs(*map(jnp.asarray, values)) for values in zip(clean, first, second, strict=True)]
        for equation, source, inputs, outputs in _walk(closed, runs, ""):
            if any(output.is_crossed() for output in outputs):
                read = ", ".join(str(list(np.shape(value.clean))) for value in inputs)
                wrote = ", ".join(str(list(np.shape(value.clean))) for value in outputs)
                return f"{equation.primitive.name} ({read} -> {wrote}) at {source}"
    return "not found op by op; it appears only in the compiled program"


def _walk(
    closed: Any, inputs: Sequence[_Runs], caller: str
) -> Generator[tuple[core.JaxprEqn, str, list[_Runs], list[_Runs]], None, list[_Runs]]:
    """Evaluates equation by equation, into nested programs.

    Yields each equation with its source line (the caller's for JAX's own nested functions), operands and
    results; returns the program's outputs.
    """
    jaxpr = closed.jaxpr
    values: dict[core.Var, _Runs] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: _Runs(c, c, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}

    def read(atom: Any) -> _Runs:
        return _Runs(atom.val, atom.val, atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        source = source_of(equation) or caller
        inner = inner_jaxpr(equation)
        if inner is not None:
            outputs = yield from _walk(inner, operands, source)
        else:
            results = [_evaluate(equation, run) for run in zip(*(o.each() for o in operands), strict=True)]
            if not operands:
                results = [_evaluate(equation, ())] * 3
            outputs = [_Runs(*result) for result in zip(*results, strict=True)]
            yield equation, source, operands, outputs
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    outputs = equation.primitive.bind(*operands, **equation.params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _differs(clean: np.ndarray, other: Any) -> np.ndarray:
    other = np.asarray(other)
    if not np.issubdtype(clean.dtype, np.inexact):
        return clean != other
    return (clean != other) & ~(np.isnan(clean) & np.isnan(other))
