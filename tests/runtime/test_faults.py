"""Devices that fail, lie or hang, and requests that make any device fail, through real engines."""

import re
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import shop
from executors import Faulty, wrap

from xlarank.bundle import read_requests
from xlarank.compiler import random_requests
from xlarank.errors import ConfigError, DeadlineError, ExecutionError, UnavailableError
from xlarank.runtime import Captures, DevicePool, Engine, workload
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.isolation import Culprit
from xlarank.spec import CaptureConfig, FaultConfig, RankRequest, RequestOptions
from xlarank.spec.serving import QueueConfig

QUICK = FaultConfig(watchdog_seconds=0.5, probe_seconds=0.01)


@pytest.fixture
def serve(repository):
    """Gives an engine on some devices, and its executors, which do as they are told."""
    opened = []

    def serve(num_devices, faults=QUICK, **options):
        pool = DevicePool(num_devices, faults=faults)
        engine = Engine.load(repository / "shop", pool=pool, **options)
        opened.append((engine, pool))
        return engine, wrap(engine, Faulty)

    yield serve
    for engine, pool in opened:
        for executor in engine._execution._executors:
            executor.fault = None
        engine.close()
        pool.close()


def broken(*_):
    raise RuntimeError("the device is broken")


def all_nan(bucket, leaves, scores):
    return {task: np.full_like(values, np.nan) for task, values in scores.items()}


def wait_for_states(pool, *expected):
    """Until the pool's threads have done what they must; whoever waits for work is told of it."""
    with pool._work:
        assert pool._work.wait_for(lambda: [s.state for s in pool._health.statuses()] == list(expected), 60)


def states(engine):
    return [status.state for status in engine._pool.statuses()]


def requests_of(count, rows=5, seed=0):
    return random_requests(shop.SPEC, count, num_candidates=rows, seed=seed)


def too_few_rows(bucket, leaves, scores):
    return {task: values[:3] for task, values in scores.items()}


def two_columns(bucket, leaves, scores):
    return {task: np.stack([values, values], axis=1) for task, values in scores.items()}


def other_tasks(bucket, leaves, scores):
    return {f"other {task}": values for task, values in scores.items()}


def no_tasks(bucket, leaves, scores):
    return {}


def doubles(bucket, leaves, scores):
    return {task: values.astype(np.float64) for task, values in scores.items()}


def nothing(bucket, leaves, scores):
    return None


def lists(bucket, leaves, scores):
    return {task: values.tolist() for task, values in scores.items()}


MALFORMED = [too_few_rows, two_columns, other_tasks, no_tasks, doubles, nothing, lists]


@pytest.mark.parametrize("fault", [broken, all_nan, *MALFORMED])
def test_a_batch_that_fails_on_one_device_is_answered_by_another_and_the_first_is_quarantined(serve, fault):
    engine, (first, _) = serve(2)
    requests = requests_of(20)
    expected = [engine.score(request) for request in requests]
    first.fault = fault
    futures = [engine.submit(request) for request in requests]
    for future, scores in zip(futures, expected, strict=True):
        np.testing.assert_allclose(future.result(60).scores["click"], scores["click"], atol=1e-6)
    # Enough batches that the broken one must have been asked.
    while states(engine)[0] is not DeviceState.QUARANTINED:
        engine.score(requests[0])
    assert states(engine)[1] is DeviceState.HEALTHY
    assert engine.fault is None
    assert engine._pool.statuses()[0].num_quarantines == 1
    first.fault = None  # it works again: a probe finds out
    wait_for_states(engine._pool, DeviceState.HEALTHY, DeviceState.HEALTHY)


PRICE = [feature.name for feature in shop.SPEC.features].index("price")
POISON = np.float32(77.25)


def poisoned(request, row):
    """The request with a mark in one of its rows."""
    columns = dict(zip([feature.name for feature in shop.SPEC.features], request.columns, strict=True))
    columns["price"] = columns["price"].copy()
    columns["price"][row, 1] = POISON
    return RankRequest(shop.SPEC, columns)


def nan_where_poisoned(bucket, leaves, scores):
    """NaN for rows with the mark, wherever and with whomever they run."""
    rows = np.zeros(bucket.rows, bool)
    for leaf in leaves.values():
        if leaf.ndim == 2 and len(leaf) == bucket.rows and leaf.dtype == np.float32:
            rows |= (leaf == POISON).any(axis=1)
    for values in scores.values():
        values[rows] = np.nan
    return scores


