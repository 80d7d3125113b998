"""Binds a model's equations anew, each at the rate that its operands need: `Walk`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.extend import core

from xlarank.compiler.passes import piecewise
from xlarank.compiler.passes.rows import SAME, Counts, Layout, Pair, RowAxis, follow, layout_of_constant
from xlarank.compiler.passes.step import Log, Maker, Step
from xlarank.compiler.passes.values import Kind, Value, join_kinds
from xlarank.compiler.program import ModelTrace, ProgramInputs
from xlarank.compiler.tracing import evaluate
from xlarank.spec import Bucket, Scope

__all__ = ["Walk"]


class Walk:
    """One bucket's walk over both traces of a model."""

    def __init__(
        self,
        rows: ModelTrace,
        contexts: ModelTrace,
        bucket: Bucket,
        *,
        split_reductions: bool,
        log: Log,
    ) -> None:
        """
        Args:
          rows: the model at B rows.
          contexts: in step with it, at Q rows or one more.
          bucket: B and Q.
          split_reductions: see `hoist_context`.
          log: is told what happens.
        """
        self._rows = rows
        self._contexts = contexts
        self._bucket = bucket
        self._split_reductions = split_reductions
        self._log = log

    def run(self, inputs: ProgramInputs) -> list[Any]:
        """Scores [B] by task."""
        counts = Counts(self._bucket.rows, self._contexts.num_rows)
        maker = Maker(
            self._bucket,
            counts,
            inputs.request_of_row,
            split_reductions=self._split_reductions,
            log=self._log,
        )
        jaxpr, context_jaxpr = self._rows.closed.jaxpr, self._contexts.closed.jaxpr
        values = self._inputs(maker, inputs)
        consts = zip(self._rows.closed.consts, self._contexts.closed.consts, strict=True)
        for var, (const, other) in zip(jaxpr.constvars, consts, strict=True):
            values[var] = _constant(var.aval, const, other, counts)
        for equation, context_equation in zip(jaxpr.eqns, context_jaxpr.eqns, strict=True):
            operands = [
                # A literal may be the row count itself; then each trace has its own.
                _constant(a.aval, a.val, b.val, counts) if isinstance(a, core.Literal) else values[a]  # type: ignore[union-attr]
                for a, b in zip(equation.invars, context_equation.invars, strict=True)
            ]
            step = Step(maker, Pair(equation, context_equation, counts), operands)
            values.update(zip(equation.outvars, _outputs(step), strict=True))
        return [
            atom.val if isinstance(atom, core.Literal) else values[atom].at_rows() for atom in jaxpr.outvars
        ]

    def _inputs(self, maker: Maker, inputs: ProgramInputs) -> dict[Any, Value]:
        num_weights = self._rows.num_weights
        variables, context_variables = self._rows.closed.jaxpr.invars, self._contexts.closed.jaxpr.invars
        values: dict[Any, Value] = {}
        for var, array in zip(variables[:num_weights], inputs.weights, strict=True):
            shape = tuple(var.aval.shape)  # type: ignore[attr-defined]
            values[var] = maker.made(Kind.WEIGHT, array, Layout(shape, shape, SAME))
        activations = zip(
            variables[num_weights:],
            context_variables[num_weights:],
            self._rows.activations,
            self._rows.scopes,
            strict=True,
        )
        for var, context_var, name, scope in activations:
            array = inputs.activations.get(name)
            values[var] = _activation(maker, var.aval, context_var.aval, array, scope)
        return values


def _activation(maker: Maker, aval: Any, context_aval: Any, array: Any, scope: Scope) -> Value:
    if array is None:  # a feature that nobody reads
        zeros = [np.zeros(a.shape, a.dtype) for a in (aval, context_aval)]
        return _constant(aval, zeros[0], zeros[1], maker.counts)
    if scope is Scope.CANDIDATE:
        return maker.row(array)
    missing = maker.counts.contexts - array.shape[0]
    if missing:  # the context part runs at one row more than there are requests
        last = jax.lax.slice_in_dim(array, array.shape[0] - 1, array.shape[0])
        array = jax.lax.concatenate([array, *[last] * missing], 0)
    return maker.made(Kind.CONTEXT, array, Layout(aval.shape, context_aval.shape, RowAxis(0)))


def _constant(aval: Any, array: Any, at_context: Any, counts: Counts) -> Value:
    layout = layout_of_constant(array, at_context, counts)
    return Value(Kind.WEIGHT, aval.shape, aval.dtype, lambda: array, at_context=at_context, layout=layout)


def _outputs(step: Step) -> list[Value]:
    """An equation's results."""
    kind = join_kinds(step.operands)
    if kind is not Kind.ROW:
        return _once_a_request(step, kind)
    by_rule = piecewise.apply(step)
    if by_rule is not None:
        return by_rule
    arrays = evaluate(step.pair.equation, [step.rows_of(value) for value in step.operands])
    return [step.maker.row(array) for array in arrays]


def _once_a_request(step: Step, kind: Kind) -> list[Value]:
    """Results of an equation of weights and contexts, taken as it stands from the context's trace."""
    arrays = evaluate(step.pair.context_equation, [value.at_context() for value in step.operands])
    layouts = follow(step.pair, [value.known_layout() for value in step.operands])
    if kind is Kind.CONTEXT:
        step.note_hoisted(arrays[0].shape)
    # A weight's first repetition (zeros((B, H)), a bias) stays one: only what is made of it is cut to a row.
    is_first = kind is Kind.WEIGHT and all(v.known_layout().place is SAME for v in step.operands)
    at_rows: list[Any] = []

    def make_rows(index: int) -> Any:
        if not at_rows:
            reason = f"{step.name} is computed for each row: it isn't known to give each the same"
            operands = [step.rows_of(value, reason) for value in step.operands]
            at_rows.extend(evaluate(step.pair.equation, operands))
        return at_rows[index]

    outputs = []
    for index, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        if layout.place is SAME or (layout.place is not None and not is_first):
            outputs.append(step.maker.made(kind, array, layout))
        else:
            make = functools.partial(make_rows, index)
            outputs.append(Value(kind, layout.shape, array.dtype, make, at_context=array, layout=layout))
    return outputs
