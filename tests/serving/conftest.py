"""A repository of fake engines that score by arithmetic, and a real server over it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from over_http import Over
from tritonclient.utils import np_to_triton_dtype
from xlarank_serving import status
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.client import RankingClient
from xlarank_serving.config import ConnectionConfig, LimitConfig, SecurityConfig, ServerConfig
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import RankingServer

from xlarank.errors import ConfigError, DeadlineError, ModelNotFoundError, OverloadError, UnavailableError
from xlarank.runtime import Answer, Metrics, Timings
from xlarank.spec import (
    Bucket,
    Bucketise,
    BucketLadder,
    Clip,
    FeatureSpec,
    Hash,
    ModelSpec,
    OutOfRange,
    Ragged,
    StringColumn,
    TableSpec,
    TaskKind,
    TaskSpec,
    check_contents,
)


def column_sum(column):
    """Per row: the sum of its numbers, ids or string lengths. [n] float64."""
    if isinstance(column, Ragged):
        flat = column_sum(column.values)
        ends = np.cumsum(column.lengths)
        return np.array([flat[end - n : end].sum() for end, n in zip(ends, column.lengths, strict=True)])
    if isinstance(column, StringColumn):
        return np.diff(column.offsets).astype(np.float64)
    return column.astype(np.float64).sum(axis=tuple(range(1, column.ndim)))


def expected_scores(request):
    """What FakeEngine answers: context plus candidate sums, and twice that."""
    total = np.zeros(request.num_candidates)
    for place, column in enumerate(request.columns, start=1):
        total = total + place * column_sum(column)
    largest = np.finfo(np.float32).max
    return {
        task: np.clip(scale * total, -largest, largest).astype(np.float32)
        for task, scale in (("finish", 1), ("share", 2))
    }


def answer_to(request):
    return Answer(expected_scores(request), Timings(queue=1e-3, gather=2e-3, execute=3e-3, total=7e-3))


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    model: str
    version: int
    state: str
    reason: str


class FakeEngine:
    """Answers at once, unless `hold` keeps requests waiting."""

    def __init__(self, spec, version, metrics):
        self.spec, self.version, self.metrics = spec, version, metrics
        self.check = check_contents
        self.ladder = BucketLadder((Bucket(8, 1), Bucket(32, 1), Bucket(32, 32)))
        self.requests = []
        self.options = []  # of each request
        self.held = None  # a list of (future, request) while holding
        self.error = None
        self.features = None  # a FeatureStore, for requests by candidate id

    def submit(self, request, options=None):
        future = concurrent.futures.Future()
        self.requests.append(request)
        self.options.append(options)
        if isinstance(self.error, (DeadlineError, OverloadError, UnavailableError)):
            raise self.error  # as a real engine refuses
        if self.error is not None:
            future.set_exception(self.error)
        elif self.held is not None:
            self.held.append((future, request))
            self.arrived.release()
        else:
            future.set_result(answer_to(request))
        return future

    def abandon(self, why):
        for future, _ in self.held or ():
            if future.set_running_or_notify_cancel():
                future.set_exception(UnavailableError(why))

    def hold(self):
        self.held, self.arrived = [], threading.Semaphore(0)

    def release(self):
        for future, request in self.held:
            if future.set_running_or_notify_cancel():
                future.set_result(answer_to(request))
        self.held = None


class FakeRepository:
    """What InferenceService asks for."""

    def __init__(self, metrics):
        self.metrics = metrics
        self.engines = {}
        self.loading = set()
        self.failed = []  # VersionStatus of versions that couldn't be loaded
        self.calls = []  # of load and unload
        self.keys = []  # of leases
        self.overloads = []  # how many were arriving, by look
        self.refusal = None
        self.is_closed = False

    def overload(self, num_arriving):
        self.overloads.append(num_arriving)
        return self.refusal

    def add(self, spec, version):
        engine = FakeEngine(spec, version, self.metrics.model(spec.name, version))
        self.engines[spec.name, version] = engine
        return engine

    def abandon(self, why):
        for engine in self.engines.values():
            engine.abandon(why)

    @property
    def is_ready(self):
        return not self.loading

    def models(self):
        return [(name, version, (name, version) not in self.loading) for name, version in self.engines]

    def index(self):
        return [
            VersionStatus(name, version, "LOADING" if (name, version) in self.loading else "READY", "")
            for name, version in self.engines
        ] + self.failed

    def load(self, name):
        if name not in {own for own, _ in self.engines}:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        self.calls.append(("load", name))

    def unload(self, name):
        self.calls.append(("unload", name))

    def rollback(self, name, version=None):
        if version == 9:
            raise ConfigError(f"model {name!r}: rollback is for policies latest and all")
        self.calls.append(("rollback", name, version))
        return version or 2

    @contextlib.contextmanager
    def lease(self, name, version, key=None, *, by_traffic=True):
        self.keys.append(key)
        yield self.engine(name, version)

    def engine(self, name, version):
        versions = [own for own_name, own in self.engines if own_name == name]
        if not versions:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        if version and version not in map(str, versions):
            raise ModelNotFoundError(f"Request for unknown model: '{name}' version {version} is not found")
        key = (name, int(version) if version else max(versions))
        if key in self.loading:
            raise UnavailableError(
                f"Request for unknown model: '{name}' version {key[1]} is not at ready state"
            )
        return self.engines[key]

    def close(self):
        self.is_closed = True


def feature(name, kind, scope, **fields):
    return FeatureSpec(name=name, kind=kind, scope=scope, **fields)


# Every kind of tensor in both scopes; `mood` and `fresh` have defaults.
FEED = ModelSpec(
    name="feed",
    features=(
        feature("age", "dense", "context"),
        feature("country", "id", "context", table="hashed", dtype="string", preprocessing=[Hash()]),
        feature("watched", "sequence", "context", table="videos", max_length=4),
        feature("mood", "dense", "context", width=2, default=0.5),
        feature("video", "id", "candidate", table="videos"),
        feature("topics", "id_list", "candidate", table="hashed", combiner="mean", preprocessing=[Hash()]),
        feature(
            "tags",
            "id_list",
            "candidate",
            table="hashed",
            combiner="sum",
            dtype="string",
            preprocessing=[Hash()],
        ),
        feature("likes", "dense", "candidate", preprocessing=[Clip(low=0.0, high=100.0)]),
        feature("vector", "dense", "candidate", width=3),
        feature("hour", "id", "candidate", table="hours", preprocessing=[Bucketise(boundaries=(6.0, 12.0))]),
        feature("fresh", "id", "candidate", table="videos", default=1),
    ),
    tables=(
        TableSpec(name="videos", rows=100, dim=4),
        TableSpec(name="hashed", rows=50, dim=4, out_of_range=OutOfRange.ZERO),
        TableSpec(name="hours", rows=3, dim=4),
    ),
    tasks=(TaskSpec(name="finish"), TaskSpec(name="share", kind=TaskKind.REGRESSION, output="share.score")),
)


@dataclasses.dataclass
class Serving:
    """A running server and what is behind it."""

    server: RankingServer
    repository: FakeRepository
    engine: FakeEngine
    client: RankingClient
    metrics: Metrics
    channel: grpc.Channel

    def call(self, method, request, **options):
        """One RPC with our own messages."""
        return self.channel.unary_unary(
            f"/{SERVICE_NAME}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(messages, f"{method}Response").FromString,
        )(request, timeout=10, **options)

    def infer(self, request, **options):
        return self.call("ModelInfer", request, **options)

    def refusal(self, request, code=grpc.StatusCode.INVALID_ARGUMENT):
        """Details of the status that ModelInfer answers, which must have this code."""
        with pytest.raises(grpc.RpcError) as info:
            self.infer(request)
        assert info.value.code() is code, info.value.details()
        return info.value.details()


def config_of(cls, options):
    """A config of those options that are its fields."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: options[name] for name in names if name in options})


