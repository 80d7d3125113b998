"""What a program does, equation by equation, into loops and branches too: `steps_of`."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from xlarank.compiler.program import Program
from xlarank.compiler.tracing import ClosedJaxpr, inner_jaxpr, source_of
from xlarank.spec import Bucket

__all__ = ["MATMULS", "Rate", "Step", "steps_of"]

MATMULS = ("dot_general", "conv_general_dilated")


class Rate(enum.StrEnum):
    """How often something is computed."""

    WEIGHTS = "weights"
    """Once, when weights are loaded."""

    REQUEST = "request"
    """Once a request: it reads the context alone."""

    ROW = "row"
    """Once a candidate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One operation of a program."""

    equation: core.JaxprEqn
    source: str
    """Author's line; of the loop around it, where it has none."""

    rate: Rate
    times: int
    """Runs a batch: the product of the lengths of the scans that it lies in."""

    is_counted: bool
    """Whether `times` is known: in a while loop it is not, and one run of the loop counts."""

    weights: Mapping[Any, int]
    """Values around it that depend on weights alone, and how many of them there are: a scan over stacked
    layers has one a layer."""

    @property
    def flops(self) -> float:
        """Of all runs: multiplications and additions of a matmul or a convolution, else one a float of the
        result."""
        out = [_aval(var) for var in self.equation.outvars]
        if self.equation.primitive.name in MATMULS:
            return 2.0 * _contracted(self.equation) * math.prod(out[0].shape) * self.times
        floats = [aval for aval in out if _is_float(aval)]
        return float(sum(math.prod(aval.shape) for aval in floats) * self.times)

    @property
    def weight_bytes(self) -> int:
        """Of the one operand that is a weight; 0 where none is, or all are."""
        found = [atom for atom in self.equation.invars if _is_in(atom, self.weights)]
        if len(found) != 1:
            return 0
        aval = _aval(found[0])
        return math.prod(aval.shape) * aval.dtype.itemsize * self.weights[found[0]]


def steps_of(program: Program) -> Iterator[Step]:
    """The operations of a program in order; of a condition's branches the one of most FLOPs."""
    jaxpr, num_weights = program.closed.jaxpr, program.num_weights
    rates: dict[Any, Rate] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], Rate.ROW)
    rates |= dict.fromkeys([*jaxpr.invars[:num_weights], *jaxpr.constvars], Rate.WEIGHTS)
    rates |= dict.fromkeys(jaxpr.invars[num_weights : num_weights + program.num_context], Rate.REQUEST)
    weights = dict.fromkeys([*jaxpr.invars[:num_weights], *jaxpr.constvars], 1)
    return _steps(jaxpr, _Place(program.bucket, rates, weights))


@dataclasses.dataclass
class _Place:
    """What is known where a program, or the body of a loop, runs."""

    bucket: Bucket
    rates: dict[Any, Rate]  # grows with every equation
    weights: dict[Any, int]  # likewise
    times: int = 1
    is_counted: bool = True
    source: str = ""


@dataclasses.dataclass(frozen=True)
class _Body:
    """A program that an equation runs."""

    jaxpr: core.Jaxpr
    operands: Sequence[Any]
    carried: range = range(0)
    """Operands that it hands on from run to run."""

    sliced: range = range(0)
    """Operands of which each run has its own part."""

    length: int | None = 1
    """Runs; None where that is not known."""


def _steps(jaxpr: core.Jaxpr, place: _Place) -> Iterator[Step]:
    order = list(Rate)
    for equation in jaxpr.eqns:
        variables = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
        rate = max((place.rates[atom] for atom in variables), key=order.index, default=Rate.WEIGHTS)
        source = source_of(equation) or place.source
        ways = [
            [step for body in bodies for step in _steps(body.jaxpr, _inside(body, place, rate, source))]
            for bodies in _bodies(equation)
        ]
        if ways:
            yield from max(ways, key=lambda steps: sum(step.flops for step in steps))
        else:
            yield Step(
                equation=equation,
                source=source,
                rate=rate,
                times=place.times,
                is_counted=place.is_counted,
                weights=place.weights,
            )
        # A context repeated for its candidates is a value of B rows, whatever it depends on.
        is_repeated = rate is Rate.REQUEST and _repeats(equation, place.bucket)
        place.rates |= dict.fromkeys(equation.outvars, Rate.ROW if is_repeated else rate)
        if all(atom in place.weights for atom in variables):
            times = max((place.weights[atom] for atom in variables), default=1)
            place.weights |= dict.fromkeys(equation.outvars, times)


