"""Proves that no row of a batch reaches another, and finds the operation through which one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.program import Program
from xlarank.compiler.tracing import ClosedJaxpr, evaluate, source_of
from xlarank.device import Replica
from xlarank.errors import ModelError
from xlarank.spec import REQUEST_OF_ROW, Bucket, ModelSpec, Scope, Signature

__all__ = ["Poison", "check_rows_independent", "find_crossing"]

_MAX_TRIES = 8


@dataclasses.dataclass(frozen=True)
class _Runs:
    """One value in three runs: untouched, with one row poisoned, with another row poisoned."""

    clean: Any
    first: Any
    second: Any

    def each(self) -> tuple[Any, Any, Any]:
        return self.clean, self.first, self.second

    def moves_rows(self, own: np.ndarray) -> bool:
        """Whether, of a value whose first axis is the rows', a row changed that isn't of `own` [B]."""
        if np.shape(self.clean)[:1] != own.shape:
            return False
        if jnp.issubdtype(jnp.result_type(self.clean), jax.dtypes.extended):
            return False
        changed = _differs(np.asarray(self.clean), self.first)
        return bool(changed.reshape(len(own), -1).any(axis=1)[~own].any())

    def left_its_row(self, own: np.ndarray) -> bool:
        """Whether, of a value whose first axis is the rows', rows changed and none of them are of `own`."""
        return self.moves_rows(own) and not self.moves_rows(~own)

    def is_crossed(self) -> bool:
        """Whether some element changed in both runs: it depends on two rows."""
        if jnp.issubdtype(jnp.result_type(self.clean), jax.dtypes.extended):
            return False  # the key of a random number generator, which isn't made of numbers
        clean = np.asarray(self.clean)
        return bool((_differs(clean, self.first) & _differs(clean, self.second)).any())


@dataclasses.dataclass(frozen=True)
class Poison:
    """What one candidate, or one context, is replaced with."""

    scope: Scope
    """candidate: a row; context: a request of the batch."""

    index: int
    """Its number."""

    value: float
    """Of every float. NaN spreads furthest, but maxima and guards may swallow it; finite ones don't."""

    mask: bool
    """Of every position of its sequences."""

    def __str__(self) -> str:
        return f"{self.value:g} in {self.scope.value} {self.index}"

    def may_change(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B] bool: the rows that may change with it."""
        request_of_row = leaves["request_of_row"]
        owners = np.arange(len(request_of_row)) if self.scope is Scope.CANDIDATE else request_of_row
        return owners == self.index

    def applied(self, signature: Signature, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves with it; arrays that it touches are copies."""
        poisoned = dict(leaves)
        for leaf in signature.leaves:
            # Places of rows on the device stay in range.
            if leaf.scope is self.scope and leaf.dtype != "int32":
                array = np.array(leaves[leaf.name])
                array[self.index] = self.mask if leaf.dtype == "bool" else self.value
                poisoned[leaf.name] = array
        return poisoned


# One after the other: what spreads, what wins a maximum, what wins a minimum, what empties a sequence.
_DOSES = ((float("nan"), True), (1e6, True), (-1e6, False), (0.0, False))


