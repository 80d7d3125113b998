"""Rows of tables on devices: what is chosen, what programs look up there, and that scores don't change."""

import dataclasses
import functools
import io
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from foreign import mlp, mlp_params, random_params
from rich.console import Console

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.cli import inspect
from xlarank.cli.compile import _row_reads
from xlarank.cli.compile_output import facts_of, show
from xlarank.compiler import (
    BuildOptions,
    PlacementPolicy,
    build,
    build_bundle,
    random_requests,
    reference_scores,
)
from xlarank.compiler.device_lookup import look_up
from xlarank.compiler.placement import plan_placement
from xlarank.compiler.split import split_function
from xlarank.errors import BundleError, ConfigError
from xlarank.host import DeviceRows, decode_rows, encode_rows
from xlarank.runtime import Engine
from xlarank.spec import (
    DeviceTable,
    ErrorBudget,
    ModelSpec,
    Placement,
    PrecisionPolicy,
    Ragged,
    RankRequest,
    RowFormat,
    TablePlacement,
)

SPLIT_BYTES = 6_000
"""Some of the rows of SPEC that random requests read, not all."""


def spec_of(item_format="float32"):
    return ModelSpec.from_dict(
        {
            "name": "placed",
            "features": [
                {"name": "user", "kind": "id", "scope": "context", "table": "users"},
                {"name": "past", "kind": "sequence", "scope": "context", "table": "items", "max_length": 5},
                {"name": "age", "kind": "dense", "scope": "context", "width": 3},
                {"name": "item", "kind": "id", "scope": "candidate", "table": "items"},
                {
                    "name": "tags",
                    "kind": "id_list",
                    "scope": "candidate",
                    "table": "tags",
                    "combiner": "mean",
                },
                {
                    "name": "near",
                    "kind": "id_list",
                    "scope": "candidate",
                    "table": "items",
                    "combiner": "sqrtn",
                },
                {"name": "sums", "kind": "id_list", "scope": "candidate", "table": "tags", "combiner": "sum"},
                {"name": "idle", "kind": "id", "scope": "candidate", "table": "tags"},
            ],
            "tables": [
                {"name": "users", "dim": 8, "rows": 50, "updatable": True},
                {"name": "items", "dim": 9, "rows": 100, "dtype": item_format, "updatable": True},
                {"name": "tags", "dim": 4, "rows": 40, "out_of_range": "zero"},
            ],
            "tasks": [{"name": "click"}],
        }
    )


SPEC = spec_of()
TABLES = {
    t.name: 0.3 * np.random.default_rng(0).standard_normal((t.num_rows, t.dim), np.float32)
    for t in SPEC.tables
}
for rows in TABLES.values():
    rows.flags.writeable = False  # as a model's own arrays are; the tables are updatable all the same
PARAMS = random_params(**mlp_params("top", 8 + 9 + 3 + 9 + 4 + 9 + 4, 16, 1))


def apply(params, features):
    mask = features["past.mask"][..., None].astype(np.float32)
    past = (features["past"] * mask).sum(1) / jax.numpy.maximum(mask.sum(1), 1)
    read = [features["user"], past, *(features[n] for n in ("age", "item", "tags", "near", "sums"))]
    return {"click": mlp(params, "top", jax.numpy.concatenate(read, axis=1))[:, 0]}


def options_of(kind, **changes):
    num_bytes = SPLIT_BYTES if kind == "split" else None
    return BuildOptions(
        bucket_rows=(8,),
        tune_seconds=0,
        policy=PrecisionPolicy(budget=ErrorBudget(max_score_error=0.1, max_auc_loss=0.1)),
        placement=PlacementPolicy.named(kind, num_bytes),
        **changes,
    )


def compile_placed(out, kind, spec=SPEC, **changes):
    golden = random_requests(spec)
    return build(
        apply, spec, TABLES, out=out, options=options_of(kind, **changes), params=PARAMS, golden=golden
    )


def requests_for(engine, count=6):
    return [
        RankRequest(engine.spec, dict(zip((f.name for f in SPEC.features), r.columns, strict=True)))
        for r in random_requests(SPEC, seed=5)[:count]
    ]


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """(placement, format of items) → what compile makes of it, each once."""

    @functools.cache
    def compiled(kind, item_format="float32"):
        return compile_placed(tmp_path_factory.mktemp(kind), kind, spec_of(item_format))

    return compiled


WAYS = [("device", "float32"), ("split", "float32"), ("split", "int8"), ("device", "int4")]


