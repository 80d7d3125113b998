"""A real bundle behind a real process: many callers at once, one of them wrong, and its stop under load."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from flax import nnx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import complaints_in
from shop import SPEC, Shop, make_tables, numpy_scores
from xlarank_serving.client import RankingClient

from xlarank.bundle import Verify, open_bundle, resolve_bundle
from xlarank.cli.server_pace import read_pace
from xlarank.compiler import build_bundle
from xlarank.errors import RequestError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.spec import RankRequest

LARGEST_BUCKET = 32
COUNTS = (0, 1, 2, 7, LARGEST_BUCKET - 1, LARGEST_BUCKET, LARGEST_BUCKET + 1, 3 * LARGEST_BUCKET + 5)
LABELS = '{model="shop",version="1"}'
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    module = Shop(rngs=nnx.Rngs(0))
    module.eval()
    return module, make_tables()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    module, tables = model
    build_bundle(module, SPEC, tables, out=folder / "models", buckets=[8, LARGEST_BUCKET], tune_seconds=0)
    return folder


@contextlib.contextmanager
def started(folder, *options):
    """A server process; what is left of it at the end is killed."""
    command = [sys.executable, "-m", "xlarank.cli", "serve", str(folder / "models"), "--json"]
    command += ["--compile-cache", str(folder / "cache"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(folder, *options):
    with started(folder, "--port", "0", "--http-port", "0", *options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1]
        yield process, json.loads(line)


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--platform", "cpu,devices=2") as (process, ready):
        yield ready
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert complaints_in(err) == []


def features_of(seed, num_candidates):
    """A request of somebody's."""
    rng = np.random.default_rng(seed)
    return {
        "age": float(rng.uniform(1, 90)),
        "history": [list(map(int, rng.integers(0, 50, rng.integers(0, 8))))],
        "item": rng.integers(0, 50, num_candidates),
        "tags": [[f"tag{i}" for i in rng.integers(0, 99, rng.integers(0, 4))] for _ in range(num_candidates)],
        "price": rng.normal(size=(num_candidates, 2)).astype(np.float32),
    }


def expected_scores(model, features):
    if not len(features["item"]):
        return {task.name: np.zeros(0) for task in SPEC.tasks}
    return numpy_scores(model[0], RankRequest(SPEC, features), model[1])


def assert_right(model, features, scores):
    for task, expected in expected_scores(model, features).items():
        assert scores[task].shape == (len(features["item"]),)
        np.testing.assert_allclose(scores[task], expected, rtol=TOLERANCE, atol=TOLERANCE)


def scores_in(answer):
    """Of a tritonclient answer, by task."""
    return {task.name: answer.as_numpy(task.output) for task in SPEC.tasks}


