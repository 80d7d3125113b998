"""The protocol over HTTP: the published client, JSON by hand, and every way to send it wrong."""

import functools
import json
import re

import numpy as np
import pytest
import tritonclient.http as triton
from over_http import as_json
from tritonclient.utils import np_to_triton_dtype
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import LimitConfig
from xlarank_serving.http_messages import HEADER_LENGTH, parse_request
from xlarank_serving.parameters import read_parameters

from xlarank.errors import (
    DeadlineError,
    OverloadError,
    RequestError,
    UnavailableError,
)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_scores(over, wire, binary):
    tensors = []
    for name, value in wire.valid(3).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        tensors.append(
            triton.InferInput(name.replace("__", "."), array.shape, np_to_triton_dtype(array.dtype))
        )
        tensors[-1].set_data_from_numpy(array, binary_data=binary)
    client = triton.InferenceServerClient(over.address)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("share.score", "finish")]
    result = client.infer("feed", tensors, model_version="3", request_id="7", outputs=outputs, priority=1)
    expected = wire.expected(over.engine.requests[-1])
    np.testing.assert_array_equal(result.as_numpy("finish"), expected["finish"])
    np.testing.assert_array_equal(result.as_numpy("share.score"), expected["share"])
    assert result.get_response()["id"] == "7"
    assert result.get_response()["model_version"] == "3"
    assert over.engine.options[-1].priority == 1
    without_outputs = client.infer("feed", tensors)
    np.testing.assert_array_equal(without_outputs.as_numpy("finish"), expected["finish"])
    with pytest.raises(triton.InferenceServerException, match="unknown model: 'food' is not found"):
        client.infer("food", tensors)
    client.close()


