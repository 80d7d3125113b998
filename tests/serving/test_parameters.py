"""Request parameters: what reaches the engine, what comes back, what is refused."""

import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype
from xlarank_serving.arrival import Arrival
from xlarank_serving.parameters import read_parameters
from xlarank_serving.parsing import InferMessage
from xlarank_serving.service import InferenceService
from xlarank_serving.top_k import TopK

from xlarank.errors import DeadlineError, RequestError
from xlarank.spec import RequestOptions, TaskSpec


def with_parameters(wire, request, **parameters):
    """A parameter's kind is told by its value: int64, bool, string or double; (kind, value) says it."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        kind, value = value if isinstance(value, tuple) else (kinds[type(value)], value)
        setattr(request.parameters[name], kind, value)
    return request


def parameters_of(wire, **parameters):
    return with_parameters(wire, wire.messages.ModelInferRequest(), **parameters).parameters


def options_of(serving, wire, **parameters):
    serving.infer(with_parameters(wire, wire.raw(**wire.valid(2)), **parameters))
    return serving.engine.options[-1]


def test_a_request_without_parameters_has_the_default_options_but_for_the_callers_deadline(serving, wire):
    options = options_of(serving, wire)
    assert (options.priority, options.affinity_key) == (RequestOptions().priority, None)
    assert 0 < options.deadline - time.monotonic() <= 10  # the channel's timeout
    serving.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=wire.messages.ModelInferRequest.SerializeToString,
    )(wire.raw(**wire.valid(1)))
    last = serving.engine.options[-1]
    assert options.arrived_at < last.arrived_at <= time.monotonic()
    assert last == RequestOptions(arrived_at=last.arrived_at)


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (1, 1),
        (4, 4),
        (("uint64_param", 3), 3),
        (0, 2),
        (5, 2),
        (-1, 2),
        (("uint64_param", 2**64 - 1), 2),
    ],
)
def test_priority_reaches_the_engine_and_is_the_default_out_of_range(serving, wire, sent, got):
    assert options_of(serving, wire, priority=sent).priority == got


def test_the_deadline_is_the_earliest_of_the_callers_the_requests_and_the_servers(wire, serving):
    def seconds_left(service, seconds_left, **parameters):
        message = InferMessage(with_parameters(wire, wire.raw(**wire.valid(1)), **parameters))
        now = time.monotonic()
        service.begin(message, Arrival(at=now, ends_at=now + seconds_left))
        return serving.engine.options[-1].deadline - now

    plain = InferenceService(serving.repository)
    limited = InferenceService(serving.repository, default_timeout_seconds=2.0)
    assert seconds_left(plain, math.inf) == math.inf
    assert seconds_left(plain, 5.0) == pytest.approx(5)
    assert seconds_left(plain, 5.0, timeout=1_000_000) == pytest.approx(1)
    assert seconds_left(plain, 0.5, timeout=("uint64_param", 1_000_000)) == pytest.approx(0.5)
    assert seconds_left(plain, math.inf, timeout=0) == math.inf
    assert seconds_left(plain, math.inf, timeout=2**63 - 1) == math.inf
    assert seconds_left(limited, math.inf) == pytest.approx(2)
    assert seconds_left(limited, 5.0, timeout=3_000_000) == pytest.approx(2)
    assert seconds_left(limited, 5.0, timeout=1_000) == pytest.approx(1e-3)
    assert seconds_left(limited, 1.0) == pytest.approx(1)


def test_a_request_that_waits_for_a_thread_is_late_all_the_same(wire):
    running = wire.start(num_threads=1)
    running.engine.hold()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.infer, wire.raw(**wire.valid(1)))
        assert running.engine.arrived.acquire(timeout=10)
        late = with_parameters(wire, wire.raw(**wire.valid(1)), timeout=1_000)
        refused = pool.submit(running.refusal, late, grpc.StatusCode.DEADLINE_EXCEEDED)
        while len(running.repository.overloads) < 2:  # it has come
            pass
        end = time.monotonic() + 2e-3
        while time.monotonic() < end:
            pass
        running.engine.release()
        assert len(first.result(timeout=10).outputs) == 2
        text = "expected an answer within the timeout of 1 ms, the request had waited "
        assert text in refused.result(timeout=10)
    assert len(running.engine.requests) == 1
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def test_a_timeout_of_a_microsecond_is_told_as_that(shared, wire):
    request = with_parameters(wire, wire.raw(**wire.valid(1)), timeout=1)
    told = shared.refusal(request, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert told.startswith("model 'feed': expected an answer within the timeout of 0.001 ms, ")


def test_a_timeout_that_passes_is_told_and_cancels_the_request(serving, wire):
    serving.engine.hold()
    details = serving.refusal(
        with_parameters(wire, wire.raw(**wire.valid(1)), timeout=20_000), grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert details.startswith("model 'feed': expected an answer within the timeout of 20 ms, got none in 2")
    ((future, _),) = serving.engine.held
    assert future.cancelled()
    assert serving.engine.metrics.statistics().num_failures == 1


def test_an_affinity_key_reaches_the_engine(serving, wire):
    assert options_of(serving, wire, xlarank_affinity_key="u7").affinity_key == "u7"
    assert options_of(serving, wire, user="u8").affinity_key == "u8"
    assert options_of(serving, wire, user=9).affinity_key == "9"
    assert options_of(serving, wire, user="u8", xlarank_affinity_key="u7").affinity_key == "u7"


def test_requests_of_one_key_else_of_one_id_go_to_one_version(serving, wire):
    request = wire.raw(**wire.valid(1))
    serving.infer(request)
    request.id = "r1"
    serving.infer(request)
    serving.infer(with_parameters(wire, request, user="u1"))
    serving.refusal(with_parameters(wire, request, user=0.5))
    assert serving.repository.keys == [None, "r1", "u1", "r1"]
    assert serving.engine.metrics.statistics().num_failures == 1


def test_parameters_that_mean_nothing_here_are_let_pass(serving, wire):
    options = options_of(
        serving, wire, trace="7", triton_enable_empty_final_response=True, ratio=0.5, headers="x", top=3
    )
    assert (options.priority, options.affinity_key) == (2, None)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"sequence_id": 7}, "parameter 'sequence_id': model 'feed' has no sequences"),
        ({"sequence_id": "s"}, "parameter 'sequence_id': model 'feed' has no sequences"),
        ({"sequence_start": True}, "parameter 'sequence_start': model 'feed' has no sequences"),
        (
            {"priority": "high"},
            r"'priority': expected an integer \(int64_param or uint64_param\), got string",
        ),
        ({"priority": 1.0}, "'priority': expected an integer .*, got double_param 1.0"),
        ({"timeout": True}, "'timeout': expected an integer of microseconds .*, got bool_param True"),
        ({"timeout": -1}, "'timeout': expected microseconds >= 0, got -1"),
        ({"user": 0.5}, "'user': expected a string or an integer .*, got double_param 0.5"),
        ({"user": "u" * 1025}, "'user': expected at most 1024 characters, got 1025"),
        ({"xlarank_timings": 1}, "'xlarank_timings': expected a bool .*, got int64_param 1"),
        ({"top_k": 0}, "'top_k': expected a number of candidates >= 1, got 0"),
        ({"top_k": "5"}, "'top_k': expected an integer .*, got string_param '5'"),
        ({"top_k": 5}, r"'top_k': model 'feed' has outputs \['finish', 'share.score'\]; say by which"),
        ({"top_k": 5, "top_k_task": "click"}, r"'top_k_task': model 'feed' has no output 'click'; it has \["),
        ({"top_k": 5, "top_k_task": "finish", "top_k_weights": "finish:1"}, "'top_k': .* got both"),
        ({"top_k_task": "finish"}, "'top_k_task': expected 'top_k' beside it"),
        ({"top_k_weights": "finish:1"}, "'top_k_weights': expected 'top_k' beside it"),
        ({"top_k": 5, "top_k_weights": "finish"}, "'top_k_weights': expected outputs and weights that are "),
        ({"top_k": 5, "top_k_weights": "finish:1,"}, "expected outputs and weights that.* got ''"),
        ({"top_k": 5, "top_k_weights": "finish:1_0"}, "finite as float32, .* got 'finish:1_0'"),
        ({"top_k": 5, "top_k_weights": "finish:nan"}, "finite as float32, .* got 'finish:nan'"),
        ({"top_k": 5, "top_k_weights": "finish:-inf"}, "finite as float32, .* got 'finish:-inf'"),
        ({"top_k": 5, "top_k_weights": "finish:1,share:1e39"}, "finite as float32, .* got 'share:1e39'"),
        ({"top_k": 5, "top_k_weights": "finish:-1e300"}, "finite as float32, .* got 'finish:-1e300'"),
        ({"top_k": 5, "top_k_weights": "finish:1,finish:2"}, "each output once, got 'finish:2'"),
        ({"top_k": 5, "top_k_weights": "share:1,share.score:2"}, "each task once, got"),
        ({"top_k": 5, "top_k_weights": "finish:1,like:2"}, "has no output 'like'"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(wire, parameters, text):
    with pytest.raises(RequestError, match=text):
        read_parameters(parameters_of(wire, **parameters), wire.spec)


def test_a_parameter_without_a_value_is_refused(shared, wire):
    request = wire.raw(**wire.valid(1))
    request.parameters["priority"].SetInParent()
    request.parameters["priority"].ClearField("int64_param")
    assert "parameter 'priority': expected an integer" in shared.refusal(request)
    assert "got no value" in shared.refusal(request)


def test_a_sequence_of_none_is_no_sequence(shared, wire):
    shared.infer(with_parameters(wire, wire.raw(**wire.valid(1)), sequence_id=0, sequence_start=False))


def test_timings_come_back_when_asked_for(shared, wire):
    request = wire.raw(**wire.valid(2))
    assert not shared.infer(request).parameters
    response = shared.infer(with_parameters(wire, request, xlarank_timings=True))
    timings = {name: value.int64_param for name, value in response.parameters.items()}
    decode_us = timings.pop("decode_us")
    assert timings == {"queue_us": 1000, "gather_us": 2000, "execute_us": 3000, "total_us": 7000}
    assert 0 < decode_us < 10e6


def naive_top_k(values, k):
    """By the definition: the best first, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return order, [values[i] for i in order]