def check_rows_independent(
    spec: ModelSpec,
    signature: Signature,
    bucket: Bucket,
    replica: Replica,
    plain: Callable[[], Program],
    weights: Sequence[Any],
    leaves: Mapping[str, np.ndarray],
) -> None:
    """Poisons the first, a middle and the last row and context; no other row's score may change by a bit.

    Args:
      spec: the model.
      signature: layout of the leaves.
      bucket: B and Q.
      replica: holds the bucket's executable, as it will serve.
      plain: makes the plain program of the bucket, to name the operation.
      weights: of the model, for the plain program.
      leaves: a valid, full batch.

    Raises:
      ModelError: names the operation through which rows meet.
    """
    clean = {task: scores.copy() for task, scores in replica.run(bucket, leaves).items()}
    for scope, num in ((Scope.CANDIDATE, bucket.rows), (Scope.CONTEXT, bucket.requests)):
        for index in sorted({0, num // 2, num - 1}):
            for value, mask in _DOSES:
                poison = Poison(scope, index, value, mask)
                others = ~poison.may_change(leaves)
                if not others.any():
                    continue
                poisoned = replica.run(bucket, poison.applied(signature, leaves))
                for task, scores in poisoned.items():
                    if not np.array_equal(clean[task][others], scores[others], equal_nan=True):
                        crossing = find_crossing(plain(), weights, signature, leaves, poison)
                        raise ModelError(
                            f"model {spec.name!r}, task {task!r}: a row's score depends on other rows of the "
                            f"batch ({poison} changed them in bucket {bucket}); a row may depend on its own "
                            f"candidate and context alone: use the axis of features, or running statistics, "
                            f"in place of the batch axis. What crosses rows: {crossing}"
                        )


def find_crossing(
    program: Program,
    weights: Sequence[Any],
    signature: Signature,
    leaves: Mapping[str, np.ndarray],
    poison: Poison,
) -> str:
    """Runs the program op by op, poisoned, then poisoned elsewhere; the first value that both poisons reach
    is it.

    Args:
      program: the plain one of the bucket.
      weights: of the model.
      signature: layout of the leaves.
      leaves: a valid, full batch.
      poison: one that changed rows which it may not change.

    Returns:
      The operation's name, the shapes it reads and writes and the line of the model's source; and where rows
      were carried to other places before they met, what did that.
    """

    def arguments(batch: Mapping[str, np.ndarray]) -> list[Any]:
        names = [leaf.name for leaf in (*signature.context_leaves, *signature.candidate_leaves)]
        return [*weights, *(batch[name] for name in names), batch[REQUEST_OF_ROW]]

    own = poison.may_change(leaves)
    clean, first = arguments(leaves), arguments(poison.applied(signature, leaves))
    for other in _elsewhere(poison, leaves):
        second = arguments(other.applied(signature, leaves))
        runs = [_Runs(*map(jnp.asarray, values)) for values in zip(clean, first, second, strict=True)]
        moved = ""
        for equation, source, inputs, outputs in _walk(program.closed, runs):
            if any(output.is_crossed() for output in outputs):
                read = ", ".join(str(list(np.shape(value.clean))) for value in inputs)
                wrote = ", ".join(str(list(np.shape(value.clean))) for value in outputs)
                return f"{equation.primitive.name} ({read} -> {wrote}) at {source}{moved}"
            if not moved and poison.scope is Scope.CANDIDATE and any(o.left_its_row(own) for o in outputs):
                moved = f", after {equation.primitive.name} at {source} moved rows"
    return _first_moved(program, clean, first, own)


def _first_moved(program: Program, clean: list[Any], first: list[Any], own: np.ndarray) -> str:
    """The first operation that carries a poisoned row to another's place, as `rev` and `roll` do."""
    runs = [_Runs(*map(jnp.asarray, values)) for values in zip(clean, first, first, strict=True)]
    for equation, source, _, outputs in _walk(program.closed, runs):
        for output in outputs:
            if output.moves_rows(own):
                return f"{equation.primitive.name} at {source}, which moves rows"
    return "not found op by op; it appears only in the compiled program"


def _elsewhere(poison: Poison, leaves: Mapping[str, np.ndarray]) -> list[Poison]:
    """Contexts, or candidates, that a poison may not reach; rows may meet in groups: nearest first."""
    if poison.scope is Scope.CONTEXT:
        contexts = np.unique(leaves[REQUEST_OF_ROW])
        contexts = contexts[contexts != poison.index]
        nearest = contexts[np.argsort(np.abs(contexts - poison.index), kind="stable")][:_MAX_TRIES]
        return [dataclasses.replace(poison, index=int(index)) for index in nearest]
    rows = np.flatnonzero(~poison.may_change(leaves))
    own = np.flatnonzero(poison.may_change(leaves))
    nearest = rows[np.argsort(np.abs(rows - own[0]), kind="stable")][:_MAX_TRIES]
    return [dataclasses.replace(poison, scope=Scope.CANDIDATE, index=int(row)) for row in nearest]


def _walk(
    closed: ClosedJaxpr, inputs: Sequence[_Runs]
) -> Iterator[tuple[core.JaxprEqn, str, list[_Runs], list[_Runs]]]:
    """Evaluates equation by equation; yields each with its source line, operands and results."""
    jaxpr = closed.jaxpr
    values: dict[core.Var, _Runs] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {v: _Runs(c, c, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}

    def read(atom: Any) -> _Runs:
        return _Runs(atom.val, atom.val, atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        results = [evaluate(equation, run) for run in zip(*(o.each() for o in operands), strict=True)]
        if not operands:
            results = [evaluate(equation, ())] * 3
        outputs = [_Runs(*result) for result in zip(*results, strict=True)]
        yield equation, source_of(equation), operands, outputs
        values.update(zip(equation.outvars, outputs, strict=True))


def _differs(clean: np.ndarray, other: Any) -> np.ndarray:
    other = np.asarray(other)
    if not np.issubdtype(clean.dtype, np.inexact):
        return clean != other
    return (clean != other) & ~(np.isnan(clean) & np.isnan(other))
