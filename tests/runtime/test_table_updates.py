"""An engine whose tables are written while it answers: scores, versions, metrics, the administrative port."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import grpc
import numpy as np
import pytest
import shop
from flax import nnx
from xlarank_serving import admin as admin_module
from xlarank_serving._proto import admin_pb2 as admin_messages
from xlarank_serving.admin import AdminClient, AdminServer
from xlarank_serving.client import RankingClient

from xlarank.compiler import build_bundle
from xlarank.compiler.reference import reference_scores
from xlarank.errors import ConfigError, ModelNotFoundError, RequestError, UnavailableError
from xlarank.runtime import Engine, Metrics
from xlarank.runtime.table_versions import TableVersions

SPEC = dataclasses.replace(
    shop.SPEC,
    tables=tuple(dataclasses.replace(table, updatable=table.name == "items") for table in shop.SPEC.tables),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    model = shop.Shop(rngs=nnx.Rngs(0))
    build_bundle(model, SPEC, shop.make_tables(), out=folder, buckets=[8], tune_seconds=0)
    return folder


def features_of(num_candidates=6):
    return {
        "age": 31.0,
        "item": np.arange(num_candidates),
        "tags": [["new", "red"]] * num_candidates,
        "price": np.ones((num_candidates, 2), np.float32),
    }


def expected_scores(request, tables):
    model = shop.Shop(rngs=nnx.Rngs(0))
    model.eval()
    return {task: parts[0] for task, parts in reference_scores(model, SPEC, tables, [request]).items()}


def check_scores(scores, expected):
    for task, values in expected.items():
        np.testing.assert_allclose(scores[task], values, rtol=1e-5, atol=1e-6)


def test_requests_after_an_update_are_scored_with_the_new_rows(repository):
    metrics, tables = Metrics(), shop.make_tables()
    rows = np.array([2, 4])
    values = np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    with Engine.load(repository / "shop", metrics=metrics) as engine:
        request = engine.request(features_of())
        before = engine.score(request)
        check_scores(before, expected_scores(request, tables))
        assert engine.update_rows("items", rows, values) == 1
        tables["items"][rows] = values
        after = engine.score(request)
        check_scores(after, expected_scores(request, tables))
        changed = np.isin(np.arange(6), rows)
        assert (after["click"] != before["click"])[changed].all()
        np.testing.assert_array_equal(after["click"][~changed], before["click"][~changed])
        assert engine.update_rows("items", rows[:1], values[:1]) == 2
        assert engine.table_versions["items"].num_rows == 3
        text = metrics.text().decode()
        assert 'xlarank_table_version{model="shop",table="items",version="1"} 2.0' in text
        assert 'xlarank_table_updated_rows_total{model="shop",table="items",version="1"} 3.0' in text
        assert 'xlarank_table_age_seconds{model="shop",table="items",version="1"} ' in text
        assert 'xlarank_table_version{model="shop",table="tags"' not in text, "it isn't updatable"
    with pytest.raises(UnavailableError, match="model 'shop' version 1 is closed"):
        engine.update_rows("items", rows, values)


def test_the_file_of_a_table_is_never_written(repository):
    with Engine.load(repository / "shop") as engine:
        engine.update_rows("items", np.array([0]), np.ones((1, 8), np.float32))
    with Engine.load(repository / "shop") as engine:
        request = engine.request(features_of())
        check_scores(engine.score(request), expected_scores(request, shop.make_tables()))


def test_an_updatable_table_is_in_memory_and_does_not_take_the_others_with_it(repository):
    metrics = Metrics()
    with Engine.load(repository / "shop", table_memory="mmap", metrics=metrics) as engine:
        assert engine.load_report.table_memory == {"items": "huge", "tags": "mmap"}
        engine.update_rows("items", np.array([0]), np.ones((1, 8), np.float32))
        text = metrics.text().decode()
    for table, memory in (("items", "huge"), ("tags", "mmap")):
        labels = f'{{memory="{memory}",model="shop",table="{table}",version="1"}}'
        num_bytes = SPEC.table_by_name[table].num_bytes
        assert f"xlarank_table_memory_bytes{labels} {num_bytes}.0" in text


def test_a_large_update_travels_in_parts(repository, monkeypatch):
    monkeypatch.setattr(admin_module, "MAX_PART_BYTES", 3 * (10 + 4 * 8))
    rows, values = np.arange(7), np.random.default_rng(8).standard_normal((7, 8)).astype(np.float32)
    with Engine.load(repository / "shop") as engine, AdminServer(OneModel(engine), 0) as server:
        with AdminClient(server.address) as admin:
            assert admin.update_rows("shop", "items", rows, values) == 3
            with pytest.raises(
                RequestError, match=r"floats of shape \[7, D\], got float32 of shape \[6, 8\]"
            ):
                admin.update_rows("shop", "items", rows, values[:6])
        tables = shop.make_tables()
        tables["items"][rows] = values
        request = engine.request(features_of())
        check_scores(engine.score(request), expected_scores(request, tables))


def test_an_update_of_no_rows_is_checked_and_is_no_update(repository):
    none = np.zeros(0, np.int64)
    with Engine.load(repository / "shop") as engine, AdminServer(OneModel(engine), 0) as server:
        with AdminClient(server.address) as admin:
            assert engine.update_rows("items", none, np.zeros((0, 8), np.float32)) == 0
            assert admin.update_rows("shop", "items", none, np.zeros((0, 8), np.float32)) == 0
            assert engine.update_rows("items", np.array([1]), np.zeros((1, 8), np.float32)) == 1
            assert admin.update_rows("shop", "items", none, np.zeros((0, 8), np.float32)) == 1
            for table, message in (("words", "one of the tables"), ("tags", "updatable")):
                with pytest.raises(RequestError, match=message):
                    admin.update_rows("shop", table, none, np.zeros((0, 8), np.float32))
            with pytest.raises(RequestError, match=r"new rows as floats of shape \[0, D\], got float32"):
                admin.update_rows("shop", "items", none, np.zeros((1, 8), np.float32))
        with pytest.raises(RequestError, match=r"\[0, 8\]"):
            engine.update_rows("items", none, np.zeros((0, 7), np.float32))
        assert engine.table_versions["items"].version == 1


def test_a_version_counts_updates_and_its_age_begins_anew_with_each():
    now = 10.0
    versions = TableVersions(["items"], clock=lambda: now)
    now = 12.5
    assert versions.now()["items"].version == 0
    assert versions.now()["items"].age_seconds == 2.5
    assert [versions.advance("items", 3), versions.advance("items", 4)] == [1, 2]
    now = 13.0
    state = versions.now()["items"]
    assert (state.version, state.num_rows, state.age_seconds) == (2, 7, 0.5)


class OneModel:
    """A repository of one engine."""

    def __init__(self, engine):
        self._engine = engine

    @contextlib.contextmanager
    def lease(self, name, version, *, by_traffic):
        if name != "shop":
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        yield self._engine


def test_the_administrative_port_updates_rows_and_names_what_is_wrong(repository):
    values = np.full((2, 8), 0.5, np.float32)
    with Engine.load(repository / "shop") as engine, AdminServer(OneModel(engine), 0) as server:
        assert server.address.startswith("127.0.0.1:")
        with AdminClient(server.address) as admin:
            assert admin.update_rows("shop", "items", [1, 3], values) == 1
            tables = shop.make_tables()
            tables["items"][[1, 3]] = values
            request = engine.request(features_of())
            check_scores(engine.score(request), expected_scores(request, tables))
            for words, error, message in (
                (("shop", "items", [50], values[:1]), RequestError, r"row numbers in \[0, 50\), got 50"),
                (
                    ("shop", "items", [1], values[:1, :7]),
                    RequestError,
                    r"floats of shape \[1, 8\], got float32",
                ),
                (
                    ("shop", "items", [1, 2, 3], values),
                    RequestError,
                    r"floats of shape \[3, D\], got float32 of shape \[2, 8\]",
                ),
                (("shop", "tags", [1], values[:1, :5]), RequestError, "table 'tags' isn't updatable"),
                (("shop", "cars", [1], values[:1]), RequestError, r"one of the tables \['items', 'tags'\]"),
                (("none", "items", [1], values[:1]), ModelNotFoundError, "'none' is not found"),
            ):
                with pytest.raises(error, match=message):
                    admin.update_rows(*words)
            assert engine.table_versions["items"].version == 1
    with (
        AdminClient(server.address, timeout=5.0) as admin,
        pytest.raises(UnavailableError),
    ):
        admin.update_rows("shop", "items", [1], values[:1])


def message_of(call):
    with pytest.raises(RequestError) as caught:
        call()
    return str(caught.value)


VALUES = np.zeros((1, 8), np.float32)


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([0.5], VALUES, "expected row numbers as integers of shape [K], got float64 of shape [1]"),
        ([[1]], VALUES, "expected row numbers as integers of shape [K], got int64 of shape [1, 1]"),
        (["a"], VALUES, "expected row numbers as integers of shape [K], got <U1 of shape [1]"),
        (5, VALUES, "expected row numbers as integers of shape [K], got int64 of shape []"),
        (None, VALUES, "expected row numbers as integers of shape [K], got object of shape []"),
        ([[1], [2, 3]], VALUES, "expected row numbers as integers of shape [K], got [[1], [2, 3]]"),
        (
            np.array([2**63], np.uint64),
            VALUES,
            "expected row numbers that int64 holds, got 9223372036854775808",
        ),
        ([1], VALUES + 1e300 * np.ones(1), "new rows: expected finite floats, row 0 holds NaN or infinity"),
        ([1], [[0.0], [0.0, 1.0]], "expected new rows as floats of shape [1, 8], got [[0.0], [0.0, 1.0]]"),
        ([1], [["a"] * 8], "expected new rows as floats of shape [1, 8], got <U1 of shape [1, 8]"),
    ],
)
def test_a_client_of_the_administrative_port_is_told_what_an_engine_tells(repository, rows, values, message):
    where = "table 'items', " if message.startswith("new rows") else "table 'items': "
    with Engine.load(repository / "shop") as engine, AdminClient("127.0.0.1:9") as admin:  # nobody there
        assert message_of(lambda: engine.update_rows("items", rows, values)) == where + message
        # Without the table it doesn't know D.
        assert message_of(lambda: admin.update_rows("shop", "items", rows, values)) == (
            where
            + message.replace("[1, 8], got [", "[1, D], got [").replace("[1, 8], got <", "[1, D], got <")
        )
        told = "expected one of the tables ['items', 'tags'], got ['items']"
        assert told in message_of(lambda: engine.update_rows(["items"], [1], VALUES))


@pytest.mark.parametrize(("rows", "num_bytes"), [([1, 2, 3], 64), ([], 32), ([1], 31)])
def test_the_administrative_port_checks_what_other_clients_send(rows, num_bytes):
    request = admin_messages.UpdateRowsRequest(
        model_name="shop", table="items", rows=rows, values=bytes(num_bytes)
    )
    with AdminServer(OneModel(None), 0) as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/xlarank.admin.v1.Admin/UpdateRows")
        with pytest.raises(grpc.RpcError) as caught:
            call(request.SerializeToString(), timeout=10.0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    told = f"expected values as float32 of shape [{len(rows)}, D], got {num_bytes} bytes"
    assert told in caught.value.details()


def test_a_malformed_message_to_the_administrative_port_is_the_clients_fault():
    with AdminServer(OneModel(None), 0) as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/xlarank.admin.v1.Admin/UpdateRows")  # sends bytes as they are
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x0a\x7fshort", timeout=10.0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a UpdateRowsRequest, got 7 bytes that aren't one: " in caught.value.details()


def test_a_port_in_use_is_refused(repository):
    with (
        AdminServer(OneModel(None), 0) as server,
        pytest.raises(ConfigError, match=rf"admin port {server.port} on 127.0.0.1: expected a free port"),
    ):
        AdminServer(OneModel(None), server.port)


def test_a_server_process_is_updated_while_it_serves(repository, tmp_path):
    words = ["serve", repository, "--port", "0", "--http-port", "0", "--admin-port", "0", "--json"]
    command = [sys.executable, "-m", "xlarank.cli", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = json.loads(process.stdout.readline())
            with RankingClient(ready["grpc"]) as client, AdminClient(ready["admin"]) as admin:
                before = client.score("shop", features_of())["click"]
                assert admin.update_rows("shop", "items", [2], np.ones((1, 8), np.float32)) == 1
                after = client.score("shop", features_of())["click"]
        finally:
            process.terminate()
            process.communicate()
        assert process.returncode == 0
    assert [bool(a != b) for a, b in zip(before, after, strict=True)] == [i == 2 for i in range(6)]
