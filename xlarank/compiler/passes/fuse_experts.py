"""fuse_experts: sibling matmuls get merged forms, in any model.

Two equations are siblings when they do the same to the same inputs with other weights (`siblings.py`).
Experts, gates and towers are found that way, whatever they are called. Merged forms differ in where the
siblings' axis E lies:

    wide           matmuls that read one operand become one over their weights side by side, then come apart
    row_major      whole chains of siblings run as one, [B, E, ...]
    expert_major   whole chains of siblings run as one, [E, B, ...]

Which wins depends on the bucket and the device, so they are candidates for autotune, not rules. Weights are
joined by equations that read weights alone: they end up in prepare.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.passes.rows import ELEMENTWISE
from xlarank.compiler.passes.siblings import (
    Class,
    is_of_weights,
    mergeable_classes,
    sharing_groups,
    without_repeats,
)
from xlarank.compiler.program import Program, read, weight_side
from xlarank.compiler.tracing import evaluate

__all__ = ["Fusion", "fuse_experts", "siblings_of"]


class Fusion(enum.StrEnum):
    """How sibling matmuls are computed."""

    UNROLLED = "unrolled"
    """One by one, as the model says."""

    WIDE = "wide"
    """Those that share an operand as one wide matmul."""

    ROW_MAJOR = "row_major"
    """Chains of siblings as one, the siblings' axis after the rows'."""

    EXPERT_MAJOR = "expert_major"
    """Chains of siblings as one, the siblings' axis first: batched matmuls as most devices like them."""


def siblings_of(program: Program) -> list[Class]:
    """Matmuls with weights that could run as one: groups of at least two siblings, in order."""
    program = without_repeats(program)
    weights = program.weight_vars()
    classes = mergeable_classes(program, weights)
    return [group for group in classes if weight_side(group[0], weights) is not None]


def fuse_experts(program: Program, fusion: Fusion) -> Program | None:
    """Merges siblings.

    Args:
      program: of one bucket, in float32.
      fusion: the form.

    Returns:
      The program in this form; None where there is nothing to merge, or for `UNROLLED`.
    """
    if fusion is Fusion.UNROLLED:
        return None
    program = without_repeats(program)
    weights = program.weight_vars()
    if fusion is Fusion.WIDE:
        groups = sharing_groups(program, weights)
        return (
            program.rewritten(lambda *inputs: _run_wide(program, groups, weights, inputs)) if groups else None
        )
    classes = mergeable_classes(program, weights)
    if not any(weight_side(group[0], weights) is not None for group in classes):
        return None
    axis = 0 if fusion is Fusion.EXPERT_MAJOR else 1
    return program.rewritten(lambda *inputs: _Merged(program, classes, weights, axis).run(inputs))


def _weight_values(program: Program, weights: set[core.Var], inputs: Sequence[Any]) -> dict[Any, Any]:
    """Inputs, and everything that depends on weights alone: a merged equation may need it early."""
    jaxpr = program.closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, program.closed.consts, strict=True))
    for equation in jaxpr.eqns:
        if is_of_weights(equation, weights):
            values.update(
                zip(equation.outvars, evaluate(equation, read(values, equation.invars)), strict=True)
            )
    return values


# Wide


def _run_wide(
    program: Program, groups: list[Class], weights: set[core.Var], inputs: Sequence[Any]
) -> list[Any]:
    first = {id(group[0]): group for group in groups}
    later = {id(equation) for group in groups for equation in group[1:]}
    values = _weight_values(program, weights, inputs)
    for equation in program.closed.jaxpr.eqns:
        if is_of_weights(equation, weights) or id(equation) in later:
            continue
        if id(equation) in first:
            values.update(_wide(first[id(equation)], values, weights))
        else:
            values.update(
                zip(equation.outvars, evaluate(equation, read(values, equation.invars)), strict=True)
            )
    return read(values, program.closed.jaxpr.outvars)


