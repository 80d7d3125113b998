"""What depends on the context alone runs once a request, and no score changes."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import mlp, mlp_params, random_params, spec_of, two_tasks
from jax import lax
from pass_cases import HALF_PRECISION, MODELS, ZOO, Case, case_of, compiled, run_all

from xlarank.compiler.passes import hoist_context
from xlarank.compiler.program import plain_program, run_equations
from xlarank.compiler.split import split_function
from xlarank.compiler.tracing import source_of
from xlarank.spec import Bucket, FeatureSpec, ModelSpec, TaskSpec

BUCKETS = ((8, 1), (8, 2), (8, 7), (64, 1), (64, 4), (3, 1), (2, 1))
ZOO_BUCKETS = ((8, 1), (8, 3))

# Where nothing is computed from the context alone, or what is needs all rows at hand.
NEVER_HOISTED = {"carry_from_candidate", "context_ignored", "crossing_loop"}


def case_from(function, params, spec=None):
    """A model written in a test."""
    return Case("ours", spec or spec_of(), split_function(function, params))


def hoisted_of(case, rows, requests, **options):
    return hoist_context(case.traces, case.signature, Bucket(rows, requests), **options)


def matmuls(program):
    """Matmuls of a program."""
    return [e for e in program.closed.jaxpr.eqns if e.primitive.name == "dot_general"]


def shapes_of(equation):
    return [tuple(atom.aval.shape) for atom in (*equation.invars, *equation.outvars)]


def flops_of(case, program, batch):
    inputs = batch.inputs(case.model.params)
    lowered = jax.jit(lambda *inputs: run_equations(program.closed, inputs)).lower(*inputs)
    return lowered.compile().cost_analysis()["flops"]


def line_of(function, text):
    """``file:line`` of the line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + i for i, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{number} "


@pytest.mark.parametrize("name", MODELS)
def test_hoisted_scores_are_those_of_the_authors_model(name):
    case = case_of(name)
    batches = [case.batch(*bucket) for bucket in (ZOO_BUCKETS if name in ZOO else BUCKETS)]
    programs = [(hoisted_of(case, b.bucket.rows, b.bucket.requests).program, b) for b in batches]
    there = [(program, batch) for program, batch in programs if program is not None]
    assert (not there) == (name in NEVER_HOISTED)
    plain = plain_program(case.traces, case.signature, batches[1].bucket)
    there.append((plain, batches[1]))
    scores, answers = run_all(case, there), case.answers([batch for _, batch in there])
    for (_, batch), ours, theirs in zip(there, scores, answers, strict=True):
        for score, answer in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(score, answer, err_msg=f"{batch.bucket}", **case.tolerance)


@pytest.mark.parametrize("name", sorted(HALF_PRECISION))
def test_a_sum_in_half_precision_is_not_split(name):
    """Its rounding would show: the hoisted program must give what the plain one gives."""
    case = case_of(name)
    batch = case.batch(8, 2)
    programs = [plain_program(case.traces, case.signature, batch.bucket), hoisted_of(case, 8, 2).program]
    plain, hoisted = run_all(case, [(program, batch) for program in programs])
    np.testing.assert_allclose(hoisted, plain, rtol=1e-5, atol=1e-6)


def test_a_mixed_batch_scores_as_each_request_alone():
    case = case_of("history_transformer")
    mixed = case.batch(8, 3)
    programs = [(hoisted_of(case, 8, 3).program, mixed)]
    alone = hoisted_of(case, 8, 1).program
    for request in range(3):
        activations = {
            name: array[request : request + 1] if name in mixed.context_names else array
            for name, array in mixed.activations.items()
        }
        leaves = tuple(
            leaf[request : request + 1] if spec.scope == "context" else leaf
            for leaf, spec in zip(mixed.leaves, _leaf_specs(case), strict=True)
        )
        batch = dataclasses.replace(
            mixed,
            bucket=Bucket(8, 1),
            activations=activations,
            leaves=leaves,
            request_of_row=np.zeros(8, np.int32),
        )
        programs.append((alone, batch))
    together, *apart = run_all(case, programs)
    for request, scores in enumerate(apart):
        rows = mixed.request_of_row == request
        assert rows.any()
        for ours, theirs in zip(together, scores, strict=True):
            np.testing.assert_allclose(ours[rows], theirs[rows], rtol=1e-5, atol=1e-6)


def _leaf_specs(case):
    return (*case.signature.context_leaves, *case.signature.candidate_leaves)


# Work


