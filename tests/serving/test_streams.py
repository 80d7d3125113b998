"""ModelStreamInfer: order, errors, bounds, callers who leave, and the stop."""

import contextlib
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.streams import _Stream
from xlarank_serving.threads import ServerThreads
from xlarank_serving.unread import UnreadAnswers

from xlarank.errors import OverloadError

METHOD = f"/{SERVICE_NAME}/ModelStreamInfer"


class Caller:
    """One stream, spoken by hand."""

    def __init__(self, serving, wire):
        self._requests = queue.Queue()
        self.num_taken = 0
        self.answers = serving.channel.stream_stream(
            METHOD,
            request_serializer=lambda message: (
                message if isinstance(message, bytes) else message.SerializeToString()
            ),
            response_deserializer=wire.messages.ModelStreamInferResponse.FromString,
        )(self._take(), timeout=60)

    def _take(self):
        while (request := self._requests.get()) is not None:
            self.num_taken += 1
            yield request

    def send(self, *requests):
        for request in requests:
            self._requests.put(request)

    def end(self):
        self._requests.put(None)


@pytest.fixture
def caller(serving, wire):
    caller = Caller(serving, wire)
    yield caller
    caller.answers.cancel()
    caller.end()


def request_of(wire, request_id, n=2):
    request = wire.raw(**wire.valid(n))
    request.id = request_id
    return request


def test_answers_come_in_order_and_carry_the_id(serving, wire, caller):
    caller.send(*(request_of(wire, str(i), n=i) for i in range(10)))
    caller.end()
    answers = list(caller.answers)
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(10)]
    assert [answer.infer_response.outputs[0].shape[0] for answer in answers] == list(range(10))
    assert {answer.error_message for answer in answers} == {""}
    assert caller.answers.code() is grpc.StatusCode.OK
    alone = serving.infer(request_of(wire, "3", n=3))
    assert answers[3].infer_response == alone


def test_a_request_that_fails_is_told_and_the_stream_goes_on(serving, wire, caller):
    bad = request_of(wire, "bad")
    bad.inputs[0].datatype = "BYTES"
    unknown = request_of(wire, "unknown")
    unknown.model_name = "food"
    empty_inputs = b"\x2a\x00" * 2**21  # 4 MiB that would take some 200 parsed
    caller.send(request_of(wire, "1"), bad, b"\xff\xff\xff", unknown, empty_inputs, request_of(wire, "2"))
    caller.end()
    answers = list(caller.answers)
    assert [answer.infer_response.id for answer in answers] == ["1", "bad", "", "unknown", "", "2"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, True, True, False]
    assert answers[4].error_message == "expected at most 16384 fields, got more"
    assert "feature 'age': expected FP32" in answers[1].error_message
    assert "that aren't one" in answers[2].error_message
    assert answers[3].error_message == "Request for unknown model: 'food' is not found"
    codes = [answer.infer_response.parameters["xlarank_status"].string_param for answer in answers[1:4]]
    assert codes == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "NOT_FOUND"]
    assert serving.engine.metrics.statistics().num_failures == 1  # of this model


def test_an_engines_error_is_told_on_the_stream(serving, wire, caller):
    serving.engine.error = OverloadError("model 'feed': the queue is full", 0.02)
    caller.send(request_of(wire, "1"))
    answer = next(caller.answers)
    assert answer.error_message == "model 'feed': the queue is full"
    assert answer.infer_response.parameters["xlarank_status"].string_param == "RESOURCE_EXHAUSTED"
    assert answer.infer_response.parameters["xlarank_retry_after_ms"].int64_param == 20
    serving.engine.error = None
    caller.send(request_of(wire, "2"))
    assert next(caller.answers).infer_response.id == "2"


def test_several_requests_are_under_way_at_a_time_but_not_any_number(serving, wire, caller):
    serving.engine.hold()
    caller.send(*(request_of(wire, str(i)) for i in range(100)))
    for _ in range(32):
        assert serving.engine.arrived.acquire(timeout=10)
    assert not serving.engine.arrived.acquire(timeout=0.3)
    serving.engine.release()
    caller.end()
    assert [answer.infer_response.id for answer in caller.answers] == [str(i) for i in range(100)]


