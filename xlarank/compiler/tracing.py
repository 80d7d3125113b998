"""Runs a model author's code and reads what it did, equation by equation: `trace`, `flatten`, `source_of`."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util  # no public name for an equation's source line
from jax.extend import core
from jax.interpreters import partial_eval

from xlarank.errors import ModelError, XlarankError

__all__ = [
    "ClosedJaxpr",
    "authors_code",
    "constant_bytes",
    "equations_of",
    "evaluate",
    "flatten",
    "in_true_float32",
    "inner_jaxpr",
    "nested_equations",
    "retrace",
    "source_of",
    "structural_text",
    "trace",
    "without_dead_code",
]

ClosedJaxpr = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def _folder(file: str | None) -> str:
    return os.path.join(os.path.dirname(file or ""), "")


_FLAX = _folder(flax.__file__)
_OURS = _folder(__file__)
_NOT_THE_AUTHORS = (_FLAX, _folder(jax.__file__), _OURS)


def trace(
    model: str, program: Callable, avals: tuple[Any, ...], source: str = "", weights: Sequence[str] = ()
) -> ClosedJaxpr:
    """Traces a program that calls a model author's module.

    Args:
      model: name of the model, for the error.
      program: what to trace.
      avals: shapes of its arguments.
      source: the author's line where an error has none.
      weights: names of the arrays in the program's argument `params`.

    Returns:
      The program as a jaxpr, float32 matmuls in true float32.

    Raises:
      ModelError: with the reason and the line of the author's source, whatever the module raised.
    """
    failed = f"model {model!r} can't be traced"
    with authors_code(failed, source, weights), jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(program)(*avals)
    lines: dict[int, str] = {-1: ""}  # by depth: inside a function of JAX's own it is the caller's
    for equation, depth in nested_equations(closed.jaxpr):
        lines[depth] = source_of(equation) or lines[depth - 1]
        if equation.primitive.name == "check":
            raise ModelError(
                f"model {model!r} checks values with checkify: check at {lines[depth] or source}; take it "
                f"out, a served program can't stop; requests are checked by their spec"
            )
        if "callback" in equation.primitive.name or equation.primitive.name == "debug_print":
            raise ModelError(
                f"model {model!r} calls back to the host: {equation.primitive.name} at "
                f"{lines[depth]}; take it out, a served program runs on the device alone"
            )
    return closed


@contextlib.contextmanager
def authors_code(what_failed: str, source: str = "", weights: Sequence[str] = ()) -> Iterator[None]:
    """Runs a model author's code, which may raise anything.

    Args:
      what_failed: begins the message.
      source: the author's line where the error has none.
      weights: names of the arrays in an argument `params`, which JAX knows by number.

    Raises:
      ModelError: with the reason and the line of the author's source.
    """
    try:
        yield
    except XlarankError:
        raise
    except Exception as error:
        line = _line_of(error) or source or "the module"
        if weights and (number := _WEIGHT.search(str(error))):
            raise ModelError(
                f"{what_failed}: params {weights[int(number[1])]!r} is a traced weight, and no shape "
                f"or choice can depend on its value (at {line}); close over it or use functools.partial: "
                f"what stays the same for every checkpoint is no weight"
            ) from error
        reason = " ".join(_SEE.split(str(error))[0].split())
        hint = next((f"; {text}" for kinds, text in _HINTS if isinstance(error, kinds)), "")
        raise ModelError(f"{what_failed}: {type(error).__name__}: {reason} (at {line}){hint}") from error


_SEE = re.compile(r"\(?See https://|\(https://flax|The function being traced when")
"""Where JAX and Flax turn from the reason to the address of their pages, or to frames of ours."""

_WEIGHT = re.compile(r"depends on the values? of the arguments? params\[(\d+)\]")
"""How JAX names the array whose value it would have to know."""

_HINTS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (
        jax.errors.NonConcreteBooleanIndexError,
        "a result's shape may not depend on values: use jnp.where or a mask of fixed shape",
    ),
    (
        (jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError),
        "a model may not leave JAX: use jnp in place of np, and keep indices in arrays",
    ),
    (
        (jax.errors.TracerBoolConversionError, jax.errors.ConcretizationTypeError),
        "a model's operations and shapes may depend on shapes, not on values: use jnp.where, lax.cond or a "
        "mask of fixed shape",
    ),
    (
        jax.errors.UnexpectedTracerError,
        "a call may leave nothing for the next one: keep no array in a list, a global or an attribute",
    ),
    (
        flax.errors.ModifyScopeVariableError,
        "a served program keeps no state between requests: for batch norm use_running_average=True",
    ),
    (
        (flax.errors.CallCompactUnboundModuleError, flax.errors.CallSetupUnboundModuleError),
        "a Linen module holds no weights of its own: give flax.nnx.bridge.ToNNX(module).lazy_init(features, "
        "rngs=nnx.Rngs(0)), then its trained weights, or a function that calls module.apply with its params",
    ),
    (
        (flax.errors.ScopeCollectionNotFound, flax.errors.ScopeParamNotFoundError),
        "its weights are missing: after flax.nnx.bridge.ToNNX(module) call lazy_init(features, "
        "rngs=nnx.Rngs(0)), or give module.apply all of its variables",
    ),
)
"""What to do, by what was raised; the first that fits."""


def retrace(function: Callable, avals: Sequence[Any]) -> ClosedJaxpr:
    """Traces a function of ours that binds equations of a model again, flat and without dead code."""
    closed = jax.make_jaxpr(function)(*avals)
    if any(inner_jaxpr(equation) is not None for equation in closed.jaxpr.eqns):
        return flatten(closed)
    return without_dead_code(closed)


def flatten(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program as one list of equations, without dead code.

    What merely calls another program (jit, custom derivatives, remat) is written out; `scan`, `while` and
    `cond` stay whole. An equation keeps the author's line; one inside a function of JAX's own has its
    caller's. Matmuls and convolutions of float32 are in true float32, whatever they asked for, in loops too.
    """

    def run(*inputs: Any) -> list[Any]:
        return _run_flat(closed, inputs, None)

    return retrace(run, closed.in_avals)


