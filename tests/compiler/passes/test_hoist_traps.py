"""Traps that a pass over other people's models falls into, one a test."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import random_params, spec_of, two_tasks
from jax import lax
from pass_cases import case_from, case_of, check_hoisted, compiled, hoisted_of, operations, plain_of, run_all

from xlarank.compiler import random_requests, reference_scores
from xlarank.compiler.program import run_equations
from xlarank.compiler.tracing import nested_equations, source_of
from xlarank.spec import FeatureSpec, ModelSpec, TaskSpec


def test_padding_of_contexts_repeats_a_valid_one():
    """At one request the context part runs at two rows; a row of zeros would divide by zero."""

    def model(params, features):
        user = jnp.atleast_2d(jnp.squeeze(features["user"]))  # something else at one row
        user = user / jnp.sum(jnp.abs(user), axis=1, keepdims=True)
        return two_tasks(jnp.log(jnp.abs(user @ params["w"])) + features["item"][:, :2])

    case = case_from(model, random_params(0, w=(4, 2)))
    program = hoisted_of(case, 4, 1).program
    with jax.debug_nans(True), jax.debug_infs(True):
        run_equations(program.closed, case.batch(4, 1).inputs(case.model.params))


def test_a_parameter_of_as_many_rows_as_the_batch_stays_with_its_rows():
    """At 8 rows each has a bias of its own; at one row the same line gives eight rows."""

    def model(params, features):
        user = jnp.tanh(features["user"] @ params["w"]) + params["bias"]
        user = lax.slice_in_dim(user, 0, features["user"].shape[0])
        return two_tasks(user + features["item"][:, :2])

    case = case_from(model, random_params(0, w=(4, 2), bias=(8, 2)))
    check_hoisted(case, [(8, 1)])


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_fast_variance_is_as_good_as_the_plain_programs(offset):
    """E[x²] - E[x]² of numbers far from zero: another order of adding up must not make it worse."""

    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"], features["age"]], axis=1) + offset
        mean = x.mean(axis=1, keepdims=True)
        variance = jnp.maximum((x * x).mean(axis=1, keepdims=True) - mean * mean, 0.0)
        return two_tasks(((x - mean) * lax.rsqrt(variance + 1e-6))[:, :2])

    case = case_from(model, {}, spec_of(regression=("click", "buy")))
    batch = case.batch(64, 2)
    programs = [
        plain_of(case, 64, 2),
        hoisted_of(case, 64, 2).program,
        hoisted_of(case, 64, 2, split_reductions=False).program,
    ]
    f = {name: array.astype(np.float64) for name, array in batch.repeated().items()}
    x = np.concatenate([f["user"], f["item"], f["age"]], axis=1) + offset
    exact = ((x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6))[:, :2].T
    there = [(program, batch) for program in programs if program is not None]
    plain, split, *_ = (np.abs(np.asarray(s) - exact).max() for s in run_all(case, there))
    assert split <= 4 * plain + 1e-5


def test_a_sum_over_both_scopes_stays_whole_when_asked():
    case = case_of("fast_variance")
    split, whole = (hoisted_of(case, 8, 2, split_reductions=s) for s in (True, False))

    def widths(found):
        return sorted(
            tuple(e.invars[0].aval.shape)
            for e in found.program.closed.jaxpr.eqns
            if e.primitive.name == "reduce_sum"
        )

    assert widths(split) == [(2, 11), (2, 11), (8, 8), (8, 8)]
    assert widths(whole) == [(8, 19), (8, 19)]
    check_hoisted(case, [(8, 2)], split_reductions=False)


def test_a_maximum_over_both_scopes_is_exact_in_pieces():
    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"], features["age"]], axis=1)
        return {"click": x.max(axis=1), "buy": x.min(axis=1)}

    case = case_from(model, {}, spec_of(regression=("click", "buy")))
    (found,) = check_hoisted(case, [(8, 2)], split_reductions=False)
    assert {name for name, _ in found.hoisted_sources} == {"reduce_max", "reduce_min"}


def test_weights_repeated_for_every_row_multiply_without_a_batch_axis():
    """A learnt query over the candidate's own rows is no batched matmul, whatever the number of requests."""
    spec = ModelSpec(
        name="pooled",
        features=[
            FeatureSpec(name="x", kind="dense", scope="candidate", width=12),
            FeatureSpec(name="u", kind="dense", scope="context", width=2),
        ],
        tasks=[TaskSpec(name="click"), TaskSpec(name="buy")],
    )

    def model(params, features):
        keys = features["x"].reshape(-1, 3, 4)
        query = jnp.broadcast_to(params["query"], (keys.shape[0], 4))
        weights = jax.nn.softmax(jnp.einsum("bd,bkd->bk", query, keys), axis=1)
        pooled = jnp.einsum("bk,bkd->bd", weights, keys)
        return two_tasks(pooled[:, :2] + jnp.sin(features["u"]))

    case = case_from(model, random_params(0, query=(4,)), spec)
    (found,) = check_hoisted(case, [(8, 2)])
    first = operations(found.program)[0]
    assert first.params["dimension_numbers"][1] == ((), ())


