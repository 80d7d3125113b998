"""What a store in front of a source does with updates: over a real file, and over a source of one's own."""

import re
import threading

import numpy as np
import pytest
import stored

from xlarank.errors import FeatureError, UnavailableError
from xlarank.host import (
    FeatureFile,
    FeatureFileWriter,
    FeatureRows,
    FeatureSchema,
    FeatureStore,
    FileSource,
    checked_columns,
)

NUM_ROWS = 3000


def row_of(number, item=0):
    """A row all of whose values say the same number: half of it would show."""
    return stored.DEFAULT_ROW | {
        "price": float(number),
        "vector": [float(number)] * 3,
        "item": item % 100,
        "brand": str(number),
        "topics": [number % 100] * (number % 9),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path, schema = tmp_path_factory.mktemp("rows") / "features", FeatureSchema.of(stored.STORED)
    rows = stored.columns_of([row_of(0, item) for item in range(NUM_ROWS)])
    ids = np.arange(NUM_ROWS)
    with FeatureFileWriter(path, schema, model="stored") as writer:
        writer.add(ids, checked_columns(schema.rows_spec(stored.SPEC), ids, rows))
    return FeatureFile.open(path)


class FakeClock:
    now = 100.0

    def __call__(self):
        return self.now


def cache(source, memory_bytes=2**16, **options):
    options = {"fetch_timeout_ms": stored.PATIENT_MS} | options
    return FeatureStore(stored.SPEC, source=source, misses="fetch", memory_bytes=memory_bytes, **options)


def joined(store, ids):
    return stored.rows_of(store.join(ids, {}))


def put(store, rows):
    store.update(list(rows), stored.columns_of(list(rows.values())))


def look_up_all_but(store, *ids):
    for first in range(0, NUM_ROWS, 100):
        store.join([i for i in range(first, first + 100) if i not in ids], {})


def test_an_update_over_a_file_outlives_its_age(file):
    clock = FakeClock()
    store = cache(FileSource(file), max_age_seconds=2, clock=clock)
    put(store, {9: row_of(5)})
    clock.now += 3
    assert joined(store, [9, 8]) == [row_of(5), row_of(0, 8)]


def test_what_is_removed_stays_away_until_it_is_put_in_again(file):
    clock = FakeClock()
    store = cache(FileSource(file), max_age_seconds=2, clock=clock)
    put(store, {NUM_ROWS: row_of(1)})
    assert store.remove([9, 10, NUM_ROWS, 10, NUM_ROWS + 1]) == 3
    for _ in range(2):
        for i in (9, 10, NUM_ROWS):
            with pytest.raises(FeatureError, match=re.escape(f"aren't there: [{i}]")):
                store.join([8, i], {})
        clock.now += 3
        look_up_all_but(store, 9, 10)
    put(store, {10: row_of(7)})
    assert joined(store, [10]) == [row_of(7)]


def test_an_update_larger_than_the_cache_is_seen_whole(file):
    store, other = cache(FileSource(file)), cache(FileSource(file))
    before = store.stats().bytes
    put(store, {i: row_of(7, i) for i in range(2000)})
    assert joined(store, range(NUM_ROWS)) == [row_of(7 if i < 2000 else 0, i) for i in range(NUM_ROWS)]
    assert store.stats().evictions > 1000
    assert store.stats().bytes > before + 2**16, "what is kept over the file counts"
    assert joined(other, [9]) == [row_of(0, 9)], "the file itself is as it was"


class Catalogue:
    """A source of one's own that can be written to, or not now."""

    def __init__(self, rows):
        self.rows, self.refusal = dict(rows), None

    def fetch(self, ids):
        found = [i for i in ids.tolist() if i in self.rows]
        return FeatureRows(np.array(found, np.int64), stored.columns_of([self.rows[i] for i in found]))

    def update(self, rows):
        self._check()
        self.rows |= dict(zip(rows.ids.tolist(), stored.rows_of(rows.features), strict=True))

    def remove(self, ids):
        self._check()
        return sum(self.rows.pop(i, None) is not None for i in ids.tolist())

    def _check(self):
        if self.refusal is not None:
            raise self.refusal


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (UnavailableError("asleep"), "asleep"),
        (TimeoutError("slow"), "feature source Catalogue of model 'stored': TimeoutError: slow"),
    ],
)
def test_a_source_of_one_s_own_is_written_to_and_its_refusal_leaves_the_cache_alone(refusal, message):
    source = Catalogue({1: row_of(1), 2: row_of(2)})
    store = cache(source)
    put(store, {1: row_of(3)})
    assert source.rows == {1: row_of(3), 2: row_of(2)}
    assert store.remove([2, 5]) == 1
    assert source.rows.keys() == {1}
    source.refusal = refusal
    for change in (lambda: put(store, {1: row_of(4)}), lambda: store.remove([1])):
        with pytest.raises(UnavailableError, match=message):
            change()
    assert joined(store, [1]) == [row_of(3)]
    assert store.stats().version == 2


def test_a_source_that_can_t_be_written_to_has_the_last_word():
    class Fixed:
        fetch = Catalogue({1: row_of(1)}).fetch

    clock = FakeClock()
    store = cache(Fixed(), max_age_seconds=10, clock=clock)
    put(store, {1: row_of(2)})
    assert joined(store, [1]) == [row_of(2)]
    clock.now += 10
    assert joined(store, [1]) == [row_of(1)]
    assert store.remove([1]) == 1
    assert joined(store, [1]) == [row_of(1)]


def test_no_fetch_brings_back_what_an_update_has_replaced(file):
    """One writer counts rows up in a cache too small for them; readers see none older than that."""
    num_ids, num_rounds = 300, 60
    store = cache(FileSource(file))
    finished = [0] * num_ids  # by id: the newest number whose update has returned
    stop, faults, num_seen = threading.Event(), [], [0]

    def read(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            ids = rng.permutation(NUM_ROWS)[:100] % num_ids
            least = [finished[i] for i in ids]
            for i, at_least, row in zip(ids.tolist(), least, joined(store, ids), strict=True):
                number = int(row["price"])
                if number < at_least or row != row_of(number, i):
                    faults.append((i, row, at_least))
            num_seen[0] += 1

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(9)
    try:
        for number in range(1, num_rounds):
            some = rng.permutation(num_ids)[:40].tolist()
            put(store, {i: row_of(number, i) for i in some})
            for i in some:
                finished[i] = number
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not faults, faults[:3]
    assert num_seen[0] > 10
    assert store.stats().evictions > 0