@pytest.mark.parametrize("num_levels", [1, 3, 1000])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (64, 64), (5, 9), (1000, 50), (0, 4)])
def test_top_k_is_the_best_with_ties_by_position(n, k, num_levels):
    rng = np.random.default_rng(n + k + num_levels)
    click = (rng.integers(num_levels, size=n) / 7).astype(np.float32)
    like = (rng.integers(num_levels, size=n) / 3).astype(np.float32)
    scores = {"click": click, "like": like}
    indices, values = TopK(k, (("click", 1.0),)).select(scores)
    assert (indices.dtype, values.dtype) == (np.int32, np.float32)
    assert (indices.tolist(), values.tolist()) == naive_top_k(click.tolist(), k)
    indices, values = TopK(k, (("click", 0.5), ("like", -2.0))).select(scores)
    mixed = (click * 0.5 + like.astype(np.float64) * -2.0).astype(np.float32)
    assert (indices.tolist(), values.tolist()) == naive_top_k(mixed.tolist(), k)


def test_what_is_not_a_number_is_never_among_the_best():
    scores = {"click": np.array([np.nan, 0.5, np.nan, -np.inf, 0.75], np.float32)}
    assert TopK(2, (("click", 1.0),)).select(scores)[0].tolist() == [4, 1]
    indices, values = TopK(4, (("click", 1.0),)).select(scores)
    assert indices.tolist()[:2] == [4, 1]
    assert len(values) == 4


