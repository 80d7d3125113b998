"""Rows are written while others read: visible at once, never in two halves, nothing else touched."""

import dataclasses
import threading

import numpy as np
import pytest

from xlarank.errors import ConfigError, RequestError
from xlarank.host import Gatherer, Segment, decode_rows, encode_rows
from xlarank.host.tables import aligned_empty
from xlarank.spec import (
    Bucket,
    FeatureSpec,
    ModelSpec,
    Ragged,
    RankRequest,
    RowFormat,
    TableSpec,
    TaskSpec,
)

NUM_ROWS, DIM = 64, 24
BACKENDS = ("native", "numpy")


def spec_of(row_format=RowFormat.FLOAT32, **fields):
    """One table that an id, a bag and a sequence read."""
    return ModelSpec(
        name="changing",
        features=[
            FeatureSpec(name="id", kind="id", scope="candidate", table="t"),
            FeatureSpec(name="bag", kind="id_list", scope="candidate", table="t", combiner="sum"),
            FeatureSpec(name="seen", kind="sequence", scope="context", table="t", max_length=4),
        ],
        tables=[TableSpec(name="t", dim=DIM, rows=NUM_ROWS, dtype=row_format, updatable=True)],
        tasks=[TaskSpec(name="click")],
    ) if not fields else dataclasses.replace(spec_of(row_format), **fields)  # fmt: skip


def values_of(seed=0, num_rows=NUM_ROWS):
    return np.random.default_rng(seed).standard_normal((num_rows, DIM)).astype(np.float32)


def gatherer_of(values, row_format=RowFormat.FLOAT32, backend="native"):
    return Gatherer(spec_of(row_format), {"t": encode_rows(values, row_format)}, backend=backend)


