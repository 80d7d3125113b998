"""What a model's author gets wrong is told by model, reason, line and remedy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify

from xlarank.bundle import open_bundle
from xlarank.compiler import build_bundle
from xlarank.errors import ModelError, VerifyError
from xlarank.spec import FeatureSpec, ModelSpec, TaskSpec

SPEC = ModelSpec(
    name="pair",
    features=(FeatureSpec(name="x", kind="dense", scope="candidate", width=4),),
    tasks=(TaskSpec(name="like"), TaskSpec(name="buy")),
)

X = {"x": np.ones((2, 4), np.float32)}

LINE = r"\(at .*test_author_errors\.py:\d+ \({}\)\); "


def answer(logits):
    return {"like": logits, "buy": logits}


class Training(linen.Module):
    """Its batch norm takes the batch's own statistics."""

    @linen.compact
    def __call__(self, features):
        return answer(linen.BatchNorm(use_running_average=False)(features["x"]).sum(axis=1))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, features):
        return answer(linen.Dense(1)(features["x"])[:, 0])


class Keyed(nnx.Module):
    def __init__(self):
        self.key = nnx.Variable(jax.random.key(0))

    def __call__(self, features):
        return answer(features["x"].sum(axis=1))


def first_logits(params, features):
    return answer(features["x"] @ params["kernel"])


def applies_training(params, features):
    return Training().apply(params, features)


def applies_without_weights(params, features):
    return Dense().apply({}, features)


def checks(params, features):
    checkify.check(jnp.sum(features["x"]) > 0, "positive")
    return first_logits(params, features)


def makes_zeros(params, features):
    return first_logits(params, features) | {"buy": np.zeros(len(features["x"]), np.float32)}


def counts_in_integers(params, features):
    return first_logits(params, features) | {"buy": (features["x"] > 0).sum(axis=1)}


def narrows(params, features):
    narrow = (features["x"] * 1e6).astype(jnp.float16)
    return answer((narrow - narrow).sum(axis=1).astype(jnp.float32))


def overflows_in_float16(params, features):
    wide = (features["x"] @ params["kernel"])[:, None] * jnp.ones((1, 4))
    return answer((wide @ jnp.full((4, 2), 1e5)) @ jnp.array([1e-6, -1e-6]))


def make_leak(place):
    kept = []

    def leaks(params, features):
        kept.append(features["x"].sum(axis=1))
        return answer(features["x"].sum(axis=1) + place(kept))

    return leaks


class Sowing(nnx.Module):
    """Keeps what its author wants to look at, and with `as_variable` what a served model may not keep."""

    def __init__(self, as_variable=nnx.Intermediate):
        self.as_variable = as_variable
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, features):
        hidden = nnx.relu(self.dense(features["x"]))
        self.sow(self.as_variable, "hidden", hidden)
        return answer(hidden.sum(axis=1))


class Seen(nnx.Variable):
    """A kind of variable of the author's own."""


CALLS = itertools.count(1)


def counts_its_calls(params, features):
    return answer(features["x"] @ params["kernel"] * next(CALLS))


def draws_in_numpy(params, features):
    return answer(features["x"] @ params["kernel"] + np.random.randn())


def shapes_by_params(params, features):
    return answer(features["x"].reshape(-1, params["sizes"]["n"], 2).sum(axis=(1, 2)) * params["kernel"][0])


def bridged(module):
    return nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))


def refuse(tmp_path, model, error, message, params=None, **options):
    if params is None and not isinstance(model, (nnx.Module, linen.Module)):
        params = {"kernel": np.ones(4, np.float32)}
    with pytest.raises(error, match=message):
        build_bundle(model, SPEC, {}, out=tmp_path, params=params, buckets=(4,), tune_seconds=0, **options)


