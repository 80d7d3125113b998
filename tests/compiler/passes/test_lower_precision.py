"""Matmuls in half precision and int8: what NumPy computes, row by row, on every model within a tolerance."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import mlp, mlp_params, random_params, spec_of, two_tasks
from pass_cases import MODELS, Case, case_of, run_all, swept

from xlarank.compiler.passes import Fusion, fuse_experts, hoist_context, lower_precision
from xlarank.compiler.passes.sensitivity import sensitive_matmuls
from xlarank.compiler.program import Program, plain_program, run_equations, weight_side
from xlarank.compiler.split import split_function
from xlarank.compiler.tracing import retrace
from xlarank.spec import Bucket, Precision

# Largest difference from float32 on random weights and activations, of probabilities and of regressions.
TOLERANCE = {Precision.BFLOAT16: 2e-2, Precision.FLOAT16: 2e-2, Precision.INT8: 1e-1}

LOWER = (Precision.BFLOAT16, Precision.INT8)

# einsums of activations and a weight, in every order of axes that XLA knows a kernel for, and others
EQUATIONS = [
    "mk,kn->mn",
    "mk,nk->mn",
    "km,kn->mn",
    "mkl,kln->mn",
    "mlk,kn->mln",
    *(f"{''.join(x)},{''.join(w)}->emn" for x, w in itertools.product(
        itertools.permutations("emk"), (("e", "k", "n"), ("n", "e", "k"), ("k", "n", "e")))),
]  # fmt: skip
SIZES = {"e": 3, "m": 8, "k": 16, "l": 2, "n": 5}


def program_of(equation, *, weight_first=False):
    """A program of one matmul with a weight, its inputs and the axes that each operand is summed over."""
    left, right = equation.split("->")[0].split(",")
    shapes = [tuple(SIZES[c] for c in side) for side in (left, right)]

    def run(weight, x):
        return [jnp.einsum(equation, x, weight)]

    avals = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (shapes[1], shapes[0])]
    rng = np.random.default_rng(3)
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in (shapes[1], shapes[0])]
    shared = set(left) & set(right) - set(equation.split("->")[1])
    axes = [tuple(i for i, c in enumerate(side) if c in shared) for side in (right, left)]
    return Program(retrace(run, avals), 1, 0, Bucket(8, 1)), inputs, axes


def quantised(array, axes):
    """Whole numbers of at most 127 and their scale, one for all that are summed together."""
    largest = np.maximum(np.abs(array).max(axis=axes, keepdims=True), np.float32(1e-30))
    scale = largest / np.float32(127)
    return np.round(array * (np.float32(127) / largest)).astype(np.int32), scale


@pytest.mark.parametrize("equation", EQUATIONS)
def test_int8_is_what_numpy_computes(equation):
    program, (weight, x), axes = program_of(equation)
    lowered = lower_precision(program, Precision.INT8, keep_sensitive=False)
    (ours,) = jax.jit(lambda *inputs: run_equations(lowered.closed, inputs))(weight, x)
    (w, w_scale), (q, x_scale) = quantised(weight, axes[0]), quantised(x, axes[1])
    exact = np.einsum(equation, q, w)
    spread = np.einsum(equation, np.broadcast_to(x_scale, x.shape), np.broadcast_to(w_scale, weight.shape))
    theirs = exact * spread / np.prod([x.shape[a] for a in axes[1]])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(Precision.BFLOAT16, ml_dtypes.bfloat16), (Precision.FLOAT16, np.float16)],
)
def test_half_precision_is_what_numpy_computes(equation, precision, dtype):
    """Rounded operands, products added up in float32. XLA's CPU backend refuses some orders when it runs."""
    program, (weight, x), _ = program_of(equation)
    lowered = lower_precision(program, precision, keep_sensitive=False)
    (ours,) = jax.jit(lambda *inputs: run_equations(lowered.closed, inputs))(weight, x)
    theirs = np.einsum(equation, x.astype(dtype).astype(np.float64), weight.astype(dtype).astype(np.float64))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(ours - np.einsum(equation, x, weight)).max() > 1e-5, "it is rounded"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("precision", LOWER)
def test_a_row_never_reaches_another(precision, bad):
    program, (weight, x), _ = program_of("mk,kn->mn")
    lowered = lower_precision(program, precision, keep_sensitive=False)
    run = jax.jit(lambda *inputs: run_equations(lowered.closed, inputs)[0])
    clean = np.asarray(run(weight, x))
    x[3, 5] = bad
    spoilt = np.asarray(run(weight, x))
    others = np.arange(8) != 3
    np.testing.assert_array_equal(spoilt[others], clean[others])
    assert np.isfinite(spoilt[3]).all() == (bad == 1e30)


