"""Where the rows lie after programs inside a program: scan, while, cond and calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xlarank.compiler.passes.rows.layout import SAME, Layout, Place, RowAxis
from xlarank.compiler.passes.rows.pair import Pair, is_equal

__all__ = ["RULES", "FollowProgram"]

FollowProgram = Callable[[Any, Any, Sequence[Layout]], list[Layout] | None]
"""(program at B rows, program at the context's row count, its inputs) -> its results; None if they differ."""


def _scan(pair: Pair, operands: Sequence[Layout], follow: FollowProgram) -> Sequence[Place] | None:
    params, context_params = pair.params, pair.context_params
    num_consts, num_carry = _num_consts_and_carry(params)
    consts, carry, steps = _parted(operands, num_consts, num_carry)
    programs = params["jaxpr"], context_params["jaxpr"]
    if params["length"] != context_params["length"]:
        return _map_of_rows(pair, consts, carry, steps, programs)
    entering = [_moved(step, -1) for step in steps]
    if any(step is None for step in entering):
        return None
    stable = _until_stable(
        [_plain(layout) for layout in carry],
        lambda state: follow(*programs, [*map(_plain, consts), *state, *entering]),  # type: ignore[list-item]
    )
    if stable is None:
        return None
    state, leaving = stable
    return [*(layout.place for layout in state), *(_stacked(layout.place) for layout in leaving[num_carry:])]


def _stacked(place: Place) -> Place:
    return RowAxis(place.axis + 1, place.inner) if isinstance(place, RowAxis) else place


def _num_consts_and_carry(params: Mapping[str, Any]) -> tuple[int, int]:
    if "num_consts" in params:  # jax < 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _parted(
    operands: Sequence[Layout], num_consts: int, num_carry: int
) -> tuple[list[Layout], list[Layout], list[Layout]]:
    middle = num_consts + num_carry
    return list(operands[:num_consts]), list(operands[num_consts:middle]), list(operands[middle:])


def _map_of_rows(
    pair: Pair,
    consts: Sequence[Layout],
    carry: Sequence[Layout],
    steps: Sequence[Layout],
    programs: tuple[Any, Any],
) -> Sequence[Place] | None:
    """A scan over the rows: alike for each if it carries nothing from one to the next."""
    if carry or any(layout.place is not SAME for layout in consts):
        return None
    if pair.params["length"] != pair.counts.rows or pair.context_params["length"] != pair.counts.contexts:
        return None
    if any(layout.place != RowAxis(0) for layout in steps):
        return None
    return [RowAxis(0)] * pair.num_results if is_equal(*programs) else None


def _while(pair: Pair, operands: Sequence[Layout], follow: FollowProgram) -> Sequence[Place] | None:
    params, context_params = pair.params, pair.context_params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = _parted(operands, num_cond, num_body)
    conds = params["cond_jaxpr"], context_params["cond_jaxpr"]
    bodies = params["body_jaxpr"], context_params["body_jaxpr"]
    stable = _until_stable(
        [_plain(layout) for layout in carry],
        lambda state: follow(*bodies, [*map(_plain, body_consts), *state]),
    )
    if stable is None:
        return None
    # How often it goes round must not depend on the rows.
    goes_on = follow(*conds, [*map(_plain, cond_consts), *stable[0]])
    if goes_on is None or goes_on[0].place is not SAME:
        return None
    return [layout.place for layout in stable[0]]


def _cond(pair: Pair, operands: Sequence[Layout], follow: FollowProgram) -> Sequence[Place] | None:
    chosen, inputs = operands[0], [_plain(layout) for layout in operands[1:]]
    if chosen.place is not SAME:
        return None
    branches = zip(pair.params["branches"], pair.context_params["branches"], strict=True)
    results = [follow(a, b, inputs) for a, b in branches]
    if any(result is None for result in results):
        return None
    columns = zip(*results, strict=True)  # type: ignore[arg-type]
    return [_either([layout.place for layout in column]) for column in columns]


def _either(places: Sequence[Place]) -> Place:
    """Where the rows lie in one of several values."""
    certain = {p for p in places if not (isinstance(p, RowAxis) and p.inner is None)}
    if not certain:
        return places[0] if len(set(places)) == 1 else None
    (found, *others) = certain
    if others or found is None:
        return None
    uniform = [p for p in places if isinstance(p, RowAxis) and p.inner is None]
    alike = all(isinstance(found, RowAxis) and p.axis == found.axis for p in uniform)
    return found if alike else None


def _until_stable(
    state: list[Layout], follow: Callable[[list[Layout]], list[Layout] | None]
) -> tuple[list[Layout], list[Layout]] | None:
    """Where the rows lie in a loop's state, the same each time round, and in what its body then gives."""
    for _ in range(2 * len(state) + 2):
        leaving = follow(state)
        if leaving is None:
            return None
        after = [
            dataclasses.replace(layout, place=_either([layout.place, result.place]))
            for layout, result in zip(state, leaving, strict=False)
        ]
        if after == state:
            return state, leaving
        state = after
    return None


def _plain(layout: Layout) -> Layout:
    """Inside a loop a value is known by its place alone."""
    return Layout(layout.shape, layout.context_shape, layout.place)


def _moved(layout: Layout, by: int) -> Layout | None:
    """A step of what a scan goes along."""
    place = layout.place
    if isinstance(place, RowAxis):
        place = RowAxis(place.axis + by, place.inner) if place.axis else None
    return Layout(layout.shape[1:], layout.context_shape[1:], place)


RULES: Mapping[str, Callable[[Pair, Sequence[Layout], FollowProgram], Sequence[Place] | None]] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
