"""Candidate features updated and removed through the administrative port, in every form they have."""

import contextlib
import gc
import socket
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import stored
from xlarank_serving import admin as admin_server
from xlarank_serving import admin_features
from xlarank_serving._proto import grpc_service_pb2 as inference
from xlarank_serving.admin import AdminClient, AdminServer

from xlarank.errors import FeatureError, ModelNotFoundError, RequestError, UnavailableError
from xlarank.host import FeatureStore


class StoreAlone:
    """An engine as far as feature stores go, and a repository of it."""

    version = 7

    def __init__(self, store):
        self.features = store
        self.asked = []  # versions of leases

    @contextlib.contextmanager
    def lease(self, name, version, *, by_traffic):
        assert not by_traffic
        if name != "stored":
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        self.asked.append(version)
        self.num_leases += 1
        yield self
        self.num_leases -= 1

    num_leases = 0

    def update_features(self, ids, features):
        assert self.num_leases
        self.features.update(ids, features)

    def remove_features(self, ids):
        return self.features.remove(ids)


@pytest.fixture
def store():
    return FeatureStore(stored.SPEC)


@pytest.fixture
def admin(store):
    with AdminServer(StoreAlone(store), 0) as server, AdminClient(server.address) as client:
        yield client


def test_a_port_that_closes_answers_what_has_come_and_hangs_up(store, monkeypatch):
    has_come, go_on = threading.Event(), threading.Event()

    class Slow(StoreAlone):
        def remove_features(self, ids):
            has_come.set()
            assert go_on.wait(timeout=20)
            return 1

    monkeypatch.setattr(admin_server, "_GRACE_SECONDS", 20.0)
    with (
        AdminServer(Slow(store), 0) as server,
        ThreadPoolExecutor(2) as pool,
        AdminClient(server.address) as busy,
        AdminClient(server.address) as idle,
    ):
        removed = pool.submit(busy.remove_features, "stored", [1])
        assert has_come.wait(timeout=20)
        with pytest.raises(ModelNotFoundError):
            idle.remove_features("nobody", [1])
        stopped = pool.submit(server.stop)
        until_refused = iter(lambda: error_of(idle), "UnavailableError")
        assert set(until_refused) <= {"ModelNotFoundError"}
        go_on.set()
        assert removed.result(timeout=20) == 1
        stopped.result(timeout=20)
        assert error_of(idle) == error_of(busy) == "UnavailableError"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=10)


def error_of(client):
    """Of a change to a model that isn't there."""
    with pytest.raises((ModelNotFoundError, UnavailableError)) as caught:
        client.remove_features("nobody", [1])
    return caught.type.__name__


def rows_of(seed, count):
    rng = np.random.default_rng(seed)
    return [stored.random_row(rng) for _ in range(count)]


@pytest.mark.parametrize("part_bytes", [16 << 20, 2000])
def test_rows_arrive_as_they_were_sent_in_one_call_or_many(store, admin, monkeypatch, part_bytes):
    monkeypatch.setattr(admin_features, "MAX_PART_BYTES", part_bytes)
    ids, rows = [5, -1, 2**62, *range(100, 160)], rows_of(0, 63)
    version = admin.update_features("stored", ids, stored.columns_of(rows))
    assert version == store.stats().version
    assert (version == 1) == (part_bytes > 2000)
    assert stored.rows_of(store.join(ids, {})) == rows
    assert admin.remove_features("stored", [5, -1, 4]) == 2
    with pytest.raises(FeatureError, match=r"aren't there: \[5\]"):
        store.join([5, 100], {})


def test_parts_go_to_the_version_that_took_the_first(store, monkeypatch):
    rows = stored.columns_of(rows_of(4, 63))
    engine = StoreAlone(store)
    with AdminServer(engine, 0) as server, AdminClient(server.address) as admin:
        monkeypatch.setattr(admin_features, "MAX_PART_BYTES", 2000)
        admin.update_features("stored", range(63), rows)
        assert engine.asked == ["", "", *["7"] * (len(engine.asked) - 2)]
        assert len(engine.asked) > 2
        engine.asked.clear()
        monkeypatch.setattr(admin_features, "MAX_PART_BYTES", 10)
        assert admin.remove_features("stored", range(4)) == 4
        assert engine.asked == ["", "7", "7", "7"]


def test_a_feature_with_a_default_may_be_left_out(store, admin):
    row = rows_of(1, 1)[0]
    columns = {name: value for name, value in stored.columns_of([row]).items() if name != "price"}
    admin.update_features("stored", [3], columns)
    assert stored.rows_of(store.join([3], {})) == [row | {"price": 1.5}]


def test_no_rows_are_no_update(store, admin):
    none = stored.columns_of([])
    assert admin.update_features("stored", [], none) == 0
    assert admin.remove_features("stored", []) == 0
    assert store.stats().version == 0


def test_what_is_wrong_is_said_and_nothing_is_put_in(store, admin):
    columns = stored.columns_of(rows_of(2, 2))
    for name, ids, features, error, message in (
        ("stored", [1, 2], columns | {"age": 3.0}, FeatureError, "model 'stored' has no feature 'age'"),
        ("stored", [1, 2, 3], columns, FeatureError, "expected 3 rows, as candidate_ids has, got 2"),
        ("stored", [1.5, 2.0], columns, FeatureError, r"expected int64 ids of shape \[N\], got float64"),
        ("stored", [1, 2], columns | {"item": [1, 100]}, RequestError, "'item': expected ids in .*got 100"),
        ("other", [1, 2], columns, ModelNotFoundError, "'other' is not found"),
    ):
        with pytest.raises(error, match=message):
            admin.update_features(name, ids, features)
    with pytest.raises(RequestError, match=r"input 'candidate_ids': expected INT64 .*the ids of the rows"):
        admin._call("UpdateFeatures", inference.ModelInferRequest(model_name="stored"))
    assert store.stats().rows == 0


def test_a_row_too_large_is_refused_before_it_is_sent(store, admin, monkeypatch):
    monkeypatch.setattr(admin_features, "MAX_PART_BYTES", 2000)
    row = rows_of(3, 1)[0] | {"topics": [1] * 300}
    with pytest.raises(FeatureError, match="of candidate 8: expected a row of at most 2000 bytes, got"):
        admin.update_features("stored", [8], stored.columns_of([row]))
    assert store.stats().rows == 0


def test_a_codec_is_made_once_a_store_and_goes_with_it(monkeypatch):
    made = []

    class Counted(admin_features.ModelCodec):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(admin_features, "ModelCodec", Counted)
    (row,) = rows_of(3, 1)
    repository = Holder(StoreAlone(FeatureStore(stored.SPEC)))
    with AdminServer(repository, 0) as server, AdminClient(server.address) as admin:
        for candidate in range(3):
            admin.update_features("stored", [candidate], stored.columns_of([row]))
        assert len(made) == 1
        store = weakref.ref(repository.served.features)
        repository.served = None
        gc.collect()
        assert store() is None


class Holder:
    """A repository that lets go of its engine."""

    def __init__(self, served):
        self.served = served

    def lease(self, name, version, *, by_traffic):
        return self.served.lease(name, version, by_traffic=by_traffic)


def test_a_model_without_a_store_has_no_features_to_change():
    with AdminServer(StoreAlone(None), 0) as server, AdminClient(server.address) as admin:
        for change in (
            lambda: admin.update_features("stored", [1], {}),
            lambda: admin.remove_features("stored", [1]),
        ):
            with pytest.raises(RequestError, match=r"without a feature store: start .* with --features"):
                change()
