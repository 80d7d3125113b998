"""Tables in a server's memory: read and checked in one pass, or mapped and checked while they serve."""

import logging
import os
import shutil
import subprocess
import sys

import bundles
import numpy as np
import pytest

from xlarank.bundle import Verify, open_bundle, tables
from xlarank.errors import BundleError, ConfigError
from xlarank.host import TableMemory, encode_rows
from xlarank.host import memory as memory_module
from xlarank.host.memory import AvailableMemory
from xlarank.runtime.table_check import TableCheck
from xlarank.runtime.tables import load_tables, memory_beside
from xlarank.spec import RowFormat

CHUNK = 512
TABLES = {
    "a": np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32),  # 17 chunks
    "b": np.arange(5, dtype=np.float32).reshape(5, 1),
    "c": np.random.default_rng(1).normal(size=(100, 33)).astype(np.float32),
}
NUM_BYTES = sum(table.nbytes for table in TABLES.values())
PLENTY = AvailableMemory(2**40, None)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK_BYTES", CHUNK)


@pytest.fixture
def path(tmp_path):
    return bundles.publish(tmp_path, TABLES)


@pytest.fixture
def bundle(path):
    return open_bundle(path, verify=Verify.ALL_BUT_TABLES)


def load(bundle, memory, available=PLENTY, **options):
    return load_tables(bundle, memory, num_threads=2, available=lambda: available, **options)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("memory", TableMemory)
def test_tables_are_those_of_the_bundle_wherever_they_are(bundle, memory):
    loaded = load(bundle, memory)
    assert loaded.memory == dict.fromkeys(TABLES, memory)
    assert list(loaded.tables) == list(TABLES)
    for name, table in TABLES.items():
        array = loaded.tables[name].rows
        np.testing.assert_array_equal(array.view(np.float32), table)
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable == (memory is TableMemory.HUGE)
    assert loaded.check.num_bytes == NUM_BYTES
    assert (loaded.huge_pages is None) == (memory is TableMemory.MMAP)


@pytest.mark.parametrize("memory", TableMemory)
@pytest.mark.parametrize("row_format", RowFormat)
def test_every_format_lies_in_memory_as_it_was_encoded(tmp_path, memory, row_format):
    encoded = {name: encode_rows(table, row_format) for name, table in TABLES.items()}
    bundle = open_bundle(bundles.publish(tmp_path, encoded), verify=Verify.ALL_BUT_TABLES)
    loaded = load(bundle, memory)
    for name, table in loaded.tables.items():
        assert (table.format, table.dim) == (row_format, TABLES[name].shape[1])
        np.testing.assert_array_equal(table.rows, encoded[name].rows)
    assert loaded.check.num_bytes == sum(table.num_bytes for table in bundle.spec.tables)


def test_progress_ends_with_all_bytes_and_nothing_is_left_to_check(bundle):
    told = []
    loaded = load(bundle, TableMemory.HUGE, on_bytes=lambda done, total: told.append((done, total)))
    assert told[-1] == (NUM_BYTES, NUM_BYTES)
    assert told == sorted(told)
    assert loaded.check.num_checked_bytes == NUM_BYTES
    loaded.check.start()
    loaded.check.join()
    assert (loaded.check.fault, loaded.check.num_checked_bytes) == (None, NUM_BYTES)


def test_a_damaged_table_is_not_read(bundle):
    flip(bundle.path / "tables/c.npy", 5000)
    with pytest.raises(BundleError, match=r"c\.npy: damaged: bytes 4608 to 5120"):
        load(bundle, TableMemory.HUGE)


@pytest.mark.parametrize("position", [200, -1])
def test_a_fault_in_a_sampled_chunk_is_found_at_once(bundle, position):
    flip(bundle.path / "tables/a.npy", position)
    with pytest.raises(BundleError, match=r"a\.npy: damaged"):
        load(bundle, TableMemory.MMAP)


def test_the_rest_of_mapped_tables_is_checked_in_the_background(bundle, caplog):
    caplog.set_level(logging.INFO)
    check = load(bundle, TableMemory.MMAP).check
    assert 0 < check.num_checked_bytes < NUM_BYTES
    check.start()
    check.join()
    assert (check.fault, check.num_checked_bytes) == (None, NUM_BYTES)
    assert f"of {NUM_BYTES} bytes of mapped tables are checked, the others" in caplog.text
    assert f"all {NUM_BYTES} bytes of mapped tables are checked" in caplog.text


