"""Sibling matmuls are found in any model, merged in three ways, and no score changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import mlp, mlp_params, random_params, two_tasks
from jax import lax
from pass_cases import MODELS, case_from, case_of, hoisted_of, operations, plain_of, run_all, shape_of, swept

from xlarank.compiler.passes import Fusion, fuse_experts, siblings_of
from xlarank.compiler.passes.siblings import without_repeats

MERGED = (Fusion.WIDE, Fusion.ROW_MAJOR, Fusion.EXPERT_MAJOR)


def of_rows(program, name):
    """Operations that read more than weights."""
    weights = program.weight_vars()
    return [e for e in operations(program, name) if e.outvars[0] not in weights]


def check(case, forms, plain=None):
    batch = case.batch(8, 2)
    programs = [plain_of(case) if plain is None else plain, *forms]
    expected, *scores = run_all(case, [(program, batch) for program in programs])
    for score in scores:
        np.testing.assert_allclose(score, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", swept(MODELS))
def test_every_form_scores_as_the_plain_program(name):
    case = case_of(name)
    bases = [program for program in (plain_of(case), hoisted_of(case).program) if program is not None]
    forms = [fuse_experts(base, fusion) for base in bases for fusion in MERGED]
    forms = [form for form in forms if form is not None]
    if forms:
        check(case, forms, bases[0])
    else:
        assert not any(siblings_of(base) for base in bases)


def test_siblings_are_found_by_what_they_do():
    groups = siblings_of(plain_of(case_of("ple")))
    # First layers of six experts, their second, those of the next level by what they read, gates, towers.
    found = sorted((len(g), shape_of(g[0].outvars[0])) for g in groups)
    assert (6, (8, 8)) in found
    assert (6, (8, 6)) in found
    assert (2, (8, 4)) in found
    groups = siblings_of(plain_of(case_of("feed")))
    assert {len(g) for g in groups} >= {2, 4}  # two tasks, four experts
    assert siblings_of(plain_of(case_of("din"))) == []


def test_experts_that_join_their_own_inputs_are_siblings():
    case = case_of("experts_of_their_own")
    program = plain_of(case)
    assert len({e.invars[0] for e in operations(program) if shape_of(e.invars[1]) == (13, 6)}) == 3
    assert [len(g) for g in siblings_of(program)] == [3, 3]
    wide = fuse_experts(program, Fusion.WIDE)
    assert [shape_of(e.invars[1]) for e in operations(wide) if shape_of(e.invars[0]) == (8, 13)] == [(13, 18)]


def test_repeats_are_computed_once_unless_constants_inside_differ():
    def model(params, features):
        def shifted(constant):
            inner = jax.jit(lambda x: x + constant)
            return lax.map(inner, features["item"])

        one, same, other = (shifted(c) for c in (_ONES, _ONES, _TWOS))
        return two_tasks((one * same + other) @ params["w"])

    case = case_from(model, random_params(0, w=(4, 2)))
    program = plain_of(case)
    assert len(operations(program, "scan")) == 3
    assert len(operations(without_repeats(program), "scan")) == 2
    check(case, [without_repeats(program)])


_ONES, _TWOS = np.ones(4, np.float32), np.full(4, 2.0, np.float32)


def test_experts_with_other_constants_inside_are_no_siblings():
    def model(params, features):
        def expert(weight, constant):
            inner = jax.jit(lambda x: x * constant)
            return lax.map(inner, jnp.tanh(features["item"] @ weight))

        experts = [expert(params[f"w{i}"], c) for i, c in enumerate((_ONES, _TWOS))]
        return {"click": experts[0].sum(axis=1), "buy": experts[1].sum(axis=1)}

    case = case_from(model, random_params(0, w0=(4, 4), w1=(4, 4)))
    check(case, [fuse_experts(plain_of(case), fusion) for fusion in MERGED])


def _gated(params, features):
    """Two experts and a gate of one shape: they differ in what becomes of them."""
    x = jnp.concatenate([features["user"], features["item"]], axis=1)
    experts = [jnp.tanh(x @ params[f"e{i}"]) for i in range(2)]
    gate = jax.nn.softmax(x @ params["gate"])
    mixed = jnp.einsum("bed,be->bd", jnp.stack(experts, axis=1), gate)
    return two_tasks(mlp(params, "top", mixed))


def _gated_params():
    return random_params(0, e0=(8, 2), e1=(8, 2), gate=(8, 2), **mlp_params("top", 2, 4, 2))


@pytest.mark.parametrize("fusion", MERGED)
def test_gates_are_kept_apart_from_experts(fusion):
    """Joined with a gate, which a lower precision leaves alone, experts would be left alone too."""
    case = case_from(_gated, _gated_params())
    program = plain_of(case)
    assert [len(g) for g in siblings_of(program)] == [2]
    fused = fuse_experts(program, fusion)
    first = [e for e in operations(fused) if 8 in shape_of(e.invars[0])[-1:]]
    assert sorted(shape_of(e.outvars[0])[-1] for e in first)[0] == 2, "the gate's own"
    assert len(first) == 2
    check(case, [fused], program)


def test_wide_takes_weights_of_any_shape_on_either_side():
    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        heads = [jnp.einsum("bd,dhe->bhe", x, params[n]) for n in ("q", "k")]
        transposed = [jnp.tanh(params[n] @ x.T) for n in ("a", "b")]  # [N, B]
        tail = sum(h.sum(axis=2) for h in heads)[:, :2] + (transposed[0] * transposed[1][:2]).T
        return two_tasks(jnp.sin(tail) @ params["out"])

    shapes = {"q": (8, 2, 3), "k": (8, 2, 4), "a": (2, 8), "b": (5, 8), "out": (2, 2)}
    case = case_from(model, random_params(0, **shapes))
    wide = fuse_experts(plain_of(case), Fusion.WIDE)
    # the products are summed over one axis: einsum and @ put the weights to either side
    widths = sorted(max(shape_of(e.outvars[0])) for e in operations(wide))
    assert widths == [8, 8, 14]
    assert {7, 14} <= {size for e in operations(wide) for size in shape_of(e.outvars[0])}
    check(case, [wide])


@pytest.mark.parametrize("fusion", [Fusion.ROW_MAJOR, Fusion.EXPERT_MAJOR])
def test_experts_stacked_again_are_not_taken_apart_in_between(fusion):
    """A gate's mixture reads the merged array as it is, or a few slices of it where it reads some experts."""
    fused = fuse_experts(plain_of(case_of("ple")), fusion)
    assert of_rows(plain_of(case_of("ple")), "stack")
    assert of_rows(fused, "stack") == []
    plain_slices = len(of_rows(plain_of(case_of("ple")), "slice"))  # features out of their leaf
    assert len(of_rows(fused, "slice")) <= plain_slices + 6
    case = case_from(_gated, _gated_params())
    mixture = fuse_experts(plain_of(case), fusion)
    assert of_rows(mixture, "stack") == []
    assert len(of_rows(mixture, "slice")) == len(of_rows(plain_of(case), "slice"))