@pytest.mark.parametrize(
    ("kind", "item_format"),
    [way if way in (WAYS[0], WAYS[2]) else pytest.param(*way, marks=pytest.mark.sweep) for way in WAYS],
)
def test_scores_are_the_same_wherever_rows_are(kind, item_format, placed):
    ours, theirs = placed(kind, item_format), placed("host", item_format)
    kinds = {p.table: p.kind(SPEC) for p in ours.manifest.placements}
    assert set(kinds) == {"users", "items", "tags"}
    assert (Placement.SPLIT in kinds.values()) == (kind == "split")
    assert theirs.manifest.placements == ()
    with Engine.load(ours.path) as engine, Engine.load(theirs.path) as other:
        for request, same in zip(requests_for(engine), requests_for(other), strict=True):
            np.testing.assert_allclose(
                engine.score(request)["click"], other.score(same)["click"], rtol=0, atol=1e-6
            )
        assert engine.num_request_path_compiles == 0


@pytest.mark.parametrize(("kind", "item_format"), [WAYS[0], WAYS[2]])
def test_row_updates_reach_what_devices_hold(kind, item_format, placed):
    paths = [placed(name, item_format).path for name in (kind, "host")]
    with Engine.load(paths[0]) as ours, Engine.load(paths[1]) as theirs:
        before = [ours.score(request)["click"] for request in requests_for(ours)]
        rng = np.random.default_rng(1)
        rows = rng.integers(0, 100, 3000)  # more than one step of the device's program, many twice
        values = rng.standard_normal((3000, 9), np.float32)
        for engine in (ours, theirs):
            engine.update_rows("items", rows, values)
            engine.update_rows("users", np.array([7]), np.ones((1, 8), np.float32))
            engine.update_rows("users", np.array([], np.int64), np.ones((0, 8), np.float32))
        after = [ours.score(request)["click"] for request in requests_for(ours)]
        expected = [theirs.score(request)["click"] for request in requests_for(theirs)]
        for ours_now, theirs_now in zip(after, expected, strict=True):
            np.testing.assert_allclose(ours_now, theirs_now, rtol=0, atol=1e-6)
        assert max(np.abs(a - b).max(initial=0) for a, b in zip(before, after, strict=True)) > 1e-3
        assert ours.num_request_path_compiles == 0


def test_an_updated_row_is_what_the_reference_scores_with_it(placed):
    changed = TABLES | {"items": np.full((100, 9), 0.5, np.float32)}
    with Engine.load(placed("split").path) as engine:
        engine.update_rows("items", np.arange(100), changed["items"])
        requests = requests_for(engine)
        expected = reference_scores(split_function(apply, PARAMS).reference, SPEC, changed, requests)["click"]
        for request, scores in zip(requests, expected, strict=True):
            np.testing.assert_allclose(engine.score(request)["click"], scores, rtol=0, atol=1e-5)


