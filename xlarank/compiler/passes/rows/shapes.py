"""Where the rows lie after operations that work place by place, move axes, reduce or multiply.

A rule answers one `Place` for each result; None where it isn't sure. What it answers is checked against the
shapes at both row counts afterwards (`follow`), so a rule only has to make sure that rows don't meet and that
each is treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from xlarank.compiler.passes.rows.layout import SAME, Layout, Place, RowAxis, meet, size_after
from xlarank.compiler.passes.rows.pair import Pair

__all__ = ["ELEMENTWISE", "GROWING", "RULES"]

ELEMENTWISE = frozenset(
    {
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
        "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz",
        "complex", "conj", "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq",
        "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma",
        "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p",
        "logistic", "lt", "lt_to", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not",
        "or", "polygamma", "population_count", "pow", "real", "reduce_precision",
        "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left",
        "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
        "stop_gradient", "sub", "tan", "tanh", "xor", "zeta",
    }
)  # fmt: skip
"""Primitives whose result at a place depends on the operands at that place alone."""


def _elementwise(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place]:
    return [meet(operands)]


def _identity(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place]:
    return [operand.place for operand in operands]


def _broadcast(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place, dims = operands[0].place, pair.params["broadcast_dimensions"]
    if isinstance(place, RowAxis):
        return [RowAxis(dims[place.axis], place.inner)]
    shape, context_shape = pair.params["shape"], pair.context_params["shape"]
    if not shape or shape == context_shape:
        return [SAME]
    grown = [i for i, (a, b) in enumerate(zip(shape, context_shape, strict=True)) if a != b]
    return [RowAxis(grown[0], 1 if shape[grown[0]] == pair.counts.rows else None)]


def _reshape(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place, shape = operands[0].place, operands[0].shape
    if pair.params.get("dimensions") is not None or not isinstance(place, RowAxis):
        return None
    total = shape[place.axis] // pair.counts.rows
    for inner in (place.inner,) if place.inner is not None else (1, total):
        # Entries from one row to the next: the axis that holds such a step holds the rows.
        step = inner * size_after(shape, place.axis)
        new = pair.params["new_sizes"]
        for axis in range(len(new)):
            after = size_after(new, axis)
            if step % after == 0 and (after * new[axis]) % (step * pair.counts.rows) == 0:
                found = RowAxis(axis, step // after)
                if pair.result_fits(found):
                    return [found]
    return None


def _transpose(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place]:
    place = operands[0].place
    assert isinstance(place, RowAxis)
    return [RowAxis(pair.params["permutation"].index(place.axis), place.inner)]


def _squeeze(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    return _without(operands[0].place, pair.params["dimensions"])


def _without(place: Place, axes: Sequence[int]) -> Sequence[Place] | None:
    assert isinstance(place, RowAxis)
    if place.axis in axes:
        return None
    return [RowAxis(place.axis - sum(1 for a in axes if a < place.axis), place.inner)]


def _concatenate(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place, axis = meet(operands), pair.params["dimension"]
    if (
        isinstance(place, RowAxis)
        and place.axis == axis
        and any(operand.place != place for operand in operands)
    ):
        return None  # each must hold all rows, dealt out in one way
    return [place]


def _stack(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place]:
    place, axis = meet(operands), pair.params["axis"]
    if isinstance(place, RowAxis):
        place = RowAxis(place.axis + (axis <= place.axis), place.inner)
    return [place]


def _unstack(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    places = _without(operands[0].place, (pair.params["axis"],))
    return None if places is None else [*places] * pair.num_results


def _slice(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    (operand,), place = operands, operands[0].place
    assert isinstance(place, RowAxis)
    (starts, limits), (context_starts, context_limits) = (
        [params[name] for name in ("start_indices", "limit_indices")]
        for params in (pair.params, pair.context_params)
    )
    strides, axis = pair.params["strides"] or (1,) * len(starts), place.axis
    if strides[axis] != 1 or not _cuts_alike(pair, place, starts[axis], context_starts[axis]):
        return None
    if not _cuts_alike(pair, place, limits[axis], context_limits[axis]):
        return None
    others = [i for i in range(len(operand.shape)) if i != axis]
    if any((starts[i], limits[i]) != (context_starts[i], context_limits[i]) for i in others):
        return None
    return [place]


def _cuts_alike(pair: Pair, place: RowAxis, at_rows: int, at_context: int) -> bool:
    """Whether an axis is cut between two whole sets of rows, the same two at both row counts."""
    number, rest = divmod(at_rows, pair.counts.rows * (place.inner or 1))
    return rest == 0 and at_context == number * pair.counts.contexts * (place.inner or 1)


def _split(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place = operands[0].place
    assert isinstance(place, RowAxis)
    if place.axis == pair.params["axis"]:
        sizes = zip(pair.params["sizes"], pair.context_params["sizes"], strict=True)
        return [place if _cuts_alike(pair, place, a, b) else None for a, b in sizes]
    if tuple(pair.params["sizes"]) != tuple(pair.context_params["sizes"]):
        return None
    return [place] * pair.num_results


def _tile(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    (operand,), place = operands, operands[0].place
    reps, context_reps = pair.params["reps"], pair.context_params["reps"]
    if isinstance(place, RowAxis):
        # Tiles of a row axis lie one after the other: one more set of rows each.
        return [place] if tuple(reps) == tuple(context_reps) else None
    grown = [i for i, (a, b) in enumerate(zip(reps, context_reps, strict=True)) if a != b]
    if len(grown) != 1 or reps[grown[0]] % pair.counts.rows:
        return None
    size = operand.shape[grown[0]]
    if size == 1:
        return [RowAxis(grown[0], 1 if reps[grown[0]] == pair.counts.rows else None)]
    return [RowAxis(grown[0], size)] if reps[grown[0]] == pair.counts.rows else None


def _pad(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place = operands[0].place
    if not isinstance(place, RowAxis) or operands[1].place is not SAME:
        return None
    return [place] if tuple(pair.params["padding_config"][place.axis]) == (0, 0, 0) else None


def _along(name: str) -> Callable[[Pair, Sequence[Layout]], Sequence[Place] | None]:
    """The rule of what works along one axis, or some, and keeps them."""

    def rule(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
        place, axes = meet(operands), pair.params.get(name, len(operands[0].shape) - 1)
        assert isinstance(place, RowAxis) or place is None
        if place is None or place.axis in (axes if isinstance(axes, Sequence) else (axes,)):
            return None
        return [place] * pair.num_results

    return rule


def _reduce(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    return _without(operands[0].place, pair.params["axes"])


def _reduce_by(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    arrays, starts = operands[: len(operands) // 2], operands[len(operands) // 2 :]
    place = meet(arrays)
    if not isinstance(place, RowAxis) or any(start.place is not SAME for start in starts):
        return None
    found = _without(place, pair.params["dimensions"])
    return None if found is None else [*found] * pair.num_results


def _window(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place, rest = operands[0].place, operands[1:]
    if not isinstance(place, RowAxis) or any(operand.place is not SAME for operand in rest):
        return None
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    if any(pair.params[name][place.axis] != 1 for name in names):
        return None
    return [place] if tuple(pair.params["padding"][place.axis]) == (0, 0) else None


def _fft(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place = operands[0].place
    assert isinstance(place, RowAxis)
    return [place] if place.axis < len(operands[0].shape) - len(pair.params["fft_lengths"]) else None


def _dot(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    contracted, batched = pair.params["dimension_numbers"]
    free = [
        [a for a in range(len(operands[s].shape)) if a not in contracted[s] and a not in batched[s]]
        for s in (0, 1)
    ]
    begins = (len(batched[0]), len(batched[0]) + len(free[0]))
    found: set[RowAxis] = set()
    for s in (0, 1):
        place = operands[s].place
        if not isinstance(place, RowAxis):
            continue
        if place.axis in free[s] and operands[1 - s].place is SAME:
            return [RowAxis(begins[s] + free[s].index(place.axis), place.inner)]
        if place.axis not in batched[s]:
            return None
        found.add(RowAxis(list(batched[s]).index(place.axis), place.inner))
    return list(found) if len(found) == 1 and SAME not in (o.place for o in operands) else None


def _convolution(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    place, numbers = operands[0].place, pair.params["dimension_numbers"]
    if (
        not isinstance(place, RowAxis)
        or operands[1].place is not SAME
        or pair.params["batch_group_count"] != 1
    ):
        return None
    return [RowAxis(numbers.out_spec[0], place.inner)] if place.axis == numbers.lhs_spec[0] else None


def _iota(pair: Pair, operands: Sequence[Layout]) -> Sequence[Place] | None:
    shape, context_shape = pair.params["shape"], pair.context_params["shape"]
    grown = [i for i, (a, b) in enumerate(zip(shape, context_shape, strict=True)) if a != b]
    if len(grown) != 1 or grown[0] == pair.params["dimension"]:
        return None
    return [RowAxis(grown[0], 1 if shape[grown[0]] == pair.counts.rows else None)]


RULES: Mapping[str, Callable[[Pair, Sequence[Layout]], Sequence[Place] | None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("device_put", "optimization_barrier"), _identity),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys([f"reduce_{n}" for n in ("sum", "prod", "max", "min", "and", "or", "xor")], _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys([f"reduce_window{n}" for n in ("", "_sum", "_max", "_min")], _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "fft": _fft,
    "iota": _iota,
    "pad": _pad,
    "reduce": _reduce_by,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "slice": _slice,
    "sort": _along("dimension"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _along("axis"),
    "transpose": _transpose,
    "unstack": _unstack,
}  # fmt: skip
"""By primitive. A rule is asked when all operands are known, some has rows (if not `GROWING`), and the
parameters agree."""

GROWING = frozenset({"broadcast_in_dim", "iota", "tile"})
"""Operations that may make rows out of a value that has none."""