@pytest.mark.parametrize("order", ["hbe,hble->hbl", "hble,hbe->hbl", "bhe,bhle->bhl", "bhle,bhe->bhl"])
def test_attention_finds_its_rows_whichever_axis_and_side_they_are_on(order):
    def model(params, features):
        target = order.replace("l", "").split(",")[0]
        query = jnp.einsum(f"bd,hde->{target}", features["item"], params["q"])
        keys = jnp.einsum(f"bld,hde->{target[:2]}le", features["history"], params["k"])
        pair = (query, keys) if "l" not in order.split(",")[0] else (keys, query)
        logits = jnp.einsum(order, *pair)
        logits = jnp.moveaxis(logits, target.index("b"), 0)
        return two_tasks(jnp.tanh(logits).sum(axis=2) @ params["out"])

    case = case_from(model, random_params(0, q=(3, 4, 2), k=(3, 4, 2), out=(3, 2)))
    one, _ = check_hoisted(case, [(8, 1), (8, 2)])
    batched = [e.params["dimension_numbers"][1] for e in operations(one.program)]
    assert max(len(axes[0]) for axes in batched) == 1, "heads alone"


def test_reductions_and_programs_that_are_no_calls():
    """lax.reduce holds a program too, of two scalars; cond and while stay whole."""

    def model(params, features):
        user = lax.reduce(features["user"], 1.0, lambda a, b: a * b + a, (1,))
        item = lax.reduce(features["item"], 1.0, lambda a, b: a * b + a, (1,))
        user = lax.cond(params["w"][0, 0] > 0, jnp.sin, jnp.cos, user)
        return {"click": user + item, "buy": user * item}

    case = case_from(model, random_params(0, w=(4, 2)))
    check_hoisted(case, [(8, 1), (8, 2)])


def test_a_repeated_unused_result_is_no_trouble():
    def model(params, features):
        first = jnp.unstack(features["history"], axis=1)[0]
        last = jnp.unstack(features["history"], axis=1)[-1]
        return two_tasks((first * last) @ params["w"] + features["item"][:, :2])

    check_hoisted(case_from(model, random_params(0, w=(4, 2))), [(8, 1), (8, 2)])


def test_the_authors_line_survives_every_pass():
    program = hoisted_of(case_of("deepfm"), 8, 2).program
    sources = {source_of(e) for e in operations(program)}
    assert len(sources) >= 3
    assert all("foreign.py" in source for source in sources)


def test_compiled_is_what_jit_computes():
    """The tests' own way to run a program quickly changes nothing."""
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    np.testing.assert_allclose(
        compiled(lambda a: jnp.tanh(a) @ a.T, x), np.tanh(x) @ x.T, rtol=1e-5, atol=1e-5
    )


