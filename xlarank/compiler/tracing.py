"""Runs a model author's code and says where in it something went wrong: `trace`, `source_of`."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
from jax._src import source_info_util  # no public name for an equation's source line
from jax.extend import core
from jax.extend.core import ClosedJaxpr as ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

from xlarank.errors import ModelError, XlarankError

__all__ = ["ClosedJaxpr", "authors_code", "equations_of", "inner_jaxpr", "source_of", "trace"]


def _folder(file: str | None) -> str:
    return os.path.join(os.path.dirname(file or ""), "")


_FLAX = _folder(flax.__file__)
_NOT_THE_AUTHORS = (_FLAX, _folder(jax.__file__), _folder(__file__))


def trace(model: str, program: Callable, avals: tuple[Any, ...]) -> ClosedJaxpr:
    """Traces a program that calls a model author's module.

    Args:
      model: name of the model, for the error.
      program: what to trace.
      avals: shapes of its arguments.

    Returns:
      The program as a jaxpr, float32 matmuls in true float32.

    Raises:
      ModelError: with the reason and the line of the author's source, whatever the module raised.
    """
    with authors_code(f"model {model!r} can't be traced"), jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(program)(*avals)
    for equation, source in equations_of(closed.jaxpr):
        if "callback" in equation.primitive.name or equation.primitive.name == "debug_print":
            raise ModelError(
                f"model {model!r} calls back to the host: {equation.primitive.name} at {source}; "
                f"take it out, a served program runs on the device alone"
            )
    return closed


@contextlib.contextmanager
def authors_code(what_failed: str) -> Iterator[None]:
    """Runs a model author's code, which may raise anything.

    Raises:
      ModelError: with the reason and the line of the author's source.
    """
    try:
        yield
    except XlarankError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split("See https://")[0].split())
        hint = ""
        if isinstance(error, (jax.errors.TracerBoolConversionError, jax.errors.ConcretizationTypeError)):
            hint = "; a model's operations may depend on shapes, not on values"
        raise ModelError(
            f"{what_failed}: {type(error).__name__}: {reason} (at {_line_of(error)}){hint}"
        ) from error


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
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        if not frame.file_name.startswith(_FLAX):
            return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return ""


def inner_jaxpr(equation: core.JaxprEqn) -> ClosedJaxpr | None:
    """The program that an equation merely calls (jit, custom derivatives, remat), else None."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner
        if isinstance(inner, core.Jaxpr):
            return ClosedJaxpr(inner, ())
    return None


def _line_of(error: Exception) -> str:
    """The innermost line that is neither JAX's, nor Flax's, nor the compiler's."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_AUTHORS)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else "the module"
