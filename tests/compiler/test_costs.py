"""What analysis and limits count: matmuls by rate, and what holds a program back."""

import pytest
import shop
from flax import nnx

from xlarank import device
from xlarank.compiler.analyze import Rate, matmuls_of
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.limits import Limit, MachineLimits, measure_limits
from xlarank.compiler.program import Traces
from xlarank.compiler.split import split_module
from xlarank.spec import Bucket, Precision, Signature

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
