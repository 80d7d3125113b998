"""A bucket's device program as flat equations: `ModelTrace`, `Program`, and the plain form of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.device_lookup import look_up
from xlarank.compiler.split import DenseModel, refused_logit, scores_of
from xlarank.compiler.tracing import (
    ClosedJaxpr,
    evaluate,
    flatten,
    nested_equations,
    retrace,
    source_of,
    trace,
)
from xlarank.errors import ModelError
from xlarank.spec import MASK_SUFFIX, Bucket, FeatureKind, ModelSpec, Scope, Signature
from xlarank.spec.wording import counted

__all__ = [
    "ModelTrace",
    "Program",
    "ProgramInputs",
    "Traces",
    "expand",
    "make_program",
    "plain_program",
    "read",
    "run_equations",
    "weight_side",
]


@dataclasses.dataclass(frozen=True)
class ModelTrace:
    """A model from activations to scores at one row count, as flat equations."""

    num_rows: int
    """Rows of every activation."""

    closed: ClosedJaxpr
    """Weights, then activations by name in, scores [num_rows] by task out; no dead code."""

    num_weights: int
    """Inputs that are weights."""

    activations: tuple[str, ...]
    """Names of the other inputs."""

    scopes: tuple[Scope, ...]
    """Of each activation."""

    @property
    def unread(self) -> frozenset[str]:
        """Activations that no score depends on."""
        read = {atom for e in self.closed.jaxpr.eqns for atom in e.invars if isinstance(atom, core.Var)}
        read |= {atom for atom in self.closed.jaxpr.outvars if isinstance(atom, core.Var)}
        inputs = self.closed.jaxpr.invars[self.num_weights :]
        return frozenset(n for n, var in zip(self.activations, inputs, strict=True) if var not in read)

    @property
    def narrow_floats(self) -> tuple[str, ...]:
        """Names of float formats narrower than float32 that the model itself computes in, in order of use."""
        names = (
            var.aval.dtype.name  # type: ignore[attr-defined]
            for equation, _ in nested_equations(self.closed.jaxpr)
            for var in equation.outvars
            if jnp.issubdtype(var.aval.dtype, jnp.floating) and var.aval.dtype.itemsize < 4  # type: ignore[attr-defined]
        )
        return tuple(dict.fromkeys(names))


class Traces:
    """The traces of one model, each made once."""

    def __init__(self, model: DenseModel, spec: ModelSpec) -> None:
        """
        Args:
          model: weights and module.
          spec: its features and tasks.
        """
        self.model = model
        self.spec = spec
        self._at: dict[int, ModelTrace] = {}

    def at(self, num_rows: int) -> ModelTrace:
        """The model at `num_rows` rows.

        Raises:
          ModelError: if it can't be traced or served, with the operation and the line of the author's source.
        """
        if num_rows not in self._at:
            try:
                self._at[num_rows] = _trace_model(self.model, self.spec, num_rows)
            except ModelError as error:
                if not self._at:
                    raise
                now, before = counted(num_rows, "row"), counted(min(self._at), "row")
                raise ModelError(
                    f"{error}; this was with {now}, and with {before} it was traced before: a call may leave "
                    f"nothing for the next one (no array in a list, a global or an attribute), and take no "
                    f"other way by the number of rows"
                ) from error
        return self._at[num_rows]

    def unused_features(self) -> tuple[str, ...]:
        """Features that no score depends on: the host need not look them up."""
        unread = self.at(2).unread
        return tuple(
            f.name
            for f in self.spec.features
            if f.name in unread and (f.kind is not FeatureKind.SEQUENCE or f.name + MASK_SUFFIX in unread)
        )


def _trace_model(model: DenseModel, spec: ModelSpec, num_rows: int) -> ModelTrace:
    avals: dict[str, jax.ShapeDtypeStruct] = {}
    scopes: list[Scope] = []
    for feature in spec.features:
        width = spec.table_of(feature).dim if feature.is_lookup else feature.width
        shape: tuple[int, ...] = (num_rows, width)
        if feature.kind is FeatureKind.SEQUENCE:
            shape = (num_rows, feature.max_length or 0, width)
            avals[feature.name + MASK_SUFFIX] = jax.ShapeDtypeStruct(shape[:2], np.dtype(bool))
            scopes.append(feature.scope)
        avals[feature.name] = jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
        scopes.append(feature.scope)

    failures: list[ModelError] = []
    written: list[str] = []

    def apply(params, random_state, *activations):
        try:
            logits, changed = model.apply(params, random_state, dict(zip(avals, activations, strict=True)))
        except KeyError as error:
            if error.args and isinstance(error.args[0], str) and error.args[0] not in avals:
                own = ", ".join(dict.fromkeys(name.partition(".")[0] for name in model.names))
                weights = f"; the weights are {own}" if own else ""
                error.args = (f"{error.args[0]} (the features are {', '.join(avals)}{weights})",)
            raise
        failures.clear()
        written[:] = changed
        try:
            scores = scores_of(spec, logits, num_rows)
        except ModelError as error:
            failures.append(error)
            refused = refused_logit(spec, logits, num_rows) if isinstance(logits, Mapping) else None
            return [] if refused is None else [refused]  # where it is none, no operation is to blame
        return [*(scores[task.name] for task in spec.tasks), *changed.values()]

    weights = tuple(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in model.params)
    arguments = (weights, model.random_state, *avals.values())
    closed = flatten(trace(spec.name, apply, arguments, model.source, model.names))
    if failures:
        origin = _origin(closed) or model.source
        raise ModelError(f"{failures[0]}{f'; it comes from {origin}' if origin else ''}")
    closed = _without_written_state(spec, closed, model, written)
    closed = _without_random_state(spec.name, closed, len(weights), len(model.random_state), model.source)
    return ModelTrace(num_rows, closed, len(weights), tuple(avals), tuple(scopes))


def _without_written_state(
    spec: ModelSpec, closed: ClosedJaxpr, model: DenseModel, written: Sequence[str]
) -> ClosedJaxpr:
    """Drops the outputs that are variables; raises ModelError when the next call would read another value.

    Flax's transformations (`nnx.jit`, `nnx.remat`) write every variable back, as it was; `nnx.WeightNorm` and
    `nnx.SpectralNorm` write weights that normalise to themselves.

    Args:
      spec: of the model.
      closed: scores by task, then the variables that were written.
      model: whose weights are the first inputs.
      written: names of those variables.
    """
    num_scores = len(spec.tasks)
    before = dict(zip(model.names, closed.jaxpr.invars, strict=False))
    outputs = dict(zip(written, closed.jaxpr.outvars[num_scores:], strict=True))
    changed = {name: after for name, after in outputs.items() if before.get(name) is not after}
    if changed and not _settles(closed, model, changed):
        for name, after in changed.items():
            made_by = [e for e in closed.jaxpr.eqns if after in e.outvars]
            where = f"{made_by[0].primitive.name} at {source_of(made_by[0])}" if made_by else "its call"
            if name not in before:
                raise ModelError(
                    f"model {spec.name!r} makes a variable {name!r} when it scores: {where}; a served "
                    f"program keeps nothing between requests: make variables in __init__, and sow values to "
                    f"look at as nnx.Intermediate, which is left out"
                )
            raise ModelError(
                f"model {spec.name!r} writes to its variable {name!r} when it scores: {where}; a "
                f"served program keeps no state between requests: update statistics in training alone (for "
                f"batch norm use_running_average=True, which `module.eval()` sets unless the call says "
                f"otherwise)"
            )
    return retrace(lambda *inputs: run_equations(closed, inputs)[:num_scores], closed.in_avals)


def _settles(closed: ClosedJaxpr, model: DenseModel, changed: Mapping[str, Any]) -> bool:
    """Whether what is written is made of weights alone, and the same when made of what was written."""
    places = [closed.jaxpr.outvars.index(after) for after in changed.values()]
    made = retrace(lambda *inputs: [run_equations(closed, inputs)[i] for i in places], closed.in_avals)
    read = [*(atom for e in made.jaxpr.eqns for atom in e.invars), *made.jaxpr.outvars]
    used = {atom for atom in read if isinstance(atom, core.Var)}
    weights = dict(zip(model.names, map(jnp.asarray, model.params), strict=True))
    others = made.jaxpr.invars[len(weights) :]
    if not used.isdisjoint(others) or not changed.keys() <= weights.keys():
        return False
    rest = [None] * len(others)
    first = run_equations(made, [*weights.values(), *rest])
    weights |= dict(zip(changed, first, strict=True))
    second = run_equations(made, [*weights.values(), *rest])
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, second, strict=True))


def _origin(closed: ClosedJaxpr) -> str:
    """Operation and author's line of the first output that has one."""
    made_by = {var: equation for equation in closed.jaxpr.eqns for var in equation.outvars}
    for var in closed.jaxpr.outvars:
        if not isinstance(var, core.Literal) and var in made_by:
            return f"{made_by[var].primitive.name} at {source_of(made_by[var])}"
    return ""


