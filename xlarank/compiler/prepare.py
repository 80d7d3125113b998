"""Parts a program into what runs once per weights and what runs for every batch: `part`, `PreparedArrays`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from xlarank.compiler.program import Program, read
from xlarank.compiler.tracing import ClosedJaxpr, constant_bytes, evaluate, retrace, structural_text

__all__ = ["Parted", "PreparedArrays", "part", "weight_key"]

_MAX_CONSTANT_BYTES = 1 << 14
"""Larger constants are prepared arrays: inside a program every bucket would hold a copy."""


@dataclasses.dataclass(frozen=True)
class Parted:
    """A row program and what it needs prepared."""

    row: ClosedJaxpr
    """Prepared arrays, leaves of the context, of the candidates, request_of_row in; scores by task out."""

    keys: tuple[str, ...]
    """Of the prepared arrays, in the order of the program's first inputs: equal keys, equal arrays."""


class PreparedArrays:
    """Every array that some program needs prepared, once: the expressions over the weights that make them.

    Buckets and forms share arrays: the same expression has the same key.
    """

    def __init__(self, weight_avals: Sequence[Any]) -> None:
        """
        Args:
          weight_avals: shapes and dtypes of the weights.
        """
        self._weight_avals = tuple(weight_avals)
        self._nodes: dict[str, tuple[core.JaxprEqn, tuple[Any, ...], int]] = {}  # equation, operands, output
        self._consts: dict[str, Any] = {}
        self._avals: dict[str, Any] = {weight_key(i): aval for i, aval in enumerate(weight_avals)}
        self._made: dict[str, jax.Array] = {}

    def num_bytes(self, keys: Sequence[str]) -> int:
        """Bytes of the distinct arrays of `keys`."""
        avals = [self._avals[key] for key in dict.fromkeys(keys)]
        return sum(int(np.prod(aval.shape)) * aval.dtype.itemsize for aval in avals)

    def make(self, keys: Sequence[str], weights: Sequence[Any]) -> tuple[jax.Array, ...]:
        """The arrays themselves, each computed once; always of the same weights."""
        return tuple(self._make(key, weights) for key in keys)

    def keep(self, keys: Collection[str]) -> None:
        """Lets go of made arrays but those of `keys`; one that is asked for again is made again."""
        self._made = {key: array for key, array in self._made.items() if key in keys}

    def _make(self, key: str, weights: Sequence[Any]) -> Any:
        if key.startswith("w"):
            return weights[int(key[1:])]
        if key in self._consts:
            return self._consts[key]
        if key not in self._made:
            equation, operands, _ = self._nodes[key]
            arrays = [
                self._make(operand, weights) if isinstance(operand, str) else operand[0]
                for operand in operands
            ]
            for index, array in enumerate(evaluate(equation, arrays)):
                self._made[_output_key(key, index)] = array
        return self._made[key]

    def program(self, keys: Sequence[str], num_params: int | None = None) -> ClosedJaxpr:
        """The program `prepare`: the first `num_params` weights (all by default) in, arrays of `keys` out.

        The others, rows of tables on devices, go by it: row programs take them as they are, and what passes
        through a program is copied.
        """

        def run(*weights: Any) -> list[Any]:
            fresh = PreparedArrays(self._weight_avals)
            fresh._nodes, fresh._consts = self._nodes, self._consts
            return [fresh._make(key, weights) for key in keys]

        return retrace(run, self._weight_avals[:num_params])

    def add(self, equation: core.JaxprEqn, operands: Sequence[Any]) -> list[str]:
        """Keys of an equation's results; operands are keys, or literals' values in a 1-tuple."""
        texts = [
            o if isinstance(o, str) else f"literal {o[1]} {np.asarray(o[0]).tobytes()!r}" for o in operands
        ]
        text = "\n".join([equation.primitive.name, structural_text(equation.params), *texts])
        base = "e" + hashlib.sha256(text.encode()).hexdigest()
        keys = [_output_key(base, index) for index in range(len(equation.outvars))]
        for index, (key, var) in enumerate(zip(keys, equation.outvars, strict=True)):
            self._nodes[key] = (equation, tuple(operands), index)
            self._avals[key] = var.aval
        return keys

    def add_constant(self, value: Any) -> str:
        """Key of a constant of the model."""
        key = f"c{hashlib.sha256(constant_bytes(value)).hexdigest()}"
        self._consts[key] = value
        self._avals[key] = jax.ShapeDtypeStruct(np.shape(value), jax.dtypes.result_type(value))
        return key


