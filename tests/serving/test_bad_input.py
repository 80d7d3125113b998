"""Every way to send a bad request: INVALID_ARGUMENT that names the feature, and the server goes on."""

import struct

import grpc
import numpy as np
import pytest
from xlarank_serving.codec import ModelCodec
from xlarank_serving.encoding import add_inputs

from xlarank.errors import FeatureError
from xlarank.spec import RankRequest


def f32(*shape):
    return np.zeros(shape, np.float32)


def i64(*values):
    return np.array(values, np.int64)


def i32(*values):
    return np.array(values, np.int32)


# What replaces (or, None, removes) inputs of a valid request of 3 candidates, and the refusal.
CASES = {
    "unknown input": (
        {"heigth": f32(3)},
        r"model 'feed' has no input 'heigth'; it has \['age', 'country', 'watched', 'watched.lengths', ",
    ),
    "missing input": (
        {"video": None},
        r"feature 'video' is missing: expected int64 of shape \[N\]; it has no default",
    ),
    "missing context": ({"age": None}, r"feature 'age' is missing: expected float32 of shape \[1\]"),
    "float ids": (
        {"video": f32(3)},
        r"feature 'video': expected INT64 or another integer of shape \[N\], got FP32 of shape \[3\]$",
    ),
    "string ids": (
        {"video": [b"a", b"b", b"c"]},
        "feature 'video': expected INT64 or another integer .*, got BYTES",
    ),
    "int strings": (
        {"country": i64(1)},
        r"feature 'country': expected BYTES of shape \[1\], got INT64 of shape \[1\]",
    ),
    "int floats": (
        {"likes": i64(1, 2, 3)},
        "feature 'likes': expected FP32 or another float of shape .*, got INT64",
    ),
    "no such datatype": ({"likes": ("FLOAT", [3], bytes(12))}, "feature 'likes': expected FP32.*, got FLOAT"),
    "no datatype": ({"likes": ("", [3], bytes(12))}, "feature 'likes': expected FP32"),
    "float lengths": (
        {"topics__lengths": f32(3)},
        r"feature 'topics': input 'topics.lengths': expected INT32 or .* of shape \[N\], got FP32",
    ),
    "lengths beyond int32": (
        {"topics__lengths": i64(2, 2**31, 2)},
        "feature 'topics': input 'topics.lengths': expected lengths that INT32 holds, got 2147483648 at",
    ),
    "id beyond int64": (
        {"video": np.array([0, 2**63, 1], np.uint64)},
        "feature 'video': expected integers that INT64 holds, got 9223372036854775808 at position 1",
    ),
    "bool that is none": (
        {"likes": ("BOOL", [3], b"\x00\x01\x02")},
        "feature 'likes': expected BOOL values of 0 or 1, got 2 at position 2",
    ),
    "half floats of the wrong size": (
        {"likes": ("BF16", [3], bytes(12))},
        r"feature 'likes': input byte size mismatch: expected 6 bytes for BF16 of shape \[3\], got 12",
    ),
    "infinite half float": (
        {"likes": np.array([0, np.inf, 0], np.float16)},
        "feature 'likes': expected finite floats, got inf in row 1",
    ),
    "rank too high": (
        {"video": ("INT64", [3, 1], bytes(24))},
        r"feature 'video': .* got INT64 of shape \[3, 1\]",
    ),
    "rank too low": (
        {"vector": f32(9)},
        r"feature 'vector': expected FP32 or another float of shape \[N, 3\], got FP32 of shape \[9\]",
    ),
    "wrong width": (
        {"vector": f32(3, 4)},
        r"feature 'vector': .* of shape \[N, 3\], got FP32 of shape \[3, 4\]",
    ),
    "scalar": ({"age": ("FP32", [], bytes(4))}, r"feature 'age': .* got FP32 of shape \[\]"),
    "hundred dimensions": (
        {"age": ("FP32", [1] * 100, bytes(4))},
        r"feature 'age': .* got FP32 of shape \[1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\]",
    ),
    "context sent N times": (
        {"age": f32(3)},
        r"feature 'age': expected FP32 or another float of shape \[1\] or \[1, 1\], got FP32 of shape \[3\]; "
        "its scope is context, so it is sent once a request",
    ),
    "context lengths N times": (
        {"watched__lengths": i32(1, 1, 1)},
        r"feature 'watched': input 'watched.lengths': expected INT32 or .* of shape \[1\].*scope is context",
    ),
    "other number of rows": (
        {"video": i64(1, 2)},
        "feature 'topics': expected 2 rows, as feature 'video' has, got 3",
    ),
    "negative size": ({"video": ("INT64", [-1], b"")}, r"feature 'video': .* got INT64 of shape \[-1\]"),
    "absurd size": (
        {"video": ("INT64", [2**62], bytes(8))},
        rf"feature 'video': input byte size mismatch: expected {8 * 2**62} bytes for INT64 of shape "
        rf"\[{2**62}\], got 8",
    ),
    "absurd empty size": (
        {"vector": ("FP32", [0, 2**62], b"")},
        r"feature 'vector': .*of shape \[N, 3\], got",
    ),
    "absurd number of strings": (
        {"tags": ("BYTES", [2**62], b"")},
        f"feature 'tags': unexpected number of string elements: expected {2**62}, got 0",
    ),
    "too few bytes": (
        {"video": ("INT64", [3], bytes(23))},
        r"feature 'video': input byte size mismatch: expected 24 bytes for INT64 of shape \[3\], got 23",
    ),
    "too many bytes": (
        {"video": ("INT64", [3], bytes(32))},
        "feature 'video': .* expected 24 bytes .* got 32",
    ),
    "string length cut": (
        {"country": ("BYTES", [1], b"\x02\x00\x00")},
        "feature 'country': expected strings, each 4 bytes of length and its bytes; element 0: expected 4 "
        "bytes of length",
    ),
    "string cut": (
        {"country": ("BYTES", [1], struct.pack("<I", 2**32 - 1) + b"de")},
        "feature 'country': .*element 0: expected 4294967295 bytes",
    ),
    "too many strings": (
        {"country": ("BYTES", [1], b"\x01\x00\x00\x00a\x01\x00\x00\x00b")},
        "feature 'country': unexpected number of string elements: expected 1, got 2",
    ),
    "values without lengths": (
        {"topics__lengths": None},
        r"feature 'topics': expected input 'topics.lengths' beside input 'topics', got none; it is "
        r"INT32 or another integer of "
        r"shape \[N\]",
    ),
    "lengths without values": (
        {"topics": None},
        "feature 'topics': expected input 'topics' beside input 'topics.lengths', got none",
    ),
    "negative lengths": (
        {"topics__lengths": i32(4, -1, 3)},
        "feature 'topics': expected lengths >= 0, got -1 in row 1",
    ),
    "lengths that don't add up": (
        {"topics__lengths": i32(1, 2, 2)},
        "feature 'topics': expected lengths that add up to its 6 values, got a sum of 5",
    ),
    "lengths that overflow": (
        {"topics__lengths": i32(2**31 - 1, 2**31 - 1, 8)},
        "feature 'topics': expected lengths that add up to its 6 values, got a sum of 4294967302",
    ),
    "id too large": (
        {"video": i64(0, 100, 2)},
        r"feature 'video': expected ids in \[0, 100\) of table 'videos', got 100 at position 1",
    ),
    "id negative": ({"video": i64(0, 1, -1)}, r"feature 'video': .* got -1 at position 2"),
    "id too large in a sequence": (
        {"watched": i64(5, 6, 1000)},
        r"feature 'watched': .* got 1000 at position 2",
    ),
    "not a number": (
        {"likes": np.array([0, np.nan, 1], np.float32)},
        "feature 'likes': expected finite floats, got nan in row 1; it has no default to stand in for NaN",
    ),
    "infinite": (
        {"age": np.array([np.inf], np.float32)},
        "feature 'age': expected finite floats, got inf in row 0",
    ),
    "beyond float32": (
        {"likes": np.array([0, 1e300, 0])},
        "feature 'likes': expected finite floats, got inf in row 1",
    ),
    "no candidate features": (
        dict.fromkeys(
            ["video", "topics", "topics__lengths", "tags", "tags__lengths", "likes", "vector", "hour"]
        ),
        "feature 'video' is missing",
    ),
    "feature by name and packed": (
        {"candidate__dense": f32(3, 5)},
        "feature 'likes': expected once, got it by name and in the packed inputs of scope candidate",
    ),
    "packed of the wrong width": (
        {"candidate__dense": f32(3, 4)},
        r"input 'candidate.dense': expected FP32 or .* of shape \[N, 5\], got FP32 of shape \[3, 4\]",
    ),
    "packed context N times": (
        {"context__dense": f32(3, 3)},
        r"input 'context.dense': expected FP32 or .* of shape \[1, 3\], got FP32 of shape \[3, 3\]; its",
    ),
    "packed values without lengths": (
        {"candidate__values": i64(1, 2, 3)},
        r"input 'candidate.lengths': expected INT32 or .* of shape \[3, N\] beside "
        r"'candidate.values', got none",
    ),
    "packed lengths without values": (
        {"candidate__lengths": np.ones((3, 3), np.int32)},
        r"input 'candidate.values': expected INT64 or .* of shape \[V\] beside 'candidate.lengths', got",
    ),
    "packed lengths of another number of features": (
        {"candidate__values": i64(1), "candidate__lengths": np.ones((2, 3), np.int32)},
        r"input 'candidate.lengths': expected INT32 or .* of shape \[3, N\], got INT32 of shape \[2, 3\]",
    ),
    "packed lengths negative": (
        {"candidate__values": i64(1), "candidate__lengths": np.array([[1, 1], [1, -7], [0, 0]], np.int32)},
        "feature 'topics': expected lengths >= 0, got -7 in row 1 of input 'candidate.lengths'",
    ),
    "packed lengths don't add up": (
        {"candidate__values": i64(1, 2), "candidate__lengths": np.ones((3, 1), np.int32)},
        "input 'candidate.lengths': expected lengths that add up to the 2 values of 'candidate.values', got "
        "a sum of 3",
    ),
    "packed ids of more than one value": (
        {
            "candidate__values": i64(1, 2, 3, 4),
            "candidate__lengths": np.array([[1, 2], [0, 0], [1, 0]], np.int32),
        },
        "feature 'video': expected length 1 in every row, as it is one id, got 2 in row 1 of input "
        "'candidate.lengths'",
    ),
    "packed id with a default missing in one row": (
        {
            "candidate__values": i64(1, 2, 3),
            "candidate__lengths": np.array([[1, 1], [0, 0], [1, 0]], np.int32),
        },
        "feature 'fresh': expected length 1 in every row, as it is one id, got 0 in row 1",
    ),
    "packed required id left out": (
        {"candidate__values": i64(1, 2), "candidate__lengths": np.array([[0, 0], [0, 0], [1, 1]], np.int32)},
        "feature 'video': expected length 1 in every row, as it is one id, got 0 in row 0",
    ),
    "a packed group that the model doesn't have": (
        {"user__dense": f32(1, 3)},
        "model 'feed' has no input 'user.dense'",
    ),
}


