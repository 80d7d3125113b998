"""What a lookup may join and a cache may take: lists as far as they are read, bytes, memory."""

import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import stored

from xlarank.errors import RequestError
from xlarank.host import (
    FeatureFile,
    FeatureFileWriter,
    FeatureOptions,
    FeatureRows,
    FeatureSchema,
    FeatureStore,
    MissPolicy,
    checked_columns,
    model_inputs,
)
from xlarank.spec import RankRequest

NAMES = {feature.name for feature in stored.STORED}


class DictSource:
    """Rows from a dict."""

    def __init__(self, rows):
        self.rows = rows

    def fetch(self, ids):
        return FeatureRows(ids, stored.columns_of([self.rows[i] for i in ids.tolist()]))


def put(store, rows):
    store.update(list(rows), stored.columns_of(list(rows.values())))


SHORT = stored.SPEC.from_dict(
    stored.SPEC.to_dict()
    | {
        "features": [
            feature | ({"max_length": 2} if feature["name"] in ("topics", "tags") else {})
            for feature in stored.SPEC.to_dict()["features"]
        ]
    }
)
"""Its lists are read to their last two, the sequence to its last three."""


def long_rows(rng, ids):
    def words():
        return ["grün", "", "x", "a longer word"][: rng.integers(5)]

    return {
        i: stored.random_row(rng)
        | {name: rng.integers(0, 100, rng.integers(9)).tolist() for name in ("topics", "path")}
        | {"tags": words() + words()}
        for i in ids
    }


def write_file(path, spec, rows):
    schema = FeatureSchema.of(spec.candidate_features)
    with FeatureFileWriter(path, schema, model=spec.name) as writer:
        ids = np.array(list(rows), np.int64)
        columns = stored.columns_of(list(rows.values()))
        writer.add(ids, checked_columns(schema.rows_spec(spec), ids, columns))
    return FeatureFile.open(path)


@pytest.mark.parametrize("kind", ["updated", "file", "source", "file as a source"])
def test_of_a_list_what_the_model_reads_is_joined_and_nothing_it_computes_changes(tmp_path, kind):
    rng = np.random.default_rng(12)
    rows = long_rows(rng, range(200))
    options: dict = {"misses": MissPolicy.FETCH, "memory_bytes": 2**17, "fetch_timeout_ms": stored.PATIENT_MS}
    if kind == "updated":
        store = FeatureStore(SHORT)
        put(store, rows)
    elif kind == "file":
        store = FeatureStore(SHORT, file=write_file(tmp_path / "f", SHORT, rows))
    elif kind == "source":
        store = FeatureStore(SHORT, source=DictSource(rows), **options)
    else:
        write_file(tmp_path / "f", SHORT, rows)
        parsed = FeatureOptions.parse(str(tmp_path / "f"), **options)
        store = parsed.store(FeatureFile.open(tmp_path / "f"), SHORT)
    cut = [
        row | {"topics": row["topics"][-2:], "path": row["path"][-3:], "tags": row["tags"][-2:]}
        for row in rows.values()
    ]
    ids = rng.integers(0, 200, 500)
    for _ in range(2):  # fetched, then from the cache
        features = store.join(ids, {})
        assert stored.rows_of(features) == [cut[i] for i in ids]
    whole = stored.columns_of([rows[i] for i in ids.tolist()])
    for name in NAMES:  # what isn't wanted is passed over
        others = store.join(ids, {name: whole[name]})
        del others[name]
        assert stored.rows_of(others) == [{key: cut[i][key] for key in others} for i in ids]
    by_id, in_full = (
        model_inputs(SHORT, RankRequest(SHORT, {"age": [1.0], **columns}).columns)
        for columns in (features, whole)
    )
    assert by_id.keys() == in_full.keys()
    for name, values in in_full.items():
        np.testing.assert_array_equal(by_id[name], values, err_msg=name)


