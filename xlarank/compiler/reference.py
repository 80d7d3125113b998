"""The reference score of a request: the model applied in float32, op by op, without the compiler."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from xlarank.compiler.program import Traces, read, run_equations
from xlarank.compiler.split import drop_intermediates, scores_of
from xlarank.compiler.tracing import (
    ClosedJaxpr,
    authors_code,
    evaluate,
    flatten,
    in_true_float32,
    inner_jaxpr,
    nested_equations,
    source_of,
    structural_text,
)
from xlarank.device import compiler_options
from xlarank.errors import ModelError
from xlarank.host import model_inputs
from xlarank.models import EmbeddingCollection
from xlarank.spec import (
    Column,
    FeatureSpec,
    ModelSpec,
    RankRequest,
    Scope,
    TaskKind,
    Tolerance,
    join_columns,
    take,
)

__all__ = ["arguments_of", "check_row_counts", "reference_scores"]

_Model = Callable[[dict[str, jax.Array]], Any]

_LOOPS = ("scan", "while")

_FEW_ROWS, _MANY_ROWS = (1, 3), 32
"""Row counts whose scores are compared; the larger is traced anyway."""

_MAX_ROWS = 1024
"""Of a call: few large ones, for each operation is dispatched by itself."""


def reference_scores(
    model: _Model,
    spec: ModelSpec,
    tables: Mapping[str, np.ndarray],
    requests: Sequence[RankRequest],
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, list[np.ndarray]]:
    """Scores requests as DESIGN §3 defines the reference.

    The context is repeated N times, tables are looked up by `EmbeddingCollection` in plain JAX and the
    model runs under `jax.disable_jit()`, so that a fault of the compiler can't agree with itself. A model
    with loops (`lax.scan`, `map`, `while_loop`) is traced and run equation by equation instead, each loop
    compiled by XLA as the one operation that it is: without jit its body would be dispatched op by op for
    every step, and a map over the rows took minutes. So is one with a matmul whose author asked for less than
    float32 (`precision=`), which is in true float32 here as in a program. No pass of ours sees that trace
    either.

    Args:
      model: an nnx.Module in evaluation mode, or any function from activations to logits.
      spec: the model.
      tables: float32 [R, D] by name.
      requests: each with at least one candidate.
      on_progress: told how many requests of how many are scored.

    Returns:
      By task, one [N] float32 array a request.

    Raises:
      ModelError: if the model's answer has the wrong form, or a score isn't finite.
    """
    scores: dict[str, list[np.ndarray]] = {task.name: [] for task in spec.tasks}
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_matmul_precision("highest"), jax.default_device(cpu):
        apply = _Reference(model)
        for first, group in _groups(requests):
            on_progress(first, len(requests))
            inputs, ends = _inputs(spec, group)
            with jax.disable_jit():
                activations = EmbeddingCollection(spec, tables=tables)(inputs)
            with authors_code(f"model {spec.name!r}, golden requests {first} to {first + len(group) - 1}"):
                logits = apply(activations)
            with jax.disable_jit():
                by_task = scores_of(spec, logits, len(next(iter(activations.values()))))
            for task, values in by_task.items():
                parts = np.split(np.array(values)[: ends[-1]], ends[:-1])
                _check_finite(spec, task, first, parts, functools.partial(apply.first_overflow, activations))
                scores[task] += parts
    return scores


def _inputs(spec: ModelSpec, group: Sequence[RankRequest]) -> tuple[dict[str, jax.Array], np.ndarray]:
    """What the embedding collection reads of a group of requests, a row a candidate, and where each ends.

    The last row is repeated up to a power of two: each operation is compiled once a size, and groups of all
    sizes would take most of the time. That rows are independent is proven.
    """
    columns = [
        join_columns([_repeated(feature, request, position) for request in group])
        for position, feature in enumerate(spec.features)
    ]
    ends = np.cumsum([request.num_candidates for request in group])
    rows = np.minimum(np.arange(1 << int(ends[-1] - 1).bit_length()), ends[-1] - 1)
    inputs = model_inputs(spec, [take(column, rows) for column in columns])
    return {name: jnp.asarray(value) for name, value in inputs.items()}, ends


def _needs_trace(equation: core.JaxprEqn) -> bool:
    """Whether an operation can't be left to the author's call: a loop, or a matmul that asks for less than
    float32."""
    if equation.primitive.name in _LOOPS:
        return True
    exact = in_true_float32(equation.params, [atom.aval for atom in equation.invars])
    return exact.get("precision") is not equation.params.get("precision")


class _Reference:
    """A model that runs op by op; one with loops or narrower matmuls equation by equation of its trace."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._traced: dict[int, tuple[ClosedJaxpr, Any]] = {}  # by rows
        self._loops: dict[core.JaxprEqn, Callable] = {}  # each compiled once
        self._is_traced: bool | None = None  # until the first call

    def __call__(self, activations: dict[str, jax.Array]) -> Any:
        """The model's answer to activations [rows, ...] by name."""
        if self._is_traced is None:
            closed, _ = self._at(activations)
            self._is_traced = any(_needs_trace(e) for e, _ in nested_equations(closed.jaxpr))
        if not self._is_traced:
            with jax.disable_jit():
                answer = self._model(activations)
            drop_intermediates(self._model)
            return answer
        closed, structure = self._at(activations)
        return jax.tree.unflatten(structure, _evaluate(closed, jax.tree.leaves(activations), self._loops))

    def first_overflow(self, activations: dict[str, jax.Array]) -> str:
        """The first operation that makes of finite values others, with its line, as the end of a message."""
        flat = flatten(self._at(activations)[0])
        values = dict(zip(flat.jaxpr.invars, jax.tree.leaves(activations), strict=True))
        values.update(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        for equation in flat.jaxpr.eqns:
            operands = read(values, equation.invars)
            results = evaluate(equation, operands)
            if all(map(_is_finite, operands)) and not all(map(_is_finite, results)):
                dtype = results[0].dtype
                largest = (
                    f", which ends at {jnp.finfo(dtype).max}: use float32" if dtype != np.float32 else ""
                )
                return (
                    f"; the first operation that makes anything else of finite values is "
                    f"{equation.primitive.name} at {source_of(equation)}, in {dtype}{largest}"
                )
            values.update(zip(equation.outvars, results, strict=True))
        return ""

    def _at(self, activations: dict[str, jax.Array]) -> tuple[ClosedJaxpr, Any]:
        num_rows = len(next(iter(activations.values())))
        if num_rows not in self._traced:
            closed, answer = jax.make_jaxpr(_pure(self._model), return_shape=True)(activations)
            self._traced[num_rows] = closed, jax.tree.structure(answer)
        return self._traced[num_rows]


def _is_finite(value: Any) -> bool:
    if not jnp.issubdtype(jax.dtypes.result_type(value), jnp.floating):
        return True
    return bool(jnp.isfinite(value).all())


def _pure(model: _Model) -> _Model:
    """The model for a trace: Flax lets no trace touch variables that were made outside of it."""
    if not isinstance(model, nnx.Module):
        return model
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)

    def call(activations: dict[str, jax.Array]) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))(activations)  # type: ignore[operator]

    return call


