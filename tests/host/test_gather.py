"""The native gather against the NumPy reference, over random models and requests."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from random_models import (
    assert_equal,
    decoded,
    needs_native,
    random_parts,
    random_request,
    random_spec,
    random_tables,
    rows_of,
)

from xlarank.host import Gatherer, model_inputs
from xlarank.host.plan import native_plan
from xlarank.spec import (
    Bucket,
    ModelSpec,
    RankRequest,
)

BACKENDS = ["numpy", pytest.param("native", marks=needs_native)]
ACTIVATIONS = ["float32", "bfloat16"]


@needs_native
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_equals_the_numpy_reference_bit_for_bit(seed, activations, gather):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    tables, parts = random_tables(rng, spec), random_parts(rng, spec)
    bucket = Bucket(rows_of(parts) + seed % 3, len(parts) + seed % 2 if seed % 3 else len(parts))
    native = gather(Gatherer(spec, tables, backend="native", activations=activations), parts, bucket)
    numpy = gather(Gatherer(spec, tables, backend="numpy", activations=activations), parts, bucket)
    assert_equal(native, numpy)


@needs_native
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa, activations, gather):
    for seed in range(100, 115):
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        tables, parts = random_tables(rng, spec), random_parts(rng, spec)
        gatherer = Gatherer(spec, tables, backend="native", activations=activations)
        try:
            gatherer._kernel = native_plan(
                spec, gatherer.signature, gatherer._tables, gatherer.lines_ahead, 1, isa=isa
            )
        except ValueError as error:
            pytest.skip(str(error))
        reference = Gatherer(spec, tables, backend="numpy", activations=activations)
        assert_equal(gather(gatherer, parts, Bucket(64, 8)), gather(reference, parts, Bucket(64, 8)))


@needs_native
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_never_change_a_bit(num_threads, activations, gather):
    for seed in range(200, 206):
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        tables = random_tables(rng, spec)
        parts = random_parts(rng, spec, num_requests=6, most=400)  # more than is done inline
        bucket = Bucket(rows_of(parts) + 300, 8)
        alone = gather(Gatherer(spec, tables, backend="native", activations=activations), parts, bucket)
        threaded = Gatherer(spec, tables, num_threads=num_threads, activations=activations)
        assert_equal(gather(threaded, parts, bucket), alone)


@needs_native
def test_a_bfloat16_batch_is_the_float32_batch_rounded(gather):
    for seed in range(210, 220):
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        tables = random_tables(rng, spec)
        parts = random_parts(rng, spec, num_requests=6, most=400)  # more than is rounded at once
        bucket = Bucket(rows_of(parts) + 9, 8)
        rounded = Gatherer(spec, tables, backend="native", activations="bfloat16")
        expected = {
            name: values.astype(rounded.signature.leaf_by_name[name].dtype)
            for name, values in gather(Gatherer(spec, tables, backend="native"), parts, bucket).items()
        }
        assert_equal(gather(rounded, parts, bucket), expected)


@needs_native
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(500, 540))
def test_unused_features_change_nothing_but_where_the_others_lie(seed, activations, gather):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    tables, parts = random_tables(rng, spec), random_parts(rng, spec)
    share = rng.choice([0.2, 0.6, 1.0], p=[0.5, 0.4, 0.1])
    unused = [feature.name for feature in spec.features if rng.random() < share]
    bucket = Bucket(rows_of(parts) + seed % 3, len(parts))
    full = Gatherer(spec, tables, backend="native", activations=activations)
    reduced = Gatherer(spec, tables, backend="native", unused=unused, activations=activations)
    reference = Gatherer(spec, tables, backend="numpy", unused=unused, activations=activations)
    ours, whole = gather(reduced, parts, bucket), gather(full, parts, bucket)
    assert_equal(ours, gather(reference, parts, bucket))
    assert reduced.signature.slots.keys() == full.signature.slots.keys() - set(unused)
    for name, slot in reduced.signature.slots.items():
        before = full.signature.slots[name]
        np.testing.assert_array_equal(
            ours[slot.leaf][..., slot.begin : slot.end], whole[before.leaf][..., before.begin : before.end]
        )
    for name in ours.keys() - {slot.leaf for slot in reduced.signature.slots.values()}:
        np.testing.assert_array_equal(ours[name], whole[name])  # masks and request_of_row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(300, 310))
def test_the_parts_of_a_request_equal_the_whole(backend, seed, gather):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    gatherer = Gatherer(spec, random_tables(rng, spec), backend=backend)
    request = random_request(rng, spec, 11)
    whole = gather(gatherer, [(request, 0, 11)], Bucket(11, 1))
    cuts = [0, 1, 5, 11]
    parts = [(request, a, b) for a, b in itertools.pairwise(cuts)]
    split = gather(gatherer, parts, Bucket(11, 3))
    np.testing.assert_array_equal(split.pop("request_of_row"), np.repeat([0, 1, 2], [1, 4, 6]))
    whole.pop("request_of_row")
    for name, values in split.items():
        leaf = gatherer.signature.leaf_by_name[name]
        expected = np.repeat(whole[name], 3, axis=0) if leaf.scope == "context" else whole[name]
        np.testing.assert_array_equal(values, expected, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_and_padding_never_change_a_row(backend, gather):
    for seed in range(400, 410):
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        gatherer = Gatherer(spec, random_tables(rng, spec), backend=backend)
        first, second = random_request(rng, spec, 3), random_request(rng, spec, 2)
        alone = gather(gatherer, [(first, 0, 3)], Bucket(3, 1))
        mixed = gather(gatherer, [(second, 0, 2), (first, 0, 3)], Bucket(8, 4))
        for leaf in gatherer.signature.leaves[:-1]:
            begin, end = (1, 2) if leaf.scope == "context" else (2, 5)
            values = mixed[leaf.name]
            np.testing.assert_array_equal(values[begin:end], alone[leaf.name], err_msg=leaf.name)
            padding = values[end:]
            np.testing.assert_array_equal(padding, np.repeat(values[end - 1 : end], len(padding), axis=0))
        np.testing.assert_array_equal(mixed["request_of_row"], [0, 0, 1, 1, 1, 1, 1, 1])


def test_model_inputs_and_the_gather_agree(gather):
    rng = np.random.default_rng(7)
    for _ in range(20):
        spec = random_spec(rng)
        tables, request = random_tables(rng, spec), random_request(rng, spec, 5)
        gatherer = Gatherer(spec, tables)
        out = gather(gatherer, [(request, 0, 5)], Bucket(5, 1))
        inputs = model_inputs(spec, request.columns)
        for feature in spec.features:
            slot, values = gatherer.signature.slots[feature.name], inputs[feature.name]
            if feature.kind == "dense":
                np.testing.assert_array_equal(out[slot.leaf][:, slot.begin : slot.end], values)
                continue
            table = np.vstack([decoded(tables[feature.table or ""]), np.zeros(spec.table_of(feature).dim)])
            looked_up = table[values].astype(np.float32)  # -1 reads the row of zeros at the end
            if feature.kind == "id":
                np.testing.assert_array_equal(out[slot.leaf][:, slot.begin : slot.end], looked_up)
                continue
            lengths = inputs[feature.name + ".lengths"]
            if feature.kind == "sequence":
                np.testing.assert_array_equal(out[feature.name], looked_up)
                np.testing.assert_array_equal(out[feature.name + ".mask"].sum(axis=1), lengths)
                continue
            divisor = {"sum": 1, "mean": lengths, "sqrtn": np.sqrt(lengths)}[feature.combiner or "sum"]
            expected = looked_up.sum(axis=1) / np.maximum(divisor, 1)[..., None]
            actual = out[slot.leaf][:, slot.begin : slot.end]
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("num_threads", [1, 3])
def test_concurrent_callers_get_their_own_batches(num_threads, gather):
    rng = np.random.default_rng(0)
    spec = random_spec(rng)
    tables = random_tables(rng, spec)
    gatherer = Gatherer(spec, tables, num_threads=num_threads)
    batches = [random_parts(rng, spec, most=300) for _ in range(8)]
    bucket = Bucket(1300, 4)
    expected = [gather(gatherer, parts, bucket) for parts in batches]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            for ours, theirs in zip(
                executor.map(lambda p: gather(gatherer, p, bucket), batches), expected, strict=True
            ):
                assert_equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_equal_bags_of_a_batch_change_nothing(num_threads, activations, gather):
    bag = {"kind": "id_list", "table": "t", "combiner": "sqrtn", "max_length": 15}
    spec = ModelSpec.from_dict(
        {
            "name": "m",
            "features": [
                {"name": "user", "scope": "context", **bag},
                {"name": "tags", "scope": "candidate", **bag},
                {"name": "item", "scope": "candidate", "kind": "id", "table": "t"},
            ],
            "tables": [{"name": "t", "dim": 37, "rows": 1000, "dtype": "int8", "out_of_range": "zero"}],
            "tasks": [{"name": "like"}],
        }
    )
    rng = np.random.default_rng(1)
    tables = random_tables(rng, spec)
    gatherers = [
        Gatherer(spec, tables, backend=backend, num_threads=num_threads, activations=activations)
        for backend in ("native", "numpy")
    ]
    bags = [rng.integers(-1, 1000, size=size) for size in (12, 15, 15, 30, 0, 11)]
    # In the first batches two bags in three are repeats, in the last ones none: looking for them stops.
    for repeats in (True, True, False, False):
        parts = []
        for _ in range(4):
            count = 150
            if repeats:
                tags = [bags[i] for i in rng.integers(len(bags), size=count)]
            else:
                tags = [rng.integers(-1, 1000, size=20) for _ in range(count)]
            user = [bags[0] if repeats else tags[0]]
            request = RankRequest(spec, {"user": user, "tags": tags, "item": rng.integers(1000, size=count)})
            parts.append((request, 0, count))
        ours, theirs = (gather(gatherer, parts, Bucket(640, 5)) for gatherer in gatherers)
        assert_equal(ours, theirs)
