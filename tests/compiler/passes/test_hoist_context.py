"""What depends on the context alone runs once a request, and no score changes."""

import dataclasses
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from foreign import mlp, mlp_params, random_params, two_tasks
from pass_cases import (
    HALF_PRECISION,
    MODELS,
    ZOO,
    case_from,
    case_of,
    check_hoisted,
    flops_of,
    hoisted_of,
    operations,
    plain_of,
    run_all,
)

from xlarank.spec import Bucket, FeatureSpec, ModelSpec, TaskSpec

BUCKETS = ((8, 1), (64, 4))
MORE_BUCKETS = ((8, 2), (8, 7), (64, 1), (3, 1), (2, 1))  # all for odd models, one in turns for the others
ZOO_BUCKETS = ((8, 1), (8, 3))

# Models that do something else at another row count, or whose rows lie in odd places.
ODD = {
    "all_eight",
    "batch_last",
    "candidate_by_context_index",
    "counts_its_rows",
    "indices",
    "merged_batch",
    "siamese",
    "sorted_experts",
    "squeezes",
}

# Where nothing is computed from the context alone, or what is needs all rows at hand.
NEVER_HOISTED = {"carry_from_candidate", "context_ignored", "crossing_loop"}


def shapes_of(equation):
    return [tuple(atom.aval.shape) for atom in (*equation.invars, *equation.outvars)]


