"""Buffers, replay arithmetic, timing by a fake clock, the compile cache and XLA's options."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shop
from jax import export

from xlarank import device
from xlarank.compiler import random_requests
from xlarank.device.programs import has_int8
from xlarank.errors import ConfigError, ModelError, VerifyError
from xlarank.host import Gatherer
from xlarank.spec import Bucket, BucketLadder, Leaf, PlatformOptions, Precision, Scope, Signature

LADDER = BucketLadder.of_rows((4, 64))
SIGNATURE = Signature.of_model(shop.SPEC)


@pytest.mark.parametrize(
    ("facts", "precision"),
    [
        ({"platform": "cpu"}, Precision.BFLOAT16),
        ({"platform": "gpu", "compute_capability": "7.5"}, Precision.FLOAT16),  # T4
        ({"platform": "gpu", "compute_capability": "8.0"}, Precision.BFLOAT16),  # A100
        ({"platform": "gpu", "compute_capability": "10.0"}, Precision.BFLOAT16),
        ({"platform": "gpu"}, Precision.BFLOAT16),
    ],
)
def test_the_16_bit_format_is_one_that_the_device_multiplies_in(facts, precision):
    assert device.half_precision(types.SimpleNamespace(**facts)) is precision


def test_buffers_are_aligned_and_hold_every_bucket_in_one_memory():
    buffers = device.BatchBuffers(SIGNATURE, LADDER)
    for bucket in LADDER.buckets:
        leaves = buffers.leaves(bucket)
        assert list(leaves) == [leaf.name for leaf in SIGNATURE.leaves]
        for leaf in SIGNATURE.leaves:
            array = leaves[leaf.name]
            assert array.shape == leaf.shape(bucket)
            assert array.dtype == leaf.dtype
            assert array.ctypes.data % 64 == 0
            assert array.flags.c_contiguous
        assert np.shares_memory(leaves.words, buffers.leaves(Bucket(64, 64)).words)
    assert buffers.num_bytes == buffers.leaves(Bucket(64, 64)).words.nbytes


def test_a_ring_hands_out_each_buffer_once_until_it_comes_back():
    ring = device.BufferRing(SIGNATURE, LADDER, 2)
    first, second = ring.acquire(), ring.acquire()
    assert first is not second
    ring.release(first)
    assert ring.acquire() is first


def test_scores_do_not_change_when_the_buffer_is_written_again():
    leaf = Leaf("candidate", Scope.CANDIDATE, (3,), "float32")
    signature = Signature((leaf, Leaf("request_of_row", Scope.CANDIDATE, (), "int32")), {}, ("y",))
    bucket = Bucket(64, 1)
    replica = replica_of(
        lambda prepared, context, candidates, rows: {"y": candidates[0].sum(1)}, signature, bucket
    )
    buffers = device.BatchBuffers(signature, BucketLadder((bucket,)))
    leaves = buffers.leaves(bucket)
    leaves["candidate"][:] = 1.0
    leaves["request_of_row"][:] = 0
    scores = replica.run(bucket, leaves)["y"]
    leaves["candidate"][:] = 7.0
    np.testing.assert_array_equal(scores, np.full(64, 3.0))


def replica_of(program, signature, bucket, params=()):
    avals = (
        tuple(jax.ShapeDtypeStruct(p.shape, p.dtype) for p in params),
        tuple(jax.ShapeDtypeStruct(leaf.shape(bucket), leaf.dtype) for leaf in signature.context_leaves),
        tuple(jax.ShapeDtypeStruct(leaf.shape(bucket), leaf.dtype) for leaf in signature.candidate_leaves),
        jax.ShapeDtypeStruct((bucket.rows,), np.int32),
    )
    data = bytes(export.export(jax.jit(program))(*avals).serialize())
    takes = tuple(range(len(params)))
    programs = {bucket: device.BucketProgram(device.deserialize_program(data), takes)}
    return device.Replica(device.devices()[0], signature, programs, params)


@pytest.mark.parametrize("num_rows", [8, 128, 500])
def test_a_sum_over_an_expanded_context_is_right_on_every_run(num_rows):
    """jaxlib 0.11 and later get it wrong when YNNPACK may take reductions."""
    signature = Signature(
        (
            Leaf("h", Scope.CONTEXT, (4, 16), "float32"),
            Leaf("h.mask", Scope.CONTEXT, (4,), "bool"),
            Leaf("candidate", Scope.CANDIDATE, (16,), "float32"),
            Leaf("request_of_row", Scope.CANDIDATE, (), "int32"),
        ),
        {},
        ("y",),
    )
    bucket = Bucket(num_rows, 1)

    def program(prepared, context, candidates, rows):
        history, mask = (jnp.broadcast_to(leaf, (num_rows, *leaf.shape[1:])) for leaf in context)
        total = (history * mask[..., None]).sum(axis=1) + candidates[0]  # [B, 16]
        return {"y": total.sum(axis=1)}

    replica = replica_of(program, signature, bucket)
    rng = np.random.default_rng(0)
    leaves = device.BatchBuffers(signature, BucketLadder((bucket,))).leaves(bucket)
    leaves["h"][:] = rng.standard_normal((1, 4, 16))
    leaves["h.mask"][:] = [[True, True, False, False]]
    leaves["candidate"][:] = rng.standard_normal((num_rows, 16))
    leaves["request_of_row"][:] = 0
    expected = leaves["h"][0, :2].sum() + leaves["candidate"].sum(axis=1)
    for _ in range(10):
        np.testing.assert_allclose(replica.run(bucket, leaves)["y"], expected, atol=1e-4)


@pytest.fixture(scope="module")
def golden():
    requests = random_requests(shop.SPEC, 3, num_candidates=5, seed=1)
    scores = {
        task.name: [np.arange(5, dtype=np.float32) + 10 * number for number in range(3)]
        for task in shop.SPEC.tasks
    }
    return device.GoldenReplay(Gatherer(shop.SPEC, shop.make_tables()), requests, scores, 64), requests


@pytest.mark.parametrize("bucket", LADDER.buckets, ids=str)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_golden_batch_holds_the_rows_whose_scores_it_names(golden, bucket, start):
    replay, requests = golden
    buffers = device.BatchBuffers(SIGNATURE, LADDER)
    prices = {
        tuple(price): 10.0 * number + row
        for number, request in enumerate(requests)
        for row, price in enumerate(request.columns[4])
    }
    for num_rows in {1, 2, bucket.rows // 2, bucket.rows - 1, bucket.rows}:
        leaves = buffers.leaves(bucket)
        expected = replay.fill(leaves, bucket, num_rows, start)
        assert expected["click"].shape == (num_rows,)
        slot = SIGNATURE.slots["price"]
        rows = leaves["candidate"][:num_rows, slot.begin : slot.end]
        np.testing.assert_array_equal([prices[tuple(row)] for row in rows], expected["click"])
        owners = leaves["request_of_row"][:num_rows]
        np.testing.assert_array_equal((expected["click"] // 10).astype(int), (owners + start) % 3)


def test_errors_are_absolute_for_probabilities_and_relative_for_regressions():
    actual = {"click": np.array([0.5, 0.1, 9.0]), "spend": np.array([100.0, 0.5, 9.0])}
    expected = {"click": np.array([0.25, 0.1]), "spend": np.array([80.0, 0.25])}
    quarter = device.ScoreError(0.25, 0.25)
    assert device.score_errors(shop.SPEC, actual, expected) == {"click": quarter, "spend": quarter}
    actual["spend"][0] = np.nan
    infinite = device.ScoreError(float("inf"), float("inf"))
    assert device.score_errors(shop.SPEC, actual, expected)["spend"] == infinite


def test_the_99th_percentile_is_that_of_all_rows_and_never_milder_than_one_of_them():
    errors = np.arange(1000) / 1000
    assert device.ScoreError.of(errors) == device.ScoreError(0.99, 0.999)
    assert device.ScoreError.of(np.array([0.0, 0.5])) == device.ScoreError(0.5, 0.5)
    assert device.ScoreError.of(np.zeros(0)) == device.ScoreError(0.0, 0.0)


def test_every_golden_row_is_scored_once_in_order_whatever_the_bucket(golden):
    replay, requests = golden
    slot = SIGNATURE.slots["price"]

    class Echo:
        """Answers a row's price, and 0 for rows that nobody asked for."""

        def run(self, bucket, leaves):
            return {
                "click": leaves["candidate"][:, slot.begin],
                "spend": leaves["candidate"][:, slot.end - 1],
            }

    prices = np.concatenate([request.columns[4] for request in requests])
    buffers = device.BatchBuffers(SIGNATURE, LADDER)
    for bucket in LADDER.buckets:
        scores = replay.score_all(Echo(), bucket, buffers.leaves(bucket))
        np.testing.assert_array_equal(scores["click"], prices[:, 0])
        assert scores["spend"].shape == replay.expected["spend"].shape == (15,)