def test_a_fault_in_any_other_chunk_is_found_in_the_background(path, tmp_path, caplog):
    """Whatever chunk it is in: a fault is found at once or later, and never missed."""
    num_later = 0
    for chunk in range(17):
        damaged = shutil.copytree(path, tmp_path / f"copy{chunk}" / "1")
        flip(damaged / "tables/a.npy", min(CHUNK * chunk + 150, 8400))
        try:
            check = load(open_bundle(damaged, verify=Verify.ALL_BUT_TABLES), TableMemory.MMAP).check
        except BundleError:
            continue
        num_later += 1
        check.start()
        check.join()
        assert check.fault is not None
        assert f"a.npy: damaged: bytes {CHUNK * chunk} to " in check.fault
        assert check.num_checked_bytes < NUM_BYTES
        assert check.fault in caplog.text
    assert num_later == 13


def test_a_table_cut_short_under_the_server_is_a_fault_too(bundle):
    check = load(bundle, TableMemory.MMAP).check
    file = bundle.path / "tables/a.npy"
    file.write_bytes(file.read_bytes()[:1100])
    check.start()
    check.join()
    assert check.fault is not None
    assert "a.npy: expected 8528 bytes of float32 [300, 7], got 1100" in check.fault


def test_a_table_cut_short_long_after_its_content_was_checked_is_a_fault_as_well(bundle, caplog):
    loaded = load(bundle, TableMemory.MMAP)
    file = bundle.path / "tables/c.npy"
    check = TableCheck(bundle.table_files().values(), size_check_seconds=0.001)
    check.start()
    check.join()
    assert check.fault is None
    assert check.check_sizes()
    os.truncate(file, 4096)
    check._thread.join(60)  # it ends with the first fault
    why = f"{file}: expected 13328 bytes of float32 [100, 33], got 4096"
    assert check.fault == why
    assert f"a file in use is damaged: {why}" in caplog.text
    check.stop()
    assert loaded.check.fault is None  # not started


def test_a_version_that_is_removed_while_it_serves_is_no_fault(bundle, caplog):
    loaded = load(bundle, TableMemory.MMAP)
    shutil.rmtree(bundle.path)
    loaded.check.start()
    loaded.check.join()
    assert loaded.check.fault is None
    assert "a.npy was removed: the rest of the tables stays unchecked" in caplog.text
    np.testing.assert_array_equal(loaded.tables["a"].rows.view(np.float32), TABLES["a"])


def test_a_check_that_is_stopped_leaves_the_rest(bundle):
    check = TableCheck(bundle.table_files().values())
    check.stop()  # before its start: it must end at once
    check.start()
    check.join()
    assert (check.num_checked_bytes, check.fault) == (0, None)


def test_too_little_memory_is_refused_with_the_figures_and_the_way_out(bundle):
    available = AvailableMemory(4 << 30, 0)
    with pytest.raises(ConfigError) as refused:
        load(bundle, TableMemory.HUGE, available)
    assert str(refused.value) == (
        f"{bundle.path}: tables of 0.00 GiB need 0.00 GiB of memory, available are 0.00 GiB "
        f"(MemAvailable 4.00 GiB, control group 0.00 GiB); with table memory mmap (--table-memory mmap) they "
        f"stay in their files"
    )
    assert set(load(bundle, TableMemory.MMAP, available).memory.values()) == {TableMemory.MMAP}


def test_room_for_the_tables_and_a_tenth_is_enough(bundle):
    least = int(np.ceil(1.1 * NUM_BYTES))
    load(bundle, TableMemory.HUGE, AvailableMemory(None, least))
    with pytest.raises(ConfigError, match=r"of memory, available are"):
        load(bundle, TableMemory.HUGE, AvailableMemory(least - 1, None))