def _wide(group: Class, values: dict[Any, Any], weights: set[core.Var]) -> dict[Any, Any]:
    """One matmul of an operand with weights [..., N] side by side, taken apart along N."""
    side = weight_side(group[0], weights)
    assert side is not None
    x_axes = tuple(group[0].params["dimension_numbers"][0][1 - side])
    columns, tails = [], []
    for member in group:
        contracted = tuple(member.params["dimension_numbers"][0][side])
        weight = values[member.invars[side]]
        free = [a for a in range(weight.ndim) if a not in contracted]
        tails.append([weight.shape[a] for a in free])
        order = (*contracted, *free) if side == 1 else (*free, *contracted)
        shape = [weight.shape[a] for a in contracted]
        shape.insert(len(shape) if side == 1 else 0, math.prod(tails[-1]))
        columns.append(jnp.transpose(weight, order).reshape(shape))
    axis = len(x_axes) if side == 1 else 0
    weight_axes = tuple(range(len(x_axes))) if side == 1 else tuple(range(1, len(x_axes) + 1))
    operands = [values[group[0].invars[1 - side]]]
    operands.insert(side, jnp.concatenate(columns, axis=axis))
    pair = (x_axes, weight_axes) if side == 1 else (weight_axes, x_axes)
    (wide,) = evaluate(group[0], operands, dimension_numbers=(pair, ((), ())))
    along = wide.ndim - 1 if side == 1 else 0
    results, begin = {}, 0
    for member, tail in zip(group, tails, strict=True):
        end = begin + math.prod(tail)
        part = jax.lax.slice_in_dim(wide, begin, end, axis=along)
        results[member.outvars[0]] = part.reshape(member.outvars[0].aval.shape)  # type: ignore[attr-defined]
        begin = end
    return results


# Row-major and expert-major


