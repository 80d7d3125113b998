"""Requests by candidate id: over the wire with a real feature store, and by an engine of a real bundle."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import urllib.request

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from flax import nnx
from tritonclient.utils import InferenceServerException
from xlarank_serving.admin import AdminClient
from xlarank_serving.client import RankingClient
from xlarank_serving.codec import ModelCodec

from xlarank.compiler import build_bundle
from xlarank.errors import ConfigError, FeatureError, RequestError, UnavailableError
from xlarank.host import FeatureFile, FeatureStore, FileSource
from xlarank.runtime import Engine, FeatureOptions, Metrics
from xlarank.spec import FeatureSpec, ModelSpec, TableSpec, TaskKind, TaskSpec

SPEC = ModelSpec(
    name="linear",
    features=(
        FeatureSpec(name="age", kind="dense", scope="context"),
        FeatureSpec(name="likes", kind="dense", scope="candidate", width=2, default=0.5),
        FeatureSpec(
            name="topics", kind="id_list", scope="candidate", table="topics", combiner="sum", default=(1,)
        ),
        FeatureSpec(name="place", kind="dense", scope="candidate", default=0.0),
    ),
    tables=(TableSpec(name="topics", rows=10, dim=3),),
    tasks=(TaskSpec(name="value", kind=TaskKind.REGRESSION),),
)

CONFIG = """
name = "linear"
model = "none:build"
features = [
  { name = "age", kind = "dense", scope = "context" },
  { name = "likes", kind = "dense", scope = "candidate", width = 2, default = 0.5 },
  { name = "topics", kind = "id_list", scope = "candidate", table = "t", combiner = "sum", default = [1] },
  { name = "place", kind = "dense", scope = "candidate", default = 0.0 },
]
tables = [{ name = "t", dim = 3 }]
tasks = [{ name = "value", kind = "regression" }]
"""

NUM_STORED = 400


class Linear(nnx.Module):
    """value = age * 2 + likes[0] - likes[1] + sum of the topics' vectors + place."""

    def __init__(self):
        self.scale = nnx.Param(np.float32([2.0]))

    def __call__(self, features):
        value = features["age"][:, 0] * self.scale[...][0] + features["place"][:, 0]
        return {"value": value + features["likes"] @ np.float32([1.0, -1.0]) + features["topics"].sum(axis=1)}


def candidate(number):
    """Likes and topics of the candidate with id 1000 + number."""
    return [float(number % 7), float(number % 5)], [number % 10] * (number % 4)


def value_of(likes, topics):
    # Row t of the table sums to 9t + 3.
    return 6.0 + likes[0] - likes[1] + sum(9 * t + 3 for t in topics)


def expected(ids):
    return [value_of(*candidate(int(i) - 1000)) for i in ids]


IDS = np.random.default_rng(0).permutation(NUM_STORED)[:37].astype(np.int64) + 1000