def request_of(wire, changes):
    inputs = {name: value for name, value in (wire.valid(3) | changes).items() if value is not None}
    return wire.raw(**inputs)


@pytest.mark.parametrize(("changes", "text"), CASES.values(), ids=CASES)
def test_a_bad_request_is_refused_by_name(wire, changes, text):
    with pytest.raises(FeatureError, match=text):
        ModelCodec(wire.spec).decode(request_of(wire, changes))


@pytest.mark.parametrize("case", ["unknown input", "too few bytes", "id too large", "not a number"])
def test_a_refusal_reaches_the_client_and_the_server_goes_on(shared, wire, case):
    changes, text = CASES[case]
    details = shared.refusal(request_of(wire, changes))
    with pytest.raises(FeatureError, match=text):
        raise FeatureError(details)
    assert len(shared.infer(wire.raw(**wire.valid(2))).outputs) == 2


def test_a_repeated_input_is_refused(shared, wire):
    request = wire.raw(**wire.valid(3))
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    assert shared.refusal(request) == "feature 'age': expected once, got it again as input 12"


def test_raw_and_typed_contents_are_not_mixed(shared, wire):
    request = wire.raw(**wire.valid(3))
    request.inputs[0].contents.fp32_contents.append(31.5)
    assert shared.refusal(request) == (
        "contents field must not be specified when using raw_input_contents for 'age' for model 'feed'"
    )