class _Merged:
    """Binds a program with every class as one equation over a new axis."""

    def __init__(self, program: Program, classes: list[Class], weights: set[core.Var], axis: int) -> None:
        self._jaxpr = program.closed.jaxpr
        self._program = program
        self._weights = weights
        self._axis = axis
        self._classes = classes
        self._class_at = {id(group[0]): number for number, group in enumerate(classes)}
        self._later = {id(e) for group in classes for e in group[1:]}
        self._place: dict[Any, tuple[int, int]] = {
            e.outvars[0]: (number, place)
            for number, group in enumerate(classes)
            for place, e in enumerate(group)
        }
        self._arrays: dict[int, Any] = {}  # by class: its results, the siblings' axis at `_axis_of`
        self._values: dict[Any, Any] = {}

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Scores by task."""
        self._values = _weight_values(self._program, self._weights, inputs)
        for equation in self._jaxpr.eqns:
            if is_of_weights(equation, self._weights) or id(equation) in self._later:
                continue
            if id(equation) in self._class_at:
                number = self._class_at[id(equation)]
                self._arrays[number] = self._run_class(self._classes[number])
            elif (joined := self._side_by_side(equation)) is not None:
                self._values[equation.outvars[0]] = joined
            else:
                results = evaluate(equation, [self._read(atom) for atom in equation.invars])
                self._values.update(zip(equation.outvars, results, strict=True))
        return [self._read(atom) for atom in self._jaxpr.outvars]

    def _axis_of(self, ndim: int) -> int:
        """Where the siblings' axis lies in the results of members of `ndim` axes."""
        return min(self._axis, ndim)

    def _read(self, atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in self._values:
            number, place = self._place[atom]
            axis = self._axis_of(atom.aval.ndim)  # type: ignore[attr-defined]
            self._values[atom] = jax.lax.index_in_dim(self._arrays[number], place, axis, keepdims=False)
        return self._values[atom]

    def _run_class(self, members: Class) -> Any:
        equation = members[0]
        if equation.primitive.name in ELEMENTWISE:
            return self._run_elementwise(members)
        side = weight_side(equation, self._weights)
        operands, axes = [], []
        for position, atoms in enumerate(zip(*(e.invars for e in members), strict=True)):
            atom: Any = atoms[0]
            if isinstance(atom, core.Literal) or all(other is atom for other in atoms):
                operands.append(self._read(atom))
                axes.append(None)
            elif atom in self._weights:
                axis = (
                    self._axis_of(atom.aval.ndim)
                    if position != side
                    else self._weight_axis(equation, position)
                )
                operands.append(jnp.stack([self._values[a] for a in atoms], axis=axis))
                axes.append(axis)
            else:
                operands.append(self._arrays[self._place[atom][0]])
                axes.append(self._axis_of(atom.aval.ndim))
        out_axis = self._axis_of(len(equation.outvars[0].aval.shape))  # type: ignore[attr-defined]
        run = jax.vmap(lambda *xs: evaluate(equation, xs)[0], in_axes=tuple(axes), out_axes=out_axis)
        return run(*operands)

    def _run_elementwise(self, members: Class) -> Any:
        """The same without `vmap`, which would move the siblings' axis to the front where a bias joins."""
        equation, result = members[0], members[0].outvars[0]
        ndim = len(result.aval.shape)  # type: ignore[attr-defined]
        axis = self._axis_of(ndim)
        operands = []
        for atoms in zip(*(e.invars for e in members), strict=True):
            atom, aval = atoms[0], cast(Any, atoms[0].aval)
            is_shared = isinstance(atom, core.Literal) or all(other is atom for other in atoms)
            if is_shared:
                array = self._read(atom)
                operands.append(jnp.expand_dims(array, axis) if aval.ndim else array)
                continue
            if atom in self._weights:
                array = jnp.stack([self._values[a] for a in atoms], axis=self._axis_of(aval.ndim))
            else:
                array = self._arrays[self._place[atom][0]]
            # A number a sibling lies along the siblings' axis.
            operands.append(array if aval.ndim else array.reshape(_only(axis, ndim + 1)))
        if equation.primitive.name in ("select_n", "clamp"):  # these repeat no axis by themselves
            shape = jnp.broadcast_shapes(*(np.shape(operand) for operand in operands))
            operands = [jnp.broadcast_to(o, shape) if np.ndim(o) else o for o in operands]
        return evaluate(equation, operands)[0]

    def _weight_axis(self, equation: core.JaxprEqn, side: int) -> int:
        """Where siblings' weights are stacked: a shared operand's matmul is one wide one over [K, E, N]."""
        contracted = equation.params["dimension_numbers"][0][side]
        is_shared = equation.invars[1 - side] not in self._place
        return 1 if is_shared and tuple(contracted) == (0,) else 0

    def _side_by_side(self, equation: core.JaxprEqn) -> Any | None:
        """A concatenation or stack of siblings' results, out of the array that holds them."""
        if equation.primitive.name not in ("concatenate", "stack"):
            return None
        atoms: list[Any] = list(equation.invars)
        member = atoms[0]
        if any(atom.aval.shape != member.aval.shape for atom in atoms):
            return None
        axis = self._axis_of(member.aval.ndim)
        parts = [self._together(run, axis) for run in self._runs(atoms)]
        if len(parts) == len(equation.invars):
            return None
        array = parts[0] if len(parts) == 1 else jax.lax.concatenate(parts, axis)
        if equation.primitive.name == "stack":
            return jnp.moveaxis(array, axis, equation.params["axis"])
        dimension = equation.params["dimension"]
        shape = list(member.aval.shape)
        shape[dimension] *= len(equation.invars)
        return jnp.moveaxis(array, axis, dimension).reshape(shape)

    def _runs(self, atoms: Sequence[Any]) -> list[list[Any]]:
        """Neighbours that lie side by side in the array of a class."""
        runs: list[list[Any]] = []
        for atom in atoms:
            place = None if isinstance(atom, core.Literal) else self._place.get(atom)
            last = self._place.get(runs[-1][-1]) if runs and place is not None else None
            if place is not None and last == (place[0], place[1] - 1):
                runs[-1].append(atom)
            else:
                runs.append([atom])
        return runs

    def _together(self, run: Sequence[Any], axis: int) -> Any:
        """The results of a run, along the siblings' axis."""
        if len(run) == 1:
            return jnp.expand_dims(self._read(run[0]), axis)
        number, begin = self._place[run[0]]
        if len(run) == len(self._classes[number]):
            return self._arrays[number]
        return jax.lax.slice_in_dim(self._arrays[number], begin, begin + len(run), axis=axis)


def _only(axis: int, ndim: int) -> tuple[int, ...]:
    """The shape of what lies along one axis."""
    return (*[1] * axis, -1, *[1] * (ndim - axis - 1))
