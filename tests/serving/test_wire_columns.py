"""Requests read in place, held against the same requests parsed."""

import dataclasses

import numpy as np
import pytest
from mutations import mutated, mutated_bytes, to_typed
from xlarank_serving.codec import ModelCodec
from xlarank_serving.config import LimitConfig
from xlarank_serving.parsing import parse, read_infer_message
from xlarank_serving.wire_columns import WireColumns

from xlarank.errors import XlarankError
from xlarank.host import FeatureStore, RawMessage
from xlarank.spec import Ragged, StringColumn

LIMITS = LimitConfig()
CONTEXT = ("age", "country", "watched", "watched__lengths")


def arrays_of(column):
    """The arrays that a column consists of."""
    if isinstance(column, Ragged):
        return [*arrays_of(column.values), column.lengths]
    return [column.blob, column.offsets] if isinstance(column, StringColumn) else [column]


def outcome(read, data):
    """What became of a message: its columns as bytes, or an error's type and text."""
    try:
        request = read(data)
    except XlarankError as error:
        return type(error), str(error)
    arrays = [array for column in request.columns for array in arrays_of(column)]
    return request.num_candidates, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def both_ways(wire, codec, data, *, takes_ids=False):
    """The outcome of a message read in place as far as that goes, and parsed; and whether it was in place."""
    parsed = outcome(lambda data: codec.decode(parse(wire.messages.ModelInferRequest, data)), data)
    own = outcome(lambda data: codec.read(read_infer_message(data, LIMITS)), data)
    raw = RawMessage.read(data)
    return own, parsed, raw is not None and WireColumns(wire.spec, takes_ids=takes_ids).read(raw) is not None


def test_a_usual_request_is_read_in_place_and_not_copied(wire):
    request = wire.raw(**wire.valid(5))
    request.id = "seven"
    request.parameters["priority"].int64_param = 1
    request.outputs.add(name="finish")
    data = request.SerializeToString()
    message = read_infer_message(data, LIMITS)
    assert message.raw.num_inputs == len(request.inputs)
    own = wire.messages.ModelInferRequest()
    own.CopyFrom(request)
    del own.inputs[:], own.raw_input_contents[:]
    assert message.request == own
    assert message.parsed() == request
    columns, ids = WireColumns(wire.spec).read(message.raw)
    assert ids is None
    names = [feature.name for feature in wire.spec.features]
    given = [name for name, column in zip(names, columns, strict=True) if column is not None]
    assert [name for name in names if name not in given] == ["mood", "fresh"]  # they have defaults
    bytes_of_message = np.frombuffer(data, np.uint8)
    for name, column in zip(names, columns, strict=True):
        if isinstance(column, np.ndarray):
            assert np.shares_memory(column, bytes_of_message), name
    own, parsed, is_in_place = both_ways(wire, ModelCodec(wire.spec), data)
    assert is_in_place
    assert own == parsed


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.inputs[0].parameters["x"].__setattr__("bool_param", True),
        lambda request: request.inputs[0].contents.fp32_contents.append(1.0),
        lambda request: request.inputs[0].shape.append(1),
        lambda request: request.inputs[0].shape.__setitem__(0, 2**40),
        lambda request: request.inputs[0].shape.__setitem__(0, -1),
        lambda request: request.raw_input_contents.append(b""),
        lambda request: request.inputs.add(name="who"),
        lambda request: request.inputs[0].__setattr__("datatype", "FP64"),
        lambda request: request.raw_input_contents.__setitem__(0, b"123"),
        lambda request: request.inputs[0].__setattr__("name", "\xe9"),
        lambda request: (
            request.inputs[0].shape.__setitem__(0, 2),
            request.raw_input_contents.__setitem__(0, bytes(8)),
        ),
    ],
)
def test_what_is_not_usual_is_parsed(wire, change):
    request = wire.raw(**wire.valid(5))
    change(request)
    own, parsed, is_in_place = both_ways(wire, ModelCodec(wire.spec), request.SerializeToString())
    assert not is_in_place or request.inputs[0].shape == [1, 1]  # a dense feature of one float may be [1, 1]
    assert own == parsed


@pytest.mark.parametrize("text", [b"feed", b"age"])
def test_what_is_no_text_is_refused_with_the_parsers_words(wire, text):
    data = wire.raw(**wire.valid(2)).SerializeToString().replace(text, b"\xff" * len(text), 1)
    own, parsed, is_in_place = both_ways(wire, ModelCodec(wire.spec), data)
    assert not is_in_place or text == b"feed"
    assert own == parsed
    assert f"got {len(data)} bytes that aren't one" in own[1]


