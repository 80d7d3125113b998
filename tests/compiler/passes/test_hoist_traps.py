"""Traps that a pass over other people's models falls into, one a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import random_params, spec_of, two_tasks
from jax import lax
from pass_cases import case_from, case_of, check_hoisted, compiled, hoisted_of, operations, plain_of, run_all

from xlarank.compiler.program import run_equations
from xlarank.compiler.tracing import source_of
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