def test_tritonclient_asks_about_server_and_models(over):
    client = triton.InferenceServerClient(over.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("feed")
    assert client.is_model_ready("feed", "3")
    assert client.get_server_metadata()["extensions"][-1] == "binary_tensor_data"
    metadata = client.get_model_metadata("feed")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("feed", ["3"], "xlarank")
    assert metadata["inputs"][4] == {"name": "mood", "datatype": "FP32", "shape": [1, 2]}
    config = client.get_model_config("feed")
    assert (config["name"], config["max_batch_size"]) == ("feed", 0)
    assert config["input"][0] == {"name": "age", "data_type": "TYPE_FP32", "dims": [1], "optional": False}
    assert config["dynamic_batching"]["priority_levels"] == 4
    assert config["parameters"] == {"buckets": {"string_value": "8x1, 32x1, 32x32"}}
    (stats,) = client.get_inference_statistics("feed")["model_stats"]
    assert (stats["name"], stats["version"]) == ("feed", "3")
    assert stats["inference_stats"]["success"] == {"count": 0, "ns": 0}
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "feed"
    index = client.get_model_repository_index()
    assert index == [{"name": "feed", "version": "3", "state": "READY", "reason": ""}]
    with pytest.raises(triton.InferenceServerException, match="administrative RPCs are off on this port"):
        client.load_model("feed")
    client.close()


def test_json_by_hand(over, wire):
    status, answer = over.infer(as_json(wire))
    expected = wire.expected(over.engine.requests[-1])
    assert status == 200
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("feed", "3", "r1")
    assert answer["outputs"] == [
        {"name": "finish", "datatype": "FP32", "shape": [3], "data": expected["finish"].tolist()},
        {"name": "share.score", "datatype": "FP32", "shape": [3], "data": expected["share"].tolist()},
    ]


def test_parameters_and_top_k_by_hand(over, wire):
    body = as_json(wire, n=5)
    body["parameters"] = {"top_k": 2, "top_k_task": "finish", "user": 7, "xlarank_timings": True}
    status, answer = over.infer(body, path="/v2/models/feed/versions/3/infer")
    scores = wire.expected(over.engine.requests[-1])["finish"].tolist()
    assert status == 200
    best = sorted(range(5), key=lambda i: -scores[i])[:2]
    assert answer["outputs"][0] == {
        "name": "top_k.indices", "datatype": "INT32", "shape": [2], "data": best
    }  # fmt: skip
    assert answer["parameters"]["total_us"] == 7000
    assert over.engine.options[-1].affinity_key == "7"


@pytest.mark.parametrize(
    "weights", ["finish:1e300", "share.score:1e39,finish:-1e39", "finish:3.4e38,share:1"]
)
def test_weights_beyond_float32_are_refused_in_words(over, wire, weights):
    body = as_json(wire, n=5) | {"parameters": {"top_k": 2, "top_k_weights": weights}}
    status, answer = over.infer(body)
    told = "weights that are finite as float32|weighted sums that float32 holds, got .* for candidate 0"
    assert status == 400
    assert re.match(f"parameter 'top_k_weights': expected .*({told})", answer["error"])


def test_binary_and_json_inputs_may_be_mixed_and_nested_lists_are_flat(over, wire):
    likes = np.array([0.5, 1.5, 2.5], np.float32)
    body = as_json(wire, vector={"data": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]})
    (tensor,) = [tensor for tensor in body["inputs"] if tensor["name"] == "likes"]
    del tensor["data"]
    tensor["parameters"] = {"binary_data_size": likes.nbytes}
    body["outputs"] = [{"name": "finish", "parameters": {"binary_data": True}}, {"name": "share.score"}]
    head = json.dumps(body).encode()
    status, headers, answer = over.call(
        "POST", "/v2/models/feed/infer", head + likes.tobytes(), {HEADER_LENGTH: str(len(head))}.items()
    )
    assert status == 200
    request = over.engine.requests[-1]
    np.testing.assert_array_equal(request.column("likes")[:, 0], likes)
    np.testing.assert_array_equal(request.column("vector"), np.arange(1, 10).reshape(3, 3))
    expected = wire.expected(request)
    end = int({name.lower(): value for name, value in headers.items()}[HEADER_LENGTH.lower()])
    first, second = json.loads(answer[:end])["outputs"]
    assert first["parameters"] == {"binary_data_size": 12}
    assert "data" not in first
    np.testing.assert_array_equal(np.frombuffer(answer[end:], "<f4"), expected["finish"])
    assert second["data"] == expected["share"].tolist()


AGE = {"name": "age", "datatype": "FP32", "shape": [1]}

BAD = {
    "no JSON": (b"{", "expected JSON, got 1 bytes that aren't"),
    "no object": ([1], r"the request: expected a JSON object, got \[1\]"),
    "no text": (b"\xff\xfe", "expected JSON"),
    "deep": (b"[" * 200_000, "expected JSON, got lists and objects that are nested too deeply"),
    "long": (b'{"id": ' + b"9" * 5000 + b"}", "expected JSON, got an integer of more than 4,300 digits"),
    "inputs no list": ({"inputs": 3}, "the request: expected 'inputs' to be a list, got 3"),
    "input no object": ({"inputs": [3]}, "input 0: expected a JSON object, got 3"),
    "no name": ({"inputs": [{"shape": [1], "datatype": "FP32"}]}, "input 0: expected 'name' to be a string"),
    "no shape": (
        {"inputs": [{"name": "age", "datatype": "FP32"}]},
        "input 'age': expected 'shape' to be a list, got nothing",
    ),
    "odd shape": (
        {"inputs": [{"name": "age", "datatype": "FP32", "shape": [1.5], "data": [1]}]},
        r"input 'age': expected a shape of integers, got \[1.5\]",
    ),
    "id no string": ({"id": 7, "inputs": []}, "expected 'id' to be a string, got 7"),
    "odd parameter": (
        {"parameters": {"user": [1]}, "inputs": []},
        r"parameter 'user': expected a bool, a 64-bit integer, a number or a string, got \[1\]",
    ),
    "huge parameter": ({"parameters": {"timeout": 2**64}, "inputs": []}, "parameter 'timeout': expected"),
    "no data": (
        {"inputs": [AGE]},
        "unable to find data for input tensor 'age'",
    ),
    "binary beyond the body": (
        {"inputs": [AGE | {"parameters": {"binary_data_size": 4}}]},
        "input 'age': expected 'binary_data_size' of at most the 0 bytes that are left of the body, got 4",
    ),
}