def run_command(*words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "xlarank.cli", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle, and the feature file that `xlarank features build` makes of Parquet."""
    folder = tmp_path_factory.mktemp("ids")
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    build_bundle(Linear(), SPEC, {"topics": table}, out=folder / "models", buckets=[16, 64])
    likes, topics = zip(*(candidate(i) for i in range(NUM_STORED)), strict=True)
    data = {"item_id": np.arange(NUM_STORED) + 1000, "likes": list(likes), "topics": list(topics)}
    pq.write_table(pa.table(data), folder / "items.parquet", row_group_size=128)
    (folder / "config.toml").write_text(CONFIG)
    words = ["--config", folder / "config.toml", "--parquet", folder / "items.parquet", "--without", "place"]
    process = run_command(
        "features", "build", *words, "--id-column", "item_id", "--out", folder / "features", "--json"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    built = json.loads(out.splitlines()[-1])
    assert (built["rows"], built["features"], built["model"]) == (NUM_STORED, ["likes", "topics"], "linear")
    return folder


@contextlib.contextmanager
def serving(folder, *options, features=None):
    """A server process and its ready line."""
    words = ["serve", folder / "models", "--json", "--port", "0", "--http-port", "0"]
    words += ["--compile-cache", folder / "cache", "--features", features or folder / "features"]
    words += options
    with run_command(*words) as process:
        try:
            line = process.stdout.readline()
            assert line, process.communicate(timeout=60)[1]
            yield json.loads(line)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
        finally:
            process.kill()


@pytest.fixture(scope="module")
def running(folder):
    with serving(folder, "--rest-port", "0") as ready:
        yield ready


def metrics_of(ready):
    with urllib.request.urlopen(f"http://{ready['http']}/metrics") as response:
        lines = response.read().decode().splitlines()
    prefix, labels = "xlarank_feature_store_", '{model="linear",version="1"} '
    found = [line.removeprefix(prefix).split(labels) for line in lines if line.startswith(prefix)]
    return {name: float(value) for name, value in found}


def close(scores, values):
    np.testing.assert_allclose(scores, values, rtol=1e-5, atol=1e-4)


def test_ids_alone_get_the_scores_of_all_features(running):
    likes, topics = zip(*(candidate(int(i) - 1000) for i in IDS), strict=True)
    with RankingClient(running["grpc"]) as client:
        by_id = client.score("linear", {"age": 3.0}, candidate_ids=IDS)["value"]
        in_full = client.score("linear", {"age": 3.0, "likes": np.float32(likes), "topics": list(topics)})
        np.testing.assert_array_equal(by_id, in_full["value"])
        close(by_id, expected(IDS))
        close(client.score("linear", {"age": 3.0}, candidate_ids=[])["value"], [])


@pytest.mark.parametrize("packed", [False, True])
def test_features_that_are_sent_go_before_the_store_s(running, packed):
    likes, place = np.float32([[9, 2], [1, 1], [0, 5]]), np.float32([1, 2, 3])
    with RankingClient(running["grpc"]) as client:
        scores = client.score(
            "linear",
            {"age": 3.0, "likes": likes, "place": place},
            candidate_ids=[1003, 1007, 1003],
            packed=packed,
        )
    topics = [candidate(i)[1] for i in (3, 7, 3)]
    values = [value_of(*pair) + p for *pair, p in zip(likes, topics, place, strict=True)]
    close(scores["value"], values)


def triton_input(name, values, datatype):
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def test_tritonclient_sends_ids(running):
    with triton.InferenceServerClient(running["grpc"]) as client:
        inputs = [triton_input("age", np.float32([3]), "FP32"), triton_input("candidate_ids", IDS, "INT64")]
        close(client.infer("linear", inputs).as_numpy("value"), expected(IDS))
        narrow = [inputs[0], triton_input("candidate_ids", IDS.astype(np.int32), "INT32")]
        close(client.infer("linear", narrow).as_numpy("value"), expected(IDS))
        metadata = client.get_model_metadata("linear", as_json=True)
        assert metadata["inputs"][-1] == {"name": "candidate_ids", "datatype": "INT64", "shape": ["-1"]}
        bad = [inputs[0], triton_input("candidate_ids", np.array([1003, 5, 6]), "INT64")]
        with pytest.raises(
            triton.InferenceServerException, match=r"2 of 3 that aren't there: \[5, 6\]"
        ) as info:
            client.infer("linear", bad)
        assert info.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_ids_come_in_a_stream(running):
    answers = queue.Queue()
    with triton.InferenceServerClient(running["grpc"]) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for ids in (IDS, IDS[:3], np.array([5])):
            inputs = [
                triton_input("age", np.float32([3]), "FP32"),
                triton_input("candidate_ids", ids, "INT64"),
            ]
            client.async_stream_infer("linear", inputs)
        for ids in (IDS, IDS[:3]):
            result, error = answers.get(timeout=60)
            assert error is None
            close(result.as_numpy("value"), expected(ids))
        assert "1 of 1 that aren't there: [5]" in str(answers.get(timeout=60)[1])


def test_ids_come_over_http(running):
    age = triton_http.InferInput("age", [1], "FP32").set_data_from_numpy(np.float32([3]))
    ids = triton_http.InferInput("candidate_ids", IDS.shape, "INT64")
    with triton_http.InferenceServerClient(running["rest"]) as client:
        for is_binary in (False, True):
            ids.set_data_from_numpy(IDS, binary_data=is_binary)
            close(client.infer("linear", [age, ids]).as_numpy("value"), expected(IDS))
        unknown = triton_http.InferInput("candidate_ids", [1], "INT64").set_data_from_numpy(np.array([5]))
        with pytest.raises(InferenceServerException, match=r"1 of 1 that aren't there: \[5\]") as info:
            client.infer("linear", [age, unknown])
        assert info.value.status() == "400"


def test_what_is_wrong_with_ids_is_said(running):
    with RankingClient(running["grpc"]) as client:
        with pytest.raises(
            RequestError, match="feature 'place': expected 2 rows, as candidate_ids has, got 3"
        ):
            # The client checks too; by hand it would be the server.
            client.score("linear", {"age": 3.0, "place": [1.0, 2.0, 3.0]}, candidate_ids=[1003, 1004])
        with pytest.raises(
            FeatureError, match=r"candidate_ids: expected int64 ids of shape \[N\], got float64"
        ):
            client.score("linear", {"age": 3.0}, candidate_ids=[1.5])
    with triton.InferenceServerClient(running["grpc"]) as client:
        for tensors, message in [
            (
                {"age": np.float32([3]), "candidate_ids": np.array([[1003]])},
                r"INT64 or another integer of shape \[N\], got",
            ),
            ({"candidate_ids": np.array([1003])}, "feature 'age' is missing"),
            (
                {"age": np.float32([3]), "candidate_ids": np.array([1003]), "place": np.float32([1, 2])},
                "feature 'place': expected 1 rows, as candidate_ids has, got 2",
            ),
        ]:
            inputs = [
                triton_input(name, array, "FP32" if array.dtype == np.float32 else "INT64")
                for name, array in tensors.items()
            ]
            with pytest.raises(triton.InferenceServerException, match=message):
                client.infer("linear", inputs)


def test_a_store_is_in_the_metrics(running):
    before = metrics_of(running)
    with RankingClient(running["grpc"]) as client:
        client.score("linear", {"age": 3.0}, candidate_ids=[1001, 1002])
        with pytest.raises(RequestError):
            client.score("linear", {"age": 3.0}, candidate_ids=[1001, 1])
    after = metrics_of(running)
    assert after.keys() == {
        "rows",
        "bytes",
        "hits_total",
        "misses_total",
        "evictions_total",
        "fetches_total",
        "fetch_seconds_total",
        "fetch_failures_total",
        "version",
        "age_seconds",
        "oldest_seconds",
    }
    assert after["rows"] == NUM_STORED
    assert after["hits_total"] - before["hits_total"] == 3
    assert after["misses_total"] - before["misses_total"] == 1
    assert after["version"] == 0


def test_policy_default_and_updates_over_the_wire(folder):
    options = ("--feature-misses", "default", "--admin-port", "0", "--max-message-mib", "1")
    with serving(folder, *options) as ready, RankingClient(ready["grpc"]) as client:
        for _ in range(2):  # half a megabyte of ids; 36 bytes each of what they stand for
            with pytest.raises(
                RequestError,
                match=r"expected at most 1048576 bytes of stored features, .* got 2359296 for 65536 ids",
            ):
                client.score("linear", {"age": 3.0}, candidate_ids=np.full(65536, 1003))

        def scores():
            return client.score("linear", {"age": 3.0}, candidate_ids=[5, 1003])["value"]

        close(scores(), [value_of([0.5, 0.5], [1]), *expected([1003])])
        with AdminClient(ready["admin"]) as admin:
            rows = {"likes": [[4.0, 1.0], [8.0, 0.0]], "topics": [[2, 3], []]}
            assert admin.update_features("linear", [5, 1003], rows) == 1
            close(scores(), [value_of([4, 1], [2, 3]), value_of([8, 0], [])])
            assert admin.remove_features("linear", [1003, 6]) == 1
            close(scores(), [value_of([4, 1], [2, 3]), value_of([0.5, 0.5], [1])])
            with pytest.raises(FeatureError, match="model 'linear' has no feature 'place'"):
                admin.update_features("linear", [5], {"place": [1.0]})
        assert metrics_of(ready)["version"] == 2


def test_policy_fetch_over_the_wire(folder):
    options = ("--feature-misses", "fetch", "--feature-memory", "65536", "--feature-fetch-timeout-ms", "1e6")
    with serving(folder, *options) as ready, RankingClient(ready["grpc"]) as client:
        for _ in range(2):
            close(client.score("linear", {"age": 3.0}, candidate_ids=IDS)["value"], expected(IDS))
        with pytest.raises(RequestError, match="the feature store or its source"):
            client.score("linear", {"age": 3.0}, candidate_ids=[5])
        stats = metrics_of(ready)
    assert (stats["hits_total"], stats["misses_total"]) == (len(IDS), len(IDS) + 1)
    assert stats["rows"] == len(IDS)
    assert (stats["fetches_total"], stats["fetch_failures_total"]) == (2, 0)
    assert 0 < stats["bytes"] <= 65536


def test_a_source_of_one_s_own_serves_and_what_it_raises_is_told(folder):
    (folder / "catalogue.py").write_text(
        "import numpy as np\n"
        "from xlarank.host import FeatureRows\n"
        "class Catalogue:\n"
        "    def fetch(self, ids):\n"
        "        if 404 in ids:\n"
        "            raise ConnectionError('catalogue refused')\n"
        "        likes = np.stack([ids, 0 * ids], 1).astype(np.float32)\n"
        "        return FeatureRows(ids, {'likes': likes, 'topics': [[3]] * len(ids)})\n"
        "def open_catalogue(spec):\n"
        "    assert spec.name == 'linear'\n"
        "    return Catalogue()\n"
    )
    source = f"{folder / 'linear'},source=catalogue:open_catalogue,without=place,fetch_timeout_ms=1e6"
    with serving(folder, features=source) as ready, RankingClient(ready["grpc"]) as client:
        scores = client.score("linear", {"age": 3.0, "place": [1.0, 2.0]}, candidate_ids=[5, 7])["value"]
        close(scores, [value_of([5, 0], [3]) + 1, value_of([7, 0], [3]) + 2])
        with pytest.raises(UnavailableError, match="Catalogue of model 'linear': ConnectionError: catalogue"):
            client.score("linear", {"age": 3.0, "place": [1.0]}, candidate_ids=[404])
        stats = metrics_of(ready)
    assert (stats["fetches_total"], stats["fetch_failures_total"], stats["rows"]) == (2, 1, 2)


def test_a_source_that_there_isn_t_is_told_by_check_and_start(folder):
    for option in ("--check", "--json"):
        process = run_command(
            "serve", folder / "models", "--port", "0", "--http-port", "0", option,
            "--features", "linear,source=nowhere:open_catalogue",
        )  # fmt: skip
        out, err = process.communicate(timeout=3600)
        assert process.returncode == 1
        assert "'nowhere:open_catalogue': no file nowhere.py in" in out + err


def test_a_packed_id_of_length_0_comes_from_the_store_default_or_not(wire):
    """`fresh` has a default, `video` none."""
    store = FeatureStore(wire.spec)
    rows = {"video": [7, 8, 9], "fresh": [4, 5, 6], "topics": [[1], [2], [3]], "tags": [["a"], [], ["b"]]}
    rows |= {"likes": [0.5] * 3, "vector": [[1.0] * 3] * 3, "hour": [2.0] * 3}
    store.update([1, 2, 3], rows)
    sent = wire.valid(2)
    inputs = {name: sent[name] for name in ("age", "country", "watched", "watched__lengths")}
    packed = {
        "candidate__values": np.array([11, 12]),
        "candidate__lengths": np.int32([[0, 0], [1, 1], [0, 0]]),
    }
    request = wire.raw(**inputs, **packed, candidate_ids=np.array([3, 1]))
    read = ModelCodec(wire.spec, store).decode(request)
    assert read.column("video").tolist() == [9, 7]
    assert read.column("fresh").tolist() == [6, 4]
    assert read.column("topics").values.tolist() == [11, 12]
    packed["candidate__lengths"] = np.int32([[1, 0], [1, 0], [0, 0]])
    request = wire.raw(**inputs, **packed, candidate_ids=np.array([3, 1]))
    with pytest.raises(
        FeatureError, match=r"feature 'video': expected length 1 in every row, .* got 0 in row 1"
    ):
        ModelCodec(wire.spec, store).decode(request)


def test_a_server_without_a_store_refuses_ids(shared):
    with pytest.raises(FeatureError, match="got candidate_ids, but it is served without a feature store"):
        shared.client.score("feed", {"age": 3.0}, candidate_ids=[1])


def test_over_the_wire_too(shared, wire):
    details = shared.refusal(wire.raw(candidate_ids=np.array([1])), grpc.StatusCode.INVALID_ARGUMENT)
    assert details.startswith("model 'feed' has no input 'candidate_ids'; it has ['age'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--feature-memory", "100000"],
            "memory_bytes is for the cache of misses 'fetch'; misses is 'error'",
        ),
        (
            ["--feature-misses", "fetch", "--feature-memory", "1"],
            "memory_bytes must be an integer in [65536, 2**63); was 1",
        ),
    ],
)
def test_serve_says_what_is_wrong_with_its_options(folder, options, message):
    words = ["serve", folder / "models", "--port", "0", "--http-port", "0", "--features", folder / "features"]
    process = run_command(*words, *options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a/b.features", ("error", None, None)),
        ("a/b.features,misses=default", ("default", None, None)),
        ("a/b.features,misses=fetch", ("fetch", 70000, 5.0)),
        ("a/b.features,memory_bytes=90000,misses=fetch,max_age_seconds=60", ("fetch", 90000, 60.0)),
    ],
)
def test_a_feature_file_has_options_of_its_own_before_those_of_all(text, fields):
    options = FeatureOptions.parse(text, memory_bytes=70000, max_age_seconds=5.0)
    assert str(options.path) == "a/b.features"
    assert (options.misses.value, options.memory_bytes, options.max_age_seconds) == fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.features,misses=fetch,memory_bytes=1",
            r"features a.features: memory_bytes must be an integer in \[65536, 2\*\*63\); was 1",
        ),
        (
            "a.features,misses=fetch,max_age_seconds=0",
            "features a.features: max_age_seconds must be >= 1; was 0.0",
        ),
        ("a,size=3", r"expected PATH,FIELD=VALUE,\.\.\. of .*'misses', .*\], got \['size'\]"),
        ("a,misses=ask", "features a,misses=ask: misses: 'ask' is not a valid MissPolicy"),
        ("a,max_age_seconds=5", "features a: max_age_seconds is for the cache of misses 'fetch'; misses is"),
        ("a,misses=fetch,memory_bytes=1k", "memory_bytes: invalid literal"),
    ],
)
def test_options_that_no_feature_file_can_have_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        FeatureOptions.parse(text)


def test_a_file_of_a_model_that_isn_t_served_is_refused(folder):
    from xlarank.runtime.features import stores_by_model

    options = FeatureOptions(path=folder / "features")
    with pytest.raises(ConfigError, match=r"was built for model 'linear'; served are \['feed'\]"):
        stores_by_model([options], ["feed"])
    with pytest.raises(ConfigError, match="model 'linear' has a feature file or source already"):
        stores_by_model([options, options], ["linear"])


def bundle(folder):
    return folder / "models" / "linear" / "1"


def test_an_engine_sees_an_update_in_every_request_made_after_it(folder):
    file = FeatureFile.open(folder / "features")
    metrics = Metrics()
    with Engine.load(
        bundle(folder), num_devices=1, features=FeatureStore(SPEC, file=file), metrics=metrics
    ) as engine:

        def score(*ids):
            return engine.score(engine.request({"age": 3.0}, candidate_ids=ids))["value"]

        close(score(1003, 1004), expected([1003, 1004]))
        before = engine.request({"age": 3.0}, candidate_ids=[1003])
        engine.update_features([1003, 7], {"likes": [[4, 1], [2, 0]], "topics": [[2], []]})
        close(score(7, 1004, 1003), [value_of([2, 0], []), *expected([1004]), value_of([4, 1], [2])])
        close(engine.score(before)["value"], expected([1003]))  # as it was when it was made
        assert engine.remove_features([1004, 5]) == 1
        with pytest.raises(FeatureError, match=r"1 of 2 that aren't there: \[1004\]"):
            engine.request({"age": 3.0}, candidate_ids=[1003, 1004])
        assert b'xlarank_feature_store_version{model="linear",version="1"} 2.0' in metrics.text()


def test_a_feature_file_that_is_cut_short_while_it_serves_ends_the_engine_s_service(folder, tmp_path):
    path = shutil.copytree(folder / "features", tmp_path / "features")
    store = FeatureStore(SPEC, file=FeatureFile.open(path))
    with Engine.load(bundle(folder), num_devices=1, features=store, table_memory="huge") as engine:
        request = engine.request({"age": 3.0}, candidate_ids=[1003])
        close(engine.score(request)["value"], expected([1003]))
        os.truncate(path / "records.bin", 0)
        engine._table_check._thread.join(60)  # it looks every second, and ends with the first fault
        assert f"{path / 'records.bin'}: expected " in engine.fault
        for call in (
            lambda: engine.request({"age": 3.0}, candidate_ids=[1003]),
            lambda: engine.submit(request),
        ):
            with pytest.raises(UnavailableError, match=r"records\.bin: expected \d+ bytes, got 0"):
                call()


def test_an_engine_without_a_store_says_so(folder):
    metrics = Metrics()
    with Engine.load(bundle(folder), num_devices=1, metrics=metrics) as engine:
        for call in (
            lambda: engine.request({"age": 3.0}, candidate_ids=[1]),
            lambda: engine.update_features([1], {}),
            lambda: engine.remove_features([1]),
        ):
            with pytest.raises(ConfigError, match="model 'linear' was loaded without a feature store"):
                call()
        assert b"xlarank_feature_store" not in metrics.text()


def test_a_store_made_for_another_spec_is_refused(folder):
    other = ModelSpec.from_dict(SPEC.to_dict() | {"name": "other"})
    source = FileSource(FeatureFile.open(folder / "features"))
    store = FeatureStore(other, source=source, without=["place"], misses="fetch", memory_bytes=2**20)
    with pytest.raises(
        ConfigError, match="model 'linear': expected a feature store made for its features, got one"
    ):
        Engine.load(bundle(folder), num_devices=1, features=store)
