"""The protocol over HTTP: the published client, JSON by hand, and every way to send it wrong."""

import contextlib
import functools
import http.client
import json
import re
import select
import socket
import threading
import time

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import HttpConfig, LimitConfig, SecurityConfig
from xlarank_serving.http_messages import HEADER_LENGTH, parse_request
from xlarank_serving.parameters import read_parameters
from xlarank_serving.server import RankingServer, ServerConfig

from xlarank.errors import (
    ConfigError,
    DeadlineError,
    OverloadError,
    RequestError,
    UnavailableError,
)


class Over:
    """A server over HTTP and what is behind it."""

    def __init__(self, wire, security=None, is_managed=False, observers=(), **options):
        self.repository = wire.repository()
        self.engine = self.repository.add(wire.spec, 3)
        self.server = RankingServer(
            self.repository,
            self.repository.metrics.text,
            ServerConfig(port=0, http_port=0),
            http=HttpConfig(port=0, **options),
            security=security,
            manager=self.repository if is_managed else None,
            observers=observers,
        )
        self.address = self.server.rest.address

    def call(self, method, path, body=None, headers=()):
        """Status, headers and body."""
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def infer(self, body, path="/v2/models/feed/infer", **headers):
        status, _, answer = self.call("POST", path, body, headers.items())
        return status, json.loads(answer)

    def num_refused(self):
        (family,) = self.server.refusals.collect()
        return {sample.labels["status"]: sample.value for sample in family.samples}


@pytest.fixture(scope="module")
def over(wire):
    over = Over(wire)
    yield over
    over.server.stop(0)


@pytest.fixture
def own(wire):
    """One of its own for a test that changes it."""
    made = []

    def make(**options):
        made.append(Over(wire, **options))
        return made[-1]

    yield make
    for over in made:
        over.server.stop(0)


def as_json(wire, n=3, **changes):
    """The valid request as JSON; values of an input may be given."""
    inputs = []
    for name, value in wire.valid(n).items():
        array = np.array(value, np.object_) if isinstance(value, list) else value
        data = [item.decode() for item in value] if isinstance(value, list) else array.tolist()
        inputs.append(
            {
                "name": name.replace("__", "."),
                "shape": list(array.shape),
                "datatype": np_to_triton_dtype(array.dtype),
                "data": data,
            }
            | changes.get(name, {})
        )
    return {"id": "r1", "inputs": inputs}


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


def test_a_body_that_is_too_large_is_refused_before_it_is_read(own):
    over = own(max_body_mib=1)
    status, answer = over.infer(bytes(2**20 + 1))
    assert (status, answer["error"]) == (413, "expected a body of at most 1048576 bytes, got more")
    chunks = (bytes(2**16) for _ in range(20))  # of no declared length
    connection = http.client.HTTPConnection(over.address, timeout=20)
    connection.request("POST", "/v2/models/feed/infer", chunks, encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    assert over.num_refused() == {"RESOURCE_EXHAUSTED": 2}


def test_silent_connections_do_not_shut_the_port(own, wire):
    over = own(max_connections=2)
    host, port = over.address.split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
        assert over.infer(as_json(wire))[0] == 200


def test_bodies_have_a_common_bound_and_give_their_share_back(own, wire):
    over = own(max_body_mib=1)
    host, port = over.address.split(":")
    head = b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    with contextlib.ExitStack() as stack:
        # One that is stalled is refused as soon as all of them together have sent more than 16 MiB.
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(17)
        ]
        for connection in connections:
            connection.sendall(head + bytes(2**20 - 1))
        (refused, *_), _, _ = select.select(connections, [], [], 20)
        answer = b""
        while not answer.endswith(b"}"):
            answer += refused.recv(4096)
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1\r\n" in answer
        assert b"retry-after-ms: 1000\r\n" in answer
        assert b"the server holds 16777216 bytes of requests, its limit; try again" in answer
        assert over.num_refused() == {"RESOURCE_EXHAUSTED": 1}
        connections.remove(refused)
        connections[0].close()
        statuses = (over.infer(as_json(wire))[0] for _ in range(1000))  # until the server has noticed
        assert next(status for status in statuses if status != 429) == 200