def test_a_file_s_lists_are_whole_for_a_model_that_reads_more_of_them(tmp_path):
    rows = long_rows(np.random.default_rng(13), range(50))
    file = write_file(tmp_path / "f", SHORT, rows)
    topics = FeatureStore(stored.SPEC, file=file).join(list(rows), {})["topics"]
    assert stored.rows_of({"topics": topics}) == [{"topics": row["topics"]} for row in rows.values()]


def test_an_updatable_source_gets_lists_whole():
    """It has them for good, for other versions of the model too."""

    class Keeps(DictSource):
        def update(self, rows):
            self.rows |= dict(zip(rows.ids.tolist(), stored.rows_of(rows.features), strict=True))

        def remove(self, ids):
            return 0

    rows = long_rows(np.random.default_rng(14), range(50))
    source = Keeps({})
    store = FeatureStore(SHORT, source=source, misses="fetch", memory_bytes=2**20)
    put(store, rows)
    assert source.rows == rows
    cached = stored.rows_of(store.join(list(rows), {}))
    assert [row["topics"] for row in cached] == [row["topics"][-2:] for row in rows.values()]


def test_more_bytes_than_may_be_joined_are_counted_and_never_allocated():
    store, count = FeatureStore(stored.SPEC), 3000
    put(store, {1: stored.DEFAULT_ROW | {"topics": [5] * 20_000, "brand": "grün", "tags": ["a", "bc"]}})
    num_bytes = count * (4 + 12 + 8 + 4 + (4 + 5) + (4 + 8 * 20_000) + 4 + (4 + 4 + 1 + 4 + 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    with pytest.raises(RequestError, match=f"at most 1000 bytes .* got {num_bytes} for 3000 ids"):
        store.join([1] * count, {}, max_bytes=1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "480 MB aren't made"
    with pytest.raises(
        RequestError,
        match=f"candidate_ids: expected at most {num_bytes - 1} bytes of stored features, which is what a "
        f"request may bring itself, got {num_bytes} for 3000 ids; send fewer candidates in a request",
    ):
        store.join([1] * count, {}, max_bytes=num_bytes - 1)
    assert store.join([1] * 3, {}, max_bytes=num_bytes // 1000)["topics"].lengths.tolist() == [20_000] * 3


def test_a_cache_takes_memory_for_its_rows_and_not_for_its_limit():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident()
    source = DictSource({1: stored.DEFAULT_ROW})
    store = FeatureStore(
        stored.SPEC, source=source, misses="fetch", memory_bytes=2**30, fetch_timeout_ms=stored.PATIENT_MS
    )
    assert stored.rows_of(store.join([1, 1], {})) == [stored.DEFAULT_ROW] * 2
    assert store.stats().bytes > 50 << 20, "the index that it may come to need"
    assert resident() - before < 8 << 20


def test_memory_that_the_system_refuses_is_a_clear_error():
    script = """
import resource, sys
import numpy as np, stored
from xlarank.errors import ConfigError, XlarankError
from xlarank.host import FeatureStore
from xlarank.spec import Ragged
store = FeatureStore(stored.SPEC)
store.update([1], stored.columns_of([stored.DEFAULT_ROW | {"topics": [1] * 2**20}]))
row = {"topics": Ragged(np.ones(2**24, np.int64), np.int32([2**24]))}
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), -1))
for call in (
    lambda: FeatureStore(stored.SPEC, memory_bytes=2**30),
    lambda: store.update([2], row),
    lambda: store.join([1] * 2000, {}),
):
    try:
        call()
    except XlarankError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    num_bytes = re.findall(r"beside its (\d+) bytes", done.stdout)[0]
    assert int(num_bytes) > 8 << 20
    assert done.stdout.splitlines() == [
        "ConfigError feature store: the system has no memory for the index of a cache of 1073741824 bytes",
        f"XlarankError feature store: no memory for 1 rows beside its {num_bytes} bytes",
        "XlarankError feature store: no memory for the features of 2000 ids",
    ]