def test_int8_of_zeros_and_of_numbers_too_small_to_divide_by():
    program, (weight, x), _ = program_of("mk,kn->mn")
    lowered = lower_precision(program, Precision.INT8, keep_sensitive=False)
    x[0], x[1], x[2] = 0.0, 1e-39, 1e-36
    weight[:, 0] = 0.0
    (ours,) = jax.jit(lambda *inputs: run_equations(lowered.closed, inputs))(weight, x)
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(np.asarray(ours)[0], 0.0)
    np.testing.assert_array_equal(np.asarray(ours)[:, 0], 0.0)
    np.testing.assert_allclose(ours[1:3], x[1:3] @ weight, atol=1e-34)
    with jax.debug_nans(True), jax.debug_infs(True):  # nothing on the way is divided by zero either
        run_equations(lowered.closed, [weight, x])


@pytest.mark.parametrize("name", swept(MODELS))
def test_every_model_stays_within_the_tolerance(name):
    case = case_of(name)
    batch = case.batch(8, 2)
    plain = plain_program(case.traces, case.signature, batch.bucket)
    base = hoist_context(case.traces, case.signature, batch.bucket).program or plain
    number = MODELS.index(name)
    fused = fuse_experts(base, (Fusion.EXPERT_MAJOR, Fusion.WIDE, Fusion.ROW_MAJOR)[number % 3])
    forms = [(base, precision) for precision in LOWER]
    forms += [] if fused is None else [(fused, LOWER[number % 2])]
    lowered = [(lower_precision(base, precision), precision) for base, precision in forms]
    lowered = [(program, precision) for program, precision in lowered if program is not None]
    if not lowered:
        weights = base.weight_vars()
        matmuls = [e for e in base.closed.jaxpr.eqns if weight_side(e, weights) is not None]
        kept = sensitive_matmuls(base)
        assert all(id(e) in kept or e.invars[0].aval.dtype != np.float32 for e in matmuls)
        return
    expected, *scores = run_all(case, [(program, batch) for program in (plain, *(p for p, _ in lowered))])
    for score, (_, precision) in zip(scores, lowered, strict=True):
        assert not np.array_equal(score, expected), "something was lowered"
        np.testing.assert_allclose(score, expected, rtol=TOLERANCE[precision], atol=TOLERANCE[precision])


def _model(params, features):
    x = jnp.concatenate([features["user"], features["item"]], axis=1)
    hidden = jnp.tanh(x @ params["w"])  # an ordinary layer
    gate = jax.nn.softmax(x @ params["gate"])  # into a softmax
    skip = x @ params["skip"]  # to the scores through a scan
    skip, _ = jax.lax.scan(lambda c, _: (jnp.sin(c), None), skip, None, length=2)
    out = mlp(params, "top", hidden * gate)  # the last layer to the scores
    return two_tasks(out + skip)


def _lowered_shapes(program):
    return sorted(
        tuple(e.invars[1].aval.shape)
        for e in program.closed.jaxpr.eqns
        if e.primitive.name == "dot_general" and e.invars[1].aval.dtype != np.float32
    )


def test_sensitive_matmuls_stay_wide():
    shapes = {"w": (8, 4), "gate": (8, 4), "skip": (8, 2), **mlp_params("top", 4, 6, 2)}
    case = Case("ours", spec_of(), split_function(_model, random_params(0, **shapes)))
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    assert len(sensitive_matmuls(plain)) == 3
    for precision in LOWER:
        kept = lower_precision(plain, precision)
        assert _lowered_shapes(kept) == [(4, 6), (8, 4)]
        everything = lower_precision(plain, precision, keep_sensitive=False)
        assert _lowered_shapes(everything) == [(4, 6), (6, 2), (8, 2), (8, 4), (8, 4)]


def test_float32_and_models_without_a_matmul_to_lower():
    case = case_of("deepfm")
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    assert lower_precision(plain, Precision.FLOAT32) is None
    case = case_of("context_ignored")  # one layer
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    assert lower_precision(plain, Precision.INT8) is None


def test_matmuls_of_other_types_are_left_alone():
    case = case_of("experts_of_their_own")  # its gate multiplies bfloat16
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    lowered = lower_precision(plain, Precision.INT8, keep_sensitive=False)
    assert [shape for shape in _lowered_shapes(lowered) if shape == (9, 3)] == [(9, 3)]
    dtypes = {
        e.invars[1].aval.dtype.name
        for e in lowered.closed.jaxpr.eqns
        if e.primitive.name == "dot_general" and e.invars[1].aval.shape == (9, 3)
    }
    assert dtypes == {"bfloat16"}


def test_lowered_weights_are_made_of_weights_alone():
    """No conversion of a weight is left for the row program."""
    case = case_of("mmoe_stacked")
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    for precision in LOWER:
        lowered = lower_precision(plain, precision)
        weights = lowered.weight_vars()
        for equation in lowered.closed.jaxpr.eqns:
            if equation.primitive.name == "dot_general" and equation.invars[0].aval.dtype != np.float32:
                assert len({atom in weights for atom in equation.invars}) == 2
