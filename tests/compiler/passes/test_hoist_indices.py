"""Concatenations that are padded, or read and written at constant indices, stay in pieces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import random_params
from jax import lax
from pass_cases import (
    case_from,
    check_hoisted,
    fed_by_weights,
    flops_of,
    hoisted_of,
    operations,
    plain_of,
    sampled,
    shape_of,
)

from xlarank.compiler.prepare import PreparedArrays, part
from xlarank.spec import FeatureSpec, ModelSpec, TaskSpec

D, NUM_FIELDS, NUM_CONTEXT = 4, 9, 6
WIDTH, NUM_PAIRS = D * NUM_FIELDS, NUM_FIELDS * (NUM_FIELDS - 1) // 2
NAMES = [f"u{i}" for i in range(NUM_CONTEXT)] + [f"c{i}" for i in range(NUM_FIELDS - NUM_CONTEXT)]
MIXED = [NAMES[i] for i in np.random.default_rng(0).permutation(NUM_FIELDS)]
SPEC = ModelSpec(
    name="fields",
    features=[
        FeatureSpec(name=n, kind="dense", scope="context" if n[0] == "u" else "candidate", width=D)
        for n in NAMES
    ],
    tasks=[TaskSpec(name="click")],
)
PARAMS = random_params(0, w=(WIDTH + 13, 128), pairs=(NUM_PAIRS * D, 32), shared=(D, D), v=(128, 1))


def top(params, x):
    return {"click": (jax.nn.relu(x @ params["w"][: x.shape[1]]) @ params["v"])[:, 0]}


def flat(fields):
    return fields.reshape(fields.shape[0], -1)


def of_columns(change):
    """A model that does something to the columns of all fields, the scopes in turn."""
    return lambda params, f: top(params, change(jnp.concatenate([f[n] for n in MIXED], axis=1)))


def of_fields(change):
    return lambda params, f: top(params, flat(change(jnp.stack([f[n] for n in MIXED], axis=1))))


def written_in_place(params, f):
    x = jnp.zeros((f["c0"].shape[0], WIDTH))
    for place, name in enumerate(MIXED):
        x = x.at[:, D * place : D * (place + 1)].set(f[name])
    return top(params, x)


def updated_in_place(params, f):
    x = jnp.zeros((f["c0"].shape[0], NUM_FIELDS, D))
    for place, name in enumerate(MIXED):
        x = lax.dynamic_update_slice(x, f[name][:, None], (0, place, 0))
    return top(params, flat(x))


def field_by_field(params, f):
    x = jnp.zeros((f["c0"].shape[0], NUM_FIELDS, D))
    for place, name in enumerate(MIXED):
        x = x.at[:, place].set(f[name])
    return top(params, flat(x))


def fields_first(params, f):
    fields = jnp.stack([f[n] for n in MIXED], axis=0)
    return top(params, flat(fields.transpose(1, 0, 2)))


def bilinear(params, f):
    fields = jnp.stack([f[n] for n in MIXED], axis=1)
    left, right = np.triu_indices(NUM_FIELDS, 1)
    pairs = flat((fields[:, left] @ params["shared"]) * fields[:, right])
    return {"click": (jax.nn.relu(pairs @ params["pairs"]) @ params["v"][:32])[:, 0]}


def pairs_in_one(params, f):
    pairs = jnp.stack([f[n] for n in MIXED], axis=1)[:, np.stack(np.triu_indices(NUM_FIELDS, 1), axis=1)]
    products = flat(pairs[:, :, 0] * pairs[:, :, 1])
    return {"click": (jax.nn.relu(products @ params["pairs"]) @ params["v"][:32])[:, 0]}


SOME = np.array([3, 8, 2, 1, 7, 6, 0, 4, 5, 5, 4, 4])
PERMUTATION = np.random.default_rng(1).permutation(WIDTH)

MODELS = {
    "all_pairs_in_one": (pairs_in_one, 1.3),
    "bilinear": (bilinear, 1.3),
    "columns_permuted": (of_columns(lambda x: x[:, PERMUTATION]), 1.7),
    "columns_taken": (of_columns(lambda x: jnp.take(jnp.tanh(x), PERMUTATION, axis=1)), 1.7),
    "dynamic_slice": (of_columns(lambda x: lax.dynamic_slice(x, (0, 10), (x.shape[0], WIDTH - 10))), 1.7),
    "fields_by_fields": (of_fields(lambda x: x[:, np.arange(NUM_FIELDS)[::-1].reshape(3, 3)]), 1.7),
    "fields_first": (fields_first, 1.7),
    "fields_picked": (of_fields(lambda x: x[:, SOME]), 1.4),
    "field_by_field": (field_by_field, 1.7),
    "inside_a_field": (of_fields(lambda x: x[:, :, np.array([0, 3, 2, 1])]), 1.7),
    "padded": (of_columns(lambda x: jnp.pad(x, ((0, 0), (0, 13)))), 1.7),
    "padded_and_cut": (of_columns(lambda x: lax.pad(x, 0.5, ((0, 0, 0), (-5, 13, 0)))), 1.7),
    "padded_fields": (of_fields(lambda x: jnp.pad(x[..., :-2], ((0, 0), (0, 0), (1, 1)))), 1.7),
    "updated_in_place": (updated_in_place, 1.7),
    "written_in_place": (written_in_place, 1.7),
}


ON_THE_OLDEST = {
    "bilinear",
    "columns_permuted",
    "dynamic_slice",
    "fields_first",
    "fields_picked",
    "padded_and_cut",
    "updated_in_place",
    "written_in_place",
}
"""One for each operation that an older JAX may write in another way."""


@pytest.mark.parametrize("name", sampled(MODELS, pytest.mark.once, ON_THE_OLDEST))
def test_the_contexts_share_runs_once_a_request(name):
    model, gain = MODELS[name]
    case = case_from(model, PARAMS, SPEC)
    found, _ = check_hoisted(case, [(64, 1), (16, 3)])
    plain = plain_of(case, 64, 1)
    assert flops_of(case, plain, batch := case.batch(64, 1)) > gain * flops_of(case, found.program, batch)
    # However often the kinds take turns, there is one product for each.
    wide = [e for e in operations(found.program) if shape_of(e.outvars[0])[-1] in (128, 32)]
    assert sorted(shape_of(e.outvars[0])[0] for e in wide) == [1, 64]
    parted = part(found.program, PreparedArrays(found.program.weight_avals))
    assert fed_by_weights(parted) == []


def pairs_of_products(params, f):
    fields = jnp.stack([f[n] for n in MIXED], axis=1)
    products = fields @ fields.swapaxes(1, 2)
    lower = products[:, *np.tril_indices(NUM_FIELDS, -1)]
    return {"click": jax.nn.relu(lower @ params["pairs"][:NUM_PAIRS])[:, 0]}


def test_products_of_pairs_of_fields_keep_the_contexts_apart():
    """DLRM's lower triangle, read along two axes: pairs of contexts have one row."""
    case = case_from(pairs_of_products, PARAMS, SPEC)
    _, found = check_hoisted(case, [(64, 1), (16, 3)])
    wide = [e for e in operations(found.program) if shape_of(e.outvars[0])[-1] == 32]
    assert sorted(shape_of(e.invars[0]) for e in wide) == [(3, 15), (16, 21)]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, np.array([0, WIDTH])],  # the last is filled in
        lambda x: jnp.take(x, np.array([0, -WIDTH - 1]), axis=1),
        lambda x: x.at[:, WIDTH:].set(1.0),
        lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))),
        lambda x: lax.dynamic_update_slice(x, x[:, :3] + 1.0, (0, WIDTH)),
        lambda x: x.at[:, np.array([3, 1])].set(x[:, :2]),
        lambda x: x.at[:, 2].add(x[:, 3]),
        lambda x: jnp.concatenate(jnp.split(x, [0, 10], axis=1), axis=1),
        lambda x: lax.dynamic_update_slice(x, x[:, :0], (0, 3)),
        lambda x: lax.pad(x[:, :2], 0.5, ((0, 0, 0), (4, -5, 0))),
    ],
    ids=[
        "out_of_range",
        "before_the_first",
        "nothing",
        "between",
        "beyond_the_end",
        "two_entries",
        "added",
        "no_columns",
        "none_written",
        "more_cropped_than_there_is",
    ],
)
def test_what_no_rule_knows_is_read_whole(change):
    def model(params, f):
        x = change(jnp.tanh(jnp.concatenate([f[n] for n in MIXED], axis=1)))
        return {"click": jnp.where(jnp.isnan(x), 1.0, x).sum(axis=1)}

    check_hoisted(case_from(model, PARAMS, SPEC), [(8, 1), (8, 3)])


def _ends_all(params, f):
    x = jnp.concatenate([f[n] for n in MIXED], axis=1)
    return top(params, jnp.sort(x, axis=1))  # read whole


def test_the_reason_names_what_reads_a_concatenation_whole():
    found = hoisted_of(case_from(_ends_all, PARAMS, SPEC), 64, 1)
    assert found.program is None
    said = r"nothing is computed from context features alone before sort at \S*test_hoist_indices\.py:\d+ "
    assert re.match(said + r"\(_ends_all\): the concatenation is read as a whole by sort", found.reason)