def line_of(function, text):
    """``file:line`` of the line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + i for i, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(function)}:{number} "


# On the oldest interpreter test_end_to_end has `feed`.
ON_THE_OLDEST = {"linen_wide", "loops", "programs_in_programs"}
# Published networks of operations that the odd ones, `ple` and `history_transformer` have between them.
PLAIN = {
    "deepfm",
    "xdeepfm",
    "autoint",
    "masknet",
    "din",
    "bst",
    "gru4rec",
    "mmoe_stacked",
    "two_tower",
    "fibinet",
}
PLAIN |= {"movielens", "dlrm", "dcn_v2"}


def once_or_swept(name):
    """Parameter of a model: on every interpreter, on the newest, or in a sweep."""
    mark = pytest.mark.sweep if name in PLAIN else pytest.mark.once
    return name if name in ON_THE_OLDEST else pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [once_or_swept(name) for name in MODELS])
def test_hoisted_scores_are_those_of_the_authors_model(name):
    case, number = case_of(name), MODELS.index(name)
    more = MORE_BUCKETS if name in ODD else (MORE_BUCKETS[number % len(MORE_BUCKETS)],)
    batches = [case.batch(*bucket) for bucket in (ZOO_BUCKETS if name in ZOO else BUCKETS + more)]
    programs = [(hoisted_of(case, b.bucket.rows, b.bucket.requests).program, b) for b in batches]
    there = [(program, batch) for program, batch in programs if program is not None]
    assert (not there) == (name in NEVER_HOISTED)
    plain = plain_of(case, batches[1].bucket.rows, batches[1].bucket.requests)
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
    programs = [plain_of(case, batch.bucket.rows, batch.bucket.requests), hoisted_of(case, 8, 2).program]
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
    plain = plain_of(case, batch.bucket.rows, batch.bucket.requests)
    hoisted = hoisted_of(case, 64, 1)
    assert hoisted.program is not None
    ours, theirs = (flops_of(case, program, batch) for program in (hoisted.program, plain))
    assert ours < 0.15 * theirs
    # Candidates have a part in the query's projections, the two products of the attention and what follows.
    of_rows = [e for e in operations(hoisted.program) if any(64 in shape for shape in shapes_of(e))]
    once = [e for e in operations(hoisted.program) if e not in of_rows]
    assert len(of_rows) == 6
    assert len(once) >= 9
    assert {name for name, _ in hoisted.hoisted_sources} >= {"dot_general", "exp", "rsqrt", "div"}


def test_target_attention_of_one_request_has_no_batched_matmul_over_rows():
    case = case_of("history_transformer")
    for rows, requests, is_batched in ((64, 1, False), (64, 4, True)):
        program = hoisted_of(case, rows, requests).program
        batches = [
            shapes_of(e)[0][axis] for e in operations(program) for axis in e.params["dimension_numbers"][1][0]
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
        for e in operations(program)
        if e.params["dimension_numbers"][1][0] and {64, 32} & set(sum(shapes_of(e), ())) == set()
    ]
    assert any(shapes_of(e)[2][0] == requests and sorted(shapes_of(e)[2])[-2:] != [] for e in found)


def _twelve(scopes):
    """Twelve features, their scopes in turn, and a perceptron over all of them."""
    spec = ModelSpec(
        name="wide",
        features=[
            FeatureSpec(name=f"f{i}", kind="dense", scope=scope, width=3) for i, scope in enumerate(scopes)
        ],
        tasks=[TaskSpec(name="click"), TaskSpec(name="buy")],
    )

    def model(params, features):
        x = jnp.tanh(jnp.concatenate([features[f"f{i}"] for i in range(12)], axis=1) * 2.0)
        return two_tasks(mlp(params, "top", x) + mlp(params, "other", x))

    sizes = mlp_params("top", 36, 8, 2) | mlp_params("other", 36, 2)
    return case_from(model, random_params(0, **sizes), spec)


def test_neighbours_of_a_kind_are_one_piece():
    case = _twelve(["context"] * 6 + ["candidate"] * 6)
    program = hoisted_of(case, 64, 2).program
    assert sorted(shapes_of(e)[0] for e in operations(program, "tanh")) == [(2, 18), (64, 18)]
    check_hoisted(case, [(64, 2)])


def test_pieces_are_joined_by_kind_before_a_product():
    """Twelve features in turn: one product for the context, one for the candidate."""
    case = _twelve(["context", "candidate"] * 6)
    program = hoisted_of(case, 64, 2).program
    expected = [(2, 18), (2, 18), (64, 8), (64, 18), (64, 18)]
    assert sorted(shapes_of(e)[0] for e in operations(program)) == expected
    wide = [e for e in operations(program) if shapes_of(e)[0][1] == 18]
    assert len({e.invars[0] for e in wide}) == 2, "both layers read the same two arrays, to be fused"
    check_hoisted(case, [(64, 2)])


def test_a_product_over_rows_alone_is_left_alone():
    """In a model whose context is read by one operation at the end the rest is as it was."""

    def model(params, features):
        item = jnp.concatenate([features["item"], features["price"]], axis=1)
        return two_tasks(mlp(params, "top", item) + features["age"][:, :1])

    case = case_from(model, random_params(0, **mlp_params("top", 6, 8, 2)))
    plain = plain_of(case)
    found = hoisted_of(case, 8, 2)
    assert found.program is None
    assert re.fullmatch(
        r"nothing is computed from context features alone before add at .*_context\.py:\d+ \(.*model\): "
        r"add reads the context and the candidate together",
        found.reason,
    )
    assert [e.operation for e in found.expansions] == ["add"]
    assert len(operations(plain)) == 2


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
    order = jnp.argsort(features["user"][:, 0])
    sorted_user = features["user"][order] @ params["w"]  # unknown here
    user = jnp.cos(sorted_user[jnp.argsort(order)])
    return two_tasks(user[:, :2] + features["item"][:, :2])


def test_what_is_computed_anew_for_each_row_is_written_down():
    case = case_from(_recomputed, random_params(0, w=(4, 6)))
    found = hoisted_of(case, 8, 2)
    assert found.program is None, "rows meet in it, and nothing is known of where they part again"
    assert {e.operation for e in found.expansions} == {"gather", "sort"}
    (first,) = [e for e in found.expansions if e.operation == "gather"]
    assert first.source.startswith(line_of(_recomputed, "# unknown here"))
    assert first.shape == (8, 4)
    assert first.reason == "gather is computed for each row: it isn't known to give each the same"


def test_why_the_pass_does_not_apply():
    case = case_of("deepfm")
    assert hoisted_of(case, 8, 8).reason == "every row has a context of its own"
    assert hoisted_of(case, 1, 1).reason == "every row has a context of its own"
    found = hoisted_of(case_of("squeezes"), 2, 1)
    assert found.program is None
    assert re.match(
        r"at 1 row the model does something else than at 2: squeeze at .*foreign_odd.py", found.reason
    )

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