def _inside(body: _Body, place: _Place, rate: Rate, source: str) -> _Place:
    """What is known in a body. What is carried has the rate of the whole loop, and is no weight."""
    rates: dict[Any, Rate] = dict.fromkeys(body.jaxpr.constvars, Rate.WEIGHTS)
    weights = dict.fromkeys(body.jaxpr.constvars, 1)
    for number, (var, atom) in enumerate(zip(body.jaxpr.invars, body.operands, strict=True)):
        is_carried = number in body.carried
        own = Rate.WEIGHTS if isinstance(atom, core.Literal) else place.rates[atom]
        rates[var] = rate if is_carried else own
        if not is_carried and _is_in(atom, place.weights):
            weights[var] = place.weights[atom] * ((body.length or 1) if number in body.sliced else 1)
    times = place.times * (1 if body.length is None else body.length)
    return _Place(place.bucket, rates, weights, times, place.is_counted and body.length is not None, source)


def _bodies(equation: core.JaxprEqn) -> list[list[_Body]]:
    """The programs that an equation runs, one list a branch; empty for an operation."""
    params, operands = equation.params, equation.invars
    match equation.primitive.name:
        case "scan":
            return [[_scanned(equation)]]
        case "while":
            num_test, num_body = params["cond_nconsts"], params["body_nconsts"]
            test, body = _jaxpr(params["cond_jaxpr"]), _jaxpr(params["body_jaxpr"])
            carry = operands[num_test + num_body :]
            return [
                [
                    _Body(
                        test,
                        [*operands[:num_test], *carry],
                        range(num_test, num_test + len(carry)),
                        length=None,
                    ),
                    _Body(body, operands[num_test:], range(num_body, num_body + len(carry)), length=None),
                ]
            ]
        case "cond":
            return [[_Body(_jaxpr(branch), operands[1:])] for branch in params["branches"]]
    inner = inner_jaxpr(equation)
    return [] if inner is None else [[_Body(inner.jaxpr, operands)]]


def _scanned(equation: core.JaxprEqn) -> _Body:
    """The body of a scan. Its operands are constants, what is carried, and what is sliced; told apart by
    ranks, as releases of JAX keep their counts in different params."""
    jaxpr = _jaxpr(equation.params["jaxpr"])
    pairs = list(zip(jaxpr.invars, equation.invars, strict=True))
    num_sliced = sum(_rank(inner) < _rank(outer) for inner, outer in pairs)
    num_carried = sum(
        _rank(inner) == _rank(outer) for inner, outer in zip(jaxpr.outvars, equation.outvars, strict=True)
    )
    first_sliced = len(pairs) - num_sliced
    return _Body(
        jaxpr,
        equation.invars,
        range(first_sliced - num_carried, first_sliced),
        range(first_sliced, len(pairs)),
        equation.params["length"],
    )


def _jaxpr(program: Any) -> core.Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _rank(atom: Any) -> int:
    return len(_aval(atom).shape)


def _aval(atom: Any) -> Any:
    return atom.aval


def _is_in(atom: Any, values: Mapping[Any, Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in values


def _contracted(equation: core.JaxprEqn) -> int:
    """Products that are added up for one element of a matmul or a convolution."""
    left, right = map(_aval, equation.invars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return math.prod(left.shape[axis] for axis in contracted)
    features_out = equation.params["dimension_numbers"].rhs_spec[0]
    return math.prod(right.shape) // right.shape[features_out]


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def _repeats(equation: core.JaxprEqn, bucket: Bucket) -> bool:
    if equation.primitive.name not in ("broadcast_in_dim", "gather"):
        return False
    shape = _aval(equation.outvars[0]).shape
    return bucket.rows != bucket.requests and bucket.rows in shape
