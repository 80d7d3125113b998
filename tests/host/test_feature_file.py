"""Feature files: what is written is found again, and no damage gets past the load."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import stored

from xlarank.errors import BundleError, ConfigError
from xlarank.host import (
    FeatureFile,
    FeatureFileWriter,
    FeatureSchema,
    FeatureStore,
    FileSource,
    checked_columns,
)

SCHEMA = FeatureSchema.of(stored.STORED)
ROWS_SPEC = SCHEMA.rows_spec(stored.SPEC)


def write(path, rows, chunk=100):
    ids = np.array(list(rows), np.int64)
    with FeatureFileWriter(path, SCHEMA, model="stored") as writer:
        for begin in range(0, len(ids), chunk):
            some = ids[begin : begin + chunk]
            columns = stored.columns_of([rows[i] for i in some.tolist()])
            writer.add(some, checked_columns(ROWS_SPEC, some, columns))
    return path


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return {int(i): stored.random_row(rng) for i in rng.integers(-(2**63), 2**63 - 1, 700)}


@pytest.fixture
def path(tmp_path, rows):
    return write(tmp_path / "file", rows)


def joined(store, ids):
    return stored.rows_of(store.join(ids, {}))


def test_what_is_written_is_found_again(path, rows):
    file = FeatureFile.open(path)
    assert (file.model, file.num_rows, file.schema) == ("stored", 700, SCHEMA)
    store = FeatureStore(stored.SPEC, file=file)
    ids = np.random.default_rng(1).permutation(list(rows))
    assert joined(store, ids) == [rows[i] for i in ids.tolist()]
    assert store.stats().rows == 700


def test_chunks_make_no_difference(path, rows, tmp_path):
    other = write(tmp_path / "other", rows, chunk=33)
    for name in ("features.json", "index.bin", "records.bin"):
        assert (path / name).read_bytes() == (other / name).read_bytes()


def test_a_file_of_no_rows_finds_none(tmp_path):
    store = FeatureStore(stored.SPEC, file=FeatureFile.open(write(tmp_path / "empty", {})), misses="default")
    assert joined(store, [1]) == [stored.DEFAULT_ROW]
    assert store.stats().rows == 0


def test_updates_go_before_the_file_and_what_is_removed_stays_removed(path, rows):
    rng = np.random.default_rng(2)
    file, reference = FeatureFile.open(path), dict(rows)
    store, untouched = (
        FeatureStore(stored.SPEC, file=file, misses="default"),
        FeatureStore(stored.SPEC, file=file),
    )
    ids = [*list(rows)[:60], *range(30)]
    for _ in range(60):
        some = [int(i) for i in rng.choice(ids, 9)]
        if rng.random() < 0.5:
            assert store.remove(some) == len(set(some) & reference.keys())
            reference = {i: row for i, row in reference.items() if i not in some}
        else:
            new = {i: stored.random_row(rng) for i in some}
            store.update(list(new), stored.columns_of(list(new.values())))
            reference |= new
        assert joined(store, ids) == [reference.get(i, stored.DEFAULT_ROW) for i in ids]
        assert store.stats().rows == len(reference)
    assert joined(untouched, list(rows)) == list(rows.values())


def test_a_file_as_a_source_answers_what_it_has(path, rows):
    source = FileSource(FeatureFile.open(path))
    store = FeatureStore(stored.SPEC, source=source, misses="fetch", memory_bytes=2**16)
    rng = np.random.default_rng(3)
    for _ in range(50):
        ids = rng.choice(list(rows), 40)
        assert joined(store, ids) == [rows[i] for i in ids.tolist()]
        assert store.stats().bytes <= 2**16
    assert source.fetch(np.array([0])).ids.tolist() == []


@pytest.mark.parametrize("name", ["index.bin", "records.bin"])
def test_a_file_that_is_cut_short_while_it_is_mapped_is_noticed(path, name):
    file = FeatureFile.open(path)
    file.check_size()
    whole = (path / name).stat().st_size
    os.truncate(path / name, 16)
    with pytest.raises(BundleError, match=rf"{name}: expected {whole} bytes, got 16"):
        file.check_size()


def test_a_file_that_is_removed_or_replaced_stays_as_it_was_mapped(path, rows, tmp_path):
    file = FeatureFile.open(path)
    path.rename(tmp_path / "before")
    write(path, {1: stored.DEFAULT_ROW})
    file.check_size()
    shutil.rmtree(path)
    shutil.rmtree(tmp_path / "before")
    file.check_size()
    assert joined(FeatureStore(stored.SPEC, file=file), list(rows)) == list(rows.values())


def test_a_store_knows_its_file_and_that_of_its_source(path):
    file = FeatureFile.open(path)
    cache = FeatureStore(stored.SPEC, source=FileSource(file), misses="fetch", memory_bytes=2**16)
    assert cache.file is FeatureStore(stored.SPEC, file=file).file is file
    assert FeatureStore(stored.SPEC).file is None


def test_an_id_that_comes_twice_is_refused_with_both_rows(tmp_path):
    columns = checked_columns(ROWS_SPEC, np.arange(2), stored.columns_of([stored.DEFAULT_ROW] * 2))

    def write_twice():
        with FeatureFileWriter(tmp_path / "file", SCHEMA, model="stored") as writer:
            writer.add(np.array([8, 9]), columns)
            writer.add(np.array([9, 7]), columns)

    with pytest.raises(ConfigError, match="expected every id once, got id 9 in rows 1 and 2 of the data"):
        write_twice()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), FeatureFileWriter(tmp_path / "f", SCHEMA, model="stored"):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next_and_what_lives_is_not(tmp_path):
    script = """