def raise_where_poisoned(bucket, leaves, scores):
    if any(np.isnan(values).any() for values in nan_where_poisoned(bucket, leaves, scores).values()):
        raise RuntimeError("overflow")
    return scores


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            nan_where_poisoned,
            r"model 'shop', task 'click', bucket 8x1: expected finite scores, got 1 of 1 that",
        ),
        (raise_where_poisoned, "overflow"),
    ],
)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_requests_that_fail_everywhere_fail_alone_and_no_device_is_quarantined(
    serve, num_devices, tmp_path, fault, message
):
    captures = Captures(CaptureConfig(folder=tmp_path / "kept"))
    engine, executors = serve(num_devices, captures=captures)
    requests = requests_of(12)
    expected = [engine.score(request) for request in requests]
    requests[4], requests[9] = poisoned(requests[4], 3), poisoned(requests[9], 0)
    for executor in executors:
        executor.fault = fault
    futures = [engine.submit(request) for request in requests]
    for number, row in ((4, 3), (9, 0)):
        with pytest.raises(
            ExecutionError,
            match=rf"model 'shop': the request fails on every device, by row {row}: {message}",
        ):
            futures[number].result(60)
    for number, (future, scores) in enumerate(zip(futures, expected, strict=True)):
        if number not in (4, 9):
            np.testing.assert_allclose(future.result(60).scores["click"], scores["click"], atol=1e-6)
    wait_for_states(engine._pool, *[DeviceState.HEALTHY] * len(executors))
    assert sum(status.num_quarantines for status in engine._pool.statuses()) == 0
    kept = {id(capture.request) for capture in captures.kept()}
    assert kept == {id(requests[4]), id(requests[9])}
    captures.close()
    files = sorted((tmp_path / "kept").glob("shop-1-fault-*.safetensors"))
    again = [read_requests(file, shop.SPEC)[0][0].columns[PRICE] for file in files]
    assert sorted(int(np.argwhere(price == POISON)[0, 0]) for price in again) == [0, 3]


class Once:
    """A fault of the first run alone."""

    def __init__(self, fault):
        self.fault, self.num_runs = fault, 0

    def __call__(self, bucket, leaves, scores):
        self.num_runs += 1
        return self.fault(bucket, leaves, scores) if self.num_runs == 1 else scores


@pytest.mark.parametrize("fault", [broken, all_nan])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_lone_device_runs_a_batch_again_that_failed_but_once(serve, rows, fault):
    captures = Captures()
    engine, (only,) = serve(1, captures=captures)
    request = requests_of(1, rows)[0]
    expected = engine.score(request)
    only.fault = Once(fault)
    np.testing.assert_array_equal(engine.score(request)["click"], expected["click"])
    assert only.fault.num_runs > 2  # golden requests between
    assert engine._pool.statuses()[0].num_quarantines == 0
    assert captures.kept() == []


def test_requests_whose_deadline_passes_while_the_fault_is_looked_for_are_not_run_again(serve, monkeypatch):
    """Of a batch of three one is at fault; another's time is over once all have run twice."""
    engine, (only,) = serve(1)
    good, late, bad = requests_of(3)
    expected = engine.score(good)
    runs, now = [], [time.monotonic()]
    monkeypatch.setattr(workload, "time", SimpleNamespace(monotonic=lambda: now[0]))
    has_come, gate = threading.Event(), threading.Event()

    def fault(bucket, leaves, scores):
        has_come.set()
        assert gate.wait(60)
        runs.append(bucket.rows)
        now[0] += 1000 * (len(runs) == 3)
        return raise_where_poisoned(bucket, leaves, scores)

    only.fault, engine._workload.probe = fault, lambda device_index: None
    blocker = engine.submit(good)
    assert has_come.wait(60)
    futures = [
        engine.submit(good),
        engine.submit(late, RequestOptions(deadline=now[0] + 500)),
        engine.submit(poisoned(bad, 0)),
    ]
    gate.set()
    blocker.result(60)
    np.testing.assert_allclose(futures[0].result(60).scores["click"], expected["click"], atol=1e-6)
    with pytest.raises(DeadlineError, match="model 'shop': the request was queued past its deadline"):
        futures[1].result(60)
    with pytest.raises(ExecutionError, match="by row 0: overflow"):
        futures[2].result(60)
    assert runs[:3] == [8, 128, 128]  # alone, then all three twice
    assert set(runs[3:]) == {8}
    (queue,) = engine._pool.snapshot().queues
    assert queue.refusals == dict.fromkeys(queue.refusals, 0) | {"late": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (broken, "the device is broken"),
        (
            too_few_rows,
            r"model 'shop', bucket 8x\d: expected \{'click': 'float32\[8\]', 'spend': 'float32\[8\]'\}, "
            r"got \{'click': 'float32\[3\]', 'spend': 'float32\[3\]'\}",
        ),
        (two_columns, r"model 'shop', .*, got \{'click': 'float32\[8, 2\]'"),
        (other_tasks, r"model 'shop', .*, got \{'other click': 'float32\[8\]'"),
        (no_tasks, r"model 'shop', .*, got \{\}"),
        (doubles, r"model 'shop', .*, got \{'click': 'float64\[8\]'"),
        (nothing, r"model 'shop', .*, got NoneType"),
        (lists, r"model 'shop', .*, got \{'click': 'list', 'spend': 'list'\}"),
    ],
)
def test_a_lone_device_that_fails_its_golden_replay_is_quarantined_and_the_server_says_why(
    serve, fault, reason
):
    engine, (only,) = serve(1)
    requests = requests_of(3)
    expected = engine.score(requests[0])
    only.fault = fault
    with pytest.raises(UnavailableError, match=rf"no device is healthy .*{reason}"):
        engine.score(requests[0])
    assert re.search(rf"no device is healthy \(0: {reason}", engine.fault)
    with pytest.raises(UnavailableError, match="model 'shop': no device is healthy"):
        engine.submit(requests[1])
    only.fault = None
    wait_for_states(engine._pool, DeviceState.HEALTHY)
    assert engine.fault is None
    np.testing.assert_array_equal(engine.score(requests[0])["click"], expected["click"])