def page_of(ready):
    with urllib.request.urlopen(f"http://{ready['http']}/metrics", timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return response.read().decode()


def metrics_of(ready):
    lines = page_of(ready).splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def triton_inputs(features):
    """Per-feature tensors, by what the table of the wire contract says."""
    tags = [tag.encode() for bag in features["tags"] for tag in bag]
    tensors = {
        "age": ("FP32", np.array([features["age"]], np.float32)),
        "history": ("INT64", np.array(features["history"][0], np.int64)),
        "history.lengths": ("INT32", np.array([len(features["history"][0])], np.int32)),
        "item": ("INT64", features["item"]),
        "tags": ("BYTES", np.array(tags, np.object_)),
        "tags.lengths": ("INT32", np.array([len(bag) for bag in features["tags"]], np.int32)),
        "price": ("FP32", features["price"]),
    }
    inputs = []
    for name, (datatype, array) in tensors.items():
        inputs.append(triton.InferInput(name, array.shape, datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


@pytest.mark.parametrize("num_candidates", COUNTS)
def test_both_clients_get_the_scores_computed_by_hand(server, model, num_candidates):
    features = features_of(num_candidates, num_candidates)
    with RankingClient(server["grpc"]) as client:
        for packed in (False, True):
            assert_right(model, features, client.score("shop", features, packed=packed))
    with triton.InferenceServerClient(server["grpc"]) as client:
        answer = client.infer("shop", triton_inputs(features))
    assert_right(model, features, scores_in(answer))


def plan_of(model_folder):
    """As the bundle was measured."""
    manifest = open_bundle(resolve_bundle(model_folder), verify=Verify.SIZES).manifest
    return BucketPlan(manifest.ladder, *manifest.latency.values())


def test_a_burst_with_bad_requests_in_it_is_answered_right_and_counted(server, folder, model, tmp_path):
    num_threads, num_rounds = 6, 12
    bad = {
        "feature 'item': expected ids in": {"item": np.array([3, 50, 1])},
        "feature 'price': expected finite floats": {"price": np.array([[0, 1], [np.nan, 1], [2, 3]])},
    }
    requests = {
        (thread, number): features_of(100 * thread + number, COUNTS[(thread + number) % len(COUNTS)])
        for thread in range(num_threads)
        for number in range(num_rounds)
    }
    start = threading.Barrier(num_threads)
    before = metrics_of(server)
    with RankingClient(server["grpc"]) as client:

        def call(thread):
            start.wait()
            answers, refusals = {}, []
            for number in range(num_rounds):
                answers[thread, number] = client.score("shop", requests[thread, number])
                if number % 3 == 0:
                    told, values = list(bad.items())[(thread + number) % 2]
                    with pytest.raises(RequestError) as refused:
                        client.score("shop", features_of(number, 3) | values)
                    refusals.append((told, str(refused.value)))
            return answers, refusals

        with ThreadPoolExecutor(num_threads) as threads:
            results = list(threads.map(call, range(num_threads)))
    after = metrics_of(server)
    page = tmp_path / "page.txt"
    page.write_text(page_of(server))
    for answers, refusals in results:
        for key, scores in answers.items():
            assert_right(model, requests[key], scores)
        assert len(refusals) == num_rounds / 3
        assert all(told in text for told, text in refusals)

    def grown(name, labels=LABELS):
        return after[name + labels] - before.get(name + labels, 0)

    def grown_in_buckets(name):
        return sum(after[one] - before.get(one, 0) for one in after if one.startswith(f"{name}{{"))

    rows = sum(len(features["item"]) for features in requests.values())
    assert grown("nv_inference_request_success") == len(requests)
    assert grown("nv_inference_count") == grown_in_buckets("xlarank_batch_rows_total") == rows
    of_callers = '{model="shop",reason="OTHER",version="1"}'
    assert grown("nv_inference_request_failure", of_callers) == num_threads * num_rounds / 3
    # Every batch is of a bucket of the ladder, and its rows are candidates or padding.
    batches: Counter[str] = Counter()
    for name in after:
        if name.startswith("xlarank_bucket_batches_total"):
            batches[name.split('bucket="')[1].split("x")[0]] += int(after[name] - before.get(name, 0))
    assert sum(batches.values()) == grown("nv_inference_exec_count")
    bucket_rows = sum(int(rows) * count for rows, count in batches.items())
    assert bucket_rows == rows + grown_in_buckets("xlarank_padding_rows_total")
    assert set(batches) <= {"8", str(LARGEST_BUCKET)}
    histogram = "nv_inference_request_duration_histogram_us"
    assert grown(f"{histogram}_count") == len(requests)
    infinite = [name for name in after if name.startswith(f"{histogram}_bucket") and 'le="+Inf"' in name]
    assert [after[name] for name in infinite] == [after[f"{histogram}_count{LABELS}"]]
    assert after["nv_inference_pending_request_count" + LABELS] == 0
    assert after["xlarank_request_path_compiles_total" + LABELS] == 0
    assert 'xlarank_device_batches_total{device="1"}' in after  # both that were made
    # `xlarank simulate` reads the same page.
    pace = read_pace([page], "shop", plan_of(folder / "models/shop"))
    assert pace.slowdown > 0
    outside = after[f"xlarank_outside_seconds_total{LABELS}"]
    assert 0 < pace.overhead_seconds == outside / after[f"nv_inference_request_success{LABELS}"]


def test_the_rest_of_the_protocol_over_a_real_engine(server, model):
    """Other datatypes, top_k, timings, a stream, configuration and statistics, by the published client."""
    features = features_of(5, 40)
    price = features["price"].astype(np.float16)
    features["price"] = price.astype(np.float32)  # what the server makes of it
    others = {"price": ("FP16", price), "item": ("UINT8", features["item"].astype(np.uint8))}
    inputs = [tensor for tensor in triton_inputs(features) if tensor.name() not in others]
    for name, (datatype, array) in others.items():
        inputs.append(triton.InferInput(name, array.shape, datatype))
        inputs[-1].set_data_from_numpy(array)
    expected = expected_scores(model, features)
    outputs = {task.output: expected[task.name] for task in SPEC.tasks}
    with triton.InferenceServerClient(server["grpc"]) as client:
        before = client.get_inference_statistics("shop").model_stats[0]
        every = client.infer("shop", inputs, parameters={"xlarank_timings": True, "user": "u1"}, priority=1)
        weights = ",".join(f"{name}:{i + 0.5}" for i, name in enumerate(outputs))
        best = client.infer("shop", inputs, parameters={"top_k": 7, "top_k_weights": weights}, timeout=10**7)
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        for number in range(5):
            client.async_stream_infer("shop", inputs, request_id=str(number))
        client.stop_stream()
        streamed = [answers.get(timeout=60) for _ in range(5)]
        after = client.get_inference_statistics("shop").model_stats[0]
        config = client.get_model_config("shop").config
    for answer in (every, *streamed):
        for name, scores in outputs.items():
            np.testing.assert_allclose(answer.as_numpy(name), scores, rtol=TOLERANCE, atol=TOLERANCE)
    assert [answer.get_response().id for answer in streamed] == list("01234")
    timings = {name: value.int64_param for name, value in every.get_response().parameters.items()}
    assert 0 < timings["execute_us"] <= timings["total_us"]
    mixed = sum((i + 0.5) * scores for i, scores in enumerate(outputs.values()))
    indices, scores = best.as_numpy("top_k.indices"), best.as_numpy("top_k.scores")
    np.testing.assert_allclose(scores, mixed[indices], rtol=TOLERANCE, atol=TOLERANCE)
    assert sorted(scores, reverse=True) == list(scores)
    assert len(set(indices)) == 7
    assert scores.min() >= np.sort(mixed)[-7] - TOLERANCE
    assert after.inference_stats.success.count - before.inference_stats.success.count == 7
    assert after.inference_count - before.inference_count == 7 * 40
    assert after.execution_count > before.execution_count
    assert sum(one.compute_infer.count for one in after.batch_stats) == after.execution_count
    assert list(config.dynamic_batching.preferred_batch_size) == [8, LARGEST_BUCKET]


def test_a_second_server_on_the_port_ends_with_one_line_and_the_first_goes_on(server, folder, model):
    port = server["grpc"].rpartition(":")[2]
    with started(folder, "--port", port, "--http-port", "0") as second:
        out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (1, "")
    told = f"xlarank serve: grpc port {port} on 127.0.0.1: expected a free port, got Address already in use\n"
    assert err == told
    features = features_of(1, 5)
    with RankingClient(server["grpc"]) as client:
        assert_right(model, features, client.score("shop", features))


def test_sigterm_under_load_answers_all_that_was_accepted(folder, model):
    features = [features_of(seed, 6000) for seed in range(5)]  # 188 batches each
    inputs = [triton_inputs(each) for each in features]
    with (
        # Half a second of work where nobody else works; a machine that others use too must not refuse it.
        serving(folder, "--devices", "1", "--max-queue-ms", "60000") as (process, ready),
        triton.InferenceServerClient(ready["grpc"]) as client,
        ThreadPoolExecutor(len(inputs)) as threads,
    ):
        with grpc.insecure_channel(ready["grpc"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        calls = [threads.submit(client.infer, "shop", each, client_timeout=60) for each in inputs]
        pending = accepted = 0
        while accepted < len(calls):
            metrics = metrics_of(ready)
            pending = metrics[f"nv_inference_pending_request_count{LABELS}"]
            accepted = metrics[f"nv_inference_request_success{LABELS}"] + pending
            assert not any(call.done() and call.exception() for call in calls)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert complaints_in(err) == []
        assert pending > 0  # some were still to be scored when the signal was sent
        for number, call in enumerate(calls):
            assert_right(model, features[number], scores_in(call.result(timeout=60)))
