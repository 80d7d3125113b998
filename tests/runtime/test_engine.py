"""The engine on real bundles: invariances, splitting, closing, zero compiles on the request path."""

import os
import shutil
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import shop
from executors import Gated, wrap
from flax import nnx

from xlarank.bundle import open_bundle, tables
from xlarank.compiler import build_bundle, random_requests
from xlarank.errors import (
    BundleError,
    ConfigError,
    DeadlineError,
    ExecutionError,
    FeatureError,
    ModelNotFoundError,
    OverloadError,
    RequestError,
    UnavailableError,
)
from xlarank.runtime import Captures, Engine, Metrics, ModelRepository, workload
from xlarank.runtime.loading import host_threads_of
from xlarank.runtime.table_check import TableCheck
from xlarank.spec import (
    CaptureConfig,
    FeatureSpec,
    ModelSpec,
    QueueConfig,
    RankRequest,
    RequestOptions,
    Scope,
    TaskSpec,
    take,
)

MAX_ROWS = 1024


@pytest.fixture(scope="module")
def engine(repository):
    with Engine.load(repository / "shop") as engine:
        yield engine


def rows_of(request, rows):
    columns = zip(request.spec.features, request.columns, strict=True)
    return RankRequest(
        request.spec,
        {f.name: take(column, rows) if f.scope is Scope.CANDIDATE else column for f, column in columns},
    )


def assert_same(actual, expected):
    for task in expected:
        np.testing.assert_allclose(actual[task], expected[task], rtol=0, atol=2e-6)


def test_no_candidate_count_and_no_mixed_batch_compiles_on_the_request_path(engine):
    (request,) = random_requests(shop.SPEC, 1, num_candidates=1100, seed=4)
    whole = engine.score(request)
    futures = []
    for num_rows in range(1, 1101):
        part = rows_of(request, np.arange(num_rows))
        if num_rows % 3:
            assert_same(engine.score(part), {task: scores[:num_rows] for task, scores in whole.items()})
        else:  # several at once share batches
            futures.append((num_rows, engine.submit(part)))
    for num_rows, future in futures:
        assert_same(future.result().scores, {task: scores[:num_rows] for task, scores in whole.items()})
    assert engine.num_request_path_compiles == 0


def test_a_compile_on_the_request_path_is_counted(repository, monkeypatch):
    with Engine.load(repository / "shop") as engine:
        replica = engine._execution._executors[0]
        run = type(replica).run

        def run_and_compile(self, bucket, leaves):
            jax.jit(lambda x: x + bucket.rows)(1.0)
            return run(self, bucket, leaves)

        monkeypatch.setattr(type(replica), "run", run_and_compile)
        for request in random_requests(shop.SPEC, 1):
            engine.score(request)
        assert engine.num_request_path_compiles >= 1
        samples = {name: value for name, _, value in engine.metrics.samples()}
        assert samples["xlarank_request_path_compiles_total"] == engine.num_request_path_compiles


def test_scores_do_not_depend_on_neighbours_order_or_splitting(engine):
    requests = random_requests(shop.SPEC, 40, num_candidates=17, seed=5)
    alone = [engine.score(request) for request in requests]
    together = [future.result().scores for future in [engine.submit(request) for request in requests]]
    for one, other in zip(alone, together, strict=True):
        assert_same(other, one)
    order = np.random.default_rng(0).permutation(17)
    for request, scores in zip(requests[:5], alone, strict=False):
        assert_same(engine.score(rows_of(request, order)), {t: s[order] for t, s in scores.items()})
    big = rows_of(requests[0], np.arange(3 * MAX_ROWS + 5) % 17)
    expected = {t: s[np.arange(3 * MAX_ROWS + 5) % 17] for t, s in alone[0].items()}
    assert_same(engine.score(big), expected)