def test_wrong_but_finite_golden_scores_keep_a_device_quarantined(serve):
    engine, (only,) = serve(1)
    only.fault = all_nan
    with pytest.raises(UnavailableError):
        engine.score(requests_of(1)[0])
    tried = threading.Semaphore(0)

    def off_by_a_half(bucket, leaves, scores):
        tried.release()
        return {task: values + np.float32(0.5) for task, values in scores.items()}

    only.fault = off_by_a_half
    # A probe runs up to 4 batches in each of 3 buckets; a second one comes only if the first has failed.
    for _ in range(3 * 4 + 1):
        assert tried.acquire(timeout=60)
    assert states(engine) == [DeviceState.QUARANTINED]


@pytest.mark.parametrize(("fault", "state"), [(all_nan, "quarantined"), (None, "healthy")])
def test_once_tables_have_changed_a_probe_still_wants_finite_scores(serve, fault, state):
    """Golden scores are those of the tables as they were loaded: any others do, but not NaN."""
    engine, (only,) = serve(1)
    engine._gatherer._has_updates = True
    probed = threading.Event()

    def off_by_a_half(bucket, leaves, scores):
        return {task: values + np.float32(0.5) for task, values in scores.items()}

    def probe(device_index):
        try:
            engine._execution.probe(device_index)
        finally:
            probed.set()

    engine._workload.probe = probe
    only.fault = all_nan
    with pytest.raises(UnavailableError):
        engine.score(requests_of(1)[0])
    only.fault = fault or off_by_a_half
    probed.clear()
    assert probed.wait(60)
    if state == "healthy":
        wait_for_states(engine._pool, DeviceState.HEALTHY)
    assert states(engine) == [state]


class Hang:
    """Holds a device in its next batch until told."""

    def __init__(self):
        self.has_come, self.go_on = threading.Event(), threading.Event()

    def __call__(self, bucket, leaves, scores):
        self.has_come.set()
        assert self.go_on.wait(60)
        return scores


def test_a_device_that_hangs_is_quarantined_and_its_batch_answered_by_another(serve):
    engine, (first, _) = serve(2)
    requests = requests_of(8)
    expected = [engine.score(request) for request in requests]
    hang = first.fault = Hang()
    futures = []
    while not hang.has_come.is_set():
        futures.append(engine.submit(requests[len(futures) % 8]))
    for number, future in enumerate(futures):
        scores = future.result(60).scores
        np.testing.assert_allclose(scores["click"], expected[number % 8]["click"], atol=1e-6)
    assert states(engine) == [DeviceState.QUARANTINED, DeviceState.HEALTHY]
    assert engine._pool.statuses()[0].reason == "a batch took more than 0.5 s"
    first.fault = None
    hang.go_on.set()  # what it brings back is thrown away; then it is probed
    wait_for_states(engine._pool, DeviceState.HEALTHY, DeviceState.HEALTHY)
    samples = {name: value for name, _, value in engine.metrics.samples()}
    assert samples["nv_inference_request_success"] == 8 + len(futures)


def test_a_batch_that_hangs_two_devices_is_given_up_and_kept_and_spares_the_third(serve, caplog):
    captures = Captures()
    engine, executors = serve(min(3, len(jax.devices())), captures=captures)
    hangs = [Hang() for _ in executors]
    for executor, hang in zip(executors, hangs, strict=True):
        executor.fault = hang
    (request,) = requests_of(1)
    with pytest.raises(ExecutionError, match=r"model 'shop': a batch took more than 0\.5 s"):
        engine.submit(request).result(60)
    assert sum(hang.has_come.is_set() for hang in hangs) == 2
    assert [(kept.request, kept.detail) for kept in captures.kept()] == [
        (request, "model 'shop': a batch took more than 0.5 s")
    ]
    assert re.search(
        r"device \d is quarantined: a batch took more than 0.5 s of model 'shop' version 1", caplog.text
    )
    for executor, hang in zip(executors, hangs, strict=True):
        executor.fault = None
        hang.go_on.set()
    wait_for_states(engine._pool, *[DeviceState.HEALTHY] * len(executors))