def start_at(**options):
    """A running server; ConfigError if it can't listen."""
    metrics = Metrics()
    repository = FakeRepository(metrics)
    engine = repository.add(FEED, 3)
    parts = [config_of(cls, options) for cls in (ServerConfig, LimitConfig, ConnectionConfig, SecurityConfig)]
    server = RankingServer(
        repository, metrics.text, parts[0], limits=parts[1], connections=parts[2], security=parts[3]
    )
    client = RankingClient(server.address, timeout=10)
    return Serving(server, repository, engine, client, metrics, grpc.insecure_channel(server.address))


def start(**options):
    """A running server on free ports."""
    return start_at(port=0, http_port=0, **options)


@pytest.fixture(autouse=True)
def nothing_is_told_yet():
    """The log hears of a kind of defect once a minute, and of these in each test."""
    status._complaints.close()


@contextlib.contextmanager
def running(**options):
    """A server until the end of the block; see `start`."""
    started = start(**options)
    yield started
    started.channel.close()
    started.client.close()
    started.server.stop(0)


@pytest.fixture
def serving():
    """A server of its own for one test."""
    with running() as started:
        yield started


@pytest.fixture
def patient():
    """The same, which minds nobody who doesn't answer its pings."""
    with running(keepalive_timeout_seconds=600.0) as started:
        yield started


