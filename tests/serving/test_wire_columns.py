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
from xlarank.host import RawMessage
from xlarank.spec import Ragged, StringColumn

LIMITS = LimitConfig()


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


def both_ways(wire, codec, data):
    """The outcome of a message read in place as far as that goes, and parsed; and whether it was in place."""
    parsed = outcome(lambda data: codec.decode(parse(wire.messages.ModelInferRequest, data)), data)
    own = outcome(lambda data: codec.read(read_infer_message(data, LIMITS)), data)
    raw = RawMessage.read(data)
    return own, parsed, raw is not None and WireColumns(wire.spec).read(raw) is not None


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
    columns = WireColumns(wire.spec).read(message.raw)
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