def test_row_major_and_expert_major_put_the_experts_axis_where_they_say():
    case = case_of("experts_of_their_own")
    for fusion, shape in ((Fusion.ROW_MAJOR, (8, 3, 4)), (Fusion.EXPERT_MAJOR, (3, 8, 4))):
        fused = fuse_experts(plain_of(case), fusion)
        shapes = [shape_of(e.outvars[0]) for e in operations(fused, "add")]
        assert shape in shapes


def test_chains_run_as_one_through_what_lies_between():
    """Relu, layer norm and a scan between two matmuls of each expert."""

    def expert(params, number, x):
        x = jax.nn.relu(x @ params["w1"][number] + params["b"][number])
        x = x - x.mean(axis=1, keepdims=True)
        x, _ = lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)
        return x @ params["w2"][number]

    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        return two_tasks(sum(expert(params, n, x) for n in range(3)))

    shapes = {"w1": (3, 8, 5), "b": (3, 5), "w2": (3, 5, 2)}
    case = case_from(model, random_params(0, **shapes))
    for base in (plain_of(case), hoisted_of(case).program):
        fused = [fuse_experts(base, fusion) for fusion in MERGED[1:]]
        assert all(len(operations(f)) == len(operations(base)) / 3 for f in fused)
        assert all(len(operations(f, "scan")) == 1 for f in fused)
        check(case, fused)


@pytest.mark.parametrize("fusion", [Fusion.ROW_MAJOR, Fusion.EXPERT_MAJOR])
def test_operations_between_that_repeat_no_axis(fusion):
    """select_n and clamp take operands of one shape; a number an expert is no vector of its columns."""

    def expert(params, number, x):
        x = x @ params["w1"][number]
        x = jnp.where(x > params["low"], x * params["slope"][number], params["bias"])
        x = lax.clamp(jnp.float32(-1.0), x, jnp.float32(2.0)) + params["b"][number]
        return jnp.where(params["b"][number] > 0, x, -x) @ params["w2"][number]

    def model(params, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        return two_tasks(sum(expert(params, n, x) for n in range(3)))

    shapes = {"w1": (3, 8, 5), "b": (3, 5), "w2": (3, 5, 2), "slope": (3,), "low": (), "bias": (5,)}
    case = case_from(model, random_params(0, **shapes))
    for base in (plain_of(case), hoisted_of(case).program):
        fused = fuse_experts(base, fusion)
        assert len(operations(fused)) == len(operations(base)) / 3
        check(case, [fused], base)


def test_siblings_of_different_operands_are_left_alone():
    def model(params, features):
        one = jnp.tanh(features["user"] @ params["a"])
        two = jnp.tanh(features["item"] @ params["b"])
        return two_tasks(one * two)

    case = case_from(model, random_params(0, a=(4, 2), b=(4, 2)))
    assert siblings_of(plain_of(case)) == []
    assert [fuse_experts(plain_of(case), fusion) for fusion in Fusion] == [None] * 4
