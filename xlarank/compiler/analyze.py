"""Counts a model's parameters, FLOPs, bytes and lookups: `analyze`."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.program import Program, Traces, plain_program, weight_side
from xlarank.compiler.split import DenseModel
from xlarank.compiler.tracing import source_of
from xlarank.spec import Bucket, ModelSpec, RankRequest, Scope, Signature

__all__ = ["Analysis", "LayerCost", "MatmulCost", "Rate", "TableCost", "analyze", "matmuls_of"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Weights of one layer of the module."""

    name: str
    """Path in the module."""

    num_parameters: int
    num_bytes: int


class Rate(enum.StrEnum):
    """How often something is computed."""

    WEIGHTS = "weights"
    """Once, when weights are loaded."""

    REQUEST = "request"
    """Once a request: it reads the context alone."""

    ROW = "row"
    """Once a candidate."""


@dataclasses.dataclass(frozen=True)
class MatmulCost:
    """The matrix multiplications of one line of the model's source, in one program."""

    source: str
    """File, line and function."""

    rate: Rate

    count: int
    """How many a batch."""

    shapes: str
    """Of the first one: left @ right, dtype when it isn't float32."""

    flops: float
    """Multiplications and additions a batch."""

    weight_bytes: int
    """Bytes of the operands that are weights."""


@dataclasses.dataclass(frozen=True)
class TableCost:
    """One embedding table and how often it is read."""

    name: str
    rows: int
    dim: int
    num_bytes: int

    lookups_per_request: float
    """Ids looked up once a request (scope context), mean over the golden requests."""

    lookups_per_candidate: float
    """Ids looked up a candidate, mean over the golden requests."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a model costs, before anything is optimised."""

    layers: tuple[LayerCost, ...]
    matmuls: tuple[MatmulCost, ...]
    """Of the plain form, for one row: FLOPs of a batch divided by its rows."""

    tables: tuple[TableCost, ...]

    elementwise_flops: float
    """Operations a row that aren't matmuls, one a result element."""

    buffer_bytes_per_row: int
    """Gathered floats and masks of a candidate."""

    buffer_bytes_per_request: int
    """Gathered floats and masks of a context."""

    @property
    def num_parameters(self) -> int:
        """Dense weights."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def flops_per_row(self) -> float:
        """Of the whole dense part."""
        return sum(matmul.flops for matmul in self.matmuls) + self.elementwise_flops

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        totals = {"num_parameters": self.num_parameters, "flops_per_row": self.flops_per_row}
        return dataclasses.asdict(self) | totals


def analyze(traces: Traces, signature: Signature, golden: Sequence[RankRequest]) -> Analysis:
    """Analyzes a model by tracing it, without running it.

    Args:
      traces: of the model.
      signature: layout of the leaves.
      golden: requests that show how many ids a bag holds.
    """
    bucket = Bucket(32, 1)
    program = plain_program(traces, signature, bucket)
    elementwise = sum(
        math.prod(aval.shape)
        for equation in program.closed.jaxpr.eqns
        if equation.primitive.name != "dot_general"
        for aval in _avals(equation.outvars)
        if _is_float(aval)
    )
    return Analysis(
        layers=_layers(traces.model),
        matmuls=tuple(
            dataclasses.replace(matmul, flops=matmul.flops / bucket.rows) for matmul in matmuls_of(program)
        ),
        tables=_tables(traces.spec, golden),
        elementwise_flops=elementwise / bucket.rows,
        buffer_bytes_per_row=_buffer_bytes(signature, Scope.CANDIDATE),
        buffer_bytes_per_request=_buffer_bytes(signature, Scope.CONTEXT),
    )


def matmuls_of(program: Program) -> tuple[MatmulCost, ...]:
    """The matmuls of a program by line of source and rate, in order."""
    jaxpr = program.closed.jaxpr
    rates: dict[Any, Rate] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], Rate.ROW)
    rates |= dict.fromkeys([*jaxpr.invars[: program.num_weights], *jaxpr.constvars], Rate.WEIGHTS)
    context = jaxpr.invars[program.num_weights : program.num_weights + program.num_context]
    rates |= dict.fromkeys(context, Rate.REQUEST)
    order = list(Rate)
    groups: dict[tuple[str, Rate], list[core.JaxprEqn]] = collections.defaultdict(list)
    for equation in jaxpr.eqns:
        read = [rates[atom] for atom in equation.invars if not isinstance(atom, core.Literal)]
        rate = max(read, key=order.index, default=Rate.WEIGHTS)
        # A context repeated for its candidates is a value of B rows, whatever it depends on.
        is_repeated = rate is Rate.REQUEST and _repeats(equation, program.bucket)
        rates |= dict.fromkeys(equation.outvars, Rate.ROW if is_repeated else rate)
        if equation.primitive.name == "dot_general":
            groups[source_of(equation), rate].append(equation)
    weights = program.weight_vars()
    return tuple(_matmul(source, rate, found, weights) for (source, rate), found in groups.items())


def _repeats(equation: core.JaxprEqn, bucket: Bucket) -> bool:
    if equation.primitive.name not in ("broadcast_in_dim", "gather"):
        return False
    shape = _avals(equation.outvars)[0].shape
    return bucket.rows != bucket.requests and bucket.rows in shape


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [atom.aval for atom in atoms]


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def _layers(model: DenseModel) -> tuple[LayerCost, ...]:
    sizes: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for name, param in zip(model.names, model.params, strict=True):
        sizes[name.rpartition(".")[0] or name].append(param)
    return tuple(
        LayerCost(name, sum(p.size for p in params), sum(p.nbytes for p in params))
        for name, params in sizes.items()
    )


def _matmul(source: str, rate: Rate, equations: list[core.JaxprEqn], weights: set[core.Var]) -> MatmulCost:
    flops, weight_bytes = 0.0, 0
    for equation in equations:
        left, right = _avals(equation.invars)
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(left.shape[axis] for axis in contracted)
        flops += 2.0 * inner * math.prod(_avals(equation.outvars)[0].shape)
        side = weight_side(equation, weights)
        if side is not None:
            weight = (left, right)[side]
            weight_bytes += math.prod(weight.shape) * weight.dtype.itemsize
    left, right = _avals(equations[0].invars)
    dtype = "" if left.dtype == np.float32 else f" {left.dtype}"
    shapes = f"{list(left.shape)} @ {list(right.shape)}{dtype}"
    return MatmulCost(source, rate, len(equations), shapes, flops, weight_bytes)


def _tables(spec: ModelSpec, golden: Sequence[RankRequest]) -> tuple[TableCost, ...]:
    counts: dict[tuple[str, Scope], int] = collections.Counter()
    for request in golden:
        for feature, column in zip(spec.features, request.columns, strict=True):
            if feature.table is not None:
                values = getattr(column, "values", column)
                counts[feature.table, feature.scope] += len(values)
    num_candidates = sum(request.num_candidates for request in golden)
    return tuple(
        TableCost(
            table.name,
            table.num_rows,
            table.dim,
            table.num_rows * table.dim * 4,
            counts[table.name, Scope.CONTEXT] / max(1, len(golden)),
            counts[table.name, Scope.CANDIDATE] / max(1, num_candidates),
        )
        for table in spec.tables
    )


def _buffer_bytes(signature: Signature, scope: Scope) -> int:
    leaves = [leaf for leaf in signature.leaves if leaf.scope is scope]
    return sum(math.prod(leaf.tail) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
