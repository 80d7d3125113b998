"""fuse_experts: sibling matmuls get merged forms, in any model.

Two equations are siblings when they do the same to the same inputs with other weights: then they have the same
*colour*, a digest of the operation, its parameters and the colours of what it reads, in which a weight counts
by its shape alone. Experts, gates and towers are found that way, whatever they are called. Merged forms differ
in where the siblings' axis E lies:

    wide           matmuls that read one operand become one over their weights side by side, then come apart
    row_major      whole chains of siblings run as one, [B, E, ...]
    expert_major   whole chains of siblings run as one, [E, B, ...]

Which wins depends on the bucket and the device, so they are candidates for autotune, not rules. Weights are
joined by equations that read weights alone: they end up in prepare.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.program import Program, weight_side
from xlarank.compiler.tracing import evaluate, structural_text

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
    """Chains of siblings as one, the siblings' axis first: batched matmuls as they are fastest on most devices."""


@dataclasses.dataclass(frozen=True)
class _Class:
    """Sibling equations that run as one."""

    equations: tuple[core.JaxprEqn, ...]

    @property
    def size(self) -> int:
        return len(self.equations)


def siblings_of(program: Program) -> list[tuple[core.JaxprEqn, ...]]:
    """Matmuls with weights that could run as one: groups of at least two siblings, in order."""
    weights = program.weight_vars()
    classes = _mergeable_classes(program, weights)
    return [c.equations for c in classes if weight_side(c.equations[0], weights) is not None]


def fuse_experts(program: Program, fusion: Fusion) -> Program | None:
    """Merges siblings.

    Args:
      program: of one bucket.
      fusion: the form.

    Returns:
      The program in this form; None where there is nothing to merge, or for `UNROLLED`.
    """
    weights = program.weight_vars()
    if fusion is Fusion.UNROLLED:
        return None
    if fusion is Fusion.WIDE:
        groups = _sharing_an_operand(program, weights)
        return program.rewritten(lambda *inputs: _run_wide(program, groups, weights, inputs)) if groups else None
    classes = _mergeable_classes(program, weights)
    if not classes:
        return None
    axis = 0 if fusion is Fusion.EXPERT_MAJOR else 1
    return program.rewritten(lambda *inputs: _Merged(program, classes, weights, axis).run(inputs))


# Finding siblings


def _mergeable_classes(program: Program, weights: set[core.Var]) -> list[_Class]:
    """Classes that can run as one, each after those that it reads."""
    by_colour: dict[str, list[core.JaxprEqn]] = collections.defaultdict(list)
    colours: dict[Any, str] = {}
    jaxpr = program.closed.jaxpr
    for index, var in enumerate(jaxpr.invars):
        colours[var] = _weight_colour(var) if var in weights else f"input {index}"
    for var in jaxpr.constvars:
        colours[var] = _weight_colour(var)
    for equation in jaxpr.eqns:
        if equation.outvars and equation.outvars[0] in weights:
            colours |= {var: _weight_colour(var) for var in equation.outvars}
            continue
        colour = _colour(equation, colours)
        colours |= {var: f"{colour} {i}" for i, var in enumerate(equation.outvars)}
        if len(equation.outvars) == 1:
            by_colour[colour].append(equation)
    merged: dict[core.Var, tuple[int, int]] = {}  # a member's result: number of its class, place in it
    classes: list[_Class] = []
    for group in by_colour.values():  # in order of first members, so operands' classes come first
        if len(group) < 2 or not _fits(group, weights, merged):
            continue
        merged |= {e.outvars[0]: (len(classes), place) for place, e in enumerate(group)}
        classes.append(_Class(tuple(group)))
    return classes


def _weight_colour(var: core.Var) -> str:
    return f"weight {var.aval.shape} {var.aval.dtype}"  # type: ignore[attr-defined]


def _colour(equation: core.JaxprEqn, colours: dict[Any, str]) -> str:
    operands = [
        f"literal {np.asarray(a.val).tobytes()!r} {a.aval}" if isinstance(a, core.Literal) else colours[a]
        for a in equation.invars
    ]
    text = "\n".join([equation.primitive.name, structural_text(equation.params), *operands])
    return hashlib.sha256(text.encode()).hexdigest()


def _fits(
    group: Sequence[core.JaxprEqn], weights: set[core.Var], merged: dict[core.Var, tuple[int, int]]
) -> bool:
    """Whether siblings read, at each place, one operand, weights, or a whole merged class in order."""
    reads_merged = False
    for atoms in zip(*(equation.invars for equation in group), strict=True):
        if isinstance(atoms[0], core.Literal) or all(atom in weights for atom in atoms):
            continue
        if all(atom is atoms[0] for atom in atoms):
            continue
        places = [merged.get(atom) for atom in atoms]  # type: ignore[arg-type]
        if places[0] is None or places != [(places[0][0], i) for i in range(len(group))]:
            return False
        reads_merged = True
    return reads_merged or weight_side(group[0], weights) is not None


def _sharing_an_operand(program: Program, weights: set[core.Var]) -> list[list[core.JaxprEqn]]:
    """Matmuls [..., K] @ [K, N] of one operand with several weights, at least two each."""
    groups: dict[Any, list[core.JaxprEqn]] = collections.defaultdict(list)
    for equation in program.closed.jaxpr.eqns:
        if weight_side(equation, weights) != 1:
            continue
        x, weight = equation.invars
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        ndim = x.aval.ndim  # type: ignore[union-attr]
        if batched or tuple(contracted) != (ndim - 1,) or weight.aval.ndim != 2:  # type: ignore[union-attr]
            continue
        kind = (x, str(equation.params["preferred_element_type"]), weight.aval.dtype)  # type: ignore[union-attr]
        groups[kind].append(equation)
    return [group for group in groups.values() if len(group) > 1]


