"""What failed, over whatever transport, keeps no version that has been replaced."""

import http.client
import logging

import grpc
import linear
import numpy as np
import pytest
from bench_server import encode
from executors import Faulty, wrap
from freed import Parts, no_collector
from soak_clients import rest_request
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.config import HttpConfig, ServerConfig
from xlarank_serving.http_messages import HEADER_LENGTH
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import RankingServer

from xlarank.runtime import ModelRepository, VersionOptions


def over_grpc(server, data):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as info:
        channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")(data, timeout=60)
    assert info.value.code() is grpc.StatusCode.INTERNAL


def on_a_stream(server, data):
    with grpc.insecure_channel(server.address) as channel:
        method = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer")
        (answer,) = method(iter([data]), timeout=60)
    parameters = messages.ModelStreamInferResponse.FromString(answer).infer_response.parameters
    assert parameters["xlarank_status"].string_param == "INTERNAL"


def left_on_a_stream(server, data):
    """The caller leaves as soon as there is an answer."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer")(iter([data] * 100), timeout=60)
        next(call)
        call.cancel()


def over_http(server, data):
    head, body = rest_request(data)
    connection = http.client.HTTPConnection(server.rest.address, timeout=60)
    connection.request("POST", "/v2/models/linear/infer", head + body, {HEADER_LENGTH: str(len(head))})
    assert connection.getresponse().status == 500
    connection.close()


@pytest.mark.parametrize("fail", [over_grpc, on_a_stream, left_on_a_stream, over_http])
def test_a_version_whose_requests_failed_is_freed(fail, linear_version, tmp_path, caplog):
    """Tracebacks have the frames that waited for the exception's future: no such cycle keeps the engine."""
    caplog.set_level(logging.CRITICAL + 1)  # pytest keeps what is logged, with its exceptions

    def nan_at_their_age(bucket, leaves, scores):
        """Not for golden requests, by which devices are judged."""
        (ages,) = (leaf for leaf in leaves.values() if leaf.shape[1:] == (1,))
        is_theirs = (ages == np.float32(linear.features(1)["age"])).any()
        return {
            task: np.full_like(values, np.nan) if is_theirs else values for task, values in scores.items()
        }

    linear.publish(linear_version, tmp_path, 1)
    repository = ModelRepository.open(tmp_path, num_devices=2, versions=VersionOptions(warm_share=1.0))
    ports = ServerConfig(port=0, http_port=0)
    with RankingServer(repository, None, ports, http=HttpConfig(port=0)) as server:
        engine = repository.engine("linear")
        data = encode(engine.spec, engine.request(linear.features(4)))
        parts = Parts(engine)
        for executor in wrap(engine, Faulty):
            executor.fault = nan_at_their_age
        with no_collector():
            del engine, executor
            fail(server, data)
            linear.publish(linear_version, tmp_path, 2)
            repository.poll()
            assert parts.left() == []
