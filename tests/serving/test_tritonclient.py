"""The published tritonclient package against the server, as it is, in the process that has our messages."""

import threading

import numpy as np
import pytest
import tritonclient.grpc as triton

from xlarank.spec import RankRequest


@pytest.fixture
def client(shared):
    with triton.InferenceServerClient(shared.server.address) as client:
        yield client


def triton_input(name, values, datatype):
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return tensor


@pytest.fixture
def inputs():
    return [
        triton_input("age", np.array([31.5], np.float32), "FP32"),
        triton_input("country", np.array([b"de"], np.object_), "BYTES"),
        triton_input("watched", np.array([5, 6, 7]), "INT64"),
        triton_input("watched.lengths", np.array([3], np.int32), "INT32"),
        triton_input("mood", np.array([[0.25, 0.75]], np.float64), "FP64"),
        triton_input("video", np.array([8, 0, 99], np.int32), "INT32"),
        triton_input("topics", np.array([1, 2, 2**40]), "INT64"),
        triton_input("topics.lengths", np.array([2, 0, 1], np.int32), "INT32"),
        triton_input("tags", np.array([b"a", b"b", b"ccc"], np.object_), "BYTES"),
        triton_input("tags.lengths", np.array([1, 2, 0], np.int32), "INT32"),
        triton_input("likes", np.array([0.5, 1.5, 2.5], np.float32), "FP32"),
        triton_input("vector", np.arange(1, 10, dtype=np.float32).reshape(3, 3), "FP32"),
        triton_input("hour", np.array([3, 9, 23], np.float32), "FP32"),
        triton_input("fresh", np.array([4, 5, 6]), "INT64"),
    ]


@pytest.fixture
def expected(wire, candidates):
    return wire.expected(RankRequest(wire.spec, candidates))


def test_infer_gets_the_scores(client, inputs, expected):
    result = client.infer("feed", inputs, request_id="7")
    np.testing.assert_array_equal(result.as_numpy("finish"), expected["finish"])
    np.testing.assert_array_equal(result.as_numpy("share.score"), expected["share"])
    response = result.get_response()
    assert (response.id, response.model_version) == ("7", "3")


def test_infer_of_one_output_of_a_named_version(client, inputs, expected):
    result = client.infer(
        "feed", inputs, model_version="3", outputs=[triton.InferRequestedOutput("share.score")]
    )
    assert result.as_numpy("finish") is None
    np.testing.assert_array_equal(result.as_numpy("share.score"), expected["share"])


def test_async_infer_calls_back(client, inputs, expected):
    answered, answers = threading.Semaphore(0), []

    def on_answer(result, error):
        answers.append((result, error))
        answered.release()

    for _ in range(4):
        client.async_infer("feed", inputs, on_answer)
    for _ in range(4):
        assert answered.acquire(timeout=10)
    for result, error in answers:
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("finish"), expected["finish"])


def test_no_candidates_give_an_empty_answer(client, inputs):
    context = inputs[:5]
    empty = [
        triton_input(name, np.zeros(shape, dtype), datatype)
        for name, shape, dtype, datatype in [
            ("video", 0, np.int64, "INT64"),
            ("topics", 0, np.int64, "INT64"),
            ("topics.lengths", 0, np.int32, "INT32"),
            ("tags", 0, np.object_, "BYTES"),
            ("tags.lengths", 0, np.int32, "INT32"),
            ("likes", 0, np.float32, "FP32"),
            ("vector", (0, 3), np.float32, "FP32"),
            ("hour", 0, np.float32, "FP32"),
        ]
    ]
    assert client.infer("feed", context + empty).as_numpy("finish").shape == (0,)


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("feed")
    assert client.is_model_ready("feed", "3")
    assert client.get_server_metadata(as_json=True)["name"] == "xlarank"
    metadata = client.get_model_metadata("feed", as_json=True)
    assert metadata["platform"] == "xlarank"
    assert metadata["inputs"][0] == {"name": "age", "datatype": "FP32", "shape": ["1"]}
    assert metadata["outputs"][1] == {"name": "share.score", "datatype": "FP32", "shape": ["-1"]}


def test_refusals_keep_code_and_text(client, inputs):
    with pytest.raises(triton.InferenceServerException, match="unknown model: 'food' is not found") as info:
        client.infer("food", inputs)
    assert info.value.status() == "StatusCode.NOT_FOUND"
    bad = [*inputs[:-1], triton_input("fresh", np.array([4, 5]), "INT64")]
    with pytest.raises(triton.InferenceServerException, match="feature 'fresh': expected 3 rows") as info:
        client.infer("feed", bad)
    assert info.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_what_is_not_served_is_unimplemented(client):
    for ask in (client.get_trace_settings, client.get_system_shared_memory_status):
        with pytest.raises(triton.InferenceServerException) as info:
            ask()
        assert info.value.status() == "StatusCode.UNIMPLEMENTED"