def _without_random_state(name: str, closed: ClosedJaxpr, begin: int, count: int, source: str) -> ClosedJaxpr:
    """Drops the inputs that hold random state; raises ModelError when a score depends on one."""
    inputs = closed.jaxpr.invars
    state = set(inputs[begin : begin + count])
    for equation in closed.jaxpr.eqns:
        if any(isinstance(atom, core.Var) and atom in state for atom in equation.invars):
            raise ModelError(
                f"model {name!r} draws random numbers when it scores: {equation.primitive.name} at "
                f"{source_of(equation) or source}; switch it off in evaluation mode "
                f"(deterministic=True), a score must be the same each time"
            )
    avals = closed.in_avals[:begin] + closed.in_avals[begin + count :]
    unread = [None] * count
    return retrace(lambda *kept: run_equations(closed, [*kept[:begin], *unread, *kept[begin:]]), avals)


@dataclasses.dataclass(frozen=True)
class Program:
    """A row program of one bucket as flat equations, weights among its inputs.

    Inputs: weights, among them last the rows of tables on the device, leaves of the context, leaves of the
    candidates, request_of_row [B]. Outputs: scores [B] by task. Passes take one and give one;
    `xlarank.compiler.prepare` parts it into prepare and program.
    """

    closed: ClosedJaxpr
    num_weights: int
    num_context: int
    """Leaves of the context."""

    bucket: Bucket

    @property
    def weight_avals(self) -> list[Any]:
        return list(self.closed.in_avals[: self.num_weights])

    def weight_vars(self) -> set[core.Var]:
        """Every value that depends on weights and constants alone."""
        jaxpr = self.closed.jaxpr
        found = {*jaxpr.invars[: self.num_weights], *jaxpr.constvars}
        for equation in jaxpr.eqns:
            if all(isinstance(atom, core.Literal) or atom in found for atom in equation.invars):
                found |= set(equation.outvars)
        return found

    def rewritten(self, run: Callable[..., list[Any]]) -> Program:
        """The program that `run` makes of this one's inputs."""
        return dataclasses.replace(self, closed=retrace(run, self.closed.in_avals))