def test_a_body_that_does_not_come_is_given_up(own):
    over = own(max_receive_seconds=0.2)
    host, port = over.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as half:
        half.sendall(b"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert half.recv(4096).startswith(b"HTTP/1.1 408")
    assert over.num_refused() == {"CANCELLED": 1}


def test_a_compressed_body_is_refused(own, wire):
    over = own()
    status, answer = over.infer(b"x", **{"Content-Encoding": "gzip"})
    assert (status, answer["error"]) == (415, "expected a body without Content-Encoding, got 'gzip'")
    assert over.infer(as_json(wire), **{"Content-Encoding": "Identity"})[0] == 200
    assert over.num_refused() == {"UNIMPLEMENTED": 1}


def test_json_is_bounded_before_it_is_parsed(over, wire):
    body = b'{"inputs": [' + b"[]," * 1_400_000 + b"[]]}"
    status, _, answer = over.call("POST", "/v2/models/feed/infer", body)
    assert status == 400
    text = f"expected at most 4 MiB of JSON, got {len(body)} bytes"
    assert json.loads(answer)["error"].startswith(text)


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


def test_a_caller_who_leaves_cancels_the_request(own, wire, caplog):
    over = own()
    over.engine.hold()
    host, port = over.address.split(":")
    body = json.dumps(as_json(wire)).encode()
    with socket.create_connection((host, int(port)), timeout=20) as leaving:
        head = f"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
        assert over.engine.arrived.acquire(timeout=10)
    ((future, _),) = over.engine.held
    gone = threading.Event()
    future.add_done_callback(lambda _: gone.set())
    assert gone.wait(timeout=10)
    assert future.cancelled()
    over.engine.release()
    assert over.infer(as_json(wire))[0] == 200
    over.server.stop(0)
    assert "Exception in ASGI application" not in caplog.text


def test_who_may_not_call_is_refused(own, wire, tmp_path):
    (tmp_path / "tokens").write_text("a-token-of-enough-letters\n")
    over = own(security=SecurityConfig(tokens=tmp_path / "tokens"))
    assert over.call("GET", "/v2/health/ready")[0] == 200
    status, headers, answer = over.call("POST", "/v2/models/feed/infer", as_json(wire))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert "token" in json.loads(answer)["error"]
    assert over.call("GET", "/v2/models/feed", headers={"Authorization": "Bearer bad"}.items())[0] == 401
    assert over.infer(as_json(wire), Authorization="Bearer a-token-of-enough-letters")[0] == 200
    assert over.num_refused() == {"UNAUTHENTICATED": 1}  # of the call that ranks


def test_models_are_loaded_and_unloaded_for_those_with_an_admin_token(own, tmp_path):
    (tmp_path / "tokens").write_text("a-token-of-enough-letters\n")
    over = own(security=SecurityConfig(admin_tokens=tmp_path / "tokens"), is_managed=True)
    token = {"Authorization": "Bearer a-token-of-enough-letters"}
    client = triton.InferenceServerClient(over.address)
    client.load_model("feed", headers=token)
    client.unload_model("feed", headers=token)
    assert over.repository.calls == [("load", "feed"), ("unload", "feed")]
    with pytest.raises(triton.InferenceServerException, match="no configuration and no file comes from"):
        client.load_model("feed", headers=token, config="{}")
    with pytest.raises(triton.InferenceServerException, match="expected a token"):
        client.load_model("feed")
    client.close()
    assert len(over.repository.calls) == 2
    body = {"parameters": ["config"]}
    assert over.call("POST", "/v2/repository/models/feed/load", body, token.items())[0] == 400


def test_what_waits_for_its_body_is_late_all_the_same(own, wire):
    over = own()
    body = json.dumps(as_json(wire) | {"parameters": {"timeout": 1_000}}).encode()
    host, port = over.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        head = f"POST /v2/models/feed/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode())
        while not over.repository.overloads:  # its headers have come
            pass
        end = time.monotonic() + 2e-3
        while time.monotonic() < end:
            pass
        slow.sendall(body)
        assert slow.recv(4096).startswith(b"HTTP/1.1 504")
    assert over.engine.requests == []


def test_observers_hear_of_requests_over_http_and_of_those_that_are_malformed(own, wire):
    records = []
    over = own(observers=[records.append])
    assert over.infer(as_json(wire))[0] == 200
    assert over.infer(b"{")[0] == 400
    facts = [(one.transport, one.status, one.model) for one in records]
    assert facts == [("http", "OK", "feed"), ("http", "INVALID_ARGUMENT", "feed")]
    (family,) = over.server.refusals.collect()
    assert [(sample.labels["status"], sample.value) for sample in family.samples] == [("INVALID_ARGUMENT", 1)]


def test_under_overload_a_request_is_refused_unread(own):
    over = own()
    over.repository.refusal = OverloadError("the queue is full: why", 1.25)
    status, headers, answer = over.call("POST", "/v2/models/feed/infer", b"no message")
    assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, "2", "1250")
    assert json.loads(answer) == {"error": "the queue is full: why"}


def test_a_stop_answers_what_was_accepted_and_turns_the_rest_away(wire):
    over = Over(wire)
    over.engine.hold()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(over.infer(as_json(wire))))
    asking.start()
    assert over.engine.arrived.acquire(timeout=10)
    stopping = threading.Thread(target=over.server.stop, args=(20,))
    stopping.start()
    while over.call("GET", "/v2/health/ready")[0] == 200:
        pass
    assert over.infer(as_json(wire)) == (503, {"error": "the server is stopping"})
    over.engine.release()
    for thread in (asking, stopping):
        thread.join(timeout=20)
        assert not thread.is_alive()
    ((status, answer),) = answers
    assert (status, len(answer["outputs"])) == (200, 2)
    with pytest.raises(OSError):
        over.call("GET", "/v2/health/live")


def test_a_port_in_use_is_refused_and_nothing_stays_open(wire):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        repository = wire.repository()
        before = threading.active_count()
        with pytest.raises(ConfigError, match=f"rest port {port} on 127.0.0.1: expected a free port"):
            RankingServer(
                repository,
                repository.metrics.text,
                ServerConfig(port=0, http_port=0),
                http=HttpConfig(port=port),
            )
        assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 70000}, r"http: port must be in \[0, 65535\]; was 70000"),
        ({"max_body_mib": 0}, "http: max_body_mib must be >= 1; was 0"),
        ({"max_receive_seconds": 0}, "http: max_receive_seconds must be > 0; was 0"),
    ],
)
def test_a_bad_config_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        HttpConfig(**options)