class Batch:
    """A request of some bags, bound once, and buffers to gather it into."""

    def __init__(self, gatherer, bags):
        self.gatherer = gatherer
        lengths = np.array([len(bag) for bag in bags], np.int32)
        flat = np.concatenate([np.asarray(bag, np.int64) for bag in bags])
        seen = Ragged(np.arange(4, dtype=np.int64), np.array([4], np.int32))
        ids = np.array([bag[0] for bag in bags], np.int64)
        request = RankRequest(gatherer.spec, {"id": ids, "bag": Ragged(flat, lengths), "seen": seen})
        self.bucket = Bucket(len(bags), 1)
        self.segments = [Segment(gatherer.bind(request), 0, len(bags))]
        self.out = {
            leaf.name: aligned_empty(leaf.shape(self.bucket), leaf.dtype)
            for leaf in gatherer.signature.leaves
        }

    def gather(self):
        """By feature: [rows, D] of the id and the bag, [4, D] of the sequence."""
        self.gatherer.gather(self.segments, self.bucket, self.out)
        slots = self.gatherer.signature.slots
        rows = {
            name: self.out[slots[name].leaf][:, slots[name].begin : slots[name].end] for name in ("id", "bag")
        }
        return rows | {"seen": self.out[slots["seen"].leaf][0]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_format", list(RowFormat))
def test_what_is_gathered_after_an_update_is_the_new_rows(row_format, backend):
    values, new = values_of(), values_of(1, 5)
    gatherer = gatherer_of(values, row_format, backend)
    batch = Batch(gatherer, [[3, 60], [7, 7, 1], [9]])
    batch.gather()
    rows = np.array([3, 9, 1, 63, 3])  # of two new rows 3 the later wins
    gatherer.update_rows("t", rows, new)
    values[rows] = new
    expected = decode_rows(encode_rows(values, row_format))
    found = batch.gather()
    np.testing.assert_array_equal(found["id"], expected[[3, 7, 9]])
    sums = [expected[3] + expected[60], expected[7] + expected[7] + expected[1], expected[9]]
    np.testing.assert_array_equal(found["bag"], sums)
    np.testing.assert_array_equal(found["seen"], expected[:4])


def test_no_row_is_read_in_two_halves():
    """A writer fills rows with one number after another; a row that is read holds one number."""
    gatherer = gatherer_of(np.zeros((NUM_ROWS, DIM), np.float32))
    # Bags of one row show a torn one; a long one meets a write at every try.
    batch = Batch(gatherer, [*([[row] for row in range(NUM_ROWS)]), list(range(NUM_ROWS)) * 200])
    stop, written = threading.Event(), []

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            rows = np.arange(NUM_ROWS)
            gatherer.update_rows("t", rows, np.full((NUM_ROWS, DIM), number, np.float32))
            written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        last = 0.0
        while len(written) < 300 or not last:
            before = len(written)
            found = batch.gather()
            ids = found["id"][:NUM_ROWS]
            np.testing.assert_array_equal(ids, np.broadcast_to(ids[:, :1], ids.shape))
            bags = found["bag"]
            np.testing.assert_array_equal(bags, np.broadcast_to(bags[:, :1], bags.shape))
            assert ids.min() >= before, "what was written before the gather began is seen"
            assert ids.max() <= len(written) + 1
            last = ids.max()
    finally:
        stop.set()
        writer.join()


def test_a_lookup_of_the_kernel_waits_for_no_lock():
    """Whoever updates holds `_updates` or less: with all of it taken, lookups go on."""
    gatherer = gatherer_of(values_of())
    batch, done = Batch(gatherer, [[3, 60]]), threading.Event()

    def look_up():
        batch.gather()
        done.set()

    with gatherer._updates:
        reader = threading.Thread(target=look_up, daemon=True)
        reader.start()
        assert done.wait(60)
    reader.join()


def test_many_writers_leave_each_row_whole():
    gatherer = gatherer_of(np.zeros((NUM_ROWS, DIM), np.float32))

    def write(number):
        for _ in range(200):
            gatherer.update_rows("t", np.arange(NUM_ROWS), np.full((NUM_ROWS, DIM), number, np.float32))

    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = Batch(gatherer, [[row] for row in range(NUM_ROWS)]).gather()["id"]
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], found.shape))
    assert set(np.unique(found)) <= {1, 2, 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("table", "rows", "values", "message"),
    [
        ("u", [0], np.ones((1, DIM)), r"expected one of the tables \['t'\], got 'u'"),
        ("t", [64], np.ones((1, DIM)), r"table 't': expected row numbers in \[0, 64\), got 64"),
        ("t", [0, -1], np.ones((2, DIM)), r"table 't': expected row numbers in \[0, 64\), got -1"),
        ("t", [2**32], np.ones((1, DIM)), r"expected row numbers in \[0, 64\), got 4294967296"),
        ("t", [0.5], np.ones((1, DIM)), r"expected row numbers as integers of shape \[K\], got float64 of"),
        ("t", [[0]], np.ones((1, DIM)), r"expected row numbers as integers .* got int64 of shape \[1, 1\]"),
        ("t", [0], np.ones(DIM), r"expected new rows as floats of shape \[1, 24\], got float64 .* \[24\]"),
        ("t", [0, 1], np.ones((1, DIM)), r"expected new rows as floats of shape \[2, 24\]"),
        ("t", [0], np.ones((1, DIM), int), r"expected new rows as floats of shape \[1, 24\], got int64"),
        ("t", [0, 5], [[0] * DIM, [np.nan] * DIM], r"table 't', new rows: expected finite floats, row 1 "),
        ("t", [0], np.full((1, DIM), 1e300), r"table 't', new rows: expected finite floats, row 0 "),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(backend, table, rows, values, message):
    gatherer = gatherer_of(values_of(), backend=backend)
    batch = Batch(gatherer, [[row] for row in range(NUM_ROWS)])
    before = batch.gather()["id"].copy()
    with pytest.raises(RequestError, match=message):
        gatherer.update_rows(table, np.array(rows), np.array(values))
    np.testing.assert_array_equal(batch.gather()["id"], before)


def test_no_rows_are_no_update():
    gatherer = gatherer_of(values_of())
    gatherer.update_rows("t", np.array([], np.int64), np.empty((0, DIM), np.float32))


def test_a_table_that_was_not_declared_updatable_stays_as_it_is():
    (table,) = spec_of().tables
    spec = spec_of(tables=(dataclasses.replace(table, updatable=False),))
    gatherer = Gatherer(spec, {"t": values_of()})
    with pytest.raises(RequestError, match=r"table 't' isn't updatable: state updatable = true in"):
        gatherer.update_rows("t", np.array([0]), np.ones((1, DIM), np.float32))


def test_updatable_rows_in_read_only_memory_are_refused():
    values = values_of()
    values.flags.writeable = False
    with pytest.raises(ConfigError, match=r"table 't' is updatable: expected rows in writable memory"):
        Gatherer(spec_of(), {"t": values})


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_updates_rows_may_be_read_only(backend):
    """As while compiling, of the arrays that a model gives."""
    values = values_of()
    values.flags.writeable = False
    gatherer = Gatherer(spec_of(), {"t": values}, backend=backend, is_updated=False)
    batch = Batch(gatherer, [[3, 4], [60]])
    np.testing.assert_array_equal(batch.gather()["id"], values[[3, 60]])
    with pytest.raises(RequestError, match=r"table 't' isn't updated here: its gatherer was made with"):
        gatherer.update_rows("t", np.array([0]), np.ones((1, DIM), np.float32))


def test_updatable_is_true_or_false():
    with pytest.raises(ConfigError, match=r"table 't': updatable must be true or false; was 'yes'"):
        TableSpec(name="t", dim=2, updatable="yes")