@dataclasses.dataclass(frozen=True)
class ProgramInputs:
    """The inputs of a row program, apart."""

    weights: Sequence[Any]
    activations: Mapping[str, Any]
    """[Q, ...] or [B, ...] by name: an embedding, dense columns, a sequence or its mask."""

    request_of_row: Any
    """[B] int32."""


def make_program(
    traced: ModelTrace,
    spec: ModelSpec,
    signature: Signature,
    bucket: Bucket,
    run: Callable[[ProgramInputs], list[Any]],
) -> Program:
    """Traces `run` over the leaves of a bucket.

    Args:
      traced: of the model; gives the weights' shapes.
      spec: its features.
      signature: layout of the leaves.
      bucket: B and Q.
      run: from the inputs to the scores by task.
    """
    num_weights, context = traced.num_weights, signature.context_leaves
    leaves, first_leaf = (*context, *signature.candidate_leaves), num_weights + len(signature.device_tables)

    def flat(*inputs: Any) -> list[Any]:
        weights, tables, given = inputs[:num_weights], inputs[num_weights:first_leaf], inputs[first_leaf:]
        arrays = dict(zip((leaf.name for leaf in leaves), given[:-1], strict=True))
        activations = dict(_activations(spec, signature, arrays, tables))
        return run(ProgramInputs(weights, activations, given[-1]))

    avals: list[Any] = list(traced.closed.in_avals[:num_weights])
    avals += [jax.ShapeDtypeStruct(table.shape, jnp.dtype(table.dtype)) for table in signature.device_tables]
    avals += [jax.ShapeDtypeStruct(leaf.shape(bucket), jnp.dtype(leaf.dtype)) for leaf in leaves]
    avals.append(jax.ShapeDtypeStruct((bucket.rows,), np.dtype(np.int32)))
    return Program(retrace(flat, avals), first_leaf, len(context), bucket)


