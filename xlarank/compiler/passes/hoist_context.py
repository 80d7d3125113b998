"""hoist_context: what depends on the context alone runs once a request.

The model is traced at B rows and at the context's row count, and both lists of equations are walked in
step. A value is a WEIGHT, a CONTEXT or a ROW (`Kind`). An equation of weights and contexts is taken as it
stands from the context's trace, so no operation needs a rule to be hoisted. Everything else runs at B rows,
from the trace at B rows, with its context operands expanded there: what no rule knows is computed exactly as
the plain program does. A context's value is expanded by repeating it where its rows are known to be alike
(`rows/`); else it is computed anew at B rows.

Rules exist where the kinds meet (`piecewise.py`): a concatenation stays a list of pieces through elementwise
operations, reshapes and slices into a matmul (one product a kind), a reduction or a batched matmul; and a
batched matmul with a single request's context loses its batch axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from xlarank.compiler.passes.rows import first_difference
from xlarank.compiler.passes.step import Expansion, Log
from xlarank.compiler.passes.walk import Walk
from xlarank.compiler.program import ModelTrace, Program, ProgramInputs, Traces, make_program
from xlarank.compiler.tracing import source_of
from xlarank.errors import ModelError
from xlarank.spec import Bucket, Scope, Signature
from xlarank.spec.wording import counted

__all__ = ["Expansion", "Hoisted", "hoist_context"]


_MAX_NAMED = 3
"""Operations that a reason names; all are among the expansions."""


@dataclasses.dataclass(frozen=True)
class Hoisted:
    """The outcome of the pass for one bucket."""

    program: Program | None
    """None when the pass doesn't apply."""

    reason: str
    """Why it doesn't apply, or what is worth saying; may be empty."""

    expansions: tuple[Expansion, ...] = ()
    """In the order of the program."""

    hoisted_sources: tuple[tuple[str, str], ...] = ()
    """Operation and author's line of what now runs once a request."""


def hoist_context(
    traces: Traces, signature: Signature, bucket: Bucket, *, split_reductions: bool = True
) -> Hoisted:
    """Moves the context's share of a model from B rows to Q.

    Args:
      traces: of the model.
      signature: layout of the leaves.
      bucket: B and Q.
      split_reductions: whether a sum over a concatenation may be taken piece by piece, which adds up in
        another order.

    Returns:
      The program, or why there is none: nothing depends on the context alone, every row has a context of its
      own, or the model does different things at different row counts.
    """
    if bucket.requests == bucket.rows:
        return Hoisted(None, "every row has a context of its own")
    rows = traces.at(bucket.rows)
    if Scope.CONTEXT not in rows.scopes:
        return Hoisted(None, "the model reads no feature of scope context")
    found = _context_trace(traces, rows, bucket)
    if isinstance(found, str):
        return Hoisted(None, found)
    contexts, reason = found
    log = Log()

    def run(inputs: ProgramInputs) -> list[Any]:
        log.clear()  # traced once; a retry of JAX's would log twice
        return Walk(rows, contexts, bucket, split_reductions=split_reductions, log=log).run(inputs)

    program = make_program(rows, traces.spec, signature, bucket, run)
    hoisted = _alive(program, log)
    if not hoisted and not log.num_unbatched:
        return Hoisted(None, _why_nothing(log.expansions), tuple(log.expansions))
    return Hoisted(program, reason, tuple(log.expansions), hoisted)


def _why_nothing(expansions: Sequence[Expansion]) -> str:
    """Why no work was found that runs once a request: what needs the context's values at every row first."""
    said = "nothing is computed from context features alone"
    if not expansions:
        return said
    found = list(dict.fromkeys(f"{e.operation} at {e.source}: {e.reason}" for e in expansions))
    return f"{said} before {'; '.join(found[:_MAX_NAMED])}"


def _alive(program: Program, log: Log) -> tuple[tuple[str, str], ...]:
    """What was hoisted and is still needed."""
    needed = {
        (equation.primitive.name, source_of(equation), equation.outvars[0].aval.shape)  # type: ignore[attr-defined]
        for equation in program.closed.jaxpr.eqns
    }
    return tuple(
        dict.fromkeys(
            (name, source) for name, source, shape in log.hoisted if (name, source, shape) in needed
        )
    )


def _context_trace(traces: Traces, rows: ModelTrace, bucket: Bucket) -> tuple[ModelTrace, str] | str:
    """The trace at Q rows that runs in step with the one at B; at one row a model may do something else."""
    first = ""
    for num_rows in (bucket.requests, bucket.requests + 1):
        if num_rows == bucket.rows:
            continue
        try:
            contexts = traces.at(num_rows)
        except ModelError as error:
            first = first or f"the model can't be traced at {counted(num_rows, 'row')}: {error}"
            continue
        difference = _difference(rows, contexts)
        if difference is None:
            said = f"{first}; its context part runs at {counted(num_rows, 'row')} instead" if first else ""
            return contexts, said
        what = f"at {counted(num_rows, 'row')} the model does something else than at {bucket.rows}"
        first = first or f"{what}: {difference}"
    return first


def _difference(rows: ModelTrace, contexts: ModelTrace) -> str | None:
    """Where two traces of a model part, in words; None when they do the same at two row counts."""
    parts = first_difference(rows.closed.jaxpr, contexts.closed.jaxpr)
    if parts is not None:
        said = [f"{e.primitive.name} at {source_of(e)}" if e is not None else "nothing more" for e in parts]
        at_context, at_rows = reversed(said)
        return (
            f"{at_context}, with other shapes or parameters"
            if at_context == at_rows
            else f"{at_context}, {at_rows}"
        )
    if len(rows.closed.consts) != len(contexts.closed.consts):
        return f"{counted(len(contexts.closed.consts), 'constant')}, {len(rows.closed.consts)}"
    return None