def test_things_timed_in_turns_run_equally_often_within_the_budget():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock, order = Clock(), []

    def run(name, seconds):
        order.append(name)
        clock.now += seconds

    runs = {"a": lambda: run("a", 0.001), "b": lambda: run("b", 0.002)}
    seconds = device.time_in_turns(runs, budget_seconds=0.0305, clock=clock)
    assert order == ["a", "b"] * (1 + len(seconds["a"]))
    assert len(seconds["a"]) == len(seconds["b"]) == 11
    np.testing.assert_allclose(seconds["b"], 0.002)
    seconds = device.time_in_turns({"a": lambda: run("a", 9.0)}, budget_seconds=0.03, clock=clock)
    assert len(seconds["a"]) == 7, "a few runs whatever they take"


def test_an_error_beyond_the_tolerance_names_task_bucket_and_size():
    errors = {"click": 1e-6, "spend": 2e-5}
    device.check_errors(shop.SPEC, "bucket 8x1", errors, {"click": 1e-5, "spend": 3e-5}, "somewhere")
    message = "task 'spend', bucket 8x1, somewhere: .* by 2e-05, expected 1e-05 or less"
    with pytest.raises(VerifyError, match=message):
        device.check_errors(shop.SPEC, "bucket 8x1", errors, {"click": 1e-5, "spend": 1e-5}, "somewhere")
    nothing = dict.fromkeys(errors, float("nan"))
    with pytest.raises(VerifyError, match="by nan"):
        device.check_errors(shop.SPEC, "", nothing, {"click": 1e-5, "spend": 1e-5}, "")


