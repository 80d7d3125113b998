"""Traces from files: the forms that are read, and what is refused."""

import contextlib
import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from xlarank.errors import ConfigError
from xlarank.host.traces import read_trace

# Written by torch 2.13: torch.save((indices, offsets, lengths), path) of the arrays below.
TORCH_FILE = Path(__file__).with_name("torch_2_13.pt")
INDICES = np.array([5, 2, 7, 7, 0, 1, 3, 9, 9], np.int64)
OFFSETS = np.array([0, 2, 2, 5, 6, 6, 9], np.int64)
LENGTHS = np.array([[2, 0, 3], [1, 0, 3]], np.int32)
ARRAYS = {"indices": INDICES, "offsets": OFFSETS, "lengths": LENGTHS}


def check(tables):
    assert [table.values.tolist() for table in tables] == [[5, 2, 7, 7, 0], [1, 3, 9, 9]]
    assert [table.lengths.tolist() for table in tables] == [[2, 0, 3], [1, 0, 3]]
    for table in tables:
        assert (table.values.dtype, table.lengths.dtype) == (np.int64, np.int32)


def npz(path, **changes):
    np.savez(path, **(ARRAYS | changes))
    return path


def torch_zip(path, pickled, storages=(), *, method=zipfile.ZIP_STORED, root="archive"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for key, array in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", array.tobytes())
    return path


def tensor(key, shape, *, stride=(1,), offset=0, storage="LongStorage"):
    """Opcodes of one tensor, as torch writes them."""
    numbers = b"".join(b"K" + bytes([number]) for number in shape)
    strides = b"".join(b"K" + bytes([number]) for number in stride)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
        + storage.encode()
        + b"\nX\x01\x00\x00\x00"
        + str(key).encode()
        + b"X\x03\x00\x00\x00cpuK\x09tQK"
        + bytes([offset])
        + b"("
        + numbers
        + b"t("
        + strides
        + b"t\x89ccollections\nOrderedDict\n)RtR"
    )


def pair(*tensors):
    return b"\x80\x02(" + b"".join(tensors) + b"t."


def test_a_file_that_torch_wrote_is_read():
    check(read_trace(TORCH_FILE))


def test_a_file_packed_with_gzip_is_read(tmp_path):
    path = tmp_path / "fbgemm_t2_bs3.pt.gz"
    path.write_bytes(gzip.compress(TORCH_FILE.read_bytes()))
    check(read_trace(path))


def test_ids_of_a_torch_file_are_mapped_and_read_only():
    values = read_trace(TORCH_FILE)[0].values
    assert not values.flags.owndata
    assert not values.flags.writeable


def test_npz_and_safetensors_are_read(tmp_path):
    check(read_trace(npz(tmp_path / "trace.npz")))
    safetensors.numpy.save_file(ARRAYS, tmp_path / "trace.safetensors")
    check(read_trace(str(tmp_path / "trace.safetensors")))


def test_other_integers_are_read(tmp_path):
    small = {name: array.astype(np.int32) for name, array in ARRAYS.items()}
    check(read_trace(npz(tmp_path / "trace.npz", **small)))


def test_an_id_beyond_int64_is_refused(tmp_path):
    path = npz(
        tmp_path / "trace.npz", indices=np.array([1, 2**64 - 1, 2], np.uint64), offsets=[0, 3], lengths=[3]
    )
    with pytest.raises(ConfigError, match=rf"expected ids in \[0, 2\*\*63\), got {2**64 - 1}"):
        read_trace(path)


def test_a_damaged_npz_is_read_or_refused_in_words(tmp_path):
    data = npz(tmp_path / "trace.npz").read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(600):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with contextlib.suppress(ConfigError):
            read_trace(tmp_path / "damaged.npz")
            continue
        refusals.append(damaged)
    assert len(refusals) > 400
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.npz")


def test_without_lengths_it_is_one_table(tmp_path):
    np.savez(tmp_path / "trace.npz", indices=INDICES, offsets=OFFSETS)
    (table,) = read_trace(tmp_path / "trace.npz")
    assert table.values.tolist() == INDICES.tolist()
    assert table.lengths.tolist() == LENGTHS.reshape(-1).tolist()


def test_tables_without_bags_are_empty(tmp_path):
    empty = np.zeros((2, 0), np.int32)
    path = npz(tmp_path / "trace.npz", indices=INDICES[:0], offsets=OFFSETS[:1], lengths=empty)
    assert [(len(table), len(table.values)) for table in read_trace(path)] == [(0, 0), (0, 0)]