def test_packed_requests_and_typed_ones_are_parsed(wire):
    codec = ModelCodec(wire.spec)
    request = wire.raw(**wire.valid(2))
    request.inputs[0].name = "context.dense"
    assert not both_ways(wire, codec, request.SerializeToString())[2]
    typed = to_typed(wire.raw(**wire.valid(2))).SerializeToString()
    own, parsed, is_in_place = both_ways(wire, codec, typed)
    assert not is_in_place
    assert own == parsed
    assert own[0] == 2  # candidates: it is a good request


def test_more_inputs_than_allowed_are_left_to_those_who_count_them(wire):
    limits = dataclasses.replace(LIMITS, max_inputs=3)
    message = read_infer_message(wire.raw(**wire.valid(2)).SerializeToString(), limits)
    assert message.raw is None
    assert len(message.request.inputs) > 3


@pytest.fixture(scope="module")
def codec_with_store(wire):
    """Its store has candidates 0 to 39, each with rows of its own."""
    store = FeatureStore(wire.spec)
    rows = {name: value for name, value in wire.valid(40).items() if name not in CONTEXT}
    rows["likes"] = np.arange(40, dtype=np.float32)
    store.update(
        *ModelCodec(wire.spec, store).decode_rows(
            wire.raw(candidate_ids=np.arange(40, dtype=np.int64), **rows)
        )
    )
    return ModelCodec(wire.spec, store)


def by_ids(wire, ids, *own):
    """A request of candidate ids, of the context, and of some candidate features."""
    inputs = wire.valid(len(ids))
    inputs = {name: inputs[name] for name in inputs if name in CONTEXT or name.split("__")[0] in own}
    return wire.raw(**inputs, candidate_ids=np.asarray(ids, np.int64))


def test_candidate_ids_are_read_in_place_and_joined(wire, codec_with_store):
    data = by_ids(wire, [7, 0, 39], "topics").SerializeToString()
    own, parsed, is_in_place = both_ways(wire, codec_with_store, data, takes_ids=True)
    assert is_in_place
    assert own == parsed
    request = codec_with_store.read(read_infer_message(data, LIMITS))
    np.testing.assert_array_equal(np.ravel(request.column("likes")), [7.0, 0.0, 39.0])  # the store's
    np.testing.assert_array_equal(request.column("topics").values, np.arange(6))  # its own
    assert not both_ways(wire, ModelCodec(wire.spec), data)[2]


@pytest.mark.parametrize("seed", range(4))
def test_any_message_of_ids_means_the_same_read_in_place_and_parsed(wire, codec_with_store, seed):
    rng = np.random.default_rng(seed)
    num_in_place = num_refused = 0
    names = ["video", "topics", "tags", "likes", "vector", "hour"]
    for step in range(150):
        ids = rng.integers(0, 41, rng.integers(0, 6))  # 40 isn't there
        request = by_ids(wire, ids, *rng.choice(names, 2))
        if step % 3 == 1:
            mutated(request, rng)
        data = request.SerializeToString()
        if step % 3 == 2:
            data, _ = mutated_bytes(data, rng)
        own, parsed, is_in_place = both_ways(wire, codec_with_store, data, takes_ids=True)
        num_in_place += is_in_place
        num_refused += isinstance(own[1], str)
        assert own == parsed
    assert num_in_place > 20
    assert num_refused > 20


@pytest.mark.parametrize("seed", range(8))
def test_any_message_means_the_same_read_in_place_and_parsed(wire, seed):
    """Requests broken by their fields and by their bytes: the same columns, or the same error."""
    rng = np.random.default_rng(seed)
    codec = ModelCodec(wire.spec)
    num_in_place = num_refused = 0
    for step in range(250):
        request = wire.raw(**wire.valid(int(rng.integers(0, 6))))
        if step % 2:
            mutated(request, rng)
            data = request.SerializeToString()
        else:
            data, _ = mutated_bytes(request.SerializeToString(), rng)
        own, parsed, is_in_place = both_ways(wire, codec, data)
        num_in_place += is_in_place
        num_refused += isinstance(own[1], str)
        assert own == parsed
    assert num_in_place > 20
    assert num_refused > 20