@pytest.mark.parametrize(
    ("platforms", "held", "passing"),
    [
        (["cpu"], 300 + 33 * 2 + 1, 0),
        (["cpu", "cpu"], 300 + 33 * 2 + 1, 0),
        (["gpu", "gpu"], 0, 300),
        (["cpu", "gpu"], 300 + 33 * 2 + 1, 300),
    ],
)
def test_what_devices_hold_of_tables_is_counted_once_for_all_cpus(tmp_path, platforms, held, passing):
    """In values of 4 bytes: tables of 300 x 1 and 2 x 33 on devices, a row of zeros behind each."""
    values = {"a": np.zeros((300, 1), np.float32), "b": np.zeros((2, 33), np.float32)}
    values["c"] = np.zeros((1000, 1), np.float32)  # on no device
    path = bundles.publish(tmp_path, values, on_devices=["a", "b"])
    bundle = open_bundle(path, verify=Verify.ALL_BUT_TABLES)
    rows = 4 * (held + (33 if held else 0) + passing + (1 if passing else 0))
    for memory, tables_bytes in ((TableMemory.HUGE, 4 * 1366), (TableMemory.MMAP, 0)):
        least = int(np.ceil(1.1 * tables_bytes)) + rows
        load(bundle, memory, AvailableMemory(least, None), platforms=platforms).check.stop()
        with pytest.raises(ConfigError) as refused:
            load(bundle, memory, AvailableMemory(least - 1, None), platforms=platforms)
        text = str(refused.value)
        assert "a bundle with fewer rows on devices (--device-table-bytes of compile) needs less" in text
        assert ("with table memory mmap" in text) == (memory is TableMemory.HUGE)
        assert ("their rows on" in text) == bool(held)
        assert ("placing or updating rows on devices 0.00 GiB for as long" in text) == bool(passing)


def test_updatable_rows_are_counted_for_every_cpu_and_while_they_are_updated(tmp_path):
    path = bundles.publish(tmp_path, {"a": np.zeros((300, 1), np.float32)}, updatable=["a"], on_devices=["a"])
    bundle = open_bundle(path, verify=Verify.ALL_BUT_TABLES)
    least = 1320 + (2 + 2) * 4 * 301
    load(bundle, None, AvailableMemory(least, None), platforms=["cpu", "cpu"])
    with pytest.raises(ConfigError, match=r"their rows on 2 CPU devices 0\.00 GiB, placing or updating"):
        load(bundle, None, AvailableMemory(least - 1, None), platforms=["cpu", "cpu"])


@pytest.mark.parametrize(("platform", "held", "passing"), [("cpu", 301, 0), ("gpu", 0, 301)])
def test_what_devices_hold_is_counted_for_every_process(tmp_path, platform, held, passing):
    path = bundles.publish(tmp_path, {"a": np.zeros((300, 1), np.float32)}, on_devices=["a"])
    bundle = open_bundle(path, verify=Verify.ALL_BUT_TABLES)
    options = {"platforms": [platform], "num_processes": 3, "is_for_forks": True}
    least = 1320 + 3 * 4 * (held + passing)
    load(bundle, TableMemory.HUGE, AvailableMemory(least, None), **options)
    words = "their rows on CPU devices of 3 processes 0" if held else "placing or updating rows on devices 0"
    with pytest.raises(ConfigError, match=words):
        load(bundle, TableMemory.HUGE, AvailableMemory(least - 1, None), **options)


@pytest.mark.parametrize(
    ("asked", "others", "expected"),
    [
        (None, [], None),
        (None, [{"a": TableMemory.MMAP, "b": TableMemory.HUGE}], None),
        (None, [{"a": TableMemory.MMAP}, {"a": TableMemory.HUGE, "b": TableMemory.HUGE}], TableMemory.HUGE),
        (TableMemory.MMAP, [{"a": TableMemory.HUGE}], TableMemory.MMAP),
        (None, [{}], None),
    ],
)
def test_beside_tables_in_memory_the_next_ones_go_nowhere_else(asked, others, expected):
    assert memory_beside(asked, others) is expected


@pytest.mark.parametrize("mode", ["madvise", "never"])
def test_by_default_tables_are_in_huge_pages_where_there_are_such_and_they_fit(
    bundle, tmp_path, monkeypatch, caplog, mode
):
    (tmp_path / "enabled").write_text(f"[{mode}]")
    monkeypatch.setattr(memory_module, "_ENABLED", tmp_path / "enabled")
    loaded = load(bundle, None)
    if mode == "madvise":
        assert set(loaded.memory.values()) == {TableMemory.HUGE}
        little = load(bundle, None, AvailableMemory(1000, None))
        assert set(little.memory.values()) == {TableMemory.MMAP}
        assert "tables are mapped from their files: " in caplog.text
        assert "available are 0.00 GiB" in caplog.text
    else:
        assert set(loaded.memory.values()) == {TableMemory.MMAP}
        assert "the kernel gives no huge pages" in caplog.text
        asked = load(bundle, TableMemory.HUGE)  # when asked for: ordinary pages
        assert set(asked.memory.values()) == {TableMemory.HUGE}


