"""A batch in one array: where its leaves lie, and programs that take it so, as on devices with memory of
their own. Here on CPUs, which a parameter makes take it likewise."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from pass_cases import MODELS, case_of, swept

from xlarank import device
from xlarank.compiler.lower import lower_row_program
from xlarank.compiler.prepare import PreparedArrays, part
from xlarank.compiler.program import plain_program
from xlarank.device.layout import BatchLayout
from xlarank.errors import ConfigError
from xlarank.spec import REQUEST_OF_ROW, Bucket, BucketLadder, Leaf, Scope, Signature

DTYPES = ("float32", "int32", "uint32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")
BUCKETS = (Bucket(1, 1), Bucket(5, 1), Bucket(5, 3), Bucket(32, 32))
OWNERS = Leaf(REQUEST_OF_ROW, Scope.CANDIDATE, (), "int32")

tails = st.lists(st.integers(0, 5), max_size=3).map(tuple)
leaf_forms = st.lists(st.tuples(st.sampled_from(DTYPES), tails), max_size=6)


def signature_of(context, candidates):
    leaves = [Leaf(f"q{i}", Scope.CONTEXT, tail, dtype) for i, (dtype, tail) in enumerate(context)]
    leaves += [Leaf(f"b{i}", Scope.CANDIDATE, tail, dtype) for i, (dtype, tail) in enumerate(candidates)]
    return Signature((*leaves, OWNERS), {}, ("y",))


EVERY = signature_of([(dtype, (3,)) for dtype in DTYPES], [(dtype, (2, 3)) for dtype in DTYPES])


def random_bits(rng, array):
    """Any bits, NaNs among them; of bools those that NumPy makes."""
    raw = rng.integers(0, 2 if array.dtype == np.bool_ else 256, array.nbytes, np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def fill(leaves, seed=0):
    rng = np.random.default_rng(seed)
    for array in leaves.values():
        array[...] = random_bits(rng, array)


def same_bits(actual, expected):
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and actual.tobytes() == expected.tobytes()
    )


@given(leaf_forms, leaf_forms, st.sampled_from(BUCKETS))
def test_leaves_are_aligned_and_apart_and_smaller_buckets_take_less(context, candidates, bucket):
    signature = signature_of(context, candidates)
    buffers = device.BatchBuffers(signature, BucketLadder(BUCKETS))
    leaves = buffers.leaves(bucket)
    assert list(leaves) == [leaf.name for leaf in signature.leaves]
    arrays = [leaves[leaf.name] for leaf in signature.leaves]
    begin = leaves.words.ctypes.data
    for leaf, array in zip(signature.leaves, arrays, strict=True):
        assert (array.shape, array.dtype) == (leaf.shape(bucket), np.dtype(leaf.dtype))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        if array.size:
            assert (array.ctypes.data % 64, array.ctypes.data >= begin) == (0, True)
            begin = array.ctypes.data + array.nbytes
    assert begin <= leaves.words.ctypes.data + leaves.words.nbytes
    assert leaves.words.nbytes <= sum(array.nbytes + 63 for array in arrays)
    assert np.shares_memory(leaves.words, buffers.leaves(BUCKETS[-1]).words)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_device_unpacks_the_bits_of_every_dtype(bucket):
    signature = signature_of(
        [(dtype, tail) for dtype in DTYPES for tail in ((), (3,), (0,))],
        [(dtype, (2, 1)) for dtype in DTYPES],
    )
    leaves = device.BatchBuffers(signature, BucketLadder((bucket,))).leaves(bucket)
    fill(leaves)
    unpacked = jax.jit(leaves.layout.unpack)(leaves.words)
    for name, array in zip(leaves, unpacked, strict=True):
        assert same_bits(np.asarray(array), leaves[name]), name


def test_arrays_that_lie_elsewhere_are_packed_whatever_their_strides():
    leaves = device.BatchBuffers(EVERY, BucketLadder(BUCKETS)).leaves(BUCKETS[2])
    fill(leaves)
    foreign = [np.asfortranarray(array)[::-1][::-1] for array in leaves.values()]
    packed = leaves.layout.views(leaves.layout.pack(leaves.names, foreign))
    assert all(same_bits(a, b) for a, b in zip(packed, leaves.values(), strict=True))


@pytest.mark.parametrize(
    ("array", "got"),
    [(np.zeros((4, 3), np.float64), r"float64\[4, 3\]"), (np.zeros((1, 3), np.float32), r"float32\[1, 3\]")],
)
def test_arrays_of_another_form_are_refused(array, got):
    layout = BatchLayout(((4, 3),), (np.dtype(np.float32),))
    with pytest.raises(ConfigError, match=rf"leaf 'x': expected float32\[4, 3\], got {got}"):
        layout.pack(["x"], [array])


def replica_of(signature, exported, arrays=(), **options):
    """On the first device, of programs by bucket."""
    programs = {b: device.BucketProgram(e, tuple(range(len(arrays)))) for b, e in exported.items()}
    return device.Replica(device.devices()[0], signature, programs, arrays, **options)


def exported(program, signature, bucket):
    def avals(leaves):
        return tuple(jax.ShapeDtypeStruct(leaf.shape(bucket), leaf.dtype) for leaf in leaves)

    given = (), avals(signature.context_leaves), avals(signature.candidate_leaves), *avals([OWNERS])
    return export.export(jax.jit(program))(*given)


@pytest.mark.parametrize(
    "bucket", [Bucket(8, 1), pytest.param(Bucket(8, 8), marks=pytest.mark.sweep)], ids=str
)
@pytest.mark.parametrize("name", swept(MODELS))
def test_scores_of_a_batch_in_one_array_are_those_of_its_leaves_to_the_bit(name, bucket):
    case = case_of(name)
    program = plain_program(case.traces, case.signature, bucket)
    prepared = PreparedArrays(program.weight_avals)
    parted = part(program, prepared)
    exported = device.deserialize_program(lower_row_program(parted, case.spec, case.signature))
    arrays = prepared.make(parted.keys, case.model.params)
    apart, packed = (
        replica_of(case.signature, {bucket: exported}, arrays, is_packed=is_packed)
        for is_packed in (False, True)
    )
    leaves = device.BatchBuffers(case.signature, BucketLadder((Bucket(8, 1), Bucket(8, 8)))).leaves(bucket)
    for seed in range(3):
        batch = case.batch(bucket.rows, bucket.requests, seed)
        for array, values in zip(leaves.values(), (*batch.leaves, batch.request_of_row), strict=True):
            array[...] = values
        counter = device.CompileCounter()
        with counter.request_path():
            expected = apart.run(bucket, leaves)
            found = packed.run(bucket, leaves), packed.run(bucket, {k: v.copy() for k, v in leaves.items()})
        assert counter.count == 0
        for scores in found:
            assert list(scores) == list(expected)
            for task in scores:
                assert same_bits(scores[task], expected[task]), task


def swapped(leaf_dtypes=("float32", "float32")):
    """Two signatures of leaves of one form whose names come in another order."""
    a, b = (Leaf(name, Scope.CANDIDATE, (), dtype) for name, dtype in zip("ab", leaf_dtypes, strict=True))
    return Signature((a, b, OWNERS), {}, ("y",)), Signature((b, a, OWNERS), {}, ("y",))


@pytest.mark.parametrize("is_packed", [False, True])
def test_leaves_are_told_apart_by_name_whatever_buffers_they_lie_in(is_packed):
    own, other = swapped()
    bucket = Bucket(4, 1)
    program = exported(lambda _, q, b, rows: {"y": b[0] - 2 * b[1]}, own, bucket)
    replica = replica_of(own, {bucket: program}, is_packed=is_packed)
    for signature in (own, other):
        leaves = device.BatchBuffers(signature, BucketLadder((bucket,))).leaves(bucket)
        leaves["a"][:], leaves["b"][:], leaves[REQUEST_OF_ROW][:] = 5, 1, 0
        np.testing.assert_array_equal(replica.run(bucket, leaves)["y"], np.full(4, 3, np.float32))
        poisoned = dict(leaves) | {"a": np.full(4, 7, np.float32)}
        np.testing.assert_array_equal(replica.run(bucket, poisoned)["y"], np.full(4, 5, np.float32))


def test_buffers_of_the_same_names_and_another_dtype_are_not_taken_for_those_of_the_program():
    own, other, bucket = swapped()[0], swapped(("int32", "float32"))[0], Bucket(4, 1)
    program = exported(lambda _, q, b, rows: {"y": b[0] - b[1]}, own, bucket)
    replica = replica_of(own, {bucket: program}, is_packed=True)
    leaves = device.BatchBuffers(other, BucketLadder((bucket,))).leaves(bucket)
    with pytest.raises(ConfigError, match=r"leaf 'a': expected float32\[4\], got int32\[4\]"):
        replica.run(bucket, leaves)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_runs_in_buffers_that_held_another_before_and_its_scores_stay(is_packed):
    """A bucket's batch in memory that another bucket's took; scores are no view of it."""
    signature = signature_of([], [("float32", (3,))])
    replica = replica_of(
        signature,
        {b: exported(lambda _, q, b, rows: {"y": b[0].sum(1) + rows}, signature, b) for b in BUCKETS},
        is_packed=is_packed,
    )
    buffers = device.BatchBuffers(signature, BucketLadder(BUCKETS))
    kept = []
    for number, bucket in enumerate((*BUCKETS, *reversed(BUCKETS))):
        leaves = buffers.leaves(bucket)
        leaves["b0"][:] = number
        leaves[REQUEST_OF_ROW][:] = np.arange(bucket.rows) % bucket.requests
        kept.append((number, bucket, replica.run(bucket, leaves)["y"]))
    for number, bucket, scores in kept:
        expected = np.float32(3 * number) + np.arange(bucket.rows) % bucket.requests
        np.testing.assert_array_equal(scores, expected.astype(np.float32))


def test_a_compiled_program_says_how_it_takes_a_batch_and_cpus_take_leaves():
    bucket = Bucket(4, 1)
    program = exported(lambda _, q, b, rows: {"y": b[0] * 1.0}, swapped()[0], bucket)
    cpu = device.devices()[0]
    assert not device.has_own_memory(cpu)
    for is_packed, num_arguments in ((None, 4), (False, 4), (True, 2)):
        compiled = device.compile_row_program(program, cpu, is_packed=is_packed)
        assert len(compiled.args_info[0]) == num_arguments
        replica = replica_of(swapped()[0], {bucket: compiled})
        layout = replica.executables[bucket].layout
        assert (layout is not None) == (is_packed is True)
        assert replica.executables[bucket].cost().bytes_accessed > 0
