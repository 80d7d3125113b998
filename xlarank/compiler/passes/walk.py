"""Binds a model's equations anew, each at the rate that its operands need: `Walk`."""

from __future__ import annotations

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
        self.bucket = bucket
        self.counts = Counts(bucket.rows, contexts.num_rows)
        self.split_reductions = split_reductions
        self.log = log
        self.memo: dict[Any, Any] = {}  # pieces cut and joined already, so that siblings share them
        self._rows = rows
        self._contexts = contexts
        self._request_of_row: Any = None

    def run(self, inputs: ProgramInputs) -> list[Any]:
        """Scores [B] by task."""
        self._request_of_row = inputs.request_of_row
        jaxpr, context_jaxpr = self._rows.closed.jaxpr, self._contexts.closed.jaxpr
        values = self._inputs(inputs)
        consts = zip(self._rows.closed.consts, self._contexts.closed.consts, strict=True)
        for var, (const, other) in zip(jaxpr.constvars, consts, strict=True):
            values[var] = self._constant(var.aval, const, other)
        for equation, context_equation in zip(jaxpr.eqns, context_jaxpr.eqns, strict=True):
            operands = [
                self._constant(a.aval, a.val, b.val)  # type: ignore[union-attr]
                if isinstance(a, core.Literal)
                else values[a]
                for a, b in zip(equation.invars, context_equation.invars, strict=True)
            ]
            step = Step(self, Pair(equation, context_equation, self.counts), operands)
            values.update(zip(equation.outvars, step.outputs(), strict=True))
        return [self._score(values, atom) for atom in jaxpr.outvars]

    def _score(self, values: dict[Any, Value], atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom].at_rows()

    def _inputs(self, inputs: ProgramInputs) -> dict[Any, Value]:
        num_weights = self._rows.num_weights
        variables, context_variables = self._rows.closed.jaxpr.invars, self._contexts.closed.jaxpr.invars
        values: dict[Any, Value] = {}
        for var, array in zip(variables[:num_weights], inputs.weights, strict=True):
            shape = tuple(var.aval.shape)  # type: ignore[attr-defined]
            values[var] = self.made(Kind.WEIGHT, array, Layout(shape, shape, SAME))
        activations = zip(
            variables[num_weights:],
            context_variables[num_weights:],
            self._rows.activations,
            self._rows.scopes,
            strict=True,
        )
        for var, context_var, name, scope in activations:
            array = inputs.activations.get(name)
            values[var] = self._activation(var.aval, context_var.aval, array, scope)
        return values

    def _activation(self, aval: Any, context_aval: Any, array: Any, scope: Scope) -> Value:
        if array is None:  # a feature that nobody reads
            return self._constant(aval, *(np.zeros(a.shape, a.dtype) for a in (aval, context_aval)))
        if scope is Scope.CANDIDATE:
            return self.row(array)
        missing = self.counts.contexts - array.shape[0]
        if missing:  # the context part runs at one row more than there are requests
            last = jax.lax.slice_in_dim(array, array.shape[0] - 1, array.shape[0])
            array = jax.lax.concatenate([array, *[last] * missing], 0)
        return self.made(Kind.CONTEXT, array, Layout(aval.shape, context_aval.shape, RowAxis(0)))

    def _constant(self, aval: Any, array: Any, at_context: Any) -> Value:
        layout = layout_of_constant(array, at_context, self.counts)
        return Value(Kind.WEIGHT, aval.shape, aval.dtype, lambda: array, at_context=at_context, layout=layout)

    def outputs(self) -> list[Value]:
        """The equation's results."""
        kind = join_kinds(self.operands)
        if kind is not Kind.ROW:
            return self._once_a_request(kind)
        by_rule = piecewise.apply(self)
        if by_rule is not None:
            return by_rule
        arrays = evaluate(self.pair.equation, [self.rows_of(value) for value in self.operands])
        return [self.walk.row(array) for array in arrays]

    def _once_a_request(self, kind: Kind) -> list[Value]:
        """Results of an equation of weights and contexts, taken as it stands from the context's trace."""
        arrays = evaluate(self.pair.context_equation, [value.at_context() for value in self.operands])
        layouts = follow(self.pair, [value.known_layout() for value in self.operands])
        if kind is Kind.CONTEXT:
            self.note_hoisted(arrays[0].shape)
        # A weight's first repetition (zeros((B, H)), a bias) stays one: only what is made of it is cut to a row.
        is_first = kind is Kind.WEIGHT and all(v.known_layout().place is SAME for v in self.operands)
        at_rows: list[Any] = []

        def make_rows(index: int) -> Any:
            if not at_rows:
                at_rows.extend(evaluate(self.pair.equation, self._recomputed_operands(kind)))
            return at_rows[index]

        outputs = []
        for index, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
            is_known = layout.place is SAME or (layout.place is not None and not is_first)
            if is_known:
                outputs.append(self.walk.made(kind, array, layout))
                continue
            outputs.append(
                Value(
                    kind,
                    layout.shape,
                    array.dtype,
                    lambda index=index: make_rows(index),
                    at_context=array,
                    layout=layout,
                )
            )
        return outputs

    def _recomputed_operands(self, kind: Kind) -> list[Any]:
        """Operands at B rows of an equation that has to be computed there though no candidate has a part in it."""
        reason = f"{self.name} is computed for each row: what it gives isn't known to be alike for all of them"
        return [self.rows_of(value, reason if kind is Kind.CONTEXT else "") for value in self.operands]