def _run_flat(closed: ClosedJaxpr, inputs: Sequence[Any], caller: core.JaxprEqn | None) -> list[Any]:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    for equation in jaxpr.eqns:
        operands = [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in equation.invars]
        place = equation if caller is None or _is_deeper(equation, caller) else caller
        inner = inner_jaxpr(equation)
        if inner is not None:
            outputs = _run_flat(inner, operands, place)
        else:
            outputs = evaluate(equation, operands, place=place)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in jaxpr.outvars]


def _is_deeper(equation: core.JaxprEqn, caller: core.JaxprEqn) -> bool:
    """Whether an equation has a line of the author's own inside the function that `caller` calls.

    JAX keeps the trace of a jitted function, and with it the line of its first caller.
    """
    return len(_frames(equation)) > len(_frames(caller))


def evaluate(
    equation: core.JaxprEqn,
    operands: Sequence[Any],
    *,
    place: core.JaxprEqn | None = None,
    **changed_params: Any,
) -> list[Any]:
    """Binds an equation's operation to other operands, as the author's line.

    Args:
      equation: what to do.
      operands: arrays or tracers.
      place: the equation whose line it gets; its own by default.
      **changed_params: in place of the equation's.

    Returns:
      Its results.
    """
    primitive, params = equation.primitive, in_true_float32({**equation.params, **changed_params}, operands)
    info = (place or equation).source_info
    with source_info_util.user_context(info.traceback, name_stack=info.name_stack):
        outputs = primitive.bind(*operands, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def in_true_float32(params: dict[str, Any], operands: Sequence[Any]) -> dict[str, Any]:
    """An equation's params, matmuls and convolutions of float32 in true float32, whatever they asked for.

    Args:
      params: of the equation; what has a precision is one of those.
      operands: arrays, or their shapes.

    Returns:
      The same objects where nothing is to change; programs among them (loops, branches) are changed too.
    """
    changed = {name: _in_true_float32(value) for name, value in params.items()}
    if params.get("precision", _EXACT) != _EXACT and _are_float32(operands):
        changed["precision"] = _EXACT
    return changed


_EXACT = (jax.lax.Precision.HIGHEST,) * 2
"""Of both operands."""


def _in_true_float32(value: Any) -> Any:
    """A param of an equation: programs, alone or several, with every equation in true float32."""
    if isinstance(value, (ClosedJaxpr, core.Jaxpr)):
        jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        equations = [_equation_in_true_float32(equation) for equation in jaxpr.eqns]
        if all(map(operator.is_, equations, jaxpr.eqns)):
            return value
        jaxpr = jaxpr.replace(eqns=equations)
        return ClosedJaxpr(jaxpr, value.consts) if isinstance(value, ClosedJaxpr) else jaxpr
    if isinstance(value, (tuple, list)):
        items = [_in_true_float32(item) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        make = getattr(type(value), "_make", type(value))  # a named tuple takes its items one by one
        return make(items)
    return value


def _equation_in_true_float32(equation: core.JaxprEqn) -> core.JaxprEqn:
    params = in_true_float32(equation.params, [atom.aval for atom in equation.invars])
    is_same = all(params[name] is value for name, value in equation.params.items())
    return equation if is_same else equation.replace(params=params)


def _are_float32(operands: Sequence[Any]) -> bool:
    """Whether none is of another floating type; a ragged matmul takes sizes besides."""
    dtypes = {jnp.result_type(operand) for operand in operands}
    return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)} == {np.dtype(np.float32)}


