"""Where the rows lie in every value of a model: what is claimed holds, what doesn't hold isn't claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core
from pass_cases import FOREIGN, HALF_PRECISION, case_of, compiled, swept

from xlarank.compiler.passes.rows import (
    SAME,
    Counts,
    Layout,
    Pair,
    RowAxis,
    first_difference,
    follow,
    follow_program,
    layout_of_constant,
)
from xlarank.compiler.program import read
from xlarank.compiler.tracing import evaluate, flatten

COUNTS = Counts(rows=5, contexts=3)
REQUEST_OF_ROW = np.array([2, 0, 2, 1, 0])

# Operations after which rows can't be told apart in these models, because rows meet or are counted there.
UNKNOWN = {
    "candidate_by_context_index": {"iota"},
    "counts_its_rows": {"broadcast_in_dim", "mul", "reduce_sum"},
    "crossing_loop": {"while"},
    "indices": {"iota"},
    "merged_batch": {"iota"},
    "sorted_experts": {"iota"},
}


def repeated(array, place, counts=COUNTS, request_of_row=REQUEST_OF_ROW):
    """A value at B rows, from the context's, as its place says."""
    if place is SAME:
        return array
    axis, inner = place.axis, place.inner or 1
    if place.inner is None:
        size = array.shape[axis] // counts.contexts * counts.rows
        return np.repeat(np.take(array, [0], axis), size, axis)
    shape = array.shape
    outer = shape[axis] // (counts.contexts * inner)
    parts = array.reshape(*shape[:axis], outer, counts.contexts, inner, *shape[axis + 1 :])
    rows = np.take(parts, request_of_row, axis + 1)
    return rows.reshape(*shape[:axis], outer * counts.rows * inner, *shape[axis + 1 :])


def layouts_of(ours, theirs, inputs, counts=COUNTS):
    """Layout of every value of a program."""
    known = dict(zip(ours.jaxpr.invars, inputs, strict=True))
    for var, a, b in zip(ours.jaxpr.constvars, ours.consts, theirs.consts, strict=True):
        known[var] = layout_of_constant(a, b, counts)
    for equation, other in zip(ours.jaxpr.eqns, theirs.jaxpr.eqns, strict=True):
        operands = [
            layout_of_constant(a.val, b.val, counts) if isinstance(a, core.Literal) else known[a]
            for a, b in zip(equation.invars, other.invars, strict=True)
        ]
        known.update(zip(equation.outvars, follow(Pair(equation, other, counts), operands), strict=True))
    return known


def all_values(programs, inputs):
    """Every value of two programs, in order of their equations."""

    def run(closed, inputs):
        values = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        results = []
        for equation in closed.jaxpr.eqns:
            outputs = evaluate(equation, read(values, equation.invars))
            values.update(zip(equation.outvars, outputs, strict=True))
            results.append(outputs)
        return [
            [None if jnp.issubdtype(o.dtype, jax.dtypes.extended) else o for o in outputs]
            for outputs in results
        ]

    return compiled(lambda *inputs: [run(p, i) for p, i in zip(programs, inputs, strict=True)], *inputs)


