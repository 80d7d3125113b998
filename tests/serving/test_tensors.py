"""Datatypes: every one that holds a feature's values is read for what it holds, raw and typed."""

import ml_dtypes
import numpy as np
import pytest
from xlarank_serving.codec import ModelCodec

from xlarank.errors import FeatureError

INTEGERS = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
TYPED = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def name_of(dtype):
    return {"i": "INT", "u": "UINT"}[dtype.kind] + str(8 * dtype.itemsize)


def typed(wire, request):
    """The same request with typed contents."""
    out = wire.messages.ModelInferRequest(model_name=request.model_name)
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        copy = out.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        field = getattr(copy.contents, TYPED[tensor.datatype])
        if tensor.datatype == "BYTES":
            while raw:
                size = int.from_bytes(raw[:4], "little")
                field.append(raw[4 : 4 + size])
                raw = raw[4 + size :]
        else:
            kind = {"B": "?", "I": "i", "U": "u", "F": "f"}[tensor.datatype[0]]
            bits = int(tensor.datatype.lstrip("BOLUINTFP") or 8)
            field.extend(np.frombuffer(raw, np.dtype(f"<{kind}{bits // 8}" if kind != "?" else "?")).tolist())
    return out


def column(wire, request, name):
    return ModelCodec(wire.spec).decode(request).column(name)


@pytest.mark.parametrize("as_typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_every_integer_type_does_for_ids(wire, dtype, as_typed):
    ids = np.array([0, 99, 7], dtype)
    request = wire.raw(**wire.valid(3) | {"video": ids, "topics": np.array([1, 2, 3, 4, 5, 127], dtype)})
    request = typed(wire, request) if as_typed else request
    got = column(wire, request, "video")
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, [0, 99, 7])
    np.testing.assert_array_equal(column(wire, request, "topics").values, [1, 2, 3, 4, 5, 127])


@pytest.mark.parametrize("as_typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_every_integer_type_does_for_lengths(wire, dtype, as_typed):
    lengths = np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]], dtype)
    values = np.array([8, 0, 99, 1, 2, 3], np.int64)
    inputs = wire.valid(3) | {"candidate__values": values, "candidate__lengths": lengths}
    inputs = {k: v for k, v in inputs.items() if k not in ("video", "topics", "topics__lengths")}
    inputs["tags__lengths"] = np.array([2, 0, 1], dtype)
    request = wire.raw(**inputs)
    request = typed(wire, request) if as_typed else request
    topics = column(wire, request, "topics")
    assert topics.lengths.dtype == np.int32
    np.testing.assert_array_equal(topics.lengths, [2, 0, 1])
    np.testing.assert_array_equal(topics.values, [1, 2, 3])
    np.testing.assert_array_equal(column(wire, request, "tags").lengths, [2, 0, 1])


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, 2**53 + 1])
def test_a_large_id_arrives_to_the_last_bit(wire, value):
    ids = np.full(6, value, np.int64)
    np.testing.assert_array_equal(
        column(wire, wire.raw(**wire.valid(3) | {"topics": ids}), "topics").values, ids
    )
    if value >= 0:
        request = wire.raw(**wire.valid(3) | {"topics": ids.astype(np.uint64)})
        np.testing.assert_array_equal(column(wire, request, "topics").values, ids)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_type_does_for_floats(wire, dtype):
    # Every finite value of 16 bits; what float32 doesn't hold of float64 is rounded as NumPy does it.
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(dtype) if np.dtype(dtype).itemsize == 2 else bits.astype(dtype) / 7
    with np.errstate(invalid="ignore"):  # older ml_dtypes complain of NaN
        values = values[np.isfinite(values)]
    values = values[: len(values) // 3 * 3]
    datatype = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"}[
        str(np.dtype(dtype))
    ]
    n = len(values) // 3
    inputs = wire.valid(n) | {"video": np.zeros(n, np.int64), "vector": (datatype, [n, 3], values.tobytes())}
    request = wire.raw(**inputs)
    got = column(wire, request, "vector")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values.reshape(n, 3).astype(np.float32))


@pytest.mark.parametrize("as_typed", [False, True], ids=["raw", "typed"])
def test_bool_does_for_floats_and_ids(wire, as_typed):
    flags = np.array([True, False, True])
    request = wire.raw(**wire.valid(3) | {"video": flags, "likes": flags})
    request = typed(wire, request) if as_typed else request
    assert column(wire, request, "video").tolist() == [1, 0, 1]
    assert column(wire, request, "likes").tolist() == [[1.0], [0.0], [1.0]]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_travel_raw(wire, datatype):
    request = wire.messages.ModelInferRequest(model_name="feed")
    tensor = request.inputs.add(name="age", datatype=datatype, shape=[1])
    tensor.contents.fp32_contents.append(1.0)
    with pytest.raises(
        FeatureError, match=f"feature 'age': expected {datatype} in raw_input_contents, got typed contents"
    ):
        ModelCodec(wire.spec).decode(request)


@pytest.mark.parametrize(
    ("datatype", "value"), [("INT8", 128), ("INT16", -32769), ("UINT8", 256), ("UINT16", 2**16)]
)
def test_typed_integers_must_fit_their_datatype(wire, datatype, value):
    request = typed(wire, wire.raw(**wire.valid(3)))
    (tensor,) = [tensor for tensor in request.inputs if tensor.name == "video"]
    tensor.datatype = datatype
    tensor.contents.ClearField("int64_contents")
    getattr(tensor.contents, TYPED[datatype]).extend([1, value, 2])
    with pytest.raises(
        FeatureError, match=f"feature 'video': expected {datatype} values, got {value} at position 1"
    ):
        ModelCodec(wire.spec).decode(request)


@pytest.mark.parametrize("as_typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("name", ["video", "likes", "country", "topics__lengths"])
def test_a_declared_shape_allocates_nothing(wire, name, as_typed):
    """A shape of 2**40 beside a few bytes: were it believed, the process would not survive this test."""
    request = wire.raw(**wire.valid(3))
    request = typed(wire, request) if as_typed else request
    (tensor,) = [tensor for tensor in request.inputs if tensor.name == name.replace("__", ".")]
    tensor.shape[:] = [2**40]
    with pytest.raises(FeatureError, match=rf"{2**40}|of shape \[1\]"):
        ModelCodec(wire.spec).decode(request)