import sys, time, stored
from xlarank.host import FeatureFileWriter, FeatureSchema
with FeatureFileWriter(sys.argv[1], FeatureSchema.of(stored.STORED), model="stored"):
    print("ready", flush=True)
    time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = []
    try:
        for name in ("file", "file", "other"):
            command = [sys.executable, "-c", script, str(tmp_path / name)]
            writers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            assert writers[-1].stdout.readline() == "ready\n"
        left = [
            f".{name}.tmp-{writer.pid}"
            for name, writer in zip(("file", "file", "other"), writers, strict=True)
        ]
        for writer in (writers[0], writers[2]):
            writer.kill()
            writer.wait()
        (tmp_path / ".file.tmp-none").mkdir()
        write(tmp_path / "file", {1: stored.DEFAULT_ROW})
        assert {p.name for p in tmp_path.iterdir()} == {"file", ".file.tmp-none", left[1], left[2]}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_folder_that_another_machine_s_process_holds_is_left_alone(tmp_path):
    """Its number is nobody's here; its lock is held."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".file.tmp-{gone.pid}"
    left.mkdir()
    handle = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write(tmp_path / "file", {})
        assert left.exists()
    finally:
        os.close(handle)
    shutil.rmtree(tmp_path / "file")
    write(tmp_path / "file", {})
    assert not left.exists()


def test_a_writer_holds_as_much_a_row_as_it_says(tmp_path):
    script = """
import resource, sys
import numpy as np
from xlarank.host import FeatureFileWriter, FeatureSchema
rows, step = 2**20, 2**15
schema = FeatureSchema((("price", "dense", "float32", 1),))
columns = [np.ones((step, 1), np.float32)]
def write(path, rows):
    with FeatureFileWriter(path, schema, model="m") as writer:
        for begin in range(0, rows, step):
            writer.add(np.arange(begin, begin + step), columns)
write(sys.argv[1] + "-small", step)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(sys.argv[1], rows)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / rows)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")], check=True, capture_output=True, text=True
    )
    assert (
        float(done.stdout) < 16 + 32 + 8
    )  # of 2**20 rows the index has the least; and a part that is joined


def test_what_is_there_is_not_overwritten(path):
    with pytest.raises(ConfigError, match="expected a new folder to write to, found something there"):
        FeatureFileWriter(path, SCHEMA, model="stored")
    with pytest.raises(ConfigError, match="expected its parent to be a folder"):
        FeatureFileWriter(path / "a" / "b", SCHEMA, model="stored")