@pytest.mark.parametrize("name", swept(FOREIGN))
def test_what_is_claimed_of_a_value_holds(name):
    """All features are taken for context: then every operation of the model is followed."""
    case = case_of(name)
    ours, theirs = (case.traces.at(n).closed for n in (COUNTS.rows, COUNTS.contexts))
    assert first_difference(ours.jaxpr, theirs.jaxpr) is None
    weights = [np.asarray(w) for w in case.model.params]
    avals = zip(ours.in_avals[len(weights) :], theirs.in_avals[len(weights) :], strict=True)
    layouts = [Layout(w.shape, w.shape, SAME) for w in weights]
    layouts += [Layout(a.shape, b.shape, RowAxis(0)) for a, b in avals]
    known = layouts_of(ours, theirs, layouts)

    rng = np.random.default_rng(7)
    draw = {"f": rng.standard_normal, "b": lambda shape: rng.random(shape) < 0.6}
    contexts = [draw[a.dtype.kind](a.shape).astype(a.dtype) for a in theirs.in_avals[len(weights) :]]
    inputs = [*weights, *(c[REQUEST_OF_ROW] for c in contexts)], [*weights, *contexts]
    at_rows, at_context = all_values((ours, theirs), inputs)
    unknown = set()
    for equation, results, shares in zip(ours.jaxpr.eqns, at_rows, at_context, strict=True):
        for var, result, share in zip(equation.outvars, results, shares, strict=True):
            if known[var].place is None:
                operands = [known[a] for a in equation.invars if not isinstance(a, core.Literal)]
                if all(layout.place is not None for layout in operands):
                    unknown.add(equation.primitive.name)
            elif result is not None:
                expected = repeated(np.asarray(share), known[var].place)
                atol = 1e-2 if name in HALF_PRECISION else 1e-4
                np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-4, atol=atol)
    assert unknown == UNKNOWN.get(name, set())


def place_after(function, *shapes, places=(), counts=COUNTS):
    """Where the rows lie in what a function makes of arrays; ``n`` in their shapes is the row count."""

    def traced(num_rows):
        sizes = [tuple(num_rows if s == "n" else s for s in shape) for shape in shapes]
        avals = [jax.ShapeDtypeStruct(s, np.float32) for s in sizes]
        return flatten(jax.make_jaxpr(function)(*avals)), sizes

    (ours, sizes), (theirs, other_sizes) = traced(counts.rows), traced(counts.contexts)
    inputs = [Layout(a, b, p) for a, b, p in zip(sizes, other_sizes, places or (RowAxis(0),), strict=True)]
    results = follow_program(ours, theirs, inputs, counts)
    return None if results is None else results[0].place


_UNCHECKED = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def _of(x):
    """[n] numbers, each of its row's own making."""
    return (x[:, 0] > 0).astype(jnp.int32)


@pytest.mark.parametrize(
    ("function", "shape", "place"),
    [
        (lambda x: x.reshape(-1, 4), ("n", 6, 4), RowAxis(0, 6)),
        (lambda x: x.reshape(-1, 4).reshape(-1, 2, 3, 4), ("n", 6, 4), RowAxis(0, 1)),
        (lambda x: x.transpose(1, 0, 2).reshape(-1, 4), ("n", 6, 4), RowAxis(0, 1)),
        (lambda x: x.transpose(1, 0, 2).reshape(3, -1, 4), ("n", 6, 4), RowAxis(1, 1)),
        (lambda x: x.reshape(-1), ("n", 6, 4), RowAxis(0, 24)),
        (lambda x: jnp.concatenate([x, 2 * x]), ("n", 4), RowAxis(0, 1)),
        (lambda x: jnp.concatenate([x, 2 * x])[x.shape[0] :], ("n", 4), RowAxis(0, 1)),
        (lambda x: jnp.tile(x, (3, 1)), ("n", 4), RowAxis(0, 1)),
        (lambda x: jnp.repeat(x, 3, axis=0), ("n", 4), RowAxis(0, 3)),
        (lambda x: x.T @ jnp.ones((3, x.shape[0])).T, ("n", 4), None),
        (lambda x: x @ x.T, ("n", 4), None),
        (lambda x: x - x.mean(axis=0), ("n", 4), None),
        (lambda x: jnp.cumsum(x, axis=0), ("n", 4), None),
        (lambda x: jnp.sort(x, axis=0), ("n", 4), None),
        (lambda x: x[::-1], ("n", 4), None),
        (lambda x: x[:2], ("n", 4), None),
        (lambda x: jnp.roll(x, 1, axis=0), ("n", 4), None),
        (lambda x: x + jnp.arange(x.shape[0])[:, None], ("n", 4), None),
        (lambda x: x + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None], ("n", 4), None),
        (lambda x: x / x.shape[0], ("n", 4), None),
        (lambda x: x ** x.shape[0], ("n", 4), None),
        (lambda x: x.reshape(4, -1), ("n", 4), None),
        (lambda x: x[jnp.arange(x.shape[0])], ("n", 4), RowAxis(0, 1)),
        (lambda x: x[jnp.arange(x.shape[0])[::-1]], ("n", 4), None),
        (lambda x: x.at[_of(x)].get(**_UNCHECKED), ("n", 4), None),
        (lambda x: jnp.zeros_like(x).at[_of(x)].add(x, **_UNCHECKED), ("n", 4), None),
        (lambda x: jnp.zeros((4, 4)).at[_of(x)].add(x, **_UNCHECKED), ("n", 4), None),
        (lambda x: jnp.ones((4, 4)).at[_of(x)].get(**_UNCHECKED), ("n", 4), RowAxis(0, 1)),
        (lambda x: x[:, None] - x[None], ("n", 4), None),
        (lambda x: lax.map(lambda r: r.sum() * r, x), ("n", 4), RowAxis(0, 1)),
        (lambda x: lax.scan(lambda c, r: (c + r, c), jnp.zeros(4), x)[1], ("n", 4), None),
        (lambda x: lax.conv_general_dilated(x[None], jnp.ones((3, 4, 2)), (1,), "SAME",
                                            dimension_numbers=("NWC", "WIO", "NWC"))[0], ("n", 4), None),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"), ("n", 4), None),
        (lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + a, (1,)), ("n", 4), RowAxis(0, 1)),
        (lambda x: jnp.linalg.inv(jnp.einsum("bi,bj->bij", x, x) + jnp.eye(4)), ("n", 4), None),
    ],
)  # fmt: skip
def test_rows_are_found_again_and_never_where_they_met(function, shape, place):
    assert place_after(function, shape) == place


