"""What a caller sends too much of, too slowly or never: refused before it costs memory or a thread."""

import contextlib
import resource
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import stored
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import RawClient
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import LimitConfig
from xlarank_serving.encoding import add_inputs
from xlarank_serving.limits import check_message, check_request
from xlarank_serving.parsing import read_infer_message
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.refusals import Refusals
from xlarank_serving.unread import UnreadAnswers

from xlarank.errors import FeatureError, OverloadError, RequestError
from xlarank.host import FeatureRows, FeatureStore
from xlarank.spec import RankRequest

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
RST_STREAM = 3
LIMITS = LimitConfig()


@contextlib.contextmanager
def running_server(wire, **options):
    running = wire.start(**options)
    try:
        yield running
    finally:
        running.channel.close()
        running.client.close()
        running.server.stop(0)


def peak_bytes(function):
    """Most bytes that Python and NumPy held at a time beyond those before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SHAPES = {
    "video": ("INT64", [2**40], bytes(8)),
    "topics__lengths": ("INT32", [2**40], bytes(4)),
    "tags": ("BYTES", [2**40], b"\0\0\0\0"),
    "vector": ("FP32", [2**40, 3], bytes(12)),
    "candidate__dense": ("FP32", [2**40, 5], bytes(20)),
    "candidate__lengths": ("INT32", [3, 2**40], bytes(12)),
}


@pytest.mark.parametrize("is_typed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_declared_shape_allocates_nothing(wire, name, is_typed):
    request = wire.raw(**wire.valid(3) | {name: SHAPES[name]})
    if is_typed:
        del request.raw_input_contents[:]
        tensor = next(tensor for tensor in request.inputs if tensor.name == name.replace("__", "."))
        del request.inputs[:]
        request.inputs.append(tensor)
    codec = ModelCodec(wire.spec)

    def refused():
        with pytest.raises(FeatureError):
            codec.decode(request)

    refused()  # caches of the codec
    assert peak_bytes(refused) < 2**16


def fields(number, payload, count):
    """A message of `count` equal fields."""
    size = len(payload)
    assert size < 128
    return (bytes([number << 3 | 2, size]) + payload) * count


@pytest.mark.parametrize("form", ["as usual", "lists", "packed", "converted", "by id"])
def test_a_request_of_too_many_candidates_is_refused_before_its_tensors_are_read(wire, form):
    most, count = 10, 10**6
    inputs = {
        "as usual": {"video": np.zeros(count, np.int64)},
        "lists": {"topics": np.zeros(0, np.int64), "topics__lengths": np.zeros(count, np.int32)},
        "packed": {"candidate__lengths": np.zeros((3, count), np.int32)},
        "converted": {"likes": ("FP64", [count], bytes(8 * count))},
        "by id": {"candidate_ids": np.zeros(count, np.int64)},
    }[form]
    data = wire.raw(**inputs).SerializeToString()
    codec = ModelCodec(wire.spec, SimpleNamespace() if form == "by id" else None, max_candidates=most)
    name = list(inputs)[-1].replace("__", ".")
    told = rf"{name}': expected at most 10 candidates, got 1000000; send them in several requests"
    message = read_infer_message(data, LIMITS)
    message.parsed()

    def refused():
        with pytest.raises(FeatureError, match=told):
            codec.read(message)

    refused()  # caches of the codec
    assert peak_bytes(refused) < 2**16
    few = ModelCodec(wire.spec, max_candidates=most)
    for request in (wire.raw(**wire.valid(most)), wire.raw(**wire.valid(most + 1))):
        message = read_infer_message(request.SerializeToString(), LIMITS)
        for read in (few.read, lambda message: few.decode(message.parsed())):
            if request.inputs[4].shape[0] == most:
                assert read(message).num_candidates == most
            else:
                with pytest.raises(FeatureError, match="expected at most 10 candidates, got 11"):
                    read(message)


def test_a_server_refuses_too_many_candidates_with_their_number(shared, wire):
    request = wire.raw(**wire.valid(3) | {"video": np.zeros(65537, np.int64)})
    assert shared.refusal(request) == (
        "feature 'video': expected at most 65536 candidates, got 65537; send them in several requests"
    )


@pytest.mark.parametrize("misses", ["error", "default", "fetch"])
def test_ids_may_add_as_much_as_their_features_would_take_on_the_wire(misses):
    rng = np.random.default_rng(0)
    rows = {i: stored.random_row(rng) for i in range(30)}
    ids = rng.integers(0, 30, 200)

    class Source:
        def fetch(self, ids):
            return FeatureRows(ids, stored.columns_of([rows[i] for i in ids.tolist()]))

    options = {}
    if misses == "fetch":
        options = {"source": Source(), "memory_bytes": 2**20, "fetch_timeout_ms": stored.PATIENT_MS}
    store = FeatureStore(stored.SPEC, misses=misses, **options)
    there = [i for i in rows if misses == "error" or i % 3]
    store.update(there, stored.columns_of([rows[i] for i in there]))
    if misses == "default":
        rows |= {i: stored.DEFAULT_ROW for i in rows if i % 3 == 0}
    in_full = messages.ModelInferRequest()
    own = {"age": 1.0, "item": [1] * len(ids)}
    columns = stored.columns_of([rows[i] for i in ids.tolist()]) | own
    add_inputs(in_full, stored.SPEC, RankRequest(stored.SPEC, columns))
    names = [tensor.name for tensor in in_full.inputs]
    sizes = dict(zip(names, map(len, in_full.raw_input_contents), strict=True))
    num_bytes = sum(size for name, size in sizes.items() if name not in own)

    told = f"expected at most {num_bytes - 1} bytes of stored features.* got {num_bytes} for 200 ids"
    for _ in range(2):  # of a cache, fetched and then found
        with pytest.raises(RequestError, match=told):
            store.join(ids, own, max_bytes=num_bytes - 1)
    assert len(store.join(ids, own, max_bytes=num_bytes)["topics"]) == 200


FIELDS, BYTES = "expected at most 16384 fields, got more", "expected at most 4 MiB beside raw_input_contents"
MANY = {
    "inputs": (fields(5, b"", 2**22), FIELDS),
    "outputs": (fields(6, b"", 2**22), FIELDS),
    "raw contents": (fields(7, b"", 2**22), FIELDS),
    "parameters": (fields(4, b"\n\x01a", 2**20), FIELDS),
    "names": (fields(1, b"", 2**22), FIELDS),
    "unknown fields": (b"\x78\x01" * 2**22, BYTES),
    "fields of two bytes": (b"\xfa\x01\0" * 2**21, BYTES),
    "raw contents after an unknown field": (b"\x78\x01" + (b"\x3a\x7f" + bytes(127)) * 2**16, BYTES),
    "a length that lies": (b"\x3a\xff\xff\xff\xff\x0f" + bytes(2**23), BYTES),
}


@pytest.mark.parametrize(("data", "told"), MANY.values(), ids=MANY)
def test_a_message_of_millions_of_fields_is_refused_unparsed(data, told):
    def refused():
        with pytest.raises(RequestError, match=told):
            check_message(data, LIMITS)

    assert peak_bytes(refused) < 2**20


def test_much_beside_raw_contents_is_refused_unparsed():
    request = messages.ModelInferRequest(model_name="feed")
    tensor = request.inputs.add(name="tags", datatype="BYTES", shape=[2**22 + 1])
    tensor.contents.bytes_contents.extend([b""] * (2**22 + 1))
    with pytest.raises(
        RequestError, match=r"expected at most 4 MiB beside raw_input_contents, got 838\d+ bytes"
    ):
        check_message(request.SerializeToString(), LIMITS)


def test_large_raw_contents_are_let_pass():
    request = messages.ModelInferRequest(model_name="feed", id="x")
    for i in range(100):
        request.inputs.add(name=f"f{i}", datatype="FP32", shape=[2**18])
        request.raw_input_contents.append(bytes(2**20))
    check_message(request.SerializeToString(), LIMITS)
    check_request(request, LIMITS)


@pytest.mark.parametrize(
    "data", [b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 12, b"\x3a" + b"\xff" * 12, b"\x0b", b"\x08", b"\x3a"]
)
def test_what_is_no_message_is_left_to_the_parser(data):
    large = b"\x3a\x80\x80\x50" + bytes(5 * 2**18)
    check_message(large + data, LIMITS)
    check_message(data + large, LIMITS)


def test_small_requests_with_too_much_in_them_are_refused(shared, wire):
    request = wire.raw(**wire.valid(1))
    request.id = "i" * 1025
    assert shared.refusal(request) == "id: expected at most 1024 bytes, got 1025"
    request.id = "i" * 1024
    assert shared.infer(request).id == request.id
    for i in range(65):
        request.parameters[f"p{i}"].int64_param = i
    assert shared.refusal(request) == "expected at most 64 parameters, got 65"
    request = messages.ModelInferRequest(model_name="feed")
    request.inputs.extend([messages.ModelInferRequest.InferInputTensor()] * 4097)
    assert shared.refusal(request) == "expected at most 4096 inputs, got 4097"

    request = messages.ModelInferRequest(model_name="feed", id="é" * 513)
    request.outputs.extend([messages.ModelInferRequest.InferRequestedOutputTensor()] * 4097)
    assert shared.refusal(request) == "expected at most 4096 outputs, got 4097"
    del request.outputs[:]
    assert shared.refusal(request) == "id: expected at most 1024 bytes, got 1026"


HOSTILE = (
    "../feed",
    "feed/3",
    "/etc/passwd",
    "feed\0",
    "feed\n",
    "..",
    ".",
    "",
    "C:\\feed",
    "%2e%2e",
    "～",
    "-rf",
)


@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "ModelMetadata"])
def test_names_of_models_are_looked_up_and_never_become_paths(shared, method):
    kind = getattr(messages, f"{method}Request")
    field = "model_name" if method == "ModelInfer" else "name"
    for name in (*HOSTILE, "n" * (10 * 2**20)):
        with pytest.raises(grpc.RpcError) as caught:
            shared.call(method, kind(**{field: name}))
        expected = ("NOT_FOUND", "INVALID_ARGUMENT") if method == "ModelInfer" else ("NOT_FOUND",)
        assert caught.value.code().name in expected
        assert len(caught.value.details()) < 3000
    version = {field: "feed", f"{field.removesuffix('name')}version": "../3"}
    with pytest.raises(grpc.RpcError, match=r"version ../3 is not found"):
        shared.call(method, kind(**version))


def test_requests_sent_by_half_hold_no_thread(wire):
    data = wire.raw(**wire.valid(3)).SerializeToString()
    with running_server(wire, num_threads=2) as running, contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(contextlib.closing(RawClient(running.server.address)))
            client.call(INFER, data, num_sent=len(data) // 2)
            client.wait_for_settings()
        for _ in range(3):
            assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2
        assert num_refused(running.server.refusals)["CANCELLED"] >= 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/inference.GRPCInferenceService/ServerLive", messages.ServerLiveRequest()),
        ("/inference.GRPCInferenceService/ModelReady", messages.ModelReadyRequest(name="feed")),
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="feed")),
        ("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(service="feed")),
    ],
)
def test_probes_sent_by_half_keep_no_others_away(wire, path, message):
    data = message.SerializeToString() or b"\x0a\x00"
    with running_server(wire) as running, contextlib.ExitStack() as stack:
        for _ in range(6):  # more than there are threads for them
            client = stack.enter_context(contextlib.closing(RawClient(running.server.address)))
            client.call(path, data, num_sent=len(data) // 2)
            client.wait_for_settings()
        for _ in range(3):
            assert running.call("ServerLive", messages.ServerLiveRequest()).live
        with grpc.insecure_channel(running.server.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            status = check(health_pb2.HealthCheckRequest(), timeout=60).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        assert num_refused(running.server.refusals) == {}


def test_answers_that_nobody_reads_hold_no_thread(wire):
    data = wire.raw(**wire.valid(3)).SerializeToString()
    with running_server(wire, num_threads=2) as running, contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(contextlib.closing(RawClient(running.server.address, window=0)))
            client.call(INFER, data)
            client.wait_for_settings()
        for _ in range(3):
            assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2
        assert len(running.engine.requests) >= 3


@pytest.mark.parametrize("method", [INFER, STREAM])
def test_of_answers_that_nobody_reads_the_oldest_are_given_up(wire, method):
    data = wire.raw(**wire.valid(3)).SerializeToString()
    with (
        running_server(wire) as running,
        contextlib.closing(RawClient(running.server.address, window=0)) as client,
    ):
        unread = running.server._unread
        unread._max_bytes = 4 * 33 * 2**10  # four calls and their small answers
        for i in range(12):
            client.call(method, data, stream=2 * i + 1)
        num_ended = 0
        while num_ended < 8:
            num_ended += client.next_frame()[0] == RST_STREAM
        while not unread.num_bytes:  # a stream's answer counts until gRPC takes it, then the call counts
            pass
        assert unread.num_bytes <= unread._max_bytes
        assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2
        client.close()
        while unread.num_bytes:  # who has left holds nothing
            pass


class Cancelled:
    """Counts how often it is cancelled."""

    def __init__(self):
        self.num_cancelled = 0

    def cancel(self):
        self.num_cancelled += 1


def test_what_a_cancelled_call_still_answers_pushes_nobody_out():
    """gRPC tells some time later that a call is over."""
    unread = UnreadAnswers(max_bytes=2 * 40 * 2**10)
    first, second, third = calls = [Cancelled() for _ in range(3)]
    for call in calls:
        unread.hold(call, call, 8 * 2**10)
    assert [call.num_cancelled for call in calls] == [1, 0, 0]
    unread.hold("another of its stream", first, 8 * 2**10)
    assert [call.num_cancelled for call in calls] == [1, 0, 0]
    unread.release("another of its stream")
    assert unread.num_bytes == 2 * 40 * 2**10
    unread.release(second)
    unread.release(third)
    assert unread.num_bytes == 0


def test_calls_past_the_limit_are_told_when_to_come_again(wire, candidates):
    with (
        running_server(wire, num_threads=1, max_concurrent_rpcs=2) as running,
        ThreadPoolExecutor(2) as pool,
    ):
        running.client.metadata("feed")
        running.engine.hold()
        answers = [pool.submit(running.infer, wire.raw(**wire.valid(3))) for _ in range(2)]
        while len(running.repository.overloads) < 2:
            pass
        text = "the server has 2 ranking calls in progress or waiting for a thread; max_concurrent_rpcs is 2"
        with pytest.raises(OverloadError, match=text) as refused:
            running.client.score("feed", candidates)
        assert refused.value.retry_after_seconds == 0.25
        assert running.client.is_ready()  # those who ask this aren't counted
        running.engine.release()
        assert [len(answer.result(timeout=10).outputs) for answer in answers] == [2, 2]
        assert len(running.client.score("feed", candidates)["finish"]) == 3


def test_a_compressed_message_is_refused_for_what_it_would_be(wire, candidates):
    with running_server(wire, max_message_mib=8) as running:
        call = running.channel.unary_unary(INFER)
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(9 * 2**20), timeout=20, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not running.engine.requests
        assert len(running.client.score("feed", candidates)["finish"]) == 3


def test_a_call_without_a_message_is_refused(shared):
    call = shared.channel.stream_unary(INFER)
    with pytest.raises(grpc.RpcError, match="expected one request message, got none") as caught:
        call(iter(()), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class Call:
    """What the watch asks of a call; its request arrives when `arrive` is set."""

    def __init__(self, watch):
        self.cancelled, self.arrive, self.answers = threading.Event(), threading.Event(), []
        handler = watch.watched(grpc.unary_unary_rpc_method_handler(lambda data, context: data * 2))
        self.thread = threading.Thread(
            target=lambda: self.answers.append(handler.stream_unary(self.arriving(), self))
        )
        self.thread.start()

    def arriving(self):
        self.arrive.wait()
        yield b"ab"

    def cancel(self):
        self.cancelled.set()

    def end(self):
        self.arrive.set()
        self.thread.join()
        return self.answers


def wait_until_waiting(watch, count):
    while len(watch._since) < count:
        pass


def watch_by_hand(num_threads):
    """A watch whose thread has ended, its pool, its count of refusals, and the time."""
    now, threads, refusals = [0.0], SimpleNamespace(num_waiting=0, num_threads=num_threads), Refusals()
    watch = ReceiveWatch(10.0, threads, refusals, lambda: now[0])
    watch.close()
    return watch, threads, refusals, now


def num_refused(refusals):
    (family,) = refusals.collect()
    return {sample.labels["status"]: sample.value for sample in family.samples}


def test_a_request_has_long_to_arrive_unless_threads_are_short_for_that():
    watch, threads, refusals, now = watch_by_hand(num_threads=4)
    calls = [Call(watch)]
    wait_until_waiting(watch, 1)
    assert watch.num_stalled == 0
    now[0] = 9.9
    assert watch.num_stalled == 1
    threads.num_waiting = 1  # but three of four threads rank
    assert watch.end_late_calls() == 0
    calls.append(Call(watch))
    wait_until_waiting(watch, 2)
    assert watch.num_stalled == 1  # the other has just come
    threads.num_waiting = 0
    assert watch.end_late_calls() == 0
    threads.num_waiting = 1
    assert watch.end_late_calls() == 1
    assert [call.cancelled.is_set() for call in calls] == [True, False]
    threads.num_waiting = 0
    now[0] = 20.0
    assert watch.end_late_calls() == 1
    assert calls[1].cancelled.is_set()
    assert watch.end_late_calls() == 0
    assert num_refused(refusals) == {"CANCELLED": 2}
    assert [call.end() for call in calls] == [[b"abab"], [b"abab"]]


def test_an_answer_has_as_long_to_be_taken():
    watch, _, _, now = watch_by_hand(num_threads=4)
    call = Cancelled()
    with watch.awaiting(call):
        now[0] = 9.9
        assert watch.end_late_calls() == 0
        now[0] = 10.1
        assert watch.end_late_calls() == 1
    assert call.num_cancelled == 1


def test_calls_that_were_refused_are_made_room_for_until_they_have_come_again():
    watch, _, _, now = watch_by_hand(num_threads=4)
    calls = [Cancelled() for _ in range(4)]

    def num_cancelled():
        return [call.num_cancelled for call in calls]

    with contextlib.ExitStack() as stack:
        for call in calls:
            stack.enter_context(watch.awaiting(call))
        watch.count_refused()
        assert watch.end_late_calls() == 0
        now[0] = 0.3
        assert watch.end_late_calls() == 1
        assert num_cancelled() == [1, 0, 0, 0]
        assert watch.end_late_calls() == 0
        stack.enter_context(watch.awaiting(calls[0]))  # who was refused has the thread now
        now[0] = 0.6
        for _ in range(2):
            watch.count_refused()
        now[0] = 1.7  # they didn't come again
        assert watch.end_late_calls() == 0
        watch.hurry(2.0)
        now[0] = 2.1
        assert watch.end_late_calls() == 3


def test_of_the_late_ones_as_many_of_the_oldest_are_ended_as_calls_wait_for_a_thread(caplog):
    watch, threads, refusals, now = watch_by_hand(num_threads=8)
    calls = []
    for number in range(8):
        now[0] = number / 100
        calls.append(Call(watch))
        wait_until_waiting(watch, number + 1)

    def ended():
        return [call.cancelled.is_set() for call in calls]

    now[0] = 0.3  # the first five have had more than 0.25 s
    threads.num_waiting = 2
    assert watch.end_late_calls() == 2
    assert ended() == [True] * 2 + [False] * 6
    assert caplog.messages == [
        "2 calls ended: requests didn't arrive, or answers weren't taken, within 0.29 s"
    ]
    assert watch.end_late_calls() == 0  # the threads of these two are about to come free
    threads.num_waiting = 3
    assert watch.end_late_calls() == 1
    calls[0].end()
    threads.num_waiting = 2  # the thread of one took a call
    assert watch.end_late_calls() == 0
    threads.num_waiting = 100
    assert watch.end_late_calls() == 2  # the others aren't late yet
    assert ended() == [True] * 5 + [False] * 3
    now[0] = 1.0
    assert watch.end_late_calls() == 3
    assert num_refused(refusals) == {"CANCELLED": 8}
    for call in calls:
        call.end()
    assert watch.end_late_calls() == 0


def test_connections_beyond_the_limit_are_closed_and_others_served(wire):
    with running_server(wire, max_connections=3) as running, contextlib.ExitStack() as stack:
        assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2
        clients = [
            stack.enter_context(contextlib.closing(RawClient(running.server.address))) for _ in range(6)
        ]
        num_closed = 0
        for client in clients:
            try:
                client.wait_for_settings()
            except ConnectionError:
                num_closed += 1
        assert num_closed >= 3
        assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_idle_seconds": 0.1}, b"idle"),
        ({"max_age_seconds": 0.1}, b"age"),
        ({"keepalive_seconds": 0.1, "keepalive_timeout_seconds": 0.1}, b"ping"),
    ],
)
def test_clients_that_stay_too_long_or_are_gone_are_disconnected(wire, options, told):
    with (
        running_server(wire, **options) as running,
        contextlib.closing(RawClient(running.server.address)) as client,
    ):
        client.wait_for_settings()
        assert told in client.wait_for_goodbye()  # within the socket's 10 s
        assert len(running.infer(wire.raw(**wire.valid(3))).outputs) == 2


def test_clients_that_ask_too_often_are_disconnected(wire):
    with (
        running_server(wire, min_ping_seconds=60.0) as running,
        contextlib.closing(RawClient(running.server.address)) as client,
    ):
        client.wait_for_settings()
        client.ping(10)
        # What it says may be lost with the connection.
        assert client.wait_for_goodbye() in (b"too_many_pings", b"")


def test_headers_beyond_the_limit_are_refused(wire):
    with running_server(wire, max_metadata_kib=4) as running:
        with pytest.raises(grpc.RpcError) as caught:
            running.infer(wire.raw(**wire.valid(1)), metadata=(("x", "y" * 5000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running.infer(wire.raw(**wire.valid(1)), metadata=(("x", "y" * 1000),))


def test_a_thousand_idle_connections_take_no_thread(shared, wire):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    shared.infer(wire.raw(**wire.valid(1)))
    before = num_threads()
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(RawClient(shared.server.address))) for _ in range(1000)
        ]
        for client in clients:
            client.wait_for_settings()
        n = 5
        answer = shared.infer(wire.raw(**wire.valid(n)))
        assert num_threads() - before < 50
        expected = wire.expected(shared.engine.requests[-1])
        scores = np.frombuffer(answer.raw_output_contents[0], np.float32)
        np.testing.assert_array_equal(scores, expected["finish"])


def num_threads():
    """Of this process, those of gRPC's core included."""
    return len(list(Path("/proc/self/task").iterdir()))