def _activations(
    spec: ModelSpec, signature: Signature, leaves: Mapping[str, Any], tables: Sequence[Any]
) -> Iterator[tuple[str, Any]]:
    """What the model reads, cut out of the leaves; zeros [1, ...] stand in for what nobody reads.

    The device's share of what is looked up is added to the host's.
    """
    for feature in spec.features:
        slot = signature.slots.get(feature.name)
        if slot is None:
            continue
        leaf = leaves[slot.leaf]
        if feature.kind is FeatureKind.SEQUENCE:
            yield feature.name + MASK_SUFFIX, leaves[slot.leaf + MASK_SUFFIX]
        else:
            leaf = jax.lax.slice_in_dim(leaf, slot.begin, slot.end, axis=1)
        activation = leaf.astype(jnp.float32)
        lookup = signature.lookups.get(feature.name)
        if lookup is not None:
            held = look_up(tables[lookup.table], leaves[lookup.places], signature.device_tables[lookup.table])
            if feature.kind is not FeatureKind.SEQUENCE:
                held = held.sum(axis=1)
            if lookup.divisor is not None:
                held = held / leaves[lookup.divisor]
            activation = activation + held
        yield feature.name, activation


def expand(value: Any, request_of_row: Any, bucket: Bucket, axis: int = 0) -> Any:
    """Each row's context: Q entries along `axis` become B."""
    if bucket.requests == 1:
        shape = (*value.shape[:axis], bucket.rows, *value.shape[axis + 1 :])
        return jax.lax.broadcast_in_dim(value, shape, tuple(range(value.ndim)))
    index = (slice(None),) * axis + (request_of_row,)
    return value.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def run_equations(closed: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Binds every equation in turn."""
    values = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for equation in closed.jaxpr.eqns:
        values.update(zip(equation.outvars, evaluate(equation, read(values, equation.invars)), strict=True))
    return read(values, closed.jaxpr.outvars)


def read(values: Mapping[Any, Any], atoms: Sequence[Any]) -> list[Any]:
    """The values of variables and literals."""
    return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in atoms]


def plain_program(traces: Traces, signature: Signature, bucket: Bucket) -> Program:
    """The plain form: every context is expanded to its rows, then the model runs at B rows.

    Raises:
      ModelError: see `Traces.at`.
    """
    traced = traces.at(bucket.rows)

    def run(inputs: ProgramInputs) -> list[Any]:
        arrays = list(inputs.weights)
        avals: list[Any] = traced.closed.in_avals[traced.num_weights :]
        for name, scope, aval in zip(traced.activations, traced.scopes, avals, strict=True):
            if name not in inputs.activations:  # nobody reads it
                arrays.append(jnp.zeros(aval.shape, aval.dtype))
            elif scope is Scope.CONTEXT:
                arrays.append(expand(inputs.activations[name], inputs.request_of_row, bucket))
            else:
                arrays.append(inputs.activations[name])
        return run_equations(traced.closed, arrays)

    return make_program(traced, traces.spec, signature, bucket, run)


def weight_side(equation: core.JaxprEqn, weights: set[core.Var]) -> int | None:
    """Which operand of a matmul is a weight; None for another equation, or one of no or two weights.

    Args:
      equation: any.
      weights: `Program.weight_vars`.
    """
    if equation.primitive.name != "dot_general":
        return None
    sides = [not isinstance(atom, core.Literal) and atom in weights for atom in equation.invars]
    return sides.index(True) if sum(sides) == 1 else None
