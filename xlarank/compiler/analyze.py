"""Counts a model's parameters, FLOPs, bytes and lookups: `analyze`."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xlarank.compiler.costs import MATMULS, Rate, Step, steps_of
from xlarank.compiler.program import Program, Traces, plain_program
from xlarank.compiler.split import DenseModel
from xlarank.spec import Bucket, ModelSpec, RankRequest, Scope, Signature

__all__ = ["Analysis", "LayerCost", "MatmulCost", "TableCost", "analyze", "matmuls_of"]


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Weights of one layer of the module."""

    name: str
    """Path in the module."""

    num_parameters: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class MatmulCost:
    """The matrix multiplications and convolutions of one line of the model's source, in one program."""

    source: str
    """File, line and function."""

    rate: Rate

    count: int
    """How many a batch; one in a scan counts for every step, one in a while loop once."""

    shapes: str
    """Of the first one: left @ right, dtype when it isn't float32, and how often a loop runs it."""

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
    elementwise = sum(s.flops for s in steps_of(program) if s.equation.primitive.name not in MATMULS)
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
    """The matmuls and convolutions of a program by line of source and rate, in order, those in loops too."""
    groups: dict[tuple[str, Rate], list[Step]] = collections.defaultdict(list)
    for step in steps_of(program):
        if step.equation.primitive.name in MATMULS:
            groups[step.source, step.rate].append(step)
    return tuple(_matmul(source, rate, found) for (source, rate), found in groups.items())


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [atom.aval for atom in atoms]


def _layers(model: DenseModel) -> tuple[LayerCost, ...]:
    sizes: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for name, param in zip(model.names, model.params, strict=True):
        sizes[name.rpartition(".")[0] or name].append(param)
    return tuple(
        LayerCost(name, sum(p.size for p in params), sum(p.nbytes for p in params))
        for name, params in sizes.items()
    )


def _matmul(source: str, rate: Rate, steps: Sequence[Step]) -> MatmulCost:
    first = steps[0]
    left, right = _avals(first.equation.invars)
    dtype = "" if left.dtype == np.float32 else f" {left.dtype}"
    return MatmulCost(
        source=source,
        rate=rate,
        count=sum(step.times for step in steps),
        shapes=f"{list(left.shape)} @ {list(right.shape)}{dtype}{_loop_of(first)}",
        flops=sum(step.flops for step in steps),
        weight_bytes=sum(step.weight_bytes for step in steps),
    )


def _loop_of(step: Step) -> str:
    times = f", {step.times} times in a loop" if step.times > 1 else ""
    return times if step.is_counted else f"{times}, in a while loop of unknown trip count, counted once"


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