def test_many_threads_each_get_their_own_scores(engine):
    requests = random_requests(shop.SPEC, 16, num_candidates=9, seed=6)
    expected = [engine.score(request) for request in requests]
    wrong = []

    def work(number):
        for turn in range(30):
            pick = (number + turn) % len(requests)
            got = engine.score(requests[pick])
            if any(np.abs(got[task] - expected[pick][task]).max() > 2e-6 for task in got):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_zero_candidates_get_empty_scores(engine):
    (request,) = random_requests(shop.SPEC, 1, num_candidates=3)
    scores = engine.score(rows_of(request, np.zeros(0, np.int64)))
    assert {task: (values.shape, values.dtype) for task, values in scores.items()} == {
        "click": ((0,), np.float32),
        "spend": ((0,), np.float32),
    }


def test_scores_are_the_callers_own_arrays(engine):
    first, second = random_requests(shop.SPEC, 2, num_candidates=50)
    scores = engine.score(first)
    kept = scores["click"].copy()
    for _ in range(3):
        engine.score(second)
    np.testing.assert_array_equal(scores["click"], kept)
    scores["click"][:] = 0  # writable


def test_a_request_of_another_model_is_refused(engine):
    other = ModelSpec(
        name="other",
        features=(FeatureSpec(name="x", kind="dense", scope="candidate"),),
        tasks=(TaskSpec(name="y"),),
    )
    with pytest.raises(ConfigError, match=r"model 'shop' .* of model 'other'"):
        engine.submit(RankRequest(other, {"x": [1.0]}))


def test_bad_input_is_refused_natively_with_the_same_words(engine):
    with pytest.raises(
        FeatureError, match=r"feature 'item': expected ids in \[0, 50\).* got 50 at position 1"
    ):
        engine.request({"age": 1.0, "item": [0, 50], "tags": [[], []], "price": np.zeros((2, 2))})


def test_closing_answers_what_was_accepted_and_refuses_the_rest(repository):
    engine = Engine.load(repository / "shop")
    requests = random_requests(shop.SPEC, 30)
    futures = [engine.submit(request) for request in requests]
    engine.close()
    assert all(future.done() for future in futures)
    assert all(np.isfinite(future.result().scores["click"]).all() for future in futures)
    with pytest.raises(UnavailableError, match="model 'shop' version 1 is closed"):
        engine.submit(requests[0])
    engine.close()


def test_a_cancelled_request_is_dropped_at_once_and_its_neighbours_are_answered(repository):
    with Engine.load(repository / "shop", num_devices=1) as engine:
        (gated,) = wrap(engine, Gated)
        requests = random_requests(shop.SPEC, 6)
        futures = [engine.submit(requests[0])]
        assert gated.has_come.acquire(timeout=60)
        futures += [engine.submit(request) for request in requests[1:]]
        queue = engine._queue.batcher
        assert queue.num_queued_requests == 5
        assert futures[2].cancel()
        assert queue.num_queued_requests == 4
        gated.gate.set()
        for number, future in enumerate(futures):
            if number != 2:
                assert np.isfinite(future.result().scores["click"]).all()
    samples = {name: value for name, _, value in engine.metrics.samples()}
    assert samples["nv_inference_request_success"] == 5


def test_a_late_request_is_refused_at_once_or_told_at_its_deadline_and_never_run(repository):
    with Engine.load(repository / "shop", num_devices=1) as engine:
        (gated,) = wrap(engine, Gated)
        first, second, third = random_requests(shop.SPEC, 3)
        running = engine.submit(first)
        assert gated.has_come.acquire(timeout=60)
        with pytest.raises(
            DeadlineError, match=r"model 'shop': the answer would come in .* ms, the deadline passed"
        ):
            engine.submit(second, RequestOptions(deadline=time.monotonic() - 1))
        late = engine.submit(third, RequestOptions(deadline=time.monotonic() + 0.2))
        with pytest.raises(
            DeadlineError, match=r"queued past its deadline, or would have been: 0 of its \d+ candidates were"
        ):
            late.result(timeout=60)
        assert not running.done()
        gated.gate.set()
        running.result()
    samples = {name: value for name, _, value in engine.metrics.samples()}
    assert samples["nv_inference_exec_count"] == samples["nv_inference_request_success"] == 1