@pytest.mark.parametrize("name", ["features.json", "index.bin", "records.bin"])
def test_any_changed_byte_is_found(path, name):
    file = path / name
    data = bytearray(file.read_bytes())
    rng = np.random.default_rng(4)
    for at in [0, len(data) - 1, *rng.integers(0, len(data), 12)]:
        if chr(data[at]).isspace():
            continue
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(BundleError, match=re.escape(str(path))):
            FeatureFile.open(path)
        data[at] ^= 1
    file.write_bytes(data)
    FeatureFile.open(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.bin", lambda data: data[:-1], "index.bin: truncated: expected"),
        ("records.bin", lambda data: data + b"\0", "records.bin: too long: expected"),
        ("records.bin", lambda data: data[:-8] + b"12345678", "records.bin: damaged: its sha256"),
        ("features.json", lambda data: data[:100], "features.json: not a whole JSON document"),
        ("features.json", lambda data: data.replace(b"700", b"701"), "damaged or edited: its digest"),
        ("features.json", lambda data: b"[]", "expected format version 1, got None"),
        (
            "features.json",
            lambda data: data.replace(b'version": 1', b'version": 9'),
            "format version 1, got 9",
        ),
    ],
)
def test_damage_is_named(path, name, change, message):
    (path / name).write_bytes(change((path / name).read_bytes()))
    with pytest.raises(BundleError, match=message):
        FeatureFile.open(path)


def test_a_missing_file_is_named(path):
    (path / "records.bin").unlink()
    with pytest.raises(BundleError, match=r"records\.bin: can't be read: No such file"):
        FeatureFile.open(path)
    with pytest.raises(BundleError, match="`xlarank features build` writes feature files"):
        FeatureFile.open(path / "nothing")


@pytest.mark.parametrize("name", ["features.json", "index.bin", "records.bin"])
def test_nobody_waits_for_a_pipe_in_place_of_a_file(path, name):
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(BundleError, match=f"{name}: can't be read: expected a file, found a pipe"):
        FeatureFile.open(path)


def slots_of(file):
    return file.index.copy().view([("id", "<i8"), ("place", "<u8")])


def filled(slots):
    return np.flatnonzero(slots["place"])[0]


def outside(slots, records):
    slots["place"][filled(slots)] = len(records) + 1 - 8


def unaligned(slots, records):
    slots["place"][filled(slots)] += 3


def of_another(slots, records):
    slots["id"][filled(slots)] += 1


def too_full(slots, records):
    slots[:] = slots[filled(slots)]


def too_large(slots, records):
    at = int(slots["place"][filled(slots)]) - 1
    records[at + 8 : at + 12].view("<u4")[0] = 2**31


def longer_inside(slots, records):
    at = int(slots["place"][filled(slots)]) - 1 + 16
    records[at + 28 + 4 : at + 28 + 8].view("<u4")[0] = 2**32 - 1  # values of `topics`, behind `brand`


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "begins at byte"),
        (unaligned, "begins at byte"),
        (of_another, "says that it is of id"),
        (too_full, "the index is more than half full"),
        (too_large, "isn't whole"),
        (longer_inside, "isn't whole"),
    ],
)
def test_an_index_or_record_that_leads_outside_is_refused_even_under_its_right_digest(path, change, message):
    """Who writes a file can write its digest too: no lookup may leave the mapped memory for all that."""
    file = FeatureFile.open(path)
    slots, records = slots_of(file), file.records.copy()
    change(slots, records)
    made = dataclasses.replace(file, index=slots.view(np.uint8), records=records)
    with pytest.raises(BundleError, match=f"damaged: .*{message}"):
        made.table()


def changed_spec(which, **fields):
    spec = stored.SPEC.to_dict()
    for feature in spec["features"]:
        if feature["name"] == which:
            feature |= fields
    return stored.SPEC.from_dict(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            changed_spec("vector", width=2),
            "dense of float32, width 2, as model 'stored' has it, got .* width 3",
        ),
        (changed_spec("item", name="good"), "model 'stored' has no such candidate feature; it has"),
        (changed_spec("price", scope="context"), "model 'stored' has no such candidate feature"),
        (
            changed_spec("brand", dtype="int64", default=3),
            "stored feature 'brand': expected id of int64, as model 'stored' has it, got id of string; build",
        ),
    ],
)
def test_a_file_of_other_features_is_refused(path, spec, message):
    with pytest.raises(ConfigError, match=message):
        FeatureStore(spec, file=FeatureFile.open(path))


def test_the_fingerprint_is_of_what_a_record_holds(path):
    manifest = json.loads((path / "features.json").read_text())
    assert manifest["fingerprint"] == SCHEMA.fingerprint
    longer = changed_spec("path", max_length=9)
    assert FeatureSchema.of(longer.candidate_features).fingerprint == SCHEMA.fingerprint
    wider = changed_spec("vector", width=4)
    assert FeatureSchema.of(wider.candidate_features).fingerprint != SCHEMA.fingerprint
