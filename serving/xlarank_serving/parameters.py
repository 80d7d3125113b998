"""What a request may ask for beside its scores, as parameters of ModelInfer: `InferParameters`.

    parameter              type            means
    priority               integer         1 (highest) to 4; 0 or any other number: the default, 2
    timeout                integer, µs     an answer after so long is of no use; 0: no limit
    xlarank_affinity_key   string or int   requests of one key go to one device while it isn't busier
    user                   string or int   the same, for callers who send it anyway; the other goes before
    top_k                  integer >= 1    answer the best k alone: outputs `top_k.indices`, `top_k.scores`
    top_k_task             string          by this output (or task); may be left out if the model has one
    top_k_weights          string          by a weighted sum of outputs, "click:1,like:0.5"
    xlarank_timings        bool            answer where the time went, in response parameters

Any other parameter is let pass, as servers of this protocol do, but for those that ask for sequences: a
server that ignored them would answer something else than was asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from xlarank.errors import RequestError
from xlarank.spec import DEFAULT_PRIORITY, NUM_PRIORITIES, ModelSpec
from xlarank_serving.top_k import INDICES, SCORES, TopK, parse_weights

__all__ = ["AFFINITY_KEY", "TIMINGS", "InferParameters", "read_parameters", "routing_key"]

AFFINITY_KEY = "xlarank_affinity_key"
TIMINGS = "xlarank_timings"

_KEY_NAMES = (AFFINITY_KEY, "user")
_MAX_KEY_LENGTH = 1024

_NO_TIMEOUT_US = 10**15
"""Thirty years. What is longer is no limit: the system's clocks can't count as far."""

_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")

_INTEGERS = ("int64_param", "uint64_param")
_KEYS = ("string_param", *_INTEGERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferParameters:
    """The parameters of one request that mean something here."""

    priority: int = DEFAULT_PRIORITY
    """1 (highest) to NUM_PRIORITIES."""

    timeout_seconds: float = math.inf
    """From the request's arrival."""

    affinity_key: str | None = None

    top_k: TopK | None = None
    """None: all candidates."""

    wants_timings: bool = False


_DEFAULT = InferParameters()


def read_parameters(parameters: Mapping[str, Any], spec: ModelSpec) -> InferParameters:
    """Reads the parameters of a request.

    Args:
      parameters: InferParameter messages by name.
      spec: the model that is asked.

    Raises:
      RequestError: for a parameter of a wrong type or value, or one that asks for a sequence.
    """
    if not parameters:
        return _DEFAULT
    for name in _SEQUENCE:
        if name in parameters and getattr(parameters[name], _kind(parameters[name]) or "bool_param"):
            raise RequestError(
                f"parameter {name!r}: model {spec.name!r} has no sequences; every request is scored by itself"
            )
    priority = _read(parameters, "priority", _INTEGERS, "an integer", 0)
    timeout_us = _read(parameters, "timeout", _INTEGERS, "an integer of microseconds", 0)
    if timeout_us < 0:
        raise RequestError(f"parameter 'timeout': expected microseconds >= 0, got {timeout_us}")
    return InferParameters(
        priority=priority if 1 <= priority <= NUM_PRIORITIES else DEFAULT_PRIORITY,
        timeout_seconds=timeout_us * 1e-6 if 0 < timeout_us < _NO_TIMEOUT_US else math.inf,
        affinity_key=_affinity_key(parameters),
        top_k=_top_k(parameters, spec),
        wants_timings=_read(parameters, TIMINGS, ("bool_param",), "a bool", False),
    )


def routing_key(parameters: Mapping[str, Any]) -> str | None:
    """The affinity key of a request, read before its model is known; None for none or a malformed one."""
    for name in _KEY_NAMES if parameters else ():
        if name in parameters and (kind := _kind(parameters[name])) in _KEYS:
            return str(getattr(parameters[name], kind))
    return None


def _affinity_key(parameters: Mapping[str, Any]) -> str | None:
    for name in _KEY_NAMES:
        key = _read(parameters, name, _KEYS, "a string or an integer", None)
        if key is None:
            continue
        key = str(key)
        if len(key) > _MAX_KEY_LENGTH:
            raise RequestError(
                f"parameter {name!r}: expected at most {_MAX_KEY_LENGTH} characters, got {len(key)}"
            )
        return key
    return None


def _top_k(parameters: Mapping[str, Any], spec: ModelSpec) -> TopK | None:
    k = _read(parameters, "top_k", _INTEGERS, "an integer", None)
    task = _read(parameters, "top_k_task", ("string_param",), "a string", None)
    weights = _read(parameters, "top_k_weights", ("string_param",), "a string", None)
    if k is None:
        if task is None and weights is None:
            return None
        name = "top_k_task" if weights is None else "top_k_weights"
        raise RequestError(f"parameter {name!r}: expected 'top_k' beside it, how many candidates; got none")
    if taken := [task.output for task in spec.tasks if task.output in (INDICES, SCORES)]:
        raise RequestError(f"parameter 'top_k': model {spec.name!r} has an output {taken[0]!r} of its own")
    if k < 1:
        raise RequestError(f"parameter 'top_k': expected a number of candidates >= 1, got {k}")
    if task is not None and weights is not None:
        raise RequestError("parameter 'top_k': expected 'top_k_task' or 'top_k_weights', got both")
    if weights is not None:
        named = [(_task(spec, "top_k_weights", n), weight) for n, weight in parse_weights(weights)]
        if len(dict(named)) < len(named):
            raise RequestError(f"parameter 'top_k_weights': expected each task once, got {weights!r}")
        return TopK(k, tuple(named))
    if task is not None:
        return TopK(k, ((_task(spec, "top_k_task", task), 1.0),))
    names = [task.name for task in spec.tasks]
    if len(names) > 1:
        raise RequestError(
            f"parameter 'top_k': model {spec.name!r} has outputs {[t.output for t in spec.tasks]}; say by "
            f"which, in 'top_k_task' or 'top_k_weights'"
        )
    return TopK(k, ((names[0], 1.0),))


def _task(spec: ModelSpec, parameter: str, name: str) -> str:
    """The task of an output's name, or of its own."""
    tasks = {task.name: task.name for task in spec.tasks} | {task.output: task.name for task in spec.tasks}
    if name not in tasks:
        raise RequestError(
            f"parameter {parameter!r}: model {spec.name!r} has no output {name!r}; "
            f"it has {[task.output for task in spec.tasks]}"
        )
    return tasks[name]


def _read(
    parameters: Mapping[str, Any], name: str, kinds: tuple[str, ...], expected: str, default: Any
) -> Any:
    """A parameter's value; the default if it is left out."""
    if name not in parameters:
        return default
    parameter = parameters[name]
    kind = _kind(parameter)
    if kind not in kinds:
        got = "no value" if kind is None else f"{kind} {getattr(parameter, kind)!r}"
        raise RequestError(f"parameter {name!r}: expected {expected} ({' or '.join(kinds)}), got {got}")
    return getattr(parameter, kind)


def _kind(parameter: Any) -> str | None:
    return parameter.WhichOneof("parameter_choice")