@pytest.fixture
def mixed(tmp_path):
    """A bundle whose table "b" is updatable, the others aren't."""
    return open_bundle(bundles.publish(tmp_path, TABLES, updatable=["b"]), verify=Verify.ALL_BUT_TABLES)


@pytest.mark.parametrize(
    ("memory", "room"), [(TableMemory.MMAP, 2**40), (None, 1000)], ids=["asked for", "for want of room"]
)
def test_updatable_tables_are_in_memory_and_the_others_mapped(mixed, tmp_path, monkeypatch, memory, room):
    (tmp_path / "enabled").write_text("[madvise]")
    monkeypatch.setattr(memory_module, "_ENABLED", tmp_path / "enabled")
    loaded = load(mixed, memory, AvailableMemory(room, None))
    assert loaded.memory == {"a": TableMemory.MMAP, "b": TableMemory.HUGE, "c": TableMemory.MMAP}
    for name, table in TABLES.items():
        rows = loaded.tables[name].rows
        np.testing.assert_array_equal(rows.view(np.float32), table)
        assert rows.flags.writeable == (name == "b")
    assert str(loaded) == "tables in huge: b; in mmap: a, c"
    assert loaded.huge_pages.asked < 2 * 64
    assert TABLES["b"].nbytes < loaded.check.num_checked_bytes < NUM_BYTES
    loaded.check.start()
    loaded.check.join()
    assert (loaded.check.fault, loaded.check.num_checked_bytes) == (None, NUM_BYTES)
    loaded.check.stop()


@pytest.mark.parametrize("memory", [None, TableMemory.MMAP])
def test_updatable_tables_that_memory_does_not_hold_are_refused(mixed, memory):
    with pytest.raises(ConfigError, match=r"MemAvailable 0\.00 GiB, .*\); updatable tables can't stay in"):
        load(mixed, memory, AvailableMemory(21, None))


# A process of its own, so that nothing else moves its memory. Prints what the loaded tables took.
MEASURED = """
import re, resource, sys
import numpy as np
from xlarank.bundle import Verify, open_bundle
from xlarank.errors import ConfigError
from xlarank.host import TableMemory, encode_rows
from xlarank.runtime.tables import load_tables, memory_beside

def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

bundle = open_bundle(sys.argv[1], verify=Verify.ALL_BUT_TABLES)
before = status("VmRSS")
if sys.argv[3] == "limited":  # room for 64 MiB of its own, and no limit on what is mapped
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + (64 << 20),) * 2)
    try:
        load_tables(bundle, TableMemory.HUGE, num_threads=2)
    except ConfigError as error:
        print("refused", error, file=sys.stderr)
    else:
        raise SystemExit("huge tables were had beyond the limit")
loaded = load_tables(bundle, TableMemory(sys.argv[2]), num_threads=2)
loaded.check.start()
loaded.check.join()
loaded.check.stop()
assert loaded.check.fault is None, loaded.check.fault
assert loaded.check.num_checked_bytes == loaded.check.num_bytes
values = loaded.tables["t"].rows.view(np.float32)
rows = np.linspace(0, len(values) - 1, 7).astype(int)
assert (values[rows, 0] == rows).all()
print(status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A table of 256 MiB whose first column is its row number."""
    table = np.zeros((1 << 20, 64), np.float32)
    table[:, 0] = np.arange(1 << 20)
    return bundles.publish(tmp_path_factory.mktemp("large"), {"t": table}), table.nbytes


def taken(large, memory, limit="unlimited"):
    """Peak and final growth of resident memory."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large[0]), memory, limit],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return [int(number) for number in ended.stdout.split()], ended.stderr


def test_reading_takes_no_more_than_a_tenth_over_the_tables(large):
    (peak, final), _ = taken(large, "huge")
    assert large[1] <= final <= 1.1 * large[1]
    assert peak <= 1.1 * large[1]


def test_mapped_tables_take_no_memory_of_their_own_even_where_it_would_not_suffice(large):
    (peak, _), refused = taken(large, "mmap", "limited")
    assert "the system has no" in refused
    assert peak < 0.1 * large[1]
