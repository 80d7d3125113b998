"""Rows that devices look up: what the gather leaves to them, natively and in NumPy."""

import numpy as np
import pytest
from random_models import (
    assert_equal,
    decoded,
    needs_native,
    random_parts,
    random_spec,
    random_tables,
    rows_of,
)

from xlarank.errors import ConfigError
from xlarank.host import DeviceRows, Gatherer, encode_rows
from xlarank.spec import Bucket, DeviceTable, RowFormat, TablePlacement
from xlarank.spec.placement import fixed_capacity


def random_device_rows(rng, spec, unused=()):
    chosen = []
    for table in spec.tables:
        readers = [f for f in spec.features if f.table == table.name and f.name not in unused]
        if not readers or rng.random() < 0.2:
            continue
        capacities = {f.name: fixed_capacity(f) or int(rng.integers(1, 5)) for f in readers}
        if rng.random() < 0.3:
            chosen.append(DeviceRows(TablePlacement(table.name, table.num_rows, capacities)))
            continue
        count = int(rng.integers(1, table.num_rows))
        numbers = np.sort(rng.choice(table.num_rows, count, replace=False)).astype(np.int32)
        chosen.append(DeviceRows(TablePlacement(table.name, count, capacities), numbers))
    return chosen


def device_share(gatherer, feature, leaves):
    """What the device adds to a feature's activation, from the places: in NumPy, not by the program."""
    lookup = gatherer.signature.lookups[feature.name]
    held = gatherer.device_rows[feature.table]
    table = gatherer._tables[feature.table]
    numbers = np.arange(table.num_rows) if held.numbers is None else held.numbers
    values = np.vstack([decoded(table)[numbers], np.zeros((1, table.dim), np.float32)])
    looked_up = values[leaves[lookup.places]]
    if feature.kind == "sequence":
        return looked_up
    total = looked_up.sum(axis=1, dtype=np.float32)
    return total if lookup.divisor is None else total / leaves[lookup.divisor]


@needs_native
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(700, 740))
def test_the_kernel_equals_the_numpy_reference_bit_for_bit(seed, activations, gather):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    tables, parts, rows = random_tables(rng, spec), random_parts(rng, spec), random_device_rows(rng, spec)
    bucket = Bucket(rows_of(parts) + 1 + seed % 3, len(parts) + seed % 2)
    options = {"activations": activations, "device_rows": rows}
    native = gather(Gatherer(spec, tables, backend="native", **options), parts, bucket)
    assert_equal(native, gather(Gatherer(spec, tables, backend="numpy", **options), parts, bucket))


@needs_native
@pytest.mark.parametrize("seed", range(740, 780))
def test_host_and_device_share_add_up_to_what_the_host_gathers_alone(seed, gather):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    tables, parts, rows = random_tables(rng, spec), random_parts(rng, spec), random_device_rows(rng, spec)
    bucket = Bucket(rows_of(parts) + 2, len(parts) + 1)
    alone = Gatherer(spec, tables)
    placed = Gatherer(spec, tables, device_rows=rows)
    expected, leaves = gather(alone, parts, bucket), gather(placed, parts, bucket)
    for feature in spec.features:
        slot = placed.signature.slots[feature.name]
        ours = leaves[slot.leaf][..., slot.begin : slot.end]
        if feature.name in placed.signature.lookups:
            ours = ours + device_share(placed, feature, leaves)
        whole = expected[slot.leaf][..., slot.begin : slot.end]
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_never_change_a_bit(num_threads, gather):
    for seed in range(780, 784):
        rng = np.random.default_rng(seed)
        spec = random_spec(rng)
        tables, rows = random_tables(rng, spec), random_device_rows(rng, spec)
        parts = random_parts(rng, spec, num_requests=6, most=400)  # more than is done inline
        bucket = Bucket(rows_of(parts) + 300, 8)
        alone = gather(Gatherer(spec, tables, device_rows=rows), parts, bucket)
        threaded = Gatherer(spec, tables, num_threads=num_threads, device_rows=rows)
        assert_equal(gather(threaded, parts, bucket), alone)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_the_array_holds_the_rows_and_zeros_after_them(row_format):
    rng = np.random.default_rng(0)
    table = encode_rows(rng.standard_normal((9, 6), np.float32), row_format)
    held = DeviceRows(TablePlacement("t", 3, {"f": 1}), np.array([1, 4, 8], np.int32))
    array = held.array(table)
    form = DeviceTable("t", 3, 6, row_format)
    assert (array.shape, array.dtype) == (form.shape, np.dtype(form.dtype))
    np.testing.assert_array_equal(array.view(np.uint8)[:3], table.rows[[1, 4, 8]])
    assert not array[3].view(np.uint8).any()


def test_places_of_rows():
    held = DeviceRows(TablePlacement("t", 3, {"f": 1}), np.array([1, 4, 8], np.int32))
    np.testing.assert_array_equal(held.places_of(np.array([8, 0, 4, -1, 9, 1])), [2, -1, 1, -1, -1, 0])
    np.testing.assert_array_equal(held.places(9), [-1, 0, -1, -1, 1, -1, -1, -1, 2])


@pytest.mark.parametrize(
    ("placement", "numbers", "message"),
    [
        (("u", 1, {"f10": 1}), None, "the model has no such table; it has"),
        (("t0", 0, {}), None, "expected 1 to"),
        (("t0", 99, {}), None, "expected 1 to"),
        (("t0", 2, {}), [0, 1], "expected a capacity of each feature that reads it"),
        (("t0", 2, None), None, "expected the numbers of 2 of"),
        (("t0", 2, None), [0, 1, 2], r"expected int32 of shape \[2\], got int32 of shape \[3\]"),
        (("t0", 2, None), [1, 1], "expected ascending numbers in"),
        (("t0", 2, None), [-1, 1], "expected ascending numbers in"),
        (("t0", 2, None), [0, 99], "expected ascending numbers in"),
    ],
)
def test_what_contradicts_the_model_is_refused(placement, numbers, message):
    rng = np.random.default_rng(3)
    spec = next(s for s in iter(lambda: random_spec(rng), None) if "t0" in s.table_by_name)
    table, count, capacities = placement
    if capacities is None:
        capacities = {f.name: fixed_capacity(f) or 2 for f in spec.features if f.table == table}
    held = DeviceRows(
        TablePlacement(table, count, capacities), None if numbers is None else np.array(numbers, np.int32)
    )
    with pytest.raises(ConfigError, match=message):
        Gatherer(spec, random_tables(rng, spec), device_rows=[held])


@pytest.mark.parametrize("capacity", [0, 2])
def test_an_id_has_one_place(capacity):
    rng = np.random.default_rng(4)
    while True:
        spec = random_spec(rng)
        ids = [f for f in spec.features if f.kind == "id"]
        if ids:
            break
    table = ids[0].table
    capacities = {f.name: fixed_capacity(f) or 2 for f in spec.features if f.table == table}
    held = DeviceRows(
        TablePlacement(table, spec.table_by_name[table].num_rows, capacities | {ids[0].name: capacity})
    )
    with pytest.raises(ConfigError, match=f"feature '{ids[0].name}': expected capacity 1, got {capacity}"):
        Gatherer(spec, random_tables(rng, spec), device_rows=[held])