KEY_REMEDY = r"expected numbers, got a key of random numbers, key<\w+>; a score must be the same each time"
KEPT = r"a call may leave nothing for the next one"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            bridged(Training()).lazy_init(X),
            r"ModifyScopeVariableError: .* is immutable\. "
            + LINE.format("__call__")
            + "a served program keeps",
        ),
        (Dense(), r"CallCompactUnbound.*" + LINE.format("__call__") + r"a Linen module .*ToNNX.*lazy_init"),
        (
            bridged(Dense()),
            r"ScopeCollectionNotFound.*" + LINE.format("__call__") + "its weights are missing",
        ),
        (applies_without_weights, r"ScopeCollectionNotFound.*" + LINE.format("__call__") + ".* lazy_init"),
        (Keyed(), "weight 'key': " + KEY_REMEDY),
        (checks, r"checks values with checkify: check at .*_errors\.py:\d+ \(checks\); take it out"),
        (
            makes_zeros,
            r"'buy' as an array \[B\], got ndarray; make it of the features, with jnp; it comes from .*errors"
            r"\.py:\d+ \(makes_zeros\)$",
        ),
        (
            counts_in_integers,
            r"'buy' as floats .* got int32 of shape \[2\]; it comes from reduce_sum at .* \(counts_in_",
        ),
        (
            make_leak(lambda kept: kept[0].sum()),
            r"UnexpectedTracerError: .* global state\. " + LINE.format("<lambda>") + KEPT,
        ),
        (
            make_leak(sum),
            r"\(leaks\)\); this was with 32 rows, and with 2 rows it was traced before: " + KEPT,
        ),
        (
            narrows,
            r"reference score of golden request 0 is nan; expected finite scores; the first operation .* is "
            r"convert_element_type at .*\.py:\d+ \(narrows\), in float16, which ends at 65504\.0: use",
        ),
    ],
)
def test_what_goes_wrong_is_told_with_line_and_remedy(tmp_path, model, message):
    refuse(tmp_path, model, ModelError, r"^model 'pair'.*" + message)


@pytest.mark.parametrize(
    ("model", "operation"), [(counts_its_calls, "mul"), (draws_in_numpy, "add")], ids=["counter", "random"]
)
def test_a_model_that_answers_differently_each_call_is_told_so(tmp_path, model, operation):
    message = (
        r"task 'like': the model gives another answer each call \(a global, np\.random, the time\): called "
        rf"twice with the same rows, its scores differ by [\d.e-]+, first by {operation} at "
        rf".*test_author_errors\.py:\d+ \({model.__name__}\); .* give it as a feature or a weight$"
    )
    refuse(tmp_path, model, ModelError, "^model 'pair', " + message)


def test_a_number_among_params_that_makes_a_shape_is_named(tmp_path):
    params = {"kernel": np.ones(4, np.float32), "sizes": {"n": 2}}
    message = (
        r"^model 'pair' can't be traced: params 'sizes\.n' is a traced weight, and no shape or choice can "
        r"depend on its value \(at .*test_author_errors\.py:\d+ \(shapes_by_params\)\); close over it or use "
        r"functools\.partial"
    )
    refuse(tmp_path, shapes_by_params, ModelError, message, params)


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_what_a_module_sows_is_left_out(tmp_path):
    """It is neither a weight nor a state, however often its author has called the module before."""
    module = Sowing()
    module(X)
    path = build_bundle(module, SPEC, {}, out=tmp_path, buckets=(4,), tune_seconds=0)
    assert open_bundle(path).manifest.params == ("dense.bias", "dense.kernel")
    assert not jax.tree.leaves(nnx.state(module, nnx.Intermediate)), "the reference's too"


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_a_variable_made_by_a_call_is_named_with_its_line(tmp_path):
    message = (
        r"^model 'pair' makes a variable 'hidden.*' when it scores: max at .*test_author_errors\.py:\d+ "
        r"\(.*__call__\); .* nnx\.Intermediate, which is left out$"
    )
    refuse(tmp_path, Sowing(Seen), ModelError, message)


def test_batch_norm_that_trains_is_told_in_a_function_too(tmp_path):
    params = Training().init(jax.random.key(0), X)
    message = LINE.format("__call__") + "a served program keeps no state .* use_running_average=True$"
    refuse(tmp_path, applies_training, ModelError, message, params)


def test_a_key_among_params_is_named(tmp_path):
    params = {"kernel": np.ones(4, np.float32), "key": jax.random.key(0)}
    refuse(tmp_path, first_logits, ModelError, "^model 'pair': weight 'key': " + KEY_REMEDY, params)


def test_float16_that_overflows_is_no_matter_of_the_budget(tmp_path):
    message = (
        r"task 'like', bucket .* float16', over all golden rows: some scores aren't finite; float16 ends at "
        r"65504, and a value in the model is larger: ask for bfloat16 or float32$"
    )
    refuse(tmp_path, overflows_in_float16, VerifyError, message, precision="float16", max_score_error=1.0)