@pytest.mark.parametrize(("body", "text"), BAD.values(), ids=BAD)
def test_a_bad_body_is_refused(over, body, text):
    status, answer = over.infer(body)
    assert status == 400
    with pytest.raises(RequestError, match=text):
        raise RequestError(answer["error"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"video": {"data": [1.5, 2, 3]}}, "input 'video': expected data for INT64, got 1.5"),
        ({"video": {"data": [True, 2, 3]}}, "input 'video': expected data for INT64, got true"),
        (
            {"video": {"data": [1, 2, 2**63]}},
            "input 'video': expected values that INT64 holds; they go from 1",
        ),
        ({"video": {"data": [1, None, 2]}}, "input 'video': expected data for INT64, got null"),
        ({"video": {"datatype": "UINT8", "data": [1, 2, -1]}}, "expected values that UINT8 holds; they go"),
        ({"likes": {"data": ["a", 1, 2]}}, "input 'likes': expected data for FP32, got \"a\""),
        ({"likes": {"data": [10**400, 1, 2]}}, "input 'likes': expected values that FP32 holds"),
        (
            {"likes": {"data": [[[[[[[[[[1]]]]]]]]], 2, 3]}},
            "input 'likes': expected at most 8 lists in lists",
        ),
        ({"country": {"data": [7]}}, "input 'country': expected data for BYTES, got 7"),
        ({"country": {"data": ["\ud800"]}}, "input 'country': expected strings, got one without UTF-8"),
        ({"likes": {"datatype": "FP16"}}, "input 'likes': expected FP16 as binary data"),
        ({"likes": {"datatype": "FP128"}}, "feature 'likes': expected FP32 or another float"),
        ({"likes": {"data": [1, 2]}}, "feature 'likes': input byte size mismatch"),
        (
            {"likes": {"shape": [2**40]}},
            "feature 'likes': expected at most 65536 candidates, got 1099511627776",
        ),
        ({"likes": {"data": [1, float("nan"), 2]}}, "feature 'likes': expected finite floats, got nan"),
        ({"likes": {"parameters": {"shared_memory_region": "r"}}}, "'shared_memory_region' is not supported"),
        ({"likes": {"parameters": {"binary_data_size": 0}}}, "got both"),
    ],
)
def test_bad_data_is_refused_by_name(over, wire, changes, text):
    status, answer = over.infer(as_json(wire, **changes))
    assert status == 400
    with pytest.raises(RequestError, match=text):
        raise RequestError(answer["error"])


DEEP = functools.reduce(lambda inner, _: [inner], range(10), 1)
ODD = [
    None,
    True,
    -1,
    0.5,
    2**63,
    2**70,
    10**400,
    float("nan"),
    "",
    "\ud800",
    "FP32",
    "BYTES",
    "BF16",
    "video",
]
ODD += [[], [[]], {}, [None], DEEP, {"a": 1}, {"binary_data_size": 3}, {"\ud800": 1}]


