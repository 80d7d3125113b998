"""One array on the disk: written in steps, read whole, mapped, checked by chunks."""

import hashlib

import numpy as np
import pytest

from xlarank.bundle import TableFile, tables
from xlarank.bundle.tables import digests_file, write_array
from xlarank.errors import BundleError, ConfigError

CHUNK = 512


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK_BYTES", CHUNK)


def write(folder, array, name="t.npy"):
    sha256, digests = write_array(folder / name, array)
    (folder / digests_file(name)).write_bytes(digests)
    assert sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return TableFile(folder / name, array.dtype, array.shape)


def random_table(num_rows=37, dim=15, dtype=np.float32):
    values = np.random.default_rng(num_rows).normal(size=(num_rows, dim))
    return (50 * values).astype(dtype)


def flip(file, position):
    data = bytearray(file.path.read_bytes())
    data[position] ^= 1
    file.path.write_bytes(data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.uint8])
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 1), (37, 15), (64, 64), (128, 3)])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_what_is_written_is_read_and_mapped_bit_for_bit(tmp_path, dtype, num_rows, dim, num_threads):
    table = random_table(num_rows, dim, dtype)
    file = write(tmp_path, table)
    memory = np.zeros(file.num_bytes, np.uint8)
    told = []
    file.read_into(memory, num_threads=num_threads, on_bytes=told.append)
    np.testing.assert_array_equal(memory.view(dtype).reshape(num_rows, dim), table)
    assert sum(told) == file.num_bytes == table.nbytes
    assert len(told) == file.num_chunks
    mapped = file.map()
    np.testing.assert_array_equal(mapped, table)
    assert mapped.ctypes.data % 64 == 0
    assert not mapped.flags.writeable
    assert sum(file.check_chunk(chunk) for chunk in range(file.num_chunks)) == table.nbytes
    np.testing.assert_array_equal(np.load(file.path, allow_pickle=False), table)


@pytest.mark.parametrize("chunk_bytes", [64, 100, 128, 4096])
def test_any_size_of_chunk_will_do(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tables, "_CHUNK_BYTES", chunk_bytes)
    table = random_table()
    file = write(tmp_path, np.asfortranarray(table))
    memory = np.zeros(file.num_bytes, np.uint8)
    file.read_into(memory, num_threads=2)
    np.testing.assert_array_equal(memory.view(np.float32).reshape(37, 15), table)


def test_one_thread_reads_at_the_pace_that_it_is_given(tmp_path):
    table = random_table()
    file = write(tmp_path, table)
    memory, log = np.zeros(file.num_bytes, np.uint8), []

    def pace(work):
        log.append("begins")
        num_bytes = work()
        log.append(num_bytes)
        return num_bytes

    file.read_into(memory, pace=pace, on_bytes=lambda num_bytes: log.append(f"{num_bytes} told"))
    assert log[:3] == ["begins", CHUNK - 128, f"{CHUNK - 128} told"]
    assert log[3] == "begins"
    assert len(log) == 3 * file.num_chunks
    np.testing.assert_array_equal(memory.view(np.float32).reshape(37, 15), table)


def test_a_changed_byte_anywhere_is_found_and_only_in_its_chunk(tmp_path):
    file = write(tmp_path, random_table())
    memory = np.zeros(file.num_bytes, np.uint8)
    file_bytes = file.path.stat().st_size
    assert file.num_chunks == 5
    for position in range(128, file_bytes, 97):
        flip(file, position)
        damaged = position // CHUNK
        for chunk in range(file.num_chunks):
            if chunk != damaged:
                file.check_chunk(chunk)
        end = min(file_bytes, CHUNK * (damaged + 1))
        expected = rf"t\.npy: damaged: bytes {CHUNK * damaged} to {end}: expected sha256 [0-9a-f]{{64}}, got"
        with pytest.raises(BundleError, match=expected):
            file.check_chunk(damaged)
        with pytest.raises(BundleError, match=expected):
            file.read_into(memory)
        flip(file, position)
    file.read_into(memory)


def test_a_header_changed_after_it_was_looked_at_is_found(tmp_path):
    file = write(tmp_path, random_table())
    flip(file, 20)
    with pytest.raises(BundleError, match=r"t\.npy: damaged: bytes 0 to 512"):
        file.check_chunk(0)
    with pytest.raises(BundleError, match=r"t\.npy: expected an npy file of float32 \[37, 15\]"):
        TableFile(file.path, file.dtype, file.shape)


def test_a_file_cut_short_while_it_is_in_use_is_named(tmp_path):
    file = write(tmp_path, random_table())
    file.path.write_bytes(file.path.read_bytes()[:1000])
    with pytest.raises(BundleError, match=r"t\.npy: truncated: expected 2348 bytes, got 1000"):
        file.read_into(np.zeros(file.num_bytes, np.uint8))
    with pytest.raises(BundleError, match=r"t\.npy: truncated: expected 2348 bytes, got 2048"):
        file.check_chunk(4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"expected 5 digests of 32 bytes each, got 159",
        ),
        (lambda path: path.unlink(), r"can't be read: No such file"),
    ],
)
def test_digests_that_are_missing_are_named(tmp_path, damage, message):
    file = write(tmp_path, random_table())
    damage(tmp_path / "t.npy.sha256")
    with pytest.raises(BundleError, match=r"t\.npy\.sha256: " + message):
        file.check_chunk(0)


def test_memory_of_another_size_is_refused(tmp_path):
    file = write(tmp_path, random_table())
    with pytest.raises(ConfigError, match=r"expected memory of uint8 \[2220\], got float32 of shape \[555\]"):
        file.read_into(np.zeros(555, np.float32))


def test_a_file_that_goes_away_is_named(tmp_path):
    file = write(tmp_path, random_table())
    file.path.unlink()
    with pytest.raises(BundleError, match=r"t\.npy: can't be read: No such file"):
        file.map()
