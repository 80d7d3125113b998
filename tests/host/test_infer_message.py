"""Where messages have their tensors: by hand, and in messages cut short and broken at every place."""

import numpy as np
import pytest

from xlarank.host import InferForms, RawMessage

FORMS = [
    ("age", "FP32", 4, 1, True),
    ("ids", "INT64", 8, 1, False),
    ("v", "FP32", 4, 3, True),
    ("s", "BYTES", 0, 1, False),
]


def field(number, content):
    """A field of bytes, by hand: https://protobuf.dev/programming-guides/encoding."""
    size, length = len(content), b""
    while True:
        size, low = size >> 7, size & 0x7F
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            return bytes([number << 3 | 2]) + length + content


def described(name, datatype, *shape):
    return field(5, field(1, name) + field(2, datatype) + field(3, bytes(shape)))


CONTENTS = [b"\1\2\3\4", bytes(range(16)), bytes(24), b"\1\0\0\0x" * 2]
USUAL = (
    field(1, b"feed")
    + described(b"age", b"FP32", 1)
    + described(b"ids", b"INT64", 2)
    + field(3, b"an id")
    + described(b"v", b"FP32", 2, 3)
    + described(b"s", b"BYTES", 2)
    + b"".join(field(7, content) for content in CONTENTS)
)


def located(data):
    """[offset, size, rows] by input; None if it has to be parsed."""
    message = RawMessage.read(data)
    spans = None if message is None else InferForms(FORMS).locate(message)
    return None if spans is None else np.reshape(spans, (-1, 3)).tolist()


def test_contents_are_found_where_they_are():
    message = RawMessage.read(USUAL)
    assert message.rest == field(1, b"feed") + field(3, b"an id")
    assert message.num_inputs == 4
    spans = located(USUAL)
    assert [rows for _, _, rows in spans] == [1, 2, 2, 2]
    assert [USUAL[offset : offset + size] for offset, size, _ in spans] == CONTENTS


def test_inputs_may_come_in_any_order_and_be_left_out():
    data = described(b"ids", b"INT64", 2) + described(b"age", b"FP32", 1, 1)
    data += field(7, CONTENTS[1]) + field(7, CONTENTS[0])
    spans = located(data)
    assert [size for _, size, _ in spans] == [4, 16, 0, 0]
    assert [offset for offset, _, _ in spans[2:]] == [-1, -1]
    assert located(b"") == [[-1, 0, 0]] * 4


@pytest.mark.parametrize(
    "data",
    [
        described(b"age", b"FP32", 1) + field(7, bytes(3)),  # too few bytes
        described(b"age", b"FP32", 1) + field(7, bytes(8)),
        described(b"age", b"FP64", 1) + field(7, bytes(8)),
        described(b"age", b"FP32", 1),  # no contents
        described(b"age", b"FP32") + field(7, bytes(4)),  # no shape
        described(b"age", b"FP32", 1, 1, 1) + field(7, bytes(4)),
        described(b"ids", b"INT64", 1, 1) + field(7, bytes(8)),  # of one axis
        described(b"v", b"FP32", 3) + field(7, bytes(12)),
        described(b"v", b"FP32", 2, 2) + field(7, bytes(16)),
        described(b"who", b"FP32", 1) + field(7, bytes(4)),
        2 * described(b"age", b"FP32", 1) + 2 * field(7, bytes(4)),
        field(5, field(1, b"age") + field(1, b"age") + field(2, b"FP32") + field(3, b"\1"))
        + field(7, bytes(4)),
        field(5, field(1, b"age") + field(2, b"FP32") + b"\x18\1") + field(7, bytes(4)),  # shape, not packed
        field(5, field(1, b"ids") + field(2, b"INT64") + field(3, b"\xff" * 9 + b"\1")) + field(7, b""),  # -1
        field(5, field(1, b"ids") + field(2, b"INT64") + field(3, b"\xff" * 11)) + field(7, b""),
        field(5, field(1, b"age") + field(2, b"FP32") + field(3, b"\1") + field(4, b"")) + field(7, bytes(4)),
        field(8, b"unknown"),
        b"\x08\1",  # a field that isn't of bytes
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\1",  # of nearly 2**64 bytes
    ],
)
def test_what_is_not_usual_is_left_to_the_parser(data):
    assert located(data) is None


def test_a_message_cut_short_is_malformed_or_lacks_what_was_cut():
    for end in range(len(USUAL)):
        spans = located(USUAL[:end])
        assert spans is None or all(offset + size <= end for offset, size, _ in spans)


def test_nothing_outside_of_a_broken_message_is_named():
    rng = np.random.default_rng(0)
    num_read = 0
    for _ in range(5000):
        data = bytearray(USUAL)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        spans = located(bytes(data))
        if spans is None:
            continue
        num_read += 1
        for (offset, size, rows), (_, _, item_bytes, width, _) in zip(spans, FORMS, strict=True):
            assert offset == -1 or (0 <= offset <= len(data) - size and rows >= 0)
            assert not item_bytes or size == rows * width * item_bytes
    assert num_read > 100