@pytest.fixture(scope="session")
def shared():
    """One server for tests that leave it as they found it."""
    with running() as started:
        yield started


@pytest.fixture
def candidates():
    """Values of every feature of FEED for 3 candidates."""
    return {
        "age": 31.5,
        "country": "de",
        "watched": [[5, 6, 7]],
        "mood": [[0.25, 0.75]],
        "video": [8, 0, 99],
        "topics": [[1, 2], [], [2**40]],
        "tags": [["a"], ["b", "ccc"], []],
        "likes": [0.5, 1.5, 2.5],
        "vector": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]],
        "hour": [3.0, 9.0, 23.0],
        "fresh": [4, 5, 6],
    }


def raw_request(model="feed", **inputs):
    """A ModelInferRequest with raw contents; each input is an array, or (datatype, shape, bytes)."""
    request = messages.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        name = name.replace("__", ".")
        if isinstance(value, tuple):
            datatype, shape, raw = value
        elif isinstance(value, list):
            datatype, shape = "BYTES", [len(value)]
            raw = b"".join(len(v).to_bytes(4, "little") + v for v in value)
        else:
            datatype, shape, raw = np_to_triton_dtype(value.dtype), value.shape, value.tobytes()
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def valid_inputs(n=3):
    """Per-feature inputs of FEED for n candidates; `mood` and `fresh` are left out."""
    return {
        "age": np.array([31.5], np.float32),
        "country": [b"de"],
        "watched": np.array([5, 6, 7], np.int64),
        "watched__lengths": np.array([3], np.int32),
        "video": np.arange(n, dtype=np.int64),
        "topics": np.arange(2 * n, dtype=np.int64),
        "topics__lengths": np.full(n, 2, np.int32),
        "tags": [b"x"] * n,
        "tags__lengths": np.ones(n, np.int32),
        "likes": np.linspace(0, 1, n, dtype=np.float32),
        "vector": np.ones((n, 3), np.float32),
        "hour": np.full(n, 9, np.float32),
    }


@pytest.fixture(scope="session")
def wire():
    """Helpers to write requests by hand."""
    return SimpleNamespace(
        messages=messages,
        raw=raw_request,
        valid=valid_inputs,
        expected=expected_scores,
        spec=FEED,
        repository=lambda: FakeRepository(Metrics()),
        start=start,
        start_at=start_at,
    )


@pytest.fixture(scope="module")
def over(wire):
    """A server over HTTP for tests that leave it as they found it."""
    over = Over(wire)
    yield over
    over.server.stop(0)


@pytest.fixture
def own(wire):
    """Starts servers over HTTP for a test that changes them."""
    made = []

    def make(**options):
        made.append(Over(wire, **options))
        return made[-1]

    yield make
    for over in made:
        over.server.stop(0)