def test_an_array_of_weights_as_long_as_the_batch_is_no_row_axis():
    """At one row x [1, 4] + w [5, 4] is [5, 4] too: each row's number would decide what it gets."""
    counts = Counts(rows=5, contexts=1)
    places = (RowAxis(0), SAME)
    assert place_after(lambda x, w: x + w, ("n", 4), (5, 4), places=places, counts=counts) is None


def test_a_constant_that_counts_rows_is_not_the_same_array():
    assert layout_of_constant(np.float32(3), np.float32(3), COUNTS).place is SAME
    assert layout_of_constant(np.float32(np.nan), np.float32(np.nan), COUNTS).place is SAME
    assert layout_of_constant(np.float32(5), np.float32(3), COUNTS).place is None
    assert layout_of_constant(np.zeros((5, 2)), np.zeros((3, 2)), COUNTS).place == RowAxis(0)
    assert layout_of_constant(np.zeros((2, 10)), np.zeros((2, 6)), COUNTS).place == RowAxis(1, None)
    assert layout_of_constant(np.arange(5), np.arange(3), COUNTS).place is None


def test_traces_that_differ_inside_a_loop_are_not_in_step():
    def program(x):
        step = jnp.sin if x.shape[0] == 1 else jnp.cos
        return lax.scan(lambda c, _: (step(c), None), x, None, length=3)[0]

    one, two, three = (jax.make_jaxpr(program)(jnp.zeros((n, 2))).jaxpr for n in (1, 2, 3))
    assert first_difference(two, three) is None
    assert [e.primitive.name for e in first_difference(one, two)] == ["scan", "scan"]


def test_a_program_inside_may_close_over_other_constants():
    def program(constant):
        inner = jax.jit(lambda x: x + constant)
        return jax.make_jaxpr(lambda xs: lax.map(lambda x: inner(x), xs))(jnp.zeros((constant.shape[0], 4)))

    ones = program(np.ones((3, 4), np.float32)), program(np.ones((5, 4), np.float32))
    assert follow_program(*ones[::-1], [Layout((5, 4), (3, 4), RowAxis(0))], COUNTS)[0].place is None
