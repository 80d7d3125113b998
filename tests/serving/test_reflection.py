"""Streams of reflection that their callers leave open, silent or unread, and those of others."""

import contextlib
import threading

import grpc
import pytest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from raw_http2 import RawClient

INFO = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
QUESTION = ServerReflectionRequest(list_services="")
NUM_STREAMS, NUM_THREADS = 20, 8
HEADERS = 1


def names_of(running):
    stream = ServerReflectionStub(running.channel).ServerReflectionInfo(iter([QUESTION]), timeout=60)
    return [service.name for answer in stream for service in answer.list_services_response.service]


def ask_and_wait():
    yield QUESTION
    threading.Event().wait()


def test_silent_streams_keep_no_others_away(patient):
    stub = ServerReflectionStub(patient.channel)
    streams = [stub.ServerReflectionInfo(ask_and_wait()) for _ in range(NUM_STREAMS)]
    for _ in range(3):
        assert "grpc.health.v1.Health" in names_of(patient)
    for stream in streams:
        stream.cancel()


def test_streams_that_nobody_reads_keep_no_others_away(patient):
    with contextlib.closing(RawClient(patient.server.address, window=0)) as client:
        for i in range(NUM_STREAMS):
            client.call(INFO, QUESTION.SerializeToString(), stream=2 * i + 1)
        num_begun = 0
        while num_begun < NUM_THREADS:
            num_begun += client.next_frame()[0] == HEADERS
        for _ in range(3):
            assert "grpc.health.v1.Health" in names_of(patient)


def test_a_stream_is_ended_once_it_is_silent_for_long(wire):
    running = wire.start(stream_idle_seconds=0.1)
    stream = ServerReflectionStub(running.channel).ServerReflectionInfo(ask_and_wait(), timeout=60)
    assert next(stream).list_services_response.service
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    running.channel.close()
    running.client.close()
    running.server.stop(0)