def test_the_placement_is_told_by_compile_and_inspect(placed):
    result = placed("split")
    users = result.manifest.placements[0]
    console = Console(record=True, width=300, file=io.StringIO())
    show(result, console)
    assert (
        f"table users: {users.num_rows} of 50 rows on each device, {32 * (users.num_rows + 1) / 1e6:.2f} MB; "
        f"ids that it looks up a bag at most: user 1"
    ) in console.export_text()
    assert facts_of(result)["tables"]["users"]["device_rows"] == users.num_rows
    inspected = inspect.run(SimpleNamespace(bundle=str(result.path), no_verify=False, json=True))
    table = inspected["tables"][0]
    assert (table["device_rows"], table["device_capacities"]) == (users.num_rows, {"user": 1})
    assert (table["device_bytes"], table["updatable"]) == (32 * (users.num_rows + 1), True)
    report = (result.path / "report.html").read_text()
    row = re.search(r'<tr><th scope="row">[^\n]*\busers\b[^\n]*</tr>', report)[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
    assert cells[-3:-1] == ["split", str(users.num_rows)]
    assert cells[-1].startswith(f"{32 * (users.num_rows + 1) / 1e3:.1f}")


def test_rows_on_devices_do_not_pass_through_a_program_that_would_copy_them(placed):
    bundle = open_bundle(placed("device").path)
    prepare = device.deserialize_program(bundle.prepare())
    assert [a.shape for a in prepare.in_avals] == [a.shape for a in bundle.params().values()]
    num_made = len(prepare.out_avals)
    assert bundle.manifest.placed_at == tuple(range(num_made, num_made + 3))


def test_a_refresh_keeps_the_placement(placed):
    first = placed("split")
    again = compile_placed(first.path.parents[1], "split")
    assert again.reused == first.manifest.version
    assert again.manifest.placements == first.manifest.placements
    assert compile_placed(first.path.parents[1], "host").reused is None


def test_a_bundle_without_its_device_rows_is_refused(placed, tmp_path):
    path = tmp_path / "placed" / "1"
    shutil.copytree(placed("split").path, path)
    (path / "device_rows.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BundleError, match=r"device_rows\.safetensors"):
        Engine.load(path)


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_the_program_decodes_rows_as_the_host_does(row_format, dim):
    values = np.random.default_rng(dim).standard_normal((20, dim), np.float32)
    table = encode_rows(values, row_format)
    held = DeviceRows(TablePlacement("t", 20, {}))
    places = np.array([[0, 19, 20], [3, 3, 7]], np.int32)
    found = look_up(jax.numpy.asarray(held.array(table)), places, DeviceTable("t", 20, dim, row_format))
    decoded = np.vstack([decode_rows(table), np.zeros((1, dim), np.float32)])
    np.testing.assert_allclose(np.asarray(found), decoded[places], rtol=1e-6)


def requests_reading(bags):
    """One request a bag of tags; every other feature reads row 0."""
    features = {
        "user": np.zeros(1, np.int64),
        "past": Ragged(np.zeros(0, np.int64), np.zeros(1, np.int32)),
        "age": np.zeros((1, 3), np.float32),
        "item": np.zeros(1, np.int64),
        "near": Ragged(np.zeros(0, np.int64), np.zeros(1, np.int32)),
        "sums": Ragged(np.zeros(0, np.int64), np.zeros(1, np.int32)),
        "idle": np.full(1, -1),
    }
    tags = [Ragged(np.array(bag, np.int64), np.array([len(bag)], np.int32)) for bag in bags]
    return [RankRequest(SPEC, features | {"tags": bag}) for bag in tags]


def plan(bags, policy, device_memory=None):
    requests = requests_reading(bags)
    found = plan_placement(SPEC, ("idle",), requests, policy, device_memory=device_memory)
    return {rows.placement.table: rows for rows in found}


def test_the_rows_read_most_are_split_off():
    bags = [[3, 3, 5], [3, 5], [3, 9], [3]]
    policy = PlacementPolicy(kind=Placement.SPLIT, device_bytes=0)
    assert plan(bags, policy) == {}
    # Row 3 of tags is read five times, for 16 bytes; row 0 of users four times, for 32, row 5 of tags twice;
    # row 0 of items four times, for 36. And each table has a row of zeros.
    policy = dataclasses.replace(policy, device_bytes=(32 + 36 + 16) + 16 + 32 + 16)
    held = plan(bags, policy)
    assert {name: rows.numbers.tolist() for name, rows in held.items()} == {"users": [0], "tags": [3, 5]}
    assert held["tags"].placement.capacities == {"tags": 3, "sums": 1}


def test_on_an_accelerator_all_rows_are_placed_if_they_fit():
    sizes = {"users": 51 * 32, "items": 101 * 36, "tags": 41 * 16}
    policy = PlacementPolicy()
    held = plan([[1]], policy, device_memory=2 * sum(sizes.values()))
    assert all(rows.numbers is None for rows in held.values())
    assert set(held) == set(sizes)
    held = plan([[1]], policy, device_memory=2 * sum(sizes.values()) - 2)
    assert held["tags"].numbers.tolist() == [1]
    assert plan([[1]], policy, device_memory=None) == {}


def test_a_trace_says_what_is_hot():
    policy = PlacementPolicy(kind=Placement.SPLIT, trace=requests_reading([[30, 31]]))
    assert plan([[1]], policy)["tags"].numbers.tolist() == [30, 31]


@pytest.mark.parametrize(
    "reads", [np.bincount([30, 31, 31, 7], minlength=40), Ragged(np.array([31, 30, 31, 7]), np.array([3, 1]))]
)
def test_reads_of_a_table_s_rows_say_what_is_hot_and_requests_how_many_a_bag(reads):
    budget = (32 + 36 + 16) + 16  # a row of zeros of each table, and one row of tags
    policy = PlacementPolicy(kind=Placement.SPLIT, device_bytes=budget, row_reads={"tags": reads})
    held = plan([[31, 1, 30]], policy)
    assert {name: rows.numbers.tolist() for name, rows in held.items()} == {"tags": [31]}
    everything = dataclasses.replace(policy, device_bytes=None)
    held = plan([[31, 1, 30]], everything)
    assert held["tags"].numbers.tolist() == [7, 30, 31]
    assert held["tags"].placement.capacities == {"tags": 2, "sums": 1}
    assert held["users"].numbers.tolist() == [0], "of the requests"


@pytest.mark.parametrize(
    ("table", "reads", "message"),
    [
        ("words", np.zeros(40, int), r"table 'words': the model has no such table"),
        ("tags", np.zeros(39, int), "expected 40 counts >= 0, one a row, got 39"),
        ("tags", np.r_[np.ones(39, int), -2], "expected counts >= 0, got -2 for row 39"),
        (
            "tags",
            np.zeros(40),
            r"expected integers \[40\] of reads, or bags of row numbers, got float64 \[40\]",
        ),
        ("tags", "all", "or bags of row numbers, got str"),
        ("tags", Ragged(np.array([3, 40]), np.array([2])), r"expected row numbers in \[0, 40\), got 40"),
    ],
)
def test_reads_that_are_not_of_the_table_are_refused(table, reads, message):
    with pytest.raises(ConfigError, match=message):
        plan([[1]], PlacementPolicy(kind=Placement.SPLIT, row_reads={table: reads}))


def test_build_bundle_takes_the_bytes_and_the_trace_of_a_placement(tmp_path):
    """Of the second build too, which finds an earlier version."""
    reads = np.zeros(40, int)
    reads[[9, 4, 2]] = 1000, 2000, 500
    given = {"tune_seconds": 0, "buckets": [8], "params": PARAMS, "golden": requests_reading([[1], [9, 4]])}
    given |= {"out": tmp_path, "table_placement": "split", "device_table_bytes": 3 * 16 + 16 + 32 + 36}
    bundle = open_bundle(build_bundle(apply, SPEC, TABLES, placement_trace={"tags": reads}, **given))
    assert [(p.table, p.num_rows) for p in bundle.manifest.placements] == [("tags", 3)]
    assert bundle.device_rows()["tags"].tolist() == [2, 4, 9]
    reads[[11, 12, 13]] = 5000
    again = open_bundle(build_bundle(apply, SPEC, TABLES, placement_trace={"tags": reads}, **given))
    assert again.device_rows()["tags"].tolist() == [11, 12, 13]


def test_a_trace_of_tables_is_read_from_files(tmp_path):
    np.save(tmp_path / "counts.npy", np.arange(4))
    np.savez(tmp_path / "two.npz", indices=[5, 6, 7], offsets=[0, 1, 1, 2, 3], lengths=[[1, 0], [1, 1]])
    assert _row_reads(f"tags={tmp_path}/counts.npy")["tags"].tolist() == [0, 1, 2, 3]
    users, items = _row_reads(f"users,items={tmp_path}/two.npz").values()
    assert (users.values.tolist(), items.values.tolist()) == ([5], [6, 7])
    for given, message in (
        (f"users={tmp_path}/two.npz", r"expected the names of 2 different tables, got \['users'\]"),
        (f"users={tmp_path}/none.npy", "can't be read: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            _row_reads(given)


def test_tables_that_do_not_fit_are_refused_with_the_figures():
    policy = PlacementPolicy(kind=Placement.DEVICE, device_bytes=1000)
    with pytest.raises(ConfigError, match="tables take 5924 bytes on a device, of which 1000 are allowed"):
        plan([[1]], policy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PlacementPolicy.named("gpu"),
            "must be one of auto, host, device, split; was 'gpu'",
        ),
        (lambda: PlacementPolicy(device_bytes=-1), "device_bytes must be >= 0; was -1"),
        (
            lambda: PlacementPolicy.named("split", None, [1, 2]),
            r"placement trace: expected requests of the model, one or more, or reads .*, got \[1, 2\]",
        ),
        (lambda: PlacementPolicy.named("split", None, []), r"expected requests .* one or more, .* got \[\]"),
        (lambda: PlacementPolicy.named("split", None, 7), "expected requests of the model, .* got 7"),
        (lambda: PlacementPolicy(kind="host "), "expected a Placement or None"),
        (lambda: BuildOptions(placement="host"), "placement: expected a PlacementPolicy, got 'host'"),
    ],
)
def test_what_is_no_policy_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
