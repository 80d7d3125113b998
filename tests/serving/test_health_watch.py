"""Who watches a server's health hears of every change, though nobody else calls."""

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from xlarank.errors import XlarankError

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def watched(serving):
    """Opens a Watch; its statuses as they come."""
    stub = health_pb2_grpc.HealthStub(serving.channel)
    open_watches = []

    def watch(service):
        call = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
        open_watches.append(call)
        return (response.status for response in call)

    yield watch
    for call in open_watches:
        call.cancel()


def test_a_watcher_hears_that_a_model_was_unloaded_and_came_back(serving, watched):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    engine = serving.repository.engines.pop(("feed", 3))
    assert next(statuses) == Status.NOT_SERVING
    serving.repository.engines["feed", 3] = engine
    assert next(statuses) == Status.SERVING


def test_a_watcher_hears_that_the_server_is_not_ready(serving, watched):
    statuses = watched("")
    assert next(statuses) == Status.SERVING
    serving.repository.loading.add(("feed", 3))
    assert next(statuses) == Status.NOT_SERVING
    serving.repository.loading.clear()
    assert next(statuses) == Status.SERVING


def test_a_look_that_fails_is_not_the_last_one(serving, watched, caplog, monkeypatch):
    statuses = watched("feed")
    assert next(statuses) == Status.SERVING
    has_failed = []

    def models():
        if not has_failed:
            has_failed.append(True)
            raise XlarankError("for once")
        return []

    monkeypatch.setattr(serving.repository, "models", models)
    assert next(statuses) == Status.NOT_SERVING
    assert "health: the repository can't be asked" in caplog.text