def test_a_transformer_over_the_history_runs_once_a_request():
    case = case_of("history_transformer")
    batch = case.batch(64, 1)
    plain = plain_program(case.traces, case.signature, batch.bucket)
    hoisted = hoisted_of(case, 64, 1)
    assert hoisted.program is not None
    ours, theirs = (flops_of(case, program, batch) for program in (hoisted.program, plain))
    assert ours < 0.15 * theirs
    # Candidates have a part in the query's projections, the two products of the attention and what follows.
    of_rows = [e for e in matmuls(hoisted.program) if any(64 in shape for shape in shapes_of(e))]
    once = [e for e in matmuls(hoisted.program) if e not in of_rows]
    assert len(of_rows) == 6
    assert len(once) >= 9
    assert {name for name, _ in hoisted.hoisted_sources} >= {"dot_general", "exp", "rsqrt", "div"}


def test_target_attention_of_one_request_has_no_batched_matmul_over_rows():
    case = case_of("history_transformer")
    for rows, requests, is_batched in ((64, 1, False), (64, 4, True)):
        program = hoisted_of(case, rows, requests).program
        batches = [
            shapes_of(e)[0][axis]
            for e in matmuls(program)
            for axis in e.params["dimension_numbers"][1][0]
        ]
        assert (64 in batches) == is_batched


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("name", ["xdeepfm", "autoint"])
def test_interaction_of_fields_keeps_what_is_of_the_context_once_a_request(name, requests):
    """Two fields of four are the context's: their block of the products has Q rows."""
    program = hoisted_of(case_of(name), 64, requests).program
    assert program is not None
    found = [
        e
        for e in matmuls(program)
        if e.params["dimension_numbers"][1][0] and {64, 32} & set(sum(shapes_of(e), ())) == set()
    ]
    assert any(shapes_of(e)[2][0] == requests and sorted(shapes_of(e)[2])[-2:] != [] for e in found)


def test_pieces_are_joined_by_kind_before_a_product():
    """Twelve features in turn: one product for the context, one for the candidate."""
    spec = ModelSpec(
        name="wide",
        features=[
            FeatureSpec(name=f"f{i}", kind="dense", scope=("context", "candidate")[i % 2], width=3)
            for i in range(12)
        ],
        tasks=[TaskSpec(name="click"), TaskSpec(name="buy")],
    )

    def model(params, features):
        x = jnp.concatenate([features[f"f{i}"] for i in range(12)], axis=1)
        return two_tasks(mlp(params, "top", jnp.tanh(x * 2.0)))

    case = case_from(model, random_params(0, **mlp_params("top", 36, 8, 2)), spec)
    program = hoisted_of(case, 64, 2).program
    assert sorted(shapes_of(e)[0] for e in matmuls(program)) == [(2, 18), (64, 8), (64, 18)]
    _check(case, [(64, 2)])


def test_experts_share_the_joined_pieces():
    """Each expert's product reads the same two arrays, so that they can be fused."""
    program = hoisted_of(case_of("ple"), 8, 2).program
    first = [e for e in matmuls(program) if shapes_of(e)[1][0] in (11, 10)]  # user, interests, age; the rest
    assert len({e.invars[0] for e in first}) == 2


def test_a_product_over_rows_alone_is_left_alone():
    """In a model whose context is read by one operation at the end the rest is as it was."""

    def model(params, features):
        item = jnp.concatenate([features["item"], features["price"]], axis=1)
        return two_tasks(mlp(params, "top", item) + features["age"][:, :1])

    case = case_from(model, random_params(0, **mlp_params("top", 6, 8, 2)))
    plain = plain_program(case.traces, case.signature, Bucket(8, 2))
    found = hoisted_of(case, 8, 2)
    assert found.program is None
    assert found.reason == "nothing is computed from context features alone"
    assert [e.operation for e in found.expansions] == ["add"]
    assert len(matmuls(plain)) == 2


# Explanations


def _explained(params, features):
    context = jnp.tanh(features["user"] @ params["w"])
    mixed = context[:, :4] * features["item"]  # expands here
    joined = jnp.concatenate([context, mixed], axis=1) @ params["v"]  # joins here
    return two_tasks(joined)


def test_expansions_name_the_operation_its_line_and_the_bytes():
    case = case_from(_explained, random_params(0, w=(4, 6), v=(10, 2)))
    found = hoisted_of(case, 64, 2)
    first, second = found.expansions
    assert (first.operation, first.shape, first.num_bytes) == ("mul", (64, 4), 64 * 4 * 4)
    assert first.source.startswith(line_of(_explained, "# expands here"))
    assert first.reason == "mul reads the context and the candidate together"
    assert (second.operation, second.shape, second.num_bytes) == ("dot_general", (64, 2), 64 * 2 * 4)
    assert second.source.startswith(line_of(_explained, "# joins here"))
    assert second.reason == "the context's share of dot_general joins the candidate's"
    assert {name for name, _ in found.hoisted_sources} == {"dot_general", "tanh"}