# Running them as one


def _run_wide(
    program: Program, groups: list[list[core.JaxprEqn]], weights: set[core.Var], inputs: Sequence[Any]
) -> list[Any]:
    first = {id(group[0]): group for group in groups}
    later = {id(equation) for group in groups for equation in group[1:]}
    values = _weight_values(program, weights, inputs)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in program.closed.jaxpr.eqns:
        if equation.outvars[0] in weights or id(equation) in later:
            continue
        if id(equation) not in first:
            results = evaluate(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
            continue
        group = first[id(equation)]
        columns = []
        for member in group:
            (_, (contracted,)), _ = member.params["dimension_numbers"]
            columns.append(read(member.invars[1]) if contracted == 0 else read(member.invars[1]).T)
        x = read(equation.invars[0])
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        (wide,) = evaluate(equation, [x, jnp.concatenate(columns, axis=1)], dimension_numbers=numbers)
        begin = 0
        for member, column in zip(group, columns, strict=True):
            end = begin + column.shape[1]
            values[member.outvars[0]] = jax.lax.slice_in_dim(wide, begin, end, axis=wide.ndim - 1)
            begin = end
    return [read(atom) for atom in program.closed.jaxpr.outvars]


def _weight_values(program: Program, weights: set[core.Var], inputs: Sequence[Any]) -> dict[Any, Any]:
    """Inputs, and everything that depends on weights alone: a merged equation may need it early."""
    jaxpr = program.closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, program.closed.consts, strict=True))
    for equation in jaxpr.eqns:
        if equation.outvars[0] in weights:
            operands = [a.val if isinstance(a, core.Literal) else values[a] for a in equation.invars]
            values.update(zip(equation.outvars, evaluate(equation, operands), strict=True))
    return values


class _Merged:
    """Binds a program with every class as one equation over a new axis."""

    def __init__(
        self, program: Program, classes: list[_Class], weights: set[core.Var], axis: int
    ) -> None:
        self._jaxpr = program.closed.jaxpr
        self._program = program
        self._weights = weights
        self._axis = axis
        self._class_at = {id(c.equations[0]): number for number, c in enumerate(classes)}
        self._classes = classes
        self._later = {id(e) for c in classes for e in c.equations[1:]}
        self._place = {
            e.outvars[0]: (number, place)
            for number, c in enumerate(classes)
            for place, e in enumerate(c.equations)
        }
        self._arrays: dict[int, Any] = {}  # by class: its results, the siblings' axis at `_axis_of`
        self._values: dict[Any, Any] = {}

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Scores by task."""
        self._values = _weight_values(self._program, self._weights, inputs)
        for equation in self._jaxpr.eqns:
            if equation.outvars[0] in self._weights or id(equation) in self._later:
                continue
            if id(equation) in self._class_at:
                number = self._class_at[id(equation)]
                self._arrays[number] = self._run_class(self._classes[number])
            elif equation.primitive.name == "concatenate" and (whole := self._whole(equation)) is not None:
                self._values[equation.outvars[0]] = self._joined(whole, equation.params["dimension"])
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
            axis = self._axis_of(atom.aval.ndim)
            self._values[atom] = jax.lax.index_in_dim(self._arrays[number], place, axis, keepdims=False)
        return self._values[atom]

    def _run_class(self, members: _Class) -> Any:
        equation = members.equations[0]
        side = weight_side(equation, self._weights)
        operands, axes = [], []
        for position, atoms in enumerate(zip(*(e.invars for e in members.equations), strict=True)):
            atom = atoms[0]
            if isinstance(atom, core.Literal) or all(other is atom for other in atoms):
                operands.append(self._read(atom))
                axes.append(None)
            elif atom in self._weights:
                # A shared operand's matmul is one wide one when its weights lie [K, E, N].
                is_wide = position == side and equation.invars[1 - position] not in self._place
                axis = self._weight_axis(equation, position) if is_wide else self._axis_of(atom.aval.ndim)
                if position == side and not is_wide:
                    axis = 0
                operands.append(jnp.stack([self._values[a] for a in atoms], axis=axis))
                axes.append(axis)
            else:
                operands.append(self._arrays[self._place[atom][0]])
                axes.append(self._axis_of(atom.aval.ndim))
        out_axis = self._axis_of(equation.outvars[0].aval.ndim)  # type: ignore[union-attr]
        run = jax.vmap(lambda *xs: evaluate(equation, xs)[0], in_axes=tuple(axes), out_axes=out_axis)
        return run(*operands)

    @staticmethod
    def _weight_axis(equation: core.JaxprEqn, position: int) -> int:
        contracted = equation.params["dimension_numbers"][0][position]
        return 1 if tuple(contracted) == (0,) else 0

    def _whole(self, equation: core.JaxprEqn) -> int | None:
        """The class that a concatenation puts side by side, whole and in order."""
        places = [self._place.get(atom) for atom in equation.invars]  # type: ignore[arg-type]
        if places[0] is None:
            return None
        number = places[0][0]
        size = self._classes[number].size
        return number if places == [(number, i) for i in range(size)] else None

    def _joined(self, number: int, dimension: int) -> Any:
        member = self._classes[number].equations[0].outvars[0].aval
        array = jnp.moveaxis(self._arrays[number], self._axis_of(member.ndim), dimension)  # type: ignore[attr-defined]
        shape = list(member.shape)  # type: ignore[attr-defined]
        shape[dimension] *= self._classes[number].size
        return array.reshape(shape)