def weight_key(index: int) -> str:
    """Key of a weight as it is."""
    return f"w{index}"


def _output_key(key: str, index: int) -> str:
    return f"{key.partition('.')[0]}.{index}"


def part(program: Program, prepared: PreparedArrays) -> Parted:
    """Moves everything that reads weights alone out of the row program.

    What stays of it are constants without a weight (zeros, iota), and broadcasts along new or longer axes:
    XLA makes them inside what reads them, while a stored one would be read from memory B times as large.

    Args:
      program: of one bucket.
      prepared: learns the expressions.
    """
    jaxpr = program.closed.jaxpr
    keys = {var: weight_key(i) for i, var in enumerate(jaxpr.invars[: program.num_weights])}
    consts = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
    keys |= {var: prepared.add_constant(const) for var, const in consts.items()}
    small = {var: const for var, const in consts.items() if len(constant_bytes(const)) <= _MAX_CONSTANT_BYTES}
    cheap = set(small)  # made of small constants, at no cost, inside what reads it
    of_weights: list[core.JaxprEqn] = []
    kept: list[core.JaxprEqn] = []
    for equation in jaxpr.eqns:
        atoms = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
        if not all(atom in keys for atom in atoms):
            kept.append(equation)
            continue
        of_weights.append(equation)
        operands = [(a.val, str(a.aval)) if isinstance(a, core.Literal) else keys[a] for a in equation.invars]
        keys.update(zip(equation.outvars, prepared.add(equation, operands), strict=True))
        if equation.primitive.name in _CHEAP and all(atom in cheap for atom in atoms):
            cheap |= set(equation.outvars)
    needed = {atom for e in kept for atom in e.invars if not isinstance(atom, core.Literal)}
    needed |= {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    for equation in reversed(of_weights):
        found = needed & set(equation.outvars)
        if found and (_is_broadcast(equation) or found <= cheap):
            kept.insert(0, equation)
            needed -= found
            needed |= {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
    small = {var: const for var, const in small.items() if var in needed}
    taken = {var: key for var, key in keys.items() if var in needed and var not in small}
    prepared_keys = tuple(dict.fromkeys(taken.values()))  # an expression written twice is one array
    leaves = jaxpr.invars[program.num_weights :]

    def run(*inputs: Any) -> list[Any]:
        arrays = dict(zip(prepared_keys, inputs, strict=False))
        values = {var: arrays[key] for var, key in taken.items()} | small
        values.update(zip(leaves, inputs[len(prepared_keys) :], strict=True))
        for equation in kept:
            results = evaluate(equation, read(values, equation.invars))
            values.update(zip(equation.outvars, results, strict=True))
        return read(values, jaxpr.outvars)

    avals = {key: var.aval for var, key in taken.items()}
    return Parted(
        retrace(run, [*(avals[key] for key in prepared_keys), *(var.aval for var in leaves)]), prepared_keys
    )


_CHEAP = frozenset({"iota", "broadcast_in_dim", "convert_element_type", "reshape"})


def _is_broadcast(equation: core.JaxprEqn) -> bool:
    """Whether an equation only makes its operand larger, by repeating it."""
    if equation.primitive.name != "broadcast_in_dim" or len(equation.invars) != 1:
        return False
    return equation.outvars[0].aval.size > equation.invars[0].aval.size  # type: ignore[union-attr]