def test_a_request_found_late_before_its_gather_is_told_and_its_neighbour_runs_without_it(
    repository, monkeypatch
):
    """Between the forming of a batch and its gather, as where it waited for another device's retry."""
    with Engine.load(repository / "shop", num_devices=1) as engine:
        (gated,) = wrap(engine, Gated)
        first, late, last = random_requests(shop.SPEC, 3, num_candidates=8)
        running = engine.submit(first)
        assert gated.has_come.acquire(timeout=60)
        # Only what runs the batch finds the time later than it was when the batch was formed.
        monkeypatch.setattr(workload, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000))
        told = engine.submit(late, RequestOptions(deadline=time.monotonic() + 500))
        neighbour = engine.submit(last)
        gated.gate.set()
        with pytest.raises(DeadlineError, match="model 'shop': the request was queued past its deadline"):
            told.result(timeout=60)
        running.result()
        neighbour.result()
    samples = {name: value for name, _, value in engine.metrics.samples()}
    assert samples["nv_inference_exec_count"] == samples["nv_inference_request_success"] == 2


def test_too_much_is_refused_and_what_was_accepted_is_answered(repository):
    queue = QueueConfig(max_queued_rows=10)
    with Engine.load(repository / "shop", num_devices=1, queue=queue) as engine:
        (gated,) = wrap(engine, Gated)
        requests = random_requests(shop.SPEC, 3, num_candidates=8)
        running = engine.submit(requests[0])
        assert gated.has_come.acquire(timeout=60)
        waiting = engine.submit(requests[1])
        with pytest.raises(OverloadError, match="8 rows are queued, 8 more would pass max_queued_rows, 10"):
            engine.submit(requests[2])
        gated.gate.set()
        assert {len(future.result().scores["click"]) for future in (running, waiting)} == {8}


def test_spread_answers_the_same_scores(repository, engine):
    requests = random_requests(shop.SPEC, 5, num_candidates=37, seed=3)
    with Engine.load(repository / "shop", queue=QueueConfig(policy="spread")) as spread:
        for request in requests:
            assert_same(spread.score(request), engine.score(request))


def test_a_failing_batch_fails_its_requests_and_not_the_engine(repository, monkeypatch):
    with Engine.load(repository / "shop") as engine:
        (request,) = random_requests(shop.SPEC, 1)
        expected = engine.score(request)

        def gather(*_):
            raise RuntimeError("broken")

        with monkeypatch.context() as broken:  # of requests alone: golden ones run as ever
            broken.setattr(engine._execution, "_gatherer", SimpleNamespace(spec=engine.spec, gather=gather))
            with pytest.raises(ExecutionError, match="the request fails on every device, by row 0: broken"):
                engine.score(request)
        assert_same(engine.score(request), expected)


def test_every_device_serves(repository):
    with Engine.load(repository / "shop") as engine:
        assert len(engine._execution._executors) == len(jax.devices()) >= 2
        placed = {
            replica.executables[bucket].prepared[0].devices().pop()
            for replica in engine._execution._executors
            for bucket in engine.ladder.buckets
        }
        assert placed == set(jax.devices())


def test_loading_reports_its_steps_and_the_golden_error(engine):
    report = engine.load_report
    assert set(report.seconds) == {"tables", "compile", "row updates", "replay", "profile"}
    assert report.fingerprint_differences == {}
    assert max(report.max_error.values()) <= 1e-5
    assert len(engine.profiles) == len(jax.devices())
    assert len(set(map(id, engine.profiles))) == 1  # of one kind
    assert set(engine.profiles[0].seconds) == set(engine.ladder.buckets)


def test_metrics_count_rows_and_padding(repository):
    metrics = Metrics()
    with Engine.load(repository / "shop", metrics=metrics) as engine:
        (request,) = random_requests(shop.SPEC, 1, num_candidates=5)
        engine.score(request)
        samples = {name: value for name, _, value in engine.metrics.samples()}
    assert samples["xlarank_batch_rows_total"] == 5
    assert samples["xlarank_padding_rows_total"] == 3
    assert samples["nv_inference_count"] == 5