def test_a_tensor_may_begin_inside_its_storage(tmp_path):
    storage = np.array([-1, -1, 4, 6, 8], np.int64)
    path = torch_zip(
        tmp_path / "trace.pt",
        pair(tensor(0, [3], offset=2), tensor(1, [2], storage="IntStorage")),
        [storage, np.array([0, 3], np.int32)],
    )
    (table,) = read_trace(path)
    assert table.values.tolist() == [4, 6, 8]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_a_pickle_asks_for_is_refused_and_not_run(tmp_path, protocol):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    path = torch_zip(tmp_path / "trace.pt", pickle.dumps((Evil(), 1), protocol))
    with pytest.raises(ConfigError, match=r"trace\.pt: expected a tuple of contiguous tensors .* got "):
        read_trace(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "got os.system, which was not looked up"),
        (
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
            "got builtins.eval, which was not looked up",
        ),
        (b"\x80\x02ctorch\nLongStorage\n)R.", "got a call of .*torch LongStorage"),
        (b"\x80\x02}.", "got pickle opcode EMPTY_DICT"),
        (b"\x80\x02(K\x01K\x02t.", "got tuple"),
        (b"\x80\x02K\x01.", "got int"),
        (b"\x80\x02(K\x01", "got a damaged pickle"),
        (b"\x80\x02t.", "got a damaged pickle"),
        (b"\x80\x02h\x07.", "got a damaged pickle"),
        (b"\x80\x02K\x01K\x02a.", "got a damaged pickle .*no list"),
        (pair(tensor(0, [3], storage="ComplexDoubleStorage")), "got torch.ComplexDoubleStorage"),
        (pair(tensor(0, [2, 2], stride=(1, 2))), r"got a tensor of shape \[2, 2\] with strides \[1, 2\]"),
        (pair(tensor(0, [2, 2], stride=(2,))), "got a damaged pickle"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, pickled, message):
    path = torch_zip(tmp_path / "trace.pt", pickled, [INDICES])
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    for more in ({"shape": [10]}, {"shape": [9], "offset": 1}):
        path = torch_zip(tmp_path / "trace.pt", pair(tensor(0, **more), tensor(0, [1])), [INDICES])
        with pytest.raises(ConfigError, match="data/0: expected 80 bytes, stored as they are, got 72"):
            read_trace(path)


def test_a_missing_storage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data/0"):
        read_trace(torch_zip(tmp_path / "trace.pt", pair(tensor(0, [9]), tensor(0, [1]))))


def test_a_packed_storage_is_refused(tmp_path):
    path = torch_zip(
        tmp_path / "trace.pt", pair(tensor(0, [9]), tensor(0, [1])), [INDICES], method=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(ConfigError, match="stored as they are, got 72 by zip method 8"):
        read_trace(path)


def test_big_endian_tensors_are_refused(tmp_path):
    path = torch_zip(tmp_path / "trace.pt", pair(tensor(0, [9]), tensor(0, [1])), [INDICES])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ConfigError, match=r"trace\.pt: expected little-endian tensors, got big-endian"):
        read_trace(path)


def test_a_huge_description_is_refused_unread(tmp_path):
    path = torch_zip(tmp_path / "trace.pt", b"\x80\x02" + b"N" * (1 << 20) + b".")
    with pytest.raises(ConfigError, match=r"expected a data\.pkl of a few tensors, got 1048579 bytes"):
        read_trace(path)


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_tensors_is_refused(tmp_path, count):
    path = torch_zip(tmp_path / "trace.pt", pair(*[tensor(0, [9])] * count), [INDICES])
    with pytest.raises(ConfigError, match=f"expected the tensors indices, offsets and .* got {count}"):
        read_trace(path)


@pytest.mark.parametrize("keep", [0, 10, 400, 1500, -1])
def test_a_torch_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "trace.pt"
    path.write_bytes(TORCH_FILE.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"trace\.pt: expected a zip of tensors as torch.save writes it"):
        read_trace(path)


def test_a_gzip_file_cut_short_and_one_that_is_none_are_refused(tmp_path):
    path = tmp_path / "trace.pt.gz"
    for content in (gzip.compress(TORCH_FILE.read_bytes())[:-20], TORCH_FILE.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"trace\.pt\.gz: expected a gzip file"):
            read_trace(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": INDICES.astype(np.float32)}, "expected integers, indices are float32"),
        ({"lengths": LENGTHS.astype(np.float64)}, "expected integers, lengths are float64"),
        ({"indices": INDICES.reshape(3, 3)}, r"got shapes \[3, 3\] and \[7\]"),
        ({"offsets": OFFSETS[:0]}, r"got shapes \[9\] and \[0\]"),
        ({"offsets": OFFSETS + 1}, "from 0 to the number of indices, 9, got 1 to 10"),
        ({"offsets": OFFSETS[:-1]}, "got 0 to 6"),
        ({"offsets": OFFSETS[[0, 2, 1, 4, 3, 5, 6]]}, "got 0 to 9, falling between"),
        ({"lengths": LENGTHS[::-1]}, r"differences of the 7 offsets, got others, of shape \[2, 3\]"),
        ({"lengths": LENGTHS[:1]}, r"got others, of shape \[1, 3\]"),
        ({"lengths": LENGTHS.reshape(1, 2, 3)}, r"got others, of shape \[1, 2, 3\]"),
        ({"indices": INDICES - 1}, r"expected ids in \[0, 2\*\*63\), got -1"),
    ],
)
def test_arrays_that_are_no_bags_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_trace(npz(tmp_path / "trace.npz", **changes))


def test_arrays_of_other_names_are_refused(tmp_path):
    np.savez(tmp_path / "trace.npz", ids=INDICES, offsets=OFFSETS)
    with pytest.raises(ConfigError, match=r"indices, offsets and maybe lengths, got \['offsets'\]"):
        read_trace(tmp_path / "trace.npz")


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "trace.npz", indices=np.array([{}], object), offsets=OFFSETS)
    with pytest.raises(ConfigError, match=r"expected arrays as numpy.savez writes them: Object arrays"):
        read_trace(tmp_path / "trace.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_file_of_something_else_is_refused(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    path.write_bytes(io.BytesIO(b"something else" * 10).getvalue())
    with pytest.raises(ConfigError, match=f"trace{suffix}: expected"):
        read_trace(path)


@pytest.mark.parametrize("name", ["trace.npy", "trace.pth", "trace", "trace.npz.gz"])
def test_other_kinds_of_file_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: expected a trace in .npz, .safetensors, .pt or .pt.gz"):
        read_trace(tmp_path / name)