def broken(rng, value):
    """One node of a JSON value replaced by something odd, removed or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        copy = value.copy()
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = broken(rng, value[key])
        return copy
    return ODD[rng.integers(len(ODD))]


def test_whatever_is_broken_is_refused_and_never_crashes(wire):
    codec, valid = ModelCodec(wire.spec), as_json(wire)
    valid["parameters"] = {"top_k": 3, "top_k_task": "finish", "priority": 1}
    valid["outputs"] = [{"name": "finish", "parameters": {"binary_data": True}}]
    rng = np.random.default_rng(5)
    num_refused = 0
    for _ in range(1500):
        body = json.dumps(broken(rng, valid)).encode()
        try:
            message = parse_request(body, None, LimitConfig(), model="feed", version="").message
            codec.requested_outputs(message, read_parameters(message.parameters, wire.spec))
            codec.decode(message)
        except RequestError:
            num_refused += 1
    assert 1000 < num_refused < 1500


@pytest.mark.parametrize("length", ["x", "-1", "1e3", "9" * 30, "\u0661", "1000000"])
def test_a_bad_header_length_is_refused(length):
    with pytest.raises(RequestError, match=f"header {HEADER_LENGTH}: expected"):
        parse_request(b"{}", length, LimitConfig(), model="feed", version="")


def test_bytes_that_no_input_has_are_refused(over):
    status, answer = over.infer(b'{"inputs": []}rest', **{HEADER_LENGTH: "14"})
    assert status == 400
    assert answer["error"].startswith("expected 14 bytes, those of the JSON")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UnavailableError("model 'feed' version 3 is closed"), 503, "is closed"),
        (DeadlineError("too late"), 504, "too late"),
        (OverloadError("the queue is full", 2.5), 429, "the queue is full"),
        (ZeroDivisionError("boom"), 500, "internal error: ZeroDivisionError: boom"),
    ],
)
def test_an_engines_errors_have_their_codes(own, wire, error, status, text):
    over = own()
    over.engine.error = error
    got, headers, answer = over.call("POST", "/v2/models/feed/infer", as_json(wire))
    assert (got, text in json.loads(answer)["error"]) == (status, True)
    assert headers.get("retry-after") == ("3" if status == 429 else None)
    over.engine.error = None
    assert over.infer(as_json(wire))[0] == 200


def test_what_is_not_there_is_404_and_in_json(over):
    for path in ("/", "/v1/models/feed", "/v2/models/feed/infer/more", "/v2/models/a%2Fb/ready"):
        status, _, answer = over.call("GET", path)
        assert (status, list(json.loads(answer))) == (404, ["error"])
    assert over.call("GET", "/v2/models/feed/infer")[0] == 405
    status, _, answer = over.call("GET", "/v2/models/food/ready")
    assert status == 404
    assert json.loads(answer) == {"error": "Request for unknown model: 'food' is not found"}


def test_what_is_not_ready_is_not_200(own):
    over = own()
    over.repository.loading.add(("feed", 3))
    assert over.call("GET", "/v2/health/live")[0] == 200
    assert over.call("GET", "/v2/health/ready")[0] == 400
    assert over.call("GET", "/v2/models/feed/ready")[0] == 400


def test_the_index_may_be_of_what_is_ready(own, wire):
    over = own()
    over.repository.add(wire.spec, 4)
    over.repository.loading.add(("feed", 4))
    every = json.loads(over.call("POST", "/v2/repository/index")[2])
    ready = json.loads(over.call("POST", "/v2/repository/index", {"ready": True})[2])
    assert [one["version"] for one in every] == ["3", "4"]
    assert [one["version"] for one in ready] == ["3"]
    assert over.call("POST", "/v2/repository/index", {"ready": "yes"})[0] == 400
    assert over.call("POST", "/v2/repository/index", {"repository_name": ""})[0] == 200
    for name, told in (
        ("other", "repository 'other': expected no name"),
        (5, "to be a string"),
    ):
        status, _, content = over.call("POST", "/v2/repository/index", {"repository_name": name})
        assert (status, told in json.loads(content)["error"]) == (400, True)


@pytest.mark.parametrize("where", ["request", "output"])
def test_a_flag_that_is_no_bool_is_refused(over, wire, where):
    body = as_json(wire)
    if where == "request":
        body["parameters"] = {"binary_data_output": "false"}
    else:
        body["outputs"] = [{"name": "finish", "parameters": {"binary_data": 1}}]
    status, answer = over.infer(body)
    assert status == 400
    assert "expected a bool, got " in answer["error"]