def test_a_profile_is_the_median_of_counted_runs_by_the_clock_handed_in():
    ticks = {Bucket(4, 1): [9.0, 1.0, 5.0, 2.0, 3.0, 4.0, 8.0]}

    class Replica:
        executables = ticks
        num_runs = 0

        def run(self, bucket, leaves):
            self.num_runs += 1
            if self.num_runs > 1:  # the first is not counted
                clock.now += 0.001 * ticks[bucket][self.num_runs - 2]

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    class Golden:
        def fill(self, leaves, bucket, num_rows):
            assert num_rows == bucket.rows

    clock, replica = Clock(), Replica()
    buffers = device.BatchBuffers(SIGNATURE, BucketLadder((Bucket(4, 1),)))
    profile = device.measure_profile(replica, Golden(), buffers, clock=clock)  # type: ignore[arg-type]
    assert replica.num_runs == 8
    np.testing.assert_allclose(profile.seconds_of(Bucket(4, 1)), 0.004)


def test_a_slow_spell_while_buckets_are_timed_is_in_no_buckets_time():
    """A third of all runs, one after the other, take four times as long: of each bucket less than half."""
    buckets = [Bucket(4, 1), Bucket(8, 1), Bucket(16, 1)]

    class Replica:
        executables = buckets
        now, num_runs = 0.0, 0

        def run(self, bucket, leaves):
            self.now += 1e-4 * bucket.rows * (4 if 8 <= self.num_runs < 16 else 1)
            self.num_runs += 1

    class Golden:
        def fill(self, leaves, bucket, num_rows):
            pass

    replica, told = Replica(), []
    buffers = device.BatchBuffers(SIGNATURE, BucketLadder(tuple(buckets)))
    profile = device.measure_profile(
        replica,  # type: ignore[arg-type]
        Golden(),  # type: ignore[arg-type]
        buffers,
        clock=lambda: replica.now,
        on_bucket=told.append,
    )
    assert sorted(told) == buckets
    for bucket in buckets:
        assert profile.seconds_of(bucket) == pytest.approx(1e-4 * bucket.rows)