def test_there_is_one_raw_entry_an_input(shared, wire):
    request = wire.raw(**wire.valid(3))
    last = request.raw_input_contents.pop()
    assert shared.refusal(request) == (
        "feature 'hour': unable to find data for input tensor 'hour': expected 12 entries of "
        "raw_input_contents, got 11"
    )
    request.raw_input_contents.extend([last, last])
    assert shared.refusal(request) == (
        "model 'feed': expected one entry of raw_input_contents for each of 12 inputs, got 13"
    )


def test_an_input_without_any_contents_is_refused(shared, wire):
    request = wire.raw(**wire.valid(3))
    del request.raw_input_contents[:]
    assert shared.refusal(request) == (
        "feature 'age': unable to find data for input tensor 'age': expected 1 elements in contents or "
        "raw_input_contents, got none"
    )


@pytest.mark.parametrize(
    ("field", "values", "text"),
    [
        ("fp64_contents", [1.0], "input tensor 'age' of type 'FP64', expected datatype 'FP32'"),
        ("int_contents", [1], "input tensor 'age' of type 'INT32', expected datatype 'FP32'"),
        ("bytes_contents", [b"1"], "input tensor 'age' of type 'BYTES', expected datatype 'FP32'"),
        ("fp32_contents", [1.0, 2.0], r"feature 'age': expected 1 elements for FP32 of shape \[1\], got 2"),
    ],
)
def test_typed_contents_must_match_datatype_and_shape(wire, field, values, text):
    request = wire.messages.ModelInferRequest(model_name="feed")
    tensor = request.inputs.add(name="age", datatype="FP32", shape=[1])
    getattr(tensor.contents, field).extend(values)
    with pytest.raises(FeatureError, match=text):
        ModelCodec(wire.spec).decode(request)