def _recomputed(params, features):
    order = jnp.argsort(features["user"][:, 0])  # unknown here
    sorted_user = features["user"][order] @ params["w"]
    user = jnp.cos(sorted_user[jnp.argsort(order)])
    return two_tasks(user[:, :2] + features["item"][:, :2])


def test_what_is_computed_anew_for_each_row_is_written_down():
    case = case_from(_recomputed, random_params(0, w=(4, 6)))
    found = hoisted_of(case, 8, 2)
    assert found.program is None, "rows meet in it, and nothing is known of where they part again"
    (first, *_) = found.expansions
    assert first.operation == "sort"
    assert first.source.startswith(line_of(_recomputed, "# unknown here"))
    assert first.reason == "sort is computed for each row: it isn't known to give each the same"


def test_why_the_pass_does_not_apply():
    case = case_of("deepfm")
    assert hoisted_of(case, 8, 8).reason == "every row has a context of its own"
    assert hoisted_of(case, 1, 1).reason == "every row has a context of its own"
    found = hoisted_of(case_of("squeezes"), 2, 1)
    assert found.program is None
    assert re.match(r"at 1 row the model does something else than at 2: squeeze at .*foreign_odd.py", found.reason)

    def model(params, features):
        return {"click": features["x"].sum(axis=1)}

    spec = ModelSpec(
        name="plain",
        features=[FeatureSpec(name="x", kind="dense", scope="candidate", width=3)],
        tasks=[TaskSpec(name="click")],
    )
    case = case_from(model, {}, spec)
    assert hoisted_of(case, 8, 1).reason == "the model reads no feature of scope context"


def test_a_model_that_does_something_else_at_one_row_is_served_by_two():
    case = case_of("squeezes")
    found = hoisted_of(case, 8, 1)
    assert found.program is not None
    assert found.reason.endswith("; its context part runs at 2 rows instead")
    assert hoisted_of(case, 8, 2).reason == ""


# Traps


def _check(case, buckets, **options):
    """Hoisted, and the author's answers."""
    batches = [case.batch(*bucket) for bucket in buckets]
    found = [hoisted_of(case, *bucket, **options) for bucket in buckets]
    assert all(f.program is not None for f in found)
    scores = run_all(case, [(f.program, b) for f, b in zip(found, batches, strict=True)])
    for ours, theirs, bucket in zip(scores, case.answers(batches), buckets, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=5e-6, err_msg=str(bucket))
    return found


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
        user = user[: features["user"].shape[0]]
        return two_tasks(user + features["item"][:, :2])

    case = case_from(model, random_params(0, w=(4, 2), bias=(8, 2)))
    _check(case, [(8, 1)])


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
        plain_program(case.traces, case.signature, batch.bucket),
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
    _check(case, [(8, 2)], split_reductions=False)


def test_a_maximum_over_both_scopes_is_exact_in_pieces():
    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"], features["age"]], axis=1)
        return {"click": x.max(axis=1), "buy": x.min(axis=1)}

    case = case_from(model, {}, spec_of(regression=("click", "buy")))
    (found,) = _check(case, [(8, 2)], split_reductions=False)
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
    (found,) = _check(case, [(8, 2)])
    first = matmuls(found.program)[0]
    assert first.params["dimension_numbers"][1] == ((), ())


def test_reductions_and_programs_that_are_no_calls():
    """lax.reduce holds a program too, of two scalars; cond and while stay whole."""

    def model(params, features):
        user = lax.reduce(features["user"], 1.0, lambda a, b: a * b + a, (1,))
        item = lax.reduce(features["item"], 1.0, lambda a, b: a * b + a, (1,))
        user = lax.cond(params["w"][0, 0] > 0, jnp.sin, jnp.cos, user)
        return {"click": user + item, "buy": user * item}

    case = case_from(model, random_params(0, w=(4, 2)))
    _check(case, [(8, 1), (8, 2)])


def test_a_repeated_unused_result_is_no_trouble():
    def model(params, features):
        first = jnp.unstack(features["history"], axis=1)[0]
        last = jnp.unstack(features["history"], axis=1)[-1]
        return two_tasks((first * last) @ params["w"] + features["item"][:, :2])

    _check(case_from(model, random_params(0, w=(4, 2))), [(8, 1), (8, 2)])


def test_the_authors_line_survives_every_pass():
    program = hoisted_of(case_of("deepfm"), 8, 2).program
    sources = {source_of(e) for e in matmuls(program)}
    assert len(sources) >= 3
    assert all("foreign.py" in source for source in sources)


def test_compiled_is_what_jit_computes():
    """The tests' own way to run a program quickly changes nothing."""
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    np.testing.assert_allclose(compiled(lambda a: jnp.tanh(a) @ a.T, x), np.tanh(x) @ x.T, rtol=1e-5, atol=1e-5)