def test_a_sum_is_exact_where_its_terms_are_large():
    scores = {name: np.array(values, np.float32) for name, values in (("a", [3, 1, 2]), ("b", [3, 2, 1]))}
    indices, values = TopK(3, (("a", 3e38), ("b", -3e38))).select(scores)  # 9e38 is beyond float32
    assert indices.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(values, np.array([3e38, 0, -3e38], np.float32))


@pytest.mark.parametrize(("weight", "told"), [(3e38, "6e+38"), (-3e38, "-6e+38")])
def test_a_sum_beyond_float32_is_refused_with_its_candidate(weight, told):
    scores = {"a": np.array([1, np.inf, np.nan, 2], np.float32), "b": np.zeros(4, np.float32)}
    with pytest.raises(
        RequestError, match=rf"weighted sums that float32 holds, got {re.escape(told)} for candidate 3"
    ):
        TopK(1, (("a", weight), ("b", 1.0))).select(scores)


def test_weights_whose_sums_overflow_are_the_callers_fault(shared, wire):
    request = with_parameters(
        wire, wire.raw(**wire.valid(3)), top_k=2, top_k_weights="finish:3.4e38,share.score:3.4e38"
    )
    told = (
        "parameter 'top_k_weights': expected weighted sums that float32 holds, got 2.3919e+41 for candidate 0"
    )
    assert shared.refusal(request) == told