def test_a_compile_is_counted_inside_the_request_path_only():
    counter = device.CompileCounter()
    with counter.request_path():
        jax.jit(lambda x: x * 3.25 + 17)(1.0)
    inside = counter.count
    assert inside >= 1
    jax.jit(lambda x: x * 4.25 + 18)(1.0)
    assert counter.count == inside


def test_devices_that_are_not_there_are_refused():
    there = len(device.devices())
    with pytest.raises(ConfigError, match=rf"expected 1 to {there} devices, got {there + 1}"):
        device.devices(there + 1)
    with pytest.raises(
        ConfigError, match=rf"{there + 1} devices were asked for after JAX started with {there}"
    ):
        device.configure(num_devices=there + 1)
    with pytest.raises(ConfigError, match="num_devices must be >= 1; was 0"):
        device.configure(num_devices=0)


def test_devices_are_those_of_the_platforms_that_are_named():
    there = jax.local_devices(backend="cpu")
    assert device.devices(platforms=[PlatformOptions(name="cpu")]) == there
    assert device.devices(platforms=[PlatformOptions(name="cpu", devices=1)]) == there[:1]
    assert device.platforms_of(there[:1]) == [PlatformOptions(name="cpu", devices=len(there))]
    before = jax.config.jax_compilation_cache_dir
    device.configure(platforms=[PlatformOptions(name="cpu", devices=1)])
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize(
    ("platforms", "message"),
    [
        ("nowhere", r"platform 'nowhere': expected one that JAX has here: .*nowhere"),
        ("cpu,devices=99", r"99 devices were asked for after JAX started with \d+; ask before"),
        ("cpu cpu,devices=1", r"expected each device once, got some twice of cpu, cpu,devices=1"),
    ],
)
def test_platforms_that_have_no_such_devices_are_refused(platforms, message):
    with pytest.raises(ConfigError, match=message):
        device.configure(platforms=[PlatformOptions.parse(text) for text in platforms.split()])


def test_accelerators_that_are_not_there_are_refused(monkeypatch):
    there = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda *, backend: there[:1])
    with pytest.raises(ConfigError, match=r"platform 'cuda': expected 2 devices, JAX has 1"):
        device.devices(platforms=[PlatformOptions(name="cuda", devices=2)])


def test_a_program_of_another_platform_is_refused():
    exported = export.export(jax.jit(lambda x: x), platforms=["cuda"])(jax.ShapeDtypeStruct((), np.float32))
    text = "expected a program for cpu, got one for cuda; serve it there, or compile the model on cpu"
    with pytest.raises(ModelError, match=f"xlarank_prepare: {text}"):
        device.compile_prepare(exported, jax.devices()[0])
    with pytest.raises(ModelError, match=f"xlarank_program: {text}"):
        device.compile_row_program(exported, jax.devices()[0])


def test_a_gpu_multiplies_int8_without_triton():
    """Which gets some sizes wrong there (jaxlib 0.11.2)."""
    shapes = [jax.ShapeDtypeStruct(shape, np.int8) for shape in ((8, 7), (7, 5))]
    assert has_int8(jax.jit(jax.lax.dot).lower(*shapes))
    for dtype in (np.uint8, np.int32, jax.numpy.bfloat16):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((8, 7), (7, 5))]
        assert not has_int8(jax.jit(jax.lax.dot).lower(*shapes))
    name = "xla_gpu_enable_triton_gemm"
    assert device.compiler_options("gpu", has_int8=True)[name] is False
    assert all(name not in device.compiler_options(*given) for given in (("gpu",), ("cpu",)))
    assert device.compiler_options("cpu", has_int8=True) == device.compiler_options("cpu")


def test_the_fingerprint_says_what_compiled_code_depends_on():
    found = device.fingerprint()
    assert found["jax"] == jax.__version__
    assert {"jaxlib", "platform_version", "xla_flags", "device_kind", "machine", "cpu_features"} <= set(found)
    assert all(isinstance(value, str) for value in found.values())


def test_cached_code_does_not_depend_on_where_the_cache_lies(tmp_path):
    leaf = Leaf("candidate", Scope.CANDIDATE, (3,), "float32")
    signature = Signature((leaf, Leaf("request_of_row", Scope.CANDIDATE, (), "int32")), {}, ("y",))
    names = []
    before = jax.config.jax_compilation_cache_dir
    for folder in ("first", "second"):
        with device.compile_cache_at(tmp_path / folder):
            replica_of(
                lambda prepared, context, candidates, rows: {"y": candidates[0].sum(1) * 1.125},
                signature,
                Bucket(8, 1),
            )
        names.append(sorted(file.name for file in (tmp_path / folder).glob("*xlarank_program*-cache")))
    assert names[0] == names[1]
    assert len(names[0]) == 1
    assert jax.config.jax_compilation_cache_dir == before