def test_durations_and_what_is_slow_count_from_the_arrival(repository):
    captures = Captures(CaptureConfig(slow_ms=1e9))
    with Engine.load(repository / "shop", captures=captures) as engine:
        at_once, waited = random_requests(shop.SPEC, 2, num_candidates=5)
        answers = [
            engine.submit(request, RequestOptions(arrived_at=time.monotonic() - seconds)).result()
            for request, seconds in ((at_once, -1e6), (waited, 2e6))  # one by a clock that is ahead
        ]
        stages = engine.metrics.statistics().stage_seconds
    inside = sum(answer.timings.total for answer in answers)  # submit to answer, as traces have it
    assert stages["request"] == pytest.approx(2e6 + inside)
    rest = {stage: seconds for stage, seconds in stages.items() if stage != "request"}
    assert sum(rest.values()) == pytest.approx(inside)
    (kept,) = captures.kept()
    assert kept.request is waited
    assert kept.detail.startswith("before 2000000")
    captures.close()


def test_who_has_an_answer_finds_it_counted(engine):
    before = engine.metrics.statistics().num_successes
    seen = Future()
    answer = engine.submit(random_requests(shop.SPEC, 1, num_candidates=5)[0])
    answer.add_done_callback(lambda _: seen.set_result(engine.metrics.statistics().num_successes))
    assert seen.result(60) == before + 1


@pytest.mark.once
def test_the_numpy_gather_serves_the_same_scores(repository, engine):
    requests = random_requests(shop.SPEC, 4, seed=9)
    with Engine.load(repository / "shop", backend="numpy") as slow:
        for request in requests:
            assert_same(slow.score(request), engine.score(request))


