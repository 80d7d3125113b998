"""Counts a model's parameters, FLOPs, bytes and lookups: `analyze`."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xlarank.compiler.split import DenseModel, program_avals, row_program
from xlarank.compiler.tracing import equations_of, trace
from xlarank.spec import Bucket, ModelSpec, RankRequest, Scope, Signature

__all__ = ["Analysis", "LayerCost", "MatmulCost", "TableCost", "analyze"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Weights of one layer of the module."""

    name: str
    """Path in the module."""

    num_parameters: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class MatmulCost:
    """The matrix multiplications of one line of the model's source, for one row of a bucket."""

    source: str
    """File, line and function."""

    count: int
    """How many a batch."""

    shapes: str
    """Of the first one, at B rows: left @ right."""

    flops: float
    """Multiplications and additions a row."""

    weight_bytes: int
    """Bytes of the right-hand sides."""


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


def analyze(
    model: DenseModel, spec: ModelSpec, signature: Signature, golden: Sequence[RankRequest]
) -> Analysis:
    """Analyzes a model by tracing it, without running it.

    Args:
      model: weights and module.
      spec: features, tables and tasks.
      signature: layout of the leaves.
      golden: requests that show how many ids a bag holds.
    """
    bucket = Bucket(32, 1)
    program = row_program(model, spec, signature, bucket)
    closed = trace(spec.name, program, program_avals(model, signature, bucket))
    groups: dict[str, list[core.JaxprEqn]] = collections.defaultdict(list)
    elementwise = 0.0
    for equation, source in equations_of(closed.jaxpr):
        if equation.primitive.name == "dot_general":
            groups[source].append(equation)
        else:
            elementwise += sum(math.prod(aval.shape) for aval in _avals(equation.outvars) if _is_float(aval))
    return Analysis(
        layers=_layers(model),
        matmuls=tuple(_matmul(source, found, bucket.rows) for source, found in groups.items()),
        tables=_tables(spec, golden),
        elementwise_flops=elementwise / bucket.rows,
        buffer_bytes_per_row=_buffer_bytes(signature, Scope.CANDIDATE),
        buffer_bytes_per_request=_buffer_bytes(signature, Scope.CONTEXT),
    )


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


def _matmul(source: str, equations: list[core.JaxprEqn], num_rows: int) -> MatmulCost:
    flops, weight_bytes = 0.0, 0
    for equation in equations:
        left, right = _avals(equation.invars)
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(left.shape[axis] for axis in contracted)
        flops += 2.0 * inner * math.prod(_avals(equation.outvars)[0].shape)
        weight_bytes += math.prod(right.shape) * right.dtype.itemsize
    left, right = _avals(equations[0].invars)
    shapes = f"{list(left.shape)} @ {list(right.shape)}"
    return MatmulCost(source, len(equations), shapes, flops / num_rows, weight_bytes)


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