def test_closing_leaves_a_device_that_hangs_behind(repository):
    pool = DevicePool(1, faults=QUICK)
    engine = Engine.load(repository / "shop", pool=pool)
    (only,) = wrap(engine, Faulty)
    hang = only.fault = Hang()
    future = engine.submit(requests_of(1)[0])
    with pytest.raises(ExecutionError, match=r"model 'shop': a batch took more than 0\.5 s"):
        future.result(60)
    is_idle = []
    with pool.idle.told(is_idle.append):
        assert is_idle == [True]  # nothing is served: who keeps out of the way of requests needn't
    engine.close()
    pool.close()
    hang.go_on.set()


def test_a_model_that_was_closed_while_its_batch_is_judged_harms_no_device(repository):
    """Its callers have left, so nothing keeps it open; the device's thread and the timer must survive."""
    pool = DevicePool(1, faults=QUICK)
    leaving = Engine.load(repository / "shop", pool=pool)
    (only,) = wrap(leaving, Faulty)
    hang = only.fault = Hang()
    future = leaving.submit(requests_of(1)[0])
    assert hang.has_come.wait(60)
    assert future.cancel()
    leaving.close()
    with Engine.load(repository / "shop", pool=DevicePool(1)) as other:
        expected = other.score(requests_of(1)[0])
    wait_for_states(pool, DeviceState.QUARANTINED)
    hang.go_on.set()
    wait_for_states(pool, DeviceState.HEALTHY)
    with Engine.load(repository / "shop", pool=pool) as staying:
        np.testing.assert_array_equal(staying.score(requests_of(1)[0])["click"], expected["click"])
    pool.close()


def test_a_callback_that_waits_for_its_own_device_does_not_stop_it_for_good(serve):
    engine, (only,) = serve(1)
    request = requests_of(1)[0]
    expected = engine.score(request)
    hang = only.fault = Hang()
    future, told, errors = engine.submit(request), threading.Event(), []

    def score_again(_):
        try:
            engine.score(request)
        except UnavailableError as error:
            errors.append(str(error))
        told.set()

    future.add_done_callback(score_again)
    hang.go_on.set()
    assert told.wait(60)
    assert errors == ["no device is healthy (0: answering a batch took more than 0.5 s)"]
    np.testing.assert_array_equal(future.result(60).scores["click"], expected["click"])
    wait_for_states(engine._pool, DeviceState.HEALTHY)
    np.testing.assert_array_equal(engine.score(request)["click"], expected["click"])


def test_the_log_hears_of_requests_at_fault_once_a_minute(caplog):
    captures, now = Captures(), [100.0]
    metrics = execution = SimpleNamespace()
    model = workload.ModelWorkload(
        "feed", 1, None, execution, metrics, captures, drop=lambda *_: None, clock=lambda: now[0]
    )
    failed = []
    for number in range(4):
        now[0] += 60 * (number == 3)
        item = SimpleNamespace(bound=SimpleNamespace(request=number), has_answer=False, fail=failed.append)
        model.accuse(Culprit(SimpleNamespace(item=item), RuntimeError("overflow"), number, number + 1))
    model.accuse(Culprit(SimpleNamespace(item=item), ValueError("shape"), 0, 2))
    model.close()
    assert len(failed) == len(captures.kept()) == 5
    said = "model 'feed': the request fails on every device, by"
    assert caplog.messages == [
        f"{said} row 0: overflow",
        f"{said} row 3: overflow (3 since the last such line)",
        f"{said} rows 0 to 1: shape",
    ]


@pytest.mark.parametrize("field", ["watchdog_seconds", "probe_seconds"])
def test_times_must_be_positive_and_such_as_threads_can_wait_for(field):
    with pytest.raises(ConfigError, match=f"faults: {field} must be > 0; was 0"):
        FaultConfig(**{field: 0})
    with pytest.raises(ConfigError, match=rf"faults: {field} must be <= 1e\+08; was 1e\+20"):
        FaultConfig(**{field: 1e20})


def test_a_timeout_must_be_such_as_threads_can_wait_for():
    said = r"queue: default_timeout_ms must be <= 1e\+11; was 1e\+20"
    with pytest.raises(ConfigError, match=said):
        QueueConfig(default_timeout_ms=1e20)
    assert QueueConfig(default_timeout_ms=1e11).default_timeout_ms == 1e11