def _evaluate(closed: ClosedJaxpr, inputs: Sequence[Any], loops: dict[core.JaxprEqn, Callable]) -> list[Any]:
    """Runs equation by equation: calls are opened, everything else is one operation of XLA.

    Args:
      closed: what to run.
      inputs: its arguments.
      loops: compiled loops, filled here; with the options of our programs, which keep XLA's faulty reductions
        out of them.
    """
    jaxpr = closed.jaxpr
    uses = collections.Counter(a for e in jaxpr.eqns for a in e.invars if isinstance(a, core.Var))
    uses.update(atom for atom in jaxpr.outvars if isinstance(atom, core.Var))
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        uses[atom] -= 1  # what nobody reads again is let go: a batch's values can be gigabytes
        return values[atom] if uses[atom] else values.pop(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = inner_jaxpr(equation)
        if inner is not None:
            outputs = _evaluate(inner, operands, loops)
        else:
            bind = functools.partial(equation.primitive.bind, **in_true_float32(equation.params, operands))
            if equation.primitive.name in _LOOPS:
                bind = loops.setdefault(equation, jax.jit(bind, compiler_options=compiler_options("cpu")))
            found = bind(*operands)
            outputs = found if equation.primitive.multiple_results else [found]
        values.update((var, out) for var, out in zip(equation.outvars, outputs, strict=True) if uses[var])
    return [read(atom) for atom in jaxpr.outvars]


def check_row_counts(
    traces: Traces, tables: Mapping[str, np.ndarray], request: RankRequest, tolerance: Tolerance
) -> None:
    """Scores the first candidates of a request at several row counts.

    A program of B rows serves requests of 1 to B candidates. A model that looks at the number of rows would
    give them other scores than its author's call does, and no two rows of one batch would show it. On a CPU,
    as the reference: an accelerator may take another kernel for another size, and round a model's own
    bfloat16 otherwise.

    Args:
      traces: of the model.
      tables: float32 [R, D] by name.
      request: a golden one.
      tolerance: largest difference to let pass.

    Raises:
      ModelError: names the task, the number of rows and the difference; if two calls with the same rows give
        other scores, that.
    """
    spec = traces.spec
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        among_many = _scores_at(traces, tables, request, _MANY_ROWS)
        _check_repeats(traces, tables, request, tolerance, among_many)
        few = {num_rows: _scores_at(traces, tables, request, num_rows) for num_rows in _FEW_ROWS}
    for num_rows, alone in few.items():
        for task, found, many in zip(spec.tasks, alone, among_many, strict=True):
            worst = _difference(task.kind, found, many[:num_rows])
            if not worst <= tolerance.of(task.kind):
                raise ModelError(
                    f"model {spec.name!r}, task {task.name!r}: a row's score depends on the number of rows: "
                    f"called with {num_rows}, the model differs by {worst:.3g} from what it gives the same "
                    f"rows among {_MANY_ROWS}, expected {tolerance.of(task.kind):.3g} or less; use no "
                    f"shape[0], no arange over the rows, and no reduction over them"
                )


def _difference(kind: TaskKind, found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest, of other than probabilities relative to scores above one."""
    scale = 1.0 if kind is TaskKind.BINARY else np.maximum(1.0, np.abs(wanted))
    return float((np.abs(found - wanted) / scale).max())


def _check_repeats(
    traces: Traces,
    tables: Mapping[str, np.ndarray],
    request: RankRequest,
    tolerance: Tolerance,
    scores: Sequence[np.ndarray],
) -> None:
    """Calls the model once more with `_MANY_ROWS` rows; raises ModelError if it does something else then."""
    again = Traces(traces.model, traces.spec)
    where = _first_change(traces.at(_MANY_ROWS).closed, again.at(_MANY_ROWS).closed)
    if where is None:
        return
    for task, one, other in zip(
        traces.spec.tasks, scores, _scores_at(again, tables, request, _MANY_ROWS), strict=True
    ):
        worst = _difference(task.kind, one, other)
        if not worst <= tolerance.of(task.kind):
            raise ModelError(
                f"model {traces.spec.name!r}, task {task.name!r}: the model gives another answer each call "
                f"(a global, np.random, the time): called twice with the same rows, its scores differ by "
                f"{worst:.3g}, first by {where or traces.model.source}; a served program is traced once and "
                f"keeps what the call found then: take it out, or give it as a feature or a weight"
            )


def _first_change(one: ClosedJaxpr, other: ClosedJaxpr) -> str | None:
    """Operation and author's line by which two traces part; empty where it isn't known, None where both do
    the same."""
    if structural_text(one) == structural_text(other):
        return None
    values = [
        {v: structural_text(c) for v, c in zip(t.jaxpr.constvars, t.consts, strict=True)}
        for t in (one, other)
    ]
    for equation, changed in zip(one.jaxpr.eqns, other.jaxpr.eqns, strict=False):
        told = [
            (e.primitive.name, structural_text(e.params), [_known(atom, known) for atom in e.invars])
            for e, known in zip((equation, changed), values, strict=True)
        ]
        if told[0] != told[1]:
            return f"{equation.primitive.name} at {source_of(equation)}"
    return ""


def _known(atom: Any, constants: Mapping[Any, str]) -> str:
    """What of an operand is the same whatever a model reads."""
    return str(atom.val) if isinstance(atom, core.Literal) else constants.get(atom, str(atom.aval))


def _scores_at(
    traces: Traces, tables: Mapping[str, np.ndarray], request: RankRequest, num_rows: int
) -> list[np.ndarray]:
    """Scores [num_rows] by task of a request's first candidates, the last repeated, compiled at that size."""
    rows = np.minimum(np.arange(num_rows), request.num_candidates - 1)
    run = functools.partial(run_equations, traces.at(num_rows).closed)
    compiled = jax.jit(run, compiler_options=compiler_options(_platform()))
    return [np.asarray(scores) for scores in compiled(arguments_of(traces, tables, request, rows))]


def arguments_of(
    traces: Traces, tables: Mapping[str, np.ndarray], request: RankRequest, rows: np.ndarray
) -> list[Any]:
    """What a model's trace at ``len(rows)`` rows reads.

    Args:
      traces: of the model.
      tables: float32 [R, D] by name.
      request: a golden one.
      rows: int64 numbers of its candidates, in any order.

    Returns:
      Weights, then activations [len(rows), ...].
    """
    spec = traces.spec
    columns = [
        take(column, np.zeros_like(rows) if feature.scope is Scope.CONTEXT else rows)
        for feature, column in zip(spec.features, request.columns, strict=True)
    ]
    activations = _looked_up(spec, tables, model_inputs(spec, columns))
    return [*traces.model.params, *(activations[name] for name in traces.at(len(rows)).activations)]


def _looked_up(
    spec: ModelSpec, tables: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """What `EmbeddingCollection` gives, compiled as one: alone each operation would take as long."""
    graph, state = nnx.split(EmbeddingCollection(spec, tables=tables))
    look_up = jax.jit(
        lambda state, inputs: nnx.merge(graph, state)(inputs),
        compiler_options=compiler_options(_platform()),
    )
    return look_up(state, inputs)


def _platform() -> str:
    """Of the device that computes here by default."""
    return (jax.config.jax_default_device or jax.local_devices()[0]).platform


def _groups(requests: Sequence[RankRequest]) -> Iterator[tuple[int, list[RankRequest]]]:
    """Neighbours of at most `_MAX_ROWS` candidates together, with the number of the first."""
    first, num_rows = 0, 0
    for number, request in enumerate(requests):
        if number > first and num_rows + request.num_candidates > _MAX_ROWS:
            yield first, list(requests[first:number])
            first, num_rows = number, 0
        num_rows += request.num_candidates
    yield first, list(requests[first:])


def _repeated(feature: FeatureSpec, request: RankRequest, position: int) -> Column:
    """A feature's column with a row a candidate."""
    column = request.columns[position]
    if feature.scope is Scope.CONTEXT:
        return take(column, np.zeros(request.num_candidates, np.int64))
    return column


def _check_finite(
    spec: ModelSpec, task: str, first: int, parts: Sequence[np.ndarray], origin: Callable[[], str]
) -> None:
    for number, array in enumerate(parts, start=first):
        if not np.isfinite(array).all():
            raise ModelError(
                f"model {spec.name!r}, task {task!r}: the reference score of golden request {number} "
                f"is {array[~np.isfinite(array)][0]}; expected finite scores{origin()}"
            )
