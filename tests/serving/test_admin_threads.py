"""Loads that wait for long hold up neither probes nor what would end them, on every door."""

import contextlib
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from xlarank_serving import admin as admin_server
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient, AdminServer
from xlarank_serving.config import HttpConfig, SecurityConfig, ServerConfig
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import RankingServer
from xlarank_serving.threads import AdminThreads

from xlarank.errors import OverloadError

TOKEN = "a-token-of-enough-letters"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
LIMIT = 64


class Slow:
    """A repository whose loads, or other changes, wait until the test lets them go on."""

    def __init__(self, wire, *slow):
        self.inner = wire.repository()
        self.inner.add(wire.spec, 3).update_rows = lambda *_: 7
        self.has_come, self.go_on = threading.Semaphore(0), threading.Event()
        self.slow = slow

    def __getattr__(self, name):
        method = getattr(self.inner, name)
        return self.wait_and(method) if name in self.slow else method

    def wait_and(self, method):
        def waiting(*words):
            self.has_come.release()
            assert self.go_on.wait(60)
            return method(*words)

        return waiting

    def wait_for(self, count):
        for _ in range(count):
            assert self.has_come.acquire(timeout=60)


@contextlib.contextmanager
def served(repository, tmp_path):
    (tmp_path / "admin").write_text(f"{TOKEN}\n")
    server = RankingServer(
        repository,
        None,
        ServerConfig(port=0),
        http=HttpConfig(port=0),
        security=SecurityConfig(admin_tokens=tmp_path / "admin"),
        manager=repository,
    )
    try:
        yield server
    finally:
        repository.go_on.set()
        server.stop(0)


def call(channel, method, **fields):
    """A future of an RPC of the inference service."""
    request = getattr(messages, f"{method}Request")(**fields)
    rpc = channel.unary_unary(
        f"/{SERVICE_NAME}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=getattr(messages, f"{method}Response").FromString,
    )
    return rpc.future(request, timeout=60, metadata=tuple(HEADERS.items()))


def ask(address, method, path):
    """Status, headers and body."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        connection.request(method, path, headers=HEADERS)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()


def loads_over(door, server, channel, pool):
    """Asks for as many loads as may wait; functions that return once one is answered."""
    if door == "grpc":
        return [call(channel, "RepositoryModelLoad", model_name="feed").result for _ in range(LIMIT)]
    path = "/v2/repository/models/feed/load"
    return [pool.submit(ask, server.rest.address, "POST", path).result for _ in range(LIMIT)]


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_probes_and_other_changes_are_answered_however_many_loads_wait(wire, tmp_path, door):
    repository = Slow(wire, "load")
    with (
        ThreadPoolExecutor(LIMIT) as pool,
        served(repository, tmp_path) as server,
        grpc.insecure_channel(server.address) as channel,
        AdminClient(server.address, token=TOKEN) as admin,
    ):
        loads = loads_over(door, server, channel, pool)
        repository.wait_for(LIMIT)
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(), timeout=60).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        assert call(channel, "ServerLive").result().live
        assert call(channel, "ServerReady").result().ready
        assert call(channel, "ModelReady", name="feed").result().ready
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/feed/ready"):
            assert ask(server.rest.address, "GET", path)[0] == 200
        assert admin.rollback("feed") == 2
        assert admin.update_rows("feed", "videos", [1], np.ones((1, 4))) == 7
        call(channel, "RepositoryModelUnload", model_name="feed").result()
        assert ask(server.rest.address, "POST", "/v2/repository/models/feed/unload")[0] == 200
        assert [name for name, *_ in repository.calls] == ["rollback", "unload", "unload"]
        with pytest.raises(grpc.RpcError, match="RepositoryModelLoad: the server has 64 calls of") as caught:
            call(channel, "RepositoryModelLoad", model_name="feed").result()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "1000") in caught.value.trailing_metadata()
        status, headers, text = ask(server.rest.address, "POST", "/v2/repository/models/feed/load")
        assert (status, headers["retry-after"]) == (429, "1")
        assert "64 calls of its kind in progress or waiting, its limit; try again when one has ended" in text
        repository.go_on.set()
        for load in loads:
            load()
        assert [name for name, *_ in repository.calls].count("load") == LIMIT
        call(channel, "RepositoryModelLoad", model_name="feed").result()


def test_on_the_administrative_port_too_a_rollback_is_heard_however_many_loads_wait(wire):
    repository = Slow(wire, "load")
    with (
        AdminServer(repository, 0, manager=repository) as server,
        grpc.insecure_channel(server.address) as channel,
        AdminClient(server.address) as admin,
    ):
        loads = [call(channel, "RepositoryModelLoad", model_name="feed") for _ in range(LIMIT)]
        repository.wait_for(LIMIT)
        with pytest.raises(grpc.RpcError, match="RepositoryModelLoad: the server has 64 calls of its kind"):
            call(channel, "RepositoryModelLoad", model_name="feed").result()
        assert admin.rollback("feed") == 2
        assert admin.update_rows("feed", "videos", [1], np.ones((1, 4))) == 7
        call(channel, "RepositoryModelUnload", model_name="feed").result()
        assert len(call(channel, "RepositoryIndex").result().models) == 1
        repository.go_on.set()
        for load in loads:
            load.result()


def test_rollbacks_that_wait_are_bounded_and_hold_up_no_update(wire):
    repository = Slow(wire, "rollback")
    with (
        AdminServer(repository, 0, manager=repository) as server,
        AdminClient(server.address) as admin,
        ThreadPoolExecutor(LIMIT) as pool,
    ):
        rollbacks = [pool.submit(admin.rollback, "feed") for _ in range(LIMIT)]
        repository.wait_for(LIMIT)
        with pytest.raises(OverloadError, match="Rollback: the server has 64 calls of its kind") as caught:
            admin.rollback("feed")
        assert caught.value.retry_after_seconds == 1
        assert admin.update_rows("feed", "videos", [1], np.ones((1, 4))) == 7
        repository.go_on.set()
        assert {rollback.result() for rollback in rollbacks} == {2}


def test_a_load_over_http_that_a_stop_cuts_short_is_told_so_in_json(wire, tmp_path, caplog):
    repository = Slow(wire, "load")
    with ThreadPoolExecutor(2) as pool, served(repository, tmp_path) as server:
        asked = pool.submit(ask, server.rest.address, "POST", "/v2/repository/models/feed/load")
        repository.wait_for(1)
        stopped = pool.submit(server.stop, 0)
        status, headers, text = asked.result()
        repository.go_on.set()
        stopped.result()
    assert (status, json.loads(text)) == (503, {"error": "the server is stopping"})
    assert headers["connection"] == "close"
    assert not [record for record in caplog.records if record.exc_info]


def test_every_administrative_rpc_has_its_threads():
    threads = AdminThreads()
    assert threads.pools.keys() == {*admin_server._RPCS, "RepositoryModelLoad", "RepositoryModelUnload"}