def test_a_caller_who_leaves_cancels_what_is_under_way(serving, wire, caller):
    serving.engine.hold()
    caller.send(*(request_of(wire, str(i)) for i in range(3)))
    for _ in range(3):
        assert serving.engine.arrived.acquire(timeout=10)
    gone = threading.Semaphore(0)
    for future, _ in serving.engine.held:
        future.add_done_callback(lambda _: gone.release())
    caller.answers.cancel()
    for _ in range(3):
        assert gone.acquire(timeout=10)
    assert all(future.cancelled() for future, _ in serving.engine.held)
    serving.engine.release()
    assert serving.infer(request_of(wire, "after")).id == "after"


def test_idle_streams_hold_up_nobody_and_are_bounded(wire, monkeypatch, candidates):
    monkeypatch.setattr(ServerThreads, "max_streams", 3)
    running = wire.start(num_threads=1)
    callers = [Caller(running, wire) for _ in range(3)]
    for i, caller in enumerate(callers):
        caller.send(request_of(wire, str(i)))
        assert next(caller.answers).infer_response.id == str(i)
    assert len(running.client.score("feed", candidates)["finish"]) == 3  # the one ranking thread is free
    late = Caller(running, wire)
    with pytest.raises(grpc.RpcError, match="3 open streams") as info:
        next(late.answers)
    assert info.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(info.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    late.end()
    for caller in callers:
        caller.end()
        assert list(caller.answers) == []
    assert running.server._threads.streams.wait_until_idle(10)
    again = Caller(running, wire)
    again.send(request_of(wire, "again"))
    again.end()
    assert [answer.infer_response.id for answer in again.answers] == ["again"]
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def test_a_stop_answers_what_was_read_and_ends_the_streams(wire):
    running = wire.start()
    idle, busy = Caller(running, wire), Caller(running, wire)
    idle.send(request_of(wire, "0"))
    assert next(idle.answers).infer_response.id == "0"
    running.engine.hold()
    busy.send(request_of(wire, "1"))
    assert running.engine.arrived.acquire(timeout=10)
    stopping = threading.Thread(target=running.server.stop, args=(20,))
    stopping.start()
    with pytest.raises(grpc.RpcError, match="the server is stopping") as info:
        next(idle.answers)
    assert info.value.code() is grpc.StatusCode.UNAVAILABLE
    running.engine.release()
    assert next(busy.answers).infer_response.id == "1"
    with pytest.raises(grpc.RpcError, match="the server is stopping"):
        next(busy.answers)
    stopping.join(timeout=20)
    assert not stopping.is_alive()
    for caller in (idle, busy):
        caller.end()
    running.channel.close()
    running.client.close()


class Context:
    """A call that does nothing."""


def test_a_stop_waits_for_a_request_that_is_being_read(wire):
    stream = _Stream(Context(), UnreadAnswers())
    answer = wire.messages.ModelStreamInferResponse(error_message="1")
    stream.expect()
    stream.stop()
    with ThreadPoolExecutor(1) as pool:
        oldest = pool.submit(stream.oldest)
        with pytest.raises(TimeoutError):
            oldest.result(timeout=0.2)
        stream.add(answer)
        assert oldest.result(timeout=10) is answer
    stream.remove_oldest()
    assert stream.oldest() is None


def test_a_stream_that_is_silent_is_ended_and_gives_its_place_away(wire, monkeypatch):
    monkeypatch.setattr(ServerThreads, "max_streams", 1)
    running = wire.start(stream_idle_seconds=0.2)
    for number in range(3):
        silent = Caller(running, wire)
        silent.send(*[request_of(wire, "1")] * number)
        for _ in range(number):
            assert next(silent.answers).infer_response.id == "1"
        with pytest.raises(grpc.RpcError, match=r"a request on the stream within 0\.2 s, got none") as info:
            next(silent.answers)
        assert info.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        silent.end()
        assert running.server._threads.streams.wait_until_idle(10)
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def test_a_stream_whose_request_is_being_read_is_not_silent(wire):
    stream = _Stream(Context(), UnreadAnswers(), max_idle_seconds=0.01)
    stream.expect()
    with ThreadPoolExecutor(1) as pool:
        oldest = pool.submit(stream.oldest)
        with pytest.raises(TimeoutError):
            oldest.result(timeout=0.2)
        stream.add(answer := wire.messages.ModelStreamInferResponse())
        assert oldest.result(timeout=10) is answer


def wait_for_full_stream(streams, unread, before):
    """Until one is open, another than before, all of whose answers count."""
    while True:
        with streams._lock:
            opened = list(streams._open)
        if len(opened) == 1 and opened[0] is not before and len(opened[0]._calls) == len(unread._held) == 32:
            return opened[0]


def test_of_streams_whose_answers_nobody_reads_the_oldest_are_given_up(wire):
    """Each has up to 32 answers that wait behind those that gRPC has taken."""
    running = wire.start()
    unread = running.server._unread
    request = wire.raw(**wire.valid(4000) | {"video": np.zeros(4000, np.int64)})
    unread._max_bytes = 40 * 64 * 2**10  # an answer has 32 KB, a call takes 32 KiB
    with contextlib.ExitStack() as stack:
        # A client that takes 64 KiB ahead of its reader, and not what it thinks the network holds.
        channel = grpc.insecure_channel(running.server.address, options=[("grpc.http2.bdp_probe", 0)])
        stack.callback(channel.close)
        callers, full = [], None
        for _ in range(3):
            callers.append(Caller(SimpleNamespace(channel=channel), wire))
            stack.callback(callers[-1].end)
            callers[-1].send(*[request] * 64)
            full = wait_for_full_stream(running.server._streams, unread, full)
            assert 0 < unread.num_bytes <= unread._max_bytes
        for caller in callers[:2]:
            with pytest.raises(grpc.RpcError) as info:
                list(caller.answers)
            assert info.value.code() is grpc.StatusCode.CANCELLED
        callers[2].end()
        assert len(list(callers[2].answers)) == 64
    while unread.num_bytes:  # who has left holds nothing
        pass
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def num_under_way(streams):
    with streams._lock:
        return sum(len(stream._calls) for stream in streams._open)


@pytest.fixture
def unread(wire, monkeypatch):
    """Starts a server that takes two streams, and opens such as nobody reads: their answers wait."""
    monkeypatch.setattr(ServerThreads, "max_streams", 2)
    request = wire.raw(**wire.valid(4000) | {"video": np.zeros(4000, np.int64)})  # its answer has 32 KB
    with contextlib.ExitStack() as stack:

        def start(num_callers, **options):
            running = wire.start(**options)
            stack.callback(running.server.stop, 0)
            stack.enter_context(contextlib.closing(running.client))
            # A client that takes 64 KiB ahead of its reader, and not what it thinks the network holds.
            channel = grpc.insecure_channel(running.server.address, options=[("grpc.http2.bdp_probe", 0)])
            stack.enter_context(contextlib.closing(channel))
            watch, callers = running.server._receive_watches[running.server._threads.streams], []
            for number in range(1, num_callers + 1):
                callers.append(Caller(SimpleNamespace(channel=channel), wire))
                stack.callback(callers[-1].end)
                callers[-1].send(*[request] * 64)
                while num_under_way(running.server._streams) < 32 * number:
                    pass
            return running, watch, callers

        yield start


def ended(caller):
    """The status of a stream whose end the server has made."""
    with pytest.raises(grpc.RpcError) as info:
        list(caller.answers)
    return info.value.code()


def test_a_stream_whose_answers_are_not_taken_is_ended_and_gives_its_place_away(unread, caplog):
    running, watch, (caller,) = unread(1, stream_idle_seconds=600.0)
    now = watch._clock()
    watch._clock = lambda: now + 601.0
    assert running.server._threads.streams.wait_until_idle(30)
    assert ended(caller) is grpc.StatusCode.CANCELLED
    watch.close()  # which logs once it has cancelled
    assert "1 calls ended: requests didn't arrive, or answers weren't taken" in caplog.text


def test_of_streams_that_are_not_read_the_oldest_makes_room_for_one_that_was_refused(unread, wire):
    running, _, callers = unread(2)
    late = Caller(running, wire)
    with pytest.raises(grpc.RpcError, match="2 open streams"):
        next(late.answers)
    late.end()
    streams = running.server._threads.streams
    with streams._changed:
        assert streams._changed.wait_for(lambda: streams.num_open < 2, 30)
    assert ended(callers[0]) is grpc.StatusCode.CANCELLED
    again = Caller(running, wire)
    again.send(request_of(wire, "again"))
    again.end()
    assert [answer.infer_response.id for answer in again.answers] == ["again"]
    callers[1].end()
    assert len(list(callers[1].answers)) == 64


def test_a_stop_waits_for_no_stream_that_is_not_read(unread):
    running, _, (caller,) = unread(1)
    stopping = threading.Thread(target=running.server.stop, args=(600,))
    stopping.start()
    stopping.join(timeout=30)
    assert not stopping.is_alive()
    assert ended(caller) is grpc.StatusCode.CANCELLED


def test_a_stream_that_is_read_slowly_is_not_ended(unread):
    _, watch, (caller,) = unread(1, stream_idle_seconds=600.0)
    now = watch._clock()
    watch._clock = lambda: now
    num_read = 0
    while num_read < 64:
        now += 400.0
        assert watch.end_late_calls() == 0
        before = list(watch._since.values())
        for _ in range(8):  # 256 KB: gRPC takes other answers
            assert len(next(caller.answers).infer_response.outputs) == 2
        num_read += 8
        while before and list(watch._since.values()) == before:
            pass
    caller.end()
    assert list(caller.answers) == []


def test_a_stream_keeps_no_tensors_of_requests_that_wait_for_their_answers(serving, wire, caller):
    """This one is parsed, as a tensor has a parameter."""
    serving.engine.hold()
    request = request_of(wire, "1")
    request.inputs[0].parameters["unusual"].bool_param = True
    request.parameters["user"].string_param = "u"
    caller.send(request)
    assert serving.engine.arrived.acquire(timeout=10)
    (stream,) = serving.server._streams._open
    with stream._changed:
        assert stream._changed.wait_for(lambda: stream._calls, 10)
        held = stream._calls[0].request
    assert (held.id, held.model_name, held.parameters["user"].string_param) == ("1", "feed", "u")
    assert not held.inputs
    assert not held.raw_input_contents
    serving.engine.release()
    assert next(caller.answers).infer_response.id == "1"


def test_tritonclient_streams(serving, wire):
    tensors = []
    for name, value in wire.valid(3).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        datatype = wire.raw(**{name: value}).inputs[0].datatype
        tensors.append(triton.InferInput(name.replace("__", "."), array.shape, datatype))
        tensors[-1].set_data_from_numpy(array)
    answers = queue.Queue()
    with triton.InferenceServerClient(serving.server.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(3):
            model = "food" if i == 1 else "feed"
            client.async_stream_infer(model, tensors, request_id=str(i), enable_empty_final_response=True)
        client.stop_stream()
        got = [answers.get(timeout=10) for _ in range(3)]
    expected = wire.expected(serving.engine.requests[0])
    for i in (0, 2):
        result, error = got[i]
        assert error is None
        assert result.get_response().id == str(i)
        assert result.get_response().parameters["triton_final_response"].bool_param
        np.testing.assert_array_equal(result.as_numpy("finish"), expected["finish"])
    assert "Request for unknown model: 'food' is not found" in str(got[1][1])