def test_a_repository_serves_the_latest_version_by_name(repository, tmp_path):
    with pytest.raises(ConfigError, match=r"expected bundles as <model>/<version>, found none"):
        ModelRepository.open(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a folder of models, found none"):
        ModelRepository.open(tmp_path / "nowhere")
    served = ModelRepository.open(repository)
    assert served.models() == [("shop", 1, True)]
    assert served.is_ready
    assert served.engine("shop").version == served.engine("shop", "1").version == 1
    with pytest.raises(ModelNotFoundError, match=r"unknown model: 'nothing' is not found"):
        served.engine("nothing")
    with pytest.raises(ModelNotFoundError, match=r"'shop' version 2 is not found"):
        served.engine("shop", "2")
    served.close()
    with pytest.raises(UnavailableError, match=r"'shop' is shutting down"):
        served.engine("shop")


def test_a_folder_that_holds_another_model_or_is_a_model_is_refused(repository, tmp_path):
    shutil.copytree(repository / "shop", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"folder 'other' holds model 'shop'"):
        ModelRepository.open(tmp_path)
    for folder in (repository / "shop", repository / "shop" / "1"):
        with pytest.raises(ConfigError, match=r"found a model; serve its parent"):
            ModelRepository.open(folder)


def test_something_else_than_a_request_is_refused(engine):
    with pytest.raises(RequestError, match=r"model 'shop': expected a RankRequest, got dict"):
        engine.score({"item": [1]})


def test_a_bundle_compiled_elsewhere_is_compiled_anew_and_says_so(repository, caplog, monkeypatch):
    from xlarank import device

    here = dict(device.fingerprint())
    monkeypatch.setattr(device, "fingerprint", lambda _target: here | {"cpu_features": "another"})
    with Engine.load(repository / "shop") as engine:
        assert engine.load_report.fingerprint_differences == {
            "cpu_features": (here["cpu_features"], "another")
        }
        assert "compiled elsewhere" in caplog.text
        assert "cpu_features" in caplog.text
        assert engine.num_request_path_compiles == 0


def test_a_bundle_whose_golden_scores_differ_here_is_refused(repository, monkeypatch):
    from xlarank.errors import VerifyError

    bundle_type = type(open_bundle(repository / "shop" / "1"))
    golden = bundle_type.golden

    def drifted(self):
        requests, values = golden(self)
        scores = {task: rows + np.float32(1e-3) for task, rows in values["scores"].items()}
        return requests, {"scores": scores}

    monkeypatch.setattr(bundle_type, "golden", drifted)
    with pytest.raises(VerifyError, match=r"model 'shop', task 'click', bucket \d+x\d+ .* golden replay on"):
        Engine.load(repository / "shop")


@pytest.fixture(scope="module")
def in_chunks(tmp_path_factory):
    """A repository whose tables have many chunks; the size of a chunk is that of this fixture's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_CHUNK_BYTES", 64)
        folder = tmp_path_factory.mktemp("chunks")
        model = shop.Shop(rngs=nnx.Rngs(0))
        build_bundle(model, shop.SPEC, shop.make_tables(), out=folder, buckets=[8], tune_seconds=0)
        yield folder


def damage_unsampled_row(folder):
    """Changes the last bit of a value in the middle of a table, far too little for a golden score to show."""
    path = folder / "shop/1/tables/items.npy"
    data = bytearray(path.read_bytes())
    data[128 + 10 * 32] ^= 1
    path.write_bytes(data)


def test_scores_are_the_same_wherever_the_tables_are(in_chunks):
    requests = random_requests(shop.SPEC, 8, num_candidates=8, seed=9)
    scores = {}
    for memory in ("huge", "mmap"):
        with Engine.load(in_chunks / "shop", table_memory=memory) as engine:
            assert set(engine.load_report.table_memory.values()) == {memory}
            scores[memory] = [engine.score(request) for request in requests]
            engine._table_check.join()
            samples = {name: value for name, _, value in engine.metrics.samples()}
            assert samples["xlarank_table_checked_bytes"] == samples["xlarank_table_bytes"] == 2000
            assert samples["xlarank_table_huge_page_bytes"] <= 2048
    for huge, mapped in zip(scores["huge"], scores["mmap"], strict=True):
        for task in huge:
            np.testing.assert_array_equal(huge[task], mapped[task])


def test_a_damaged_table_found_while_it_serves_makes_the_model_unready_and_says_why(
    in_chunks, tmp_path, monkeypatch
):
    shutil.copytree(in_chunks, tmp_path, dirs_exist_ok=True)
    damage_unsampled_row(tmp_path)
    with pytest.raises(BundleError, match=r"items\.npy: damaged: bytes 448 to 512"):
        Engine.load(tmp_path / "shop", table_memory="huge")
    with monkeypatch.context() as later:  # else it may be found before the model has begun to serve
        later.setattr(TableCheck, "start", lambda self: None)
        served = ModelRepository.open(tmp_path, num_devices=1, table_memory="mmap")
    engine = served._models["shop"].routes.versions[1].engine
    assert served.is_ready
    engine._table_check.start()
    engine._table_check.join()
    assert engine.fault is not None
    assert not served.is_ready
    assert served.models() == [("shop", 1, False)]
    why = r"shop'? version 1 has failed: .*items\.npy: damaged: bytes 448 to 512: expected sha256"
    with pytest.raises(UnavailableError, match=why):
        served.engine("shop")
    (request,) = random_requests(shop.SPEC, 1)
    with pytest.raises(UnavailableError, match=why.replace("shop'?", "model 'shop'")):
        engine.submit(request)
    served.close()


@pytest.mark.parametrize(
    ("num_cpus", "num_processes", "expected"), [(2, 1, 2), (64, 1, 4), (2, 4, 1), (12, 4, 3), (64, 4, 4)]
)
def test_processes_share_the_cpus_for_their_gathers(monkeypatch, num_cpus, num_processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cpus)))
    assert host_threads_of(None, num_processes) == expected
    assert host_threads_of(7, num_processes) == 7


def test_a_memory_that_there_is_not_is_refused(repository):
    with pytest.raises(ConfigError, match=r"table memory: expected one of \['huge', 'mmap'\], got 'disk'"):
        Engine.load(repository / "shop", table_memory="disk")
