"""Finds what is at fault in a batch that fails wherever it runs: `isolate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from xlarank.runtime.batcher import Part

__all__ = ["Culprit", "isolate"]

Run = Callable[[Sequence[Part]], Any]
"""Runs parts as a batch of their own; raises when that fails."""


@dataclasses.dataclass(frozen=True, eq=False)
class Culprit:
    """A request that fails by itself."""

    part: Part
    error: Exception
    """Without its traceback, whose frames have the culprits: a cycle."""

    begin: int
    """The fault shows with rows ``[begin, end)`` of the request; one row, unless it takes several."""

    end: int


def isolate(parts: Sequence[Part], run: Run, error: Exception) -> tuple[list[tuple[Any, Any]], list[Culprit]]:
    """Halves a batch until every request has run or is found to fail by itself.

    Of k requests at fault among Q it takes at most 2 k log2(Q) runs, and 2 log2(N) for the row in each.

    Args:
      parts: that fail together.
      run: see `Run`.
      error: what they failed with.

    Returns:
      What ran: parts and what `run` gave for them; and what doesn't.
    """
    if len(parts) == 1:
        return [], [_narrowed(parts[0], run, error)]
    done: list[tuple[Any, Any]] = []
    culprits: list[Culprit] = []
    middle = len(parts) // 2
    for half in (parts[:middle], parts[middle:]):
        try:
            done.append((half, run(half)))
        except Exception as own:
            ran, failed = isolate(half, run, own.with_traceback(None))
            done += ran
            culprits += failed
    return done, culprits


def _narrowed(part: Part, run: Run, error: Exception) -> Culprit:
    """The first row at fault, by halving; more rows where none fails without the others."""
    begin, end = part.begin, part.end
    while end - begin > 1:
        middle = (begin + end) // 2
        for low, high in ((begin, middle), (middle, end)):
            try:
                run([dataclasses.replace(part, begin=low, end=high)])
            except Exception as own:
                begin, end, error = low, high, own.with_traceback(None)
                break
        else:
            break
    return Culprit(part, error, begin, end)