def without_dead_code(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program without equations and constants that no output needs, in loops and branches too; its inputs
    stay."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    needed = {atom for equation in jaxpr.eqns for atom in equation.invars if isinstance(atom, core.Var)}
    needed |= {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    consts = [(v, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True) if v in needed]
    return ClosedJaxpr(jaxpr.replace(constvars=[v for v, _ in consts]), [c for _, c in consts])


def structural_text(value: Any) -> str:
    """A program or an equation's params as text that is the same in every process.

    Constants of programs inside are in it as a digest: JAX prints their shapes alone.
    """
    digest = hashlib.sha256()
    for constant in _constants_in(value):
        digest.update(constant_bytes(constant))
    constants = "" if digest.digest() == _NO_CONSTANTS else f" constants {digest.hexdigest()}"
    return _ADDRESS.sub("0x", str(value)) + constants


_NO_CONSTANTS = hashlib.sha256().digest()


def _constants_in(value: Any) -> Iterator[Any]:
    """Arrays among an equation's params and in the programs there, at any depth."""
    if isinstance(value, (np.ndarray, jax.Array)):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _constants_in(item)
    elif isinstance(value, (ClosedJaxpr, core.Jaxpr)):
        yield from getattr(value, "consts", ())
        for equation in value.eqns:
            yield from _constants_in(equation.params)


def constant_bytes(constant: Any) -> bytes:
    """A constant of a model in bytes, with its dtype and shape; it may be the key of random numbers."""
    if jnp.issubdtype(jax.dtypes.result_type(constant), jax.dtypes.extended):
        constant = jax.random.key_data(constant)
    array = np.asarray(constant)
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()


def nested_equations(jaxpr: core.Jaxpr, depth: int = 0) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Equations in order, into calls, loops and branches too, with how many they lie in."""
    for equation in jaxpr.eqns:
        yield equation, depth
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, ClosedJaxpr):
                    yield from nested_equations(inner.jaxpr, depth + 1)
                elif isinstance(inner, core.Jaxpr):
                    yield from nested_equations(inner, depth + 1)


def equations_of(jaxpr: core.Jaxpr, caller: str = "") -> Iterator[tuple[core.JaxprEqn, str]]:
    """Equations in order, into nested calls, each with its line of source (in JAX's own the caller's)."""
    for equation in jaxpr.eqns:
        source = source_of(equation) or caller
        inner = inner_jaxpr(equation)
        if inner is not None:
            yield from equations_of(inner.jaxpr, source)
        else:
            yield equation, source


def source_of(equation: core.JaxprEqn) -> str:
    """File, line and function of the author's code that an equation comes from; Flax is passed over."""
    for frame in _frames(equation):
        return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return ""


def _frames(equation: core.JaxprEqn) -> list[Any]:
    """The author's lines, innermost first."""
    frames = source_info_util.user_frames(equation.source_info.traceback)
    return [frame for frame in frames if not frame.file_name.startswith((_FLAX, _OURS))]


def inner_jaxpr(equation: core.JaxprEqn) -> ClosedJaxpr | None:
    """The program that an equation merely calls (jit, custom derivatives, remat), else None."""
    if equation.primitive.name in ("scan", "while", "cond", "shard_map"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if isinstance(inner, core.Jaxpr) and not isinstance(inner, ClosedJaxpr):
            inner = ClosedJaxpr(inner, ())
        if isinstance(inner, ClosedJaxpr):
            # One that is given other things than the equation's operands (a custom reduction) is no call.
            given = [atom.aval for atom in equation.invars]
            is_call = len(inner.in_avals) == len(given) and all(map(_same_type, inner.in_avals, given))
            return inner if is_call else None
    return None


def _same_type(a: Any, b: Any) -> bool:
    return getattr(a, "shape", None) == getattr(b, "shape", None) and getattr(a, "dtype", None) == getattr(
        b, "dtype", None
    )


def _line_of(error: Exception) -> str:
    """The innermost line that is neither JAX's, nor Flax's, nor the compiler's; empty where all are."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_AUTHORS)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else ""
