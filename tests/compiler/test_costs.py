"""What analysis and limits count: matmuls by rate, and what holds a program back."""

import jax
import numpy as np
import pytest
import shop
from flax import nnx

from xlarank import device
from xlarank.compiler import random_requests
from xlarank.compiler.analyze import analyze, matmuls_of
from xlarank.compiler.costs import Rate
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.limits import Limit, MachineLimits, measure_limits
from xlarank.compiler.program import Traces, plain_program
from xlarank.compiler.split import split_function, split_module
from xlarank.spec import Bucket, FeatureSpec, ModelSpec, Precision, Signature, TaskSpec

CONTEXT, CANDIDATE, HIDDEN, TASKS = 1 + 8, 8 + 5 + 2, 32, 2


@pytest.fixture(scope="module")
def forms():
    traces = Traces(split_module(shop.Shop(rngs=nnx.Rngs(0))), shop.SPEC)
    return FormMaker(traces, Signature.of_model(shop.SPEC))


def flops_by_rate(program):
    flops = dict.fromkeys(Rate, 0.0)
    for matmul in matmuls_of(program):
        assert "shop.py:" in matmul.source
        flops[matmul.rate] += matmul.flops
    return flops


@pytest.mark.parametrize(("rows", "requests"), [(64, 1), (64, 2)])
def test_hoisting_moves_the_context_s_share_from_once_a_row_to_once_a_request(forms, rows, requests):
    bucket = Bucket(rows, requests)
    plain = flops_by_rate(forms.program(bucket, PLAIN))
    hoisted = flops_by_rate(forms.program(bucket, Form(hoisted=True)))
    last = 2 * rows * HIDDEN * TASKS
    assert plain == {
        Rate.WEIGHTS: 0,
        Rate.REQUEST: 0,
        Rate.ROW: 2 * rows * (CONTEXT + CANDIDATE) * HIDDEN + last,
    }
    assert hoisted == {
        Rate.WEIGHTS: 0,
        Rate.REQUEST: 2 * requests * CONTEXT * HIDDEN,
        Rate.ROW: 2 * rows * CANDIDATE * HIDDEN + last,
    }


def test_a_lowered_matmul_shows_its_format_and_the_bytes_of_its_weights(forms):
    bucket = Bucket(64, 1)
    wide = matmuls_of(forms.program(bucket, PLAIN))
    low = matmuls_of(forms.program(bucket, Form(precision=Precision.INT8)))
    assert [m.shapes.endswith("int8") for m in low] == [True, False], "the last before a score stays"
    assert low[0].weight_bytes * 4 == wide[0].weight_bytes == 4 * (CONTEXT + CANDIDATE) * HIDDEN


LOOPS = ModelSpec(
    name="loops",
    features=(
        FeatureSpec(name="user", kind="dense", scope="context", width=6),
        FeatureSpec(name="item", kind="dense", scope="candidate", width=6),
    ),
    tasks=(TaskSpec(name="like"),),
)


def costs(function, rows=8, **params):
    weights = {name: np.ones(shape, np.float32) for name, shape in params.items()}
    traces = Traces(split_function(function, weights), LOOPS)
    return plain_program(traces, Signature.of_model(LOOPS), Bucket(rows, 1))


def stacked(params, features):
    """Three layers, [3, 6, 6], under a scan in which another runs a constant layer twice."""

    @jax.jit
    def layer(x, kernel):
        x = jax.lax.fori_loop(0, 2, lambda _, x: x @ params["same"], x)
        return x @ kernel, None

    return {"like": jax.lax.scan(layer, features["item"], params["layers"])[0].sum(axis=1)}


def test_matmuls_in_scans_count_for_every_step_and_stacked_weights_once_a_layer():
    same, layers = matmuls_of(costs(stacked, layers=(3, 6, 6), same=(6, 6)))
    assert (same.count, layers.count) == (6, 3)
    assert (same.flops, layers.flops) == (6 * 2 * 8 * 36, 3 * 2 * 8 * 36)
    assert (same.weight_bytes, layers.weight_bytes) == (36 * 4, 3 * 36 * 4)
    assert same.shapes == "[8, 6] @ [6, 6], 6 times in a loop"
    assert {same.rate, layers.rate} == {Rate.ROW}


def test_a_loop_over_weights_alone_runs_when_they_are_loaded():
    def powers(params, features):
        kernel, _ = jax.lax.scan(lambda kernel, _: (kernel @ params["w"], None), params["w"], None, length=4)
        return {"like": (features["item"] @ kernel).sum(axis=1)}

    powers, applied = matmuls_of(costs(powers, w=(6, 6)))
    assert (powers.rate, powers.count, powers.flops) == (Rate.WEIGHTS, 4, 4 * 2 * 6 * 36)
    assert (applied.rate, applied.count, applied.weight_bytes) == (Rate.ROW, 1, 144)


def test_a_while_loop_counts_once_and_says_so():
    def halves(params, features):
        x = jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ params["w"], features["item"])
        return {"like": x.sum(axis=1)}

    (matmul,) = matmuls_of(costs(halves, w=(6, 6)))
    assert (matmul.count, matmul.flops, matmul.weight_bytes) == (1, 2 * 8 * 36, 144)
    assert matmul.shapes == "[8, 6] @ [6, 6], in a while loop of unknown trip count, counted once"


def test_of_a_condition_the_dearer_branch_counts():
    def chooses(params, features):
        x = jax.lax.cond(params["on"] > 0, lambda x: x @ params["w"], lambda x: x, features["item"])
        return {"like": x.sum(axis=1)}

    (matmul,) = matmuls_of(costs(chooses, w=(6, 6), on=()))
    assert (matmul.count, matmul.flops) == (1, 2 * 8 * 36)


def test_a_convolution_counts_its_window_and_the_features_of_a_group():
    def convolves(params, features):
        x = features["item"].reshape(-1, 3, 2)  # [B, 3, 2]
        x = jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )  # [B, 3, 4]
        return {"like": x.sum(axis=(1, 2))}

    (matmul,) = matmuls_of(costs(convolves, w=(3, 1, 4)))
    assert matmul.flops == 2 * 8 * 3 * 4 * 3
    assert matmul.weight_bytes == 3 * 4 * 4


def test_the_analysis_holds_what_loops_do():
    traces = Traces(
        split_function(
            stacked, {"layers": np.ones((3, 6, 6), np.float32), "same": np.ones((6, 6), np.float32)}
        ),
        LOOPS,
    )
    found = analyze(traces, Signature.of_model(LOOPS), random_requests(LOOPS, 1))
    assert sum(matmul.flops for matmul in found.matmuls) == (6 + 3) * 2 * 36
    assert 1 <= found.elementwise_flops < 100


def test_the_limit_is_what_takes_longest_at_best():
    limits = MachineLimits(flops_a_second=1e9, bytes_a_second=1e8, launch_seconds=1e-5, lower_gain={})
    cost = device.ProgramCost
    assert limits.limit_of(cost(2e6, 1e4)) == (Limit.ARITHMETIC, 2e-3)
    assert limits.limit_of(cost(1e3, 1e6)) == (Limit.MEMORY, 1e-2)
    assert limits.limit_of(cost(1e3, 1e2)) == (Limit.LAUNCH, 1e-5)


def test_a_device_s_limits_are_measured_in_every_precision():
    limits = measure_limits(device.devices()[0])
    assert limits.flops_a_second > 1e8
    assert limits.bytes_a_second > 1e7
    assert 0 < limits.launch_seconds < 1
    assert set(limits.lower_gain) == {"bfloat16", "int8"}, "what this device may lower to"
