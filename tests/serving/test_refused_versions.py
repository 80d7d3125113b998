"""What is told of a version that can't be served to whoever asks for it."""

import http.client
import json

import grpc
import pytest
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient
from xlarank_serving.config import HttpConfig, SecurityConfig, ServerConfig
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import RankingServer

from xlarank.errors import BundleError, ConfigError, ModelError, RequestError, VerifyError

TOKEN = "a-token-of-enough-letters"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def refusing(wire, tmp_path):
    """A server whose repository raises `error` for every load and rollback."""
    repository = wire.repository()
    repository.add(wire.spec, 3)

    def refuse(*_):
        raise repository.error

    repository.load = repository.rollback = refuse
    (tmp_path / "admin").write_text(f"{TOKEN}\n")
    with RankingServer(
        repository,
        None,
        ServerConfig(port=0, grace_seconds=0),
        http=HttpConfig(port=0),
        security=SecurityConfig(admin_tokens=tmp_path / "admin"),
        manager=repository,
    ) as server:
        yield server, repository


def loaded_over_grpc(server):
    with grpc.insecure_channel(server.address) as channel:
        rpc = channel.unary_unary(f"/{SERVICE_NAME}/RepositoryModelLoad")
        request = messages.RepositoryModelLoadRequest(model_name="feed").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            rpc(request, timeout=20, metadata=tuple(HEADERS.items()))
    return caught.value.code().name, caught.value.details()


def loaded_over_http(server):
    connection = http.client.HTTPConnection(server.rest.address, timeout=20)
    connection.request("POST", "/v2/repository/models/feed/load", headers=HEADERS)
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


@pytest.mark.parametrize("error_type", [ModelError, VerifyError, BundleError, ConfigError])
def test_a_load_is_refused_with_the_reason_and_no_traceback(refusing, caplog, error_type):
    server, repository = refusing
    repository.error = error_type("version 2: golden scores differ")
    assert loaded_over_grpc(server) == ("FAILED_PRECONDITION", "version 2: golden scores differ")
    assert loaded_over_http(server) == (400, {"error": "version 2: golden scores differ"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("error_type", "told"),
    [(ModelError, ModelError), (BundleError, ModelError), (ConfigError, RequestError)],
)
def test_a_rollback_is_refused_likewise_and_by_the_policy_as_asked_wrong(refusing, caplog, error_type, told):
    server, repository = refusing
    repository.error = error_type("rollback to version 1 failed")
    with (
        AdminClient(server.address, token=TOKEN) as admin,
        pytest.raises(told, match=r"^rollback to version 1 failed$") as caught,
    ):
        admin.rollback("feed")
    assert type(caught.value) is told
    assert not caplog.records


def test_a_defect_of_a_load_is_internal_and_logged(refusing, caplog):
    server, repository = refusing
    repository.error = ZeroDivisionError("boom")
    assert loaded_over_grpc(server) == ("INTERNAL", "internal error: ZeroDivisionError: boom")
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
