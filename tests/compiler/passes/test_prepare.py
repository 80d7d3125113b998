"""What depends on the weights alone is prepared once, and what is left gives the same scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import random_params, two_tasks
from jax import lax
from pass_cases import (
    MODELS,
    ZOO,
    case_from,
    case_of,
    compiled,
    fed_by_weights,
    hoisted_of,
    plain_of,
    swept,
)

from xlarank.compiler.passes import Fusion, fuse_experts, lower_precision
from xlarank.compiler.prepare import PreparedArrays, part
from xlarank.compiler.program import run_equations
from xlarank.spec import Precision


def forms_of(case, requests=2):
    """Programs of a model by the name of their form."""
    plain, hoisted = plain_of(case, requests=requests), hoisted_of(case, requests=requests).program
    base = hoisted or plain
    fused = {fusion: fuse_experts(base, fusion) for fusion in list(Fusion)[1:]}
    forms = {"plain": plain, "hoisted": hoisted} | {f"{fusion}": form for fusion, form in fused.items()}
    forms["int8"] = lower_precision(fused[Fusion.EXPERT_MAJOR] or base, Precision.INT8)
    forms["bfloat16"] = lower_precision(base, Precision.BFLOAT16)
    return {name: form for name, form in forms.items() if form is not None}


@pytest.mark.parametrize("name", swept(MODELS))
def test_no_row_program_computes_what_depends_on_weights_alone(name):
    for form, program in forms_of(case_of(name)).items():
        parted = part(program, PreparedArrays(program.weight_avals))
        assert fed_by_weights(parted) == [], form
        assert len(set(parted.keys)) == len(parted.keys), form


SCORED = (
    "bst",
    "feed",
    "indices",
    "linen_wide",
    "merged_batch",
    "mmoe_stacked",
    "ple",
    "programs_in_programs",
)


@pytest.mark.parametrize("name", SCORED)
def test_prepare_and_the_row_program_score_as_the_whole(name):
    case = case_of(name)
    batch = case.batch(8, 2)
    forms = forms_of(case)
    kept = [form for form in forms if name not in ZOO or form in ("wide", "int8")]
    prepared = PreparedArrays(forms["plain"].weight_avals)
    parted = {form: part(forms[form], prepared) for form in kept}
    programs = {form: prepared.program(parted[form].keys) for form in kept}

    def run(*weights):
        scores = {}
        for form in kept:
            arrays = run_equations(programs[form], weights)
            row = run_equations(parted[form].row, [*arrays, *batch.leaves, batch.request_of_row])
            scores[form] = (
                row,
                run_equations(forms[form].closed, [*weights, *batch.leaves, batch.request_of_row]),
            )
        return scores

    for form, (row, whole) in compiled(run, *case.model.params).items():
        np.testing.assert_allclose(row, whole, rtol=2e-5, atol=2e-6, err_msg=form)


def test_arrays_made_one_by_one_are_those_of_the_program():
    case = case_of("mmoe_stacked")
    prepared = PreparedArrays(plain_of(case).weight_avals)
    keys = [key for program in forms_of(case).values() for key in part(program, prepared).keys]
    made = prepared.make(keys, case.model.params)
    for ours, theirs in zip(made, run_equations(prepared.program(keys), case.model.params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def test_new_weights_need_new_arrays_and_no_new_program():
    case = case_of("ple")
    program = fuse_experts(hoisted_of(case).program, Fusion.EXPERT_MAJOR)
    batch = case.batch(8, 2)
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    prepare = prepared.program(parted.keys)
    others = [w * 0.5 + 0.1 for w in case.model.params]
    row = compiled(
        lambda *w: run_equations(
            parted.row, [*run_equations(prepare, w), *batch.leaves, batch.request_of_row]
        ),
        *others,
    )
    whole = compiled(lambda *w: run_equations(program.closed, batch.inputs(w)), *others)
    np.testing.assert_allclose(row, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["deepfm", "din", "mmoe_stacked", "ple", "two_tower"])
def test_buckets_share_the_arrays_of_equal_expressions(name):
    case = case_of(name)
    prepared = PreparedArrays(plain_of(case).weight_avals)
    for make in (plain_of, lambda *bucket: hoisted_of(*bucket).program):
        keys = [set(part(make(case, *bucket), prepared).keys) for bucket in ((8, 2), (64, 2), (64, 4))]
        assert keys[0] == keys[1] == keys[2]
        assert keys[0]


def test_equal_arrays_are_counted_once():
    case = case_of("deepfm")
    prepared = PreparedArrays(plain_of(case).weight_avals)
    programs = plain_of(case), hoisted_of(case).program
    plain, hoisted = (part(program, prepared).keys for program in programs)
    weights = sum(np.asarray(w).nbytes for w in case.model.params)
    assert prepared.num_bytes(plain) <= weights
    assert prepared.num_bytes([*plain, *plain]) == prepared.num_bytes(plain)
    # Hoisted, the first layers' weights are cut in two: as many bytes again, no more.
    assert prepared.num_bytes([*plain, *hoisted]) <= 2 * weights


def test_weights_by_other_constants_are_other_arrays():
    """What a program inside closes over is no part of its text."""
    ones, twos = np.ones(4, np.float32), np.full(4, 2.0, np.float32)

    def model(params, features):
        def scaled(constant):
            inner = jax.jit(lambda x: x * constant)
            return lax.map(inner, params["w"])

        return {"click": features["item"] @ scaled(ones)[:, 0], "buy": features["item"] @ scaled(twos)[:, 0]}

    case = case_from(model, random_params(0, w=(4, 4)))
    program = plain_of(case)
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    assert len(parted.keys) == 2
    one, two = prepared.make(parted.keys, case.model.params)
    np.testing.assert_allclose(2 * one, two, rtol=1e-6)


def test_constants_stay_where_they_cost_nothing():
    """zeros and iota stay in the row program; a big matrix and what is computed of constants are prepared."""
    big = np.arange(4 * 2048, dtype=np.float32).reshape(4, 2048) / 8192

    def model(params, features):
        num_rows = features["item"].shape[0]
        zeros, count = jnp.zeros((num_rows, 2)), jnp.arange(2.0)
        wide = features["item"] @ jnp.asarray(big)
        folded = jnp.sin(jnp.arange(2.0) + 1)  # computed of constants
        return two_tasks(jnp.maximum(wide[:, :2] @ params["w"] + count, zeros) * folded)

    case = case_from(model, random_params(0, w=(2, 2)))
    program = plain_of(case)
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    shapes = sorted(tuple(a.shape) for a in parted.row.in_avals[: len(parted.keys)])
    assert shapes == [(1, 2), (2, 2), (4, 2048)] or shapes == [(2,), (2, 2), (4, 2048)]
    names = [equation.primitive.name for equation in parted.row.jaxpr.eqns]
    assert "iota" in names
    assert "sin" not in names


def test_a_key_of_random_numbers_is_a_constant_like_others():
    key = jax.random.key(5)

    def model(params, features):
        projection = jax.random.normal(key, (4, 2)) + jax.random.normal(jax.random.key(1), (4, 2))
        return two_tasks(features["item"] @ projection * params["w"])

    case = case_from(model, random_params(0, w=(2,)))
    program = plain_of(case)
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    arrays = prepared.make(parted.keys, case.model.params)
    batch = case.batch(8, 2)
    row = run_equations(parted.row, [*arrays, *batch.leaves, batch.request_of_row])
    np.testing.assert_allclose(row, case.answers([batch])[0], rtol=2e-5, atol=2e-6)
    assert not [e for e in parted.row.jaxpr.eqns if "random" in e.primitive.name]


def test_biases_and_masks_repeated_for_every_row_are_not_stored_that_often():
    """A token and positions of the model's own, before the history: prepared once, not once a row."""
    case = case_of("bst")
    program = hoisted_of(case, 64, 2).program
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    prepared_inputs = parted.row.jaxpr.invars[: len(parted.keys)]
    assert all(64 not in var.aval.shape for var in prepared_inputs)
    # They are the same for every request, too: nobody looks up whose row it is.
    looked_up = [e.invars[0] for e in parted.row.jaxpr.eqns if e.primitive.name == "gather"]
    assert looked_up
    assert not set(looked_up) & set(prepared_inputs)