def test_seeding_copies_what_is_missing_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a-cache").write_bytes(b"new")
    (source / "b-cache").write_bytes(b"your")
    with device.compile_cache_at(target):
        (target / "b-cache").write_bytes(b"mine")
        device.seed_compile_cache(source.iterdir())
    assert sorted((f.name, f.read_bytes()) for f in target.iterdir()) == [
        ("a-cache", b"new"),
        ("b-cache", b"mine"),
    ]


def test_seeding_replaces_what_may_have_been_cut_off(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a-cache").write_bytes(b"whole")
    with device.compile_cache_at(target):
        (target / "a-cache").write_bytes(b"who")
        device.seed_compile_cache(source.iterdir())
    assert [(f.name, f.read_bytes()) for f in target.iterdir()] == [("a-cache", b"whole")]


@pytest.mark.parametrize("num_bytes", [0, 1, 100])
def test_code_that_a_killed_process_has_cut_off_is_compiled_once_more_and_replaced(tmp_path, num_bytes):
    """Whatever reads the cache first: as JAX leaves it, no later start would find it again."""
    cpu = jax.devices("cpu")[0]

    def compile_one():
        before = device.num_compiled()
        compiled = device.compile_update(cpu, (7, 3), np.dtype(np.float32))
        return compiled, device.num_compiled() - before

    with device.compile_cache_at(tmp_path):
        compile_one()
        (file,) = tmp_path.glob("*xlarank_update*-cache")
        whole = len(file.read_bytes())
        file.write_bytes(file.read_bytes()[:num_bytes])
        compiled, num_compiled = compile_one()
        assert num_compiled >= 1
        assert compile_one()[1] == 0
        assert len(file.read_bytes()) > 0.9 * whole
    places, rows = np.full(1024, 2, np.int32), np.ones((1024, 3), np.float32)
    found = np.asarray(compiled(np.zeros((7, 3), np.float32), places, rows))
    np.testing.assert_array_equal(found, np.eye(7, dtype=np.float32)[:, 2:3] * np.ones(3, np.float32))


# A process of its own, so that nothing else moves its memory. Prints the peak and final growth in bytes.
PLACED = """
import re
import numpy as np
from xlarank import device
from xlarank.host import DeviceRows, Gatherer
from xlarank.spec import ModelSpec, TablePlacement

def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

device.configure(num_devices=2)
devices = device.devices(2)
names = ["a", "b", "c"]
spec = ModelSpec.from_dict({
    "name": "placed",
    "features": [{"name": f"{n}_id", "kind": "id", "scope": "candidate", "table": n} for n in names],
    "tables": [{"name": n, "rows": 1 << 17, "dim": 64} for n in names],
    "tasks": [{"name": "click"}],
})
tables = {n: np.full((1 << 17, 64), i + 1, np.float32) for i, n in enumerate(names)}
rows = [DeviceRows(TablePlacement(n, 1 << 17, {f"{n}_id": 1})) for n in names]
gatherer = Gatherer(spec, tables, lines_ahead=0, device_rows=rows)
device.place_tables(devices, [np.ones((2, 64), np.float32)])
before = status("VmRSS")
placed = device.place_tables(devices, gatherer.device_arrays())
for own, target in zip(placed, devices, strict=True):
    for i, array in enumerate(own):
        assert array.devices() == {target}
        values = np.asarray(array)
        assert (values[[0, -2], 5] == i + 1).all() and (values[-1] == 0).all()
final = status("VmRSS")  # first: the peak is no less than what there was before it is read
print(status("VmHWM") - before, final - before)
"""


def test_placing_tables_on_cpu_devices_takes_their_bytes_once():
    ended = subprocess.run(
        [sys.executable, "-c", PLACED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    peak, final = (int(number) for number in ended.stdout.split())
    num_bytes = 3 * (32 << 20)
    assert num_bytes <= final <= peak <= 1.1 * num_bytes