def test_typed_strings_must_match_the_shape(wire):
    request = wire.messages.ModelInferRequest(model_name="feed")
    tensor = request.inputs.add(name="country", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.extend([b"de", b"fr"])
    with pytest.raises(FeatureError, match="unexpected number of string elements: expected 1, got 2"):
        ModelCodec(wire.spec).decode(request)


def test_an_unknown_output_is_refused(shared, wire):
    request = wire.raw(**wire.valid(1))
    request.outputs.add(name="clicks")
    assert shared.refusal(request) == (
        "model 'feed' has no output 'clicks'; it has ['finish', 'share.score']"
    )


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_refused_and_not_ignored(shared, wire, where):
    request = wire.raw(**wire.valid(1))
    request.outputs.add(name="finish")
    getattr(request, where)[0].parameters["shared_memory_region"].string_param = "region"
    assert "parameter 'shared_memory_region' is not supported" in shared.refusal(request)


def test_an_empty_request_is_refused(shared, wire):
    request = wire.messages.ModelInferRequest(model_name="feed")
    assert shared.refusal(request).startswith("feature 'age' is missing")


def test_a_message_that_is_no_protobuf_is_refused_and_the_server_goes_on(shared, wire):
    call = shared.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError):
        call(b"\xff\xff\xff\xff", timeout=10)
    assert len(shared.infer(wire.raw(**wire.valid(2))).outputs) == 2


def test_a_huge_name_still_gives_a_readable_refusal(shared, wire):
    details = shared.refusal(wire.raw(**wire.valid(1), **{"ü" * 100_000: f32(1)}))
    assert details.startswith("model 'feed' has no input 'üüü")
    assert details.endswith("...")
    assert len(details.encode()) <= 2003


def test_a_message_above_the_limit_is_refused_and_the_server_goes_on(wire):
    running = wire.start(max_message_mib=1)
    request = wire.raw(**wire.valid(1))
    request.raw_input_contents.append(bytes(2**20))
    assert "larger than max" in running.refusal(request, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert running.client.is_ready()
    running.channel.close()
    running.client.close()
    running.server.stop(0)


def mutate(request, rng):
    """Breaks one thing of a request; it may stay valid."""
    i = int(rng.integers(len(request.inputs)))
    tensor, raw = request.inputs[i], request.raw_input_contents[i]
    kind = rng.integers(7)
    if kind == 0:
        sizes = [-(2**63), -1, 0, 1, 2, 3, 4, 2**31, 2**62, 2**63 - 1]
        tensor.shape[:] = rng.choice(sizes, size=rng.integers(4)).tolist()
    elif kind == 1:
        tensor.datatype = str(rng.choice(["FP32", "FP64", "INT32", "INT64", "BYTES", "BOOL", "", "fp32"]))
    elif kind == 2:
        request.raw_input_contents[i] = raw[: rng.integers(len(raw) + 1)]
    elif kind == 3:
        request.raw_input_contents[i] = rng.bytes(len(raw))
    elif kind == 4:
        tensor.name = str(rng.choice([*(other.name for other in request.inputs), "", "context.", "é\0"]))
    elif kind == 5:
        del request.inputs[i]
    else:
        tensor.contents.int64_contents.extend([1, 2])


@pytest.mark.parametrize("packed", [False, True])
def test_whatever_is_broken_is_refused_and_never_crashes(wire, candidates, packed):
    codec = ModelCodec(wire.spec)
    valid = wire.messages.ModelInferRequest(model_name="feed")
    add_inputs(valid, wire.spec, RankRequest(wire.spec, candidates), packed=packed)
    rng = np.random.default_rng(7)
    num_refused = 0
    for _ in range(1500):
        request = wire.messages.ModelInferRequest()
        request.CopyFrom(valid)
        for _ in range(int(rng.integers(1, 3))):
            mutate(request, rng)
        try:
            codec.decode(request)
        except FeatureError:
            num_refused += 1
    assert 1000 < num_refused < 1500