def narrow(x, weight):
    """A matmul whose author asks for less than float32; a CPU doesn't even have it."""
    return jnp.dot(x, weight, precision="TF32_TF32_F32")


def in_scan(weight, x, history):
    return lax.scan(lambda h, step: (jnp.tanh(narrow(h, weight) + step), None), x, history.swapaxes(0, 1))[0]


def in_fori_loop(weight, x, history):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(narrow(h, weight) + history[:, i]), x)


def in_while(weight, x, history):
    start = narrow(history[:, 0], weight) + x, 0.0

    def step(state):
        return jnp.tanh(narrow(state[0], weight)), state[1] + narrow(weight, weight).sum() ** 2 + 1.0

    return lax.while_loop(lambda state: narrow(weight, weight).sum() ** 2 + state[1] < 3.0, step, start)[0]


def in_cond(weight, x, history):
    branches = [lambda x: narrow(x, weight), lambda x: lax.map(lambda row: narrow(row, weight), x)]
    return lax.cond(weight[0, 0] > 0, *branches, x) + history[:, 0]


def in_a_jitted_map(weight, x, history):
    return jax.jit(lambda x: lax.map(lambda row: narrow(row, weight), x))(history).sum(axis=1) + x


def in_convolution(weight, x, history):
    def step(h, _):
        return lax.conv_general_dilated(
            h, weight[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), precision="default"
        ), None

    return lax.scan(step, history, None, length=2)[0].sum(axis=1) + x


@pytest.mark.parametrize(
    "loop",
    [in_scan, in_fori_loop, in_while, in_cond, in_a_jitted_map, in_convolution],
    ids=lambda f: f.__name__,
)
def test_float32_is_float32_in_loops_and_branches_too(loop):
    """Whatever the author asks for: in the row programs, in what is exported, and in the reference."""

    def model(params, features):
        found = [loop(params["w"], features[name], features["history"]) for name in ("user", "item")]
        return two_tasks(narrow(found[0] + found[1], params["v"]))

    case = case_from(model, random_params(0, w=(4, 4), v=(4, 2)))
    hoisted = hoisted_of(case, 8, 2).program
    for program in (plain_of(case), hoisted):
        found = [
            (depth, e.params["precision"])
            for e, depth in nested_equations(program.closed.jaxpr)
            if "precision" in e.params
        ]
        assert max(depth for depth, _ in found) > 0
        assert {precision for _, precision in found} == {(lax.Precision.HIGHEST,) * 2}
        batch = case.batch(8, 2)
        text = jax.jit(lambda *i, p=program: run_equations(p.closed, i)).lower(
            *batch.inputs(case.model.params)
        )
        lines = [
            line
            for line in text.as_text().splitlines()
            if re.search(r"stablehlo\.(dot_general|convolution)", line)
        ]
        assert lines
        assert all(line.count("HIGHEST") == 2 for line in lines), lines
    requests = random_requests(case.spec, 2, num_candidates=3)
    tables = {"items": np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)}
    # Without the mend the CPU refuses the matmul that the author wrote.
    scores = reference_scores(case.model.reference, case.spec, tables, requests)
    assert all(np.isfinite(score).all() for score in scores["click"])


def test_a_matmul_that_asks_for_less_is_true_float32_in_the_reference():
    def model(params, features):
        return two_tasks(narrow(features["user"], params["w"]) + features["item"][:, :2])

    def exact(params, features):
        return two_tasks(features["user"] @ params["w"] + features["item"][:, :2])

    requests = random_requests(spec_of(), 2, num_candidates=3)
    tables = {"items": np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)}
    params = random_params(0, w=(4, 2))
    found, expected = (
        reference_scores(case_from(function, params).model.reference, spec_of(), tables, requests)
        for function in (model, exact)
    )
    for ours, theirs in zip(found["buy"], expected["buy"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