def tensors_of(response):
    dtypes = {"FP32": "<f4", "INT32": "<i4"}
    return {
        tensor.name: np.frombuffer(raw, dtypes[tensor.datatype]).reshape(tensor.shape).tolist()
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def test_top_k_is_answered_instead_of_the_scores(shared, wire):
    request = wire.raw(**wire.valid(20))
    scores = tensors_of(shared.infer(request))
    response = shared.infer(with_parameters(wire, request, top_k=3, top_k_task="share.score"))
    indices, values = naive_top_k(scores["share.score"], 3)
    assert tensors_of(response) == {"top_k.indices": indices, "top_k.scores": values}
    assert [(t.name, t.datatype) for t in response.outputs] == [
        ("top_k.indices", "INT32"),
        ("top_k.scores", "FP32"),
    ]
    by_name = shared.infer(with_parameters(wire, request, top_k=3, top_k_task="share"))
    assert tensors_of(by_name) == tensors_of(response)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (["finish"], ["top_k.indices", "top_k.scores", "finish"]),
        (["finish", "top_k.indices"], ["finish", "top_k.indices"]),
        (["top_k.scores"], ["top_k.scores"]),
    ],
)
def test_outputs_that_are_named_come_beside_the_top_k(shared, wire, asked, answered):
    request = wire.raw(**wire.valid(4))
    with_parameters(wire, request, top_k=2, top_k_weights="finish:1, share.score:0.25")
    for name in asked:
        request.outputs.add(name=name)
    assert list(tensors_of(shared.infer(request))) == answered


def test_top_k_outputs_need_the_parameter(shared, wire):
    request = wire.raw(**wire.valid(4))
    request.outputs.add(name="top_k.indices")
    assert shared.refusal(request).endswith("; it is an output of requests with parameter 'top_k'")


def test_the_only_task_needs_no_name(wire):
    spec = type(wire.spec)(
        name="one", features=wire.spec.features, tables=wire.spec.tables, tasks=(TaskSpec(name="click"),)
    )
    assert read_parameters(parameters_of(wire, top_k=7), spec).top_k == TopK(7, (("click", 1.0),))


def test_tritonclients_parameters_are_understood(serving, wire, candidates):
    tensors = []
    for name, value in wire.valid(3).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        tensors.append(
            triton.InferInput(name.replace("__", "."), array.shape, np_to_triton_dtype(array.dtype))
        )
        tensors[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(serving.server.address) as client:
        result = client.infer(
            "feed",
            tensors,
            priority=1,
            timeout=5_000_000,
            parameters={"user": "u1", "top_k": 2, "top_k_task": "finish", "xlarank_timings": True},
        )
        assert result.as_numpy("top_k.indices").tolist() == [2, 1]
        assert result.get_response().parameters["total_us"].int64_param == 7000
        with pytest.raises(triton.InferenceServerException, match="has no sequences"):
            client.infer("feed", tensors, sequence_id=5, sequence_start=True)
    options = serving.engine.options[0]
    assert (options.priority, options.affinity_key) == (1, "u1")
    assert 0 < options.deadline - time.monotonic() <= 5


def test_the_client_sends_options(serving, candidates):
    serving.engine.hold()
    release = threading.Thread(target=lambda: (serving.engine.arrived.acquire(), serving.engine.release()))
    release.start()
    scores = serving.client.score(
        "feed", candidates, priority=3, affinity_key="u2", top_k=2, top_k_by={"finish": 1, "share.score": 2}
    )
    release.join()
    options = serving.engine.options[-1]
    assert (options.priority, options.affinity_key) == (3, "u2")
    assert sorted(scores) == ["top_k.indices", "top_k.scores"]
    every = serving.client.score("feed", candidates)
    order, values = naive_top_k((every["finish"] + 2 * every["share.score"]).tolist(), 2)
    assert scores["top_k.indices"].tolist() == order
    assert scores["top_k.indices"].dtype == np.int32
    np.testing.assert_allclose(scores["top_k.scores"], values)
    alone = serving.client.score("feed", candidates, top_k=1, top_k_by="finish")
    assert alone["top_k.indices"].tolist() == naive_top_k(every["finish"].tolist(), 1)[0]


def test_a_client_whose_time_is_up_hears_deadline_exceeded(serving, candidates):
    serving.client.score("feed", candidates)
    serving.engine.error = DeadlineError("model 'feed': too late")
    with pytest.raises(DeadlineError, match="model 'feed': too late"):
        serving.client.score("feed", candidates)
