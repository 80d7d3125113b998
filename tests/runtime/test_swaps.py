"""Swaps under load: nothing fails, nothing mixes, nothing compiles in the process, everything is freed."""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import linear
import numpy as np
import pytest
from executors import Faulty, Gated, wrap
from freed import Parts, no_collector
from served import environment
from xlarank_serving.admin import AdminClient, AdminServer

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.errors import (
    DeadlineError,
    ExecutionError,
    ModelError,
    OverloadError,
    RequestError,
    UnavailableError,
)
from xlarank.runtime import Metrics, ModelRepository, VersionOptions, warming
from xlarank.runtime.compile_helper import CompileHelper
from xlarank.runtime.pacing import PacedRuns
from xlarank.runtime.version_loading import VersionLoader
from xlarank.spec import RequestOptions
from xlarank.spec.serving import QueueConfig


@pytest.fixture
def opened(root):
    repositories = []

    def opened(**options):
        repository = ModelRepository.open(
            root, num_devices=2, versions=VersionOptions(warm_share=1.0), **options
        )
        repositories.append(repository)
        return repository

    yield opened
    for repository in repositories:
        repository.close()


def drained(repository):
    assert repository._models["linear"].wait_until_drained(60)


def ask(repository, num_candidates, version=""):
    """The engine's version, after a check that the scores are of that version alone."""
    with repository.lease("linear", version) as engine:
        future = engine.submit(engine.request(linear.features(num_candidates)))
    scores = future.result(timeout=60).scores["value"]
    np.testing.assert_allclose(scores, linear.expected(num_candidates, engine.version), rtol=1e-6)
    return engine.version


def test_under_load_no_request_fails_and_no_score_mixes_versions_while_they_swap(publish, opened):
    publish(1)
    repository = opened()
    stop, problems, seen = threading.Event(), [], [set() for _ in range(6)]

    def hammer(number):
        try:
            while not stop.is_set():
                # 40 candidates run as three batches, in between which versions swap.
                seen[number].add(ask(repository, 40 if number % 2 else 3))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(len(seen))]
    for thread in threads:
        thread.start()
    try:
        for version in (2, 3):
            publish(version)
            repository.poll()
            assert ask(repository, 3) == version
            assert repository.rollback("linear", version - 1) == version - 1
            assert ask(repository, 3) == version - 1
            repository.load("linear")  # forgets the rollback
            assert repository.is_ready
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert all(versions <= {1, 2, 3} and len(versions) > 1 for versions in seen)
    drained(repository)
    assert repository.engine("linear").num_request_path_compiles == 0
    assert [version for _, version, _ in repository.models()] == [3]


def test_a_request_that_got_the_old_engine_just_before_the_swap_is_answered_by_it(publish, opened):
    publish(1)
    repository = opened()
    with repository.lease("linear") as engine:
        publish(2)
        repository.poll()
        assert ask(repository, 3) == 2
        states = {status.version: status.state for status in repository.index()}
        assert states == {1: "UNLOADING", 2: "READY"}
        future = engine.submit(engine.request(linear.features(5)))
    np.testing.assert_allclose(future.result().scores["value"], linear.expected(5, 1), rtol=1e-6)
    drained(repository)
    assert {status.version: status.state for status in repository.index()} == {1: "UNAVAILABLE", 2: "READY"}


def test_an_update_that_a_swap_overtakes_keeps_its_version_open(publish, opened):
    publish(1)
    repository = opened()
    engine = repository.engine("linear")
    update_rows = engine.update_rows

    def swap_and_update(*words):
        publish(2)
        repository.poll()
        assert not repository._models["linear"].wait_until_drained(0.2)
        return update_rows(*words)

    engine.update_rows = swap_and_update
    with (
        AdminServer(repository, 0) as server,
        AdminClient(server.address) as admin,
        pytest.raises(RequestError, match="updatable"),  # what an open engine says of this table
    ):
        admin.update_rows("linear", "topics", [1], np.ones((1, 3)))
    del engine.update_rows
    drained(repository)
    with pytest.raises(UnavailableError, match="model 'linear' version 1 is closed"):
        engine.update_rows("topics", np.array([1]), np.ones((1, 3)))


def test_an_old_version_is_freed_with_its_tables_and_weights(publish, opened):
    publish(1)
    metrics = Metrics()
    repository = opened(metrics=metrics)
    ask(repository, 40)
    parts = Parts(repository.engine("linear"))
    publish(2)
    repository.poll()
    drained(repository)
    assert parts.left() == []
    assert b'version="1"' not in metrics.text()


def failure(ask):
    """The type of what a request fails with: the exception itself would keep the frames it has come by."""
    try:
        ask()
    except Exception as error:
        return type(error)
    raise AssertionError("expected an error, got an answer")


def disturb(engine):
    """Requests refused for the queue's sake and for their deadlines, and one that fails on every device."""

    def nan(bucket, leaves, scores):
        return {task: np.full_like(values, np.nan) for task, values in scores.items()}

    request = engine.request(linear.features(4))
    gated = wrap(engine, Gated)
    gate, has_come, busy = threading.Event(), threading.Semaphore(0), []
    for executor in gated:
        executor.gate, executor.has_come = gate, has_come
    for _ in gated:
        busy.append(engine.submit(request))
        assert has_come.acquire(timeout=60)
    busy.append(engine.submit(request))  # fills the queue
    assert failure(lambda: engine.submit(request)) is OverloadError
    gate.set()
    for future in busy:
        future.result(60)
    assert failure(lambda: engine.submit(request, RequestOptions(deadline=0.0))) is DeadlineError
    for executor in wrap(engine, Faulty):
        executor.fault = nan
    assert failure(lambda: engine.submit(request).result(60)) is ExecutionError


def test_an_old_version_is_freed_though_requests_were_refused_and_failed(publish, opened, caplog):
    """Errors have frames in their tracebacks and futures have errors: no cycle may keep the engine."""
    caplog.set_level(logging.CRITICAL + 1)  # pytest keeps what is logged, with its exceptions
    publish(1)
    repository = opened(queue=QueueConfig(max_queued_rows=4))
    with no_collector():
        parts = Parts(repository.engine("linear"))
        disturb(repository.engine("linear"))
        publish(2)
        repository.poll()
        drained(repository)
        assert parts.left() == []


def test_a_model_unloaded_by_hand_is_freed_though_nothing_else_runs_on_the_devices(publish, opened):
    publish(1)
    repository = opened()
    parts = Parts(repository.engine("linear"))
    ask(repository, 40)
    repository.unload("linear")
    assert parts.left() == []


def test_metrics_do_not_grow_with_swaps(publish, opened):
    publish(1)
    metrics = Metrics()
    repository = opened(metrics=metrics)
    sizes = []
    for version in (2, 3, 4):
        publish(version)
        repository.poll()
        ask(repository, 3)
        drained(repository)
        sizes.append(len(metrics.text().splitlines()))
    assert len(set(sizes)) == 1


@pytest.fixture
def cold_cache(tmp_path):
    """The process compiles into an empty folder."""
    folder = tmp_path / "cache"
    with device.compile_cache_at(folder):
        yield folder


def test_a_swap_that_must_compile_compiles_nothing_in_the_process_that_serves(publish, opened, cold_cache):
    publish(1, rows=[4], with_code=False)
    repository = opened(use_bundle_code=False)
    before, files = device.num_compiled(), set(cold_cache.iterdir())
    publish(2, rows=[16], with_code=False)
    repository.poll()
    assert ask(repository, 16) == 2
    assert repository.engine("linear").ladder.max_rows == 16
    assert device.num_compiled() == before
    assert repository._loader.num_serving_compiles == 0
    # A helper compiled them: row programs of two buckets for two devices.
    assert sum("xlarank_program" in file.name for file in set(cold_cache.iterdir()) - files) == 4
    # Going back needs no helper: the programs are in the cache.
    repository._loader._helper.compile = None
    assert repository.rollback("linear") == 1
    assert ask(repository, 4) == 1
    assert device.num_compiled() == before


def test_a_rollback_after_the_cache_was_emptied_compiles_nothing_in_the_process_that_serves(
    publish, opened, cold_cache
):
    publish(1, rows=[16], with_code=False)
    repository = opened(use_bundle_code=False)
    publish(2, rows=[4], with_code=False)
    repository.poll()
    drained(repository)
    for file in cold_cache.iterdir():
        file.unlink()
    assert repository.rollback("linear") == 1
    assert ask(repository, 16) == 1
    assert repository._loader.num_serving_compiles == 0


def test_code_that_a_killed_start_has_cut_off_is_replaced_at_the_next_start_and_by_the_helper(
    publish, opened, cold_cache
):
    """A server that is killed while it compiles leaves a part of a file in the cache."""

    def programs():
        return {file: file.read_bytes() for file in cold_cache.glob("*xlarank_program*")}

    publish(1, with_code=False)
    opened(use_bundle_code=False).close()
    whole = programs()
    for file, data in whole.items():
        file.write_bytes(data[: len(data) // 2])
    publish(2, rows=[4], with_code=False)
    repository = opened(use_bundle_code=False)
    assert ask(repository, 4) == 2
    half = [file for file, data in programs().items() if len(data) < 0.6 * len(whole[file])]
    assert len(half) == len(whole) / 2  # those of the other bucket
    publish(3, rows=[16], with_code=False)
    repository.poll()
    assert ask(repository, 16) == 3, repository.index()
    assert repository._loader.num_serving_compiles == 0
    assert all(len(data) > 0.9 * len(whole[file]) for file, data in programs().items())


def test_new_weights_take_the_compiled_programs_and_the_times_of_the_version_that_serves(
    publish, opened, cold_cache
):
    publish(1, with_code=False)
    repository = opened(use_bundle_code=False)
    old = repository.engine("linear")
    programs = [e.compiled for replica in old._execution._executors for e in replica.executables.values()]
    profiles = old.profiles
    for file in cold_cache.iterdir():  # nothing there is read
        file.unlink()
    before = device.num_compiled()
    publish(2, with_code=False)
    repository.poll()
    new = repository.engine("linear")
    assert ask(repository, 3) == 2
    assert [
        e.compiled for replica in new._execution._executors for e in replica.executables.values()
    ] == programs
    assert new.profiles is profiles
    assert device.num_compiled() == before


def test_a_helper_process_that_fails_is_reported_with_what_it_said(publish, opened, monkeypatch):
    publish(1, rows=[4])
    repository = opened()
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    path = publish(2, rows=[16])
    repository.poll()
    assert ask(repository, 3) == 1
    (status,) = [status for status in repository.index() if status.version == 2]
    assert f"{path}: the process that compiles it ended with status 1" in status.reason
    assert "nonsense" in status.reason


def test_a_version_whose_helper_process_is_killed_is_tried_again(publish, opened, started, monkeypatch):
    """Thrice: the system may do so where memory is short, and the version may be what takes it."""
    publish(1, rows=[4])
    repository = opened()
    path, now = publish(2, rows=[16]), 0.0
    monkeypatch.setattr(repository._models["linear"], "_clock", lambda: now)

    def poll():
        with ThreadPoolExecutor(1) as pool:
            polled = pool.submit(repository.poll)
            started.get(timeout=60).kill()
            polled.result(120)
        repository.poll()
        assert started.empty()
        (status,) = [status for status in repository.index() if status.version == 2]
        return status.state, status.reason

    killed = (
        f"{path}: the process that compiles it was ended by signal 9 (SIGKILL); the system does so where "
        f"memory is short"
    )
    assert poll() == ("UNAVAILABLE", f"{killed}; a look after 10 s tries it again")
    now = 10.0
    assert poll() == ("UNAVAILABLE", f"{killed}; a look after 20 s tries it again")
    now = 30.0
    assert poll() == ("UNAVAILABLE", killed)
    now = 1e9
    repository.poll()
    assert started.empty()
    repository.load("linear")
    assert ask(repository, 3) == 2


def test_a_helper_process_that_cannot_be_started_is_no_fault_of_the_version(publish, opened, monkeypatch):
    publish(1, rows=[4])
    repository = opened()
    path = publish(2, rows=[16])
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        repository.poll()
    (status,) = [status for status in repository.index() if status.version == 2]
    assert status.reason == (
        f"{path}: the process that compiles it can't be started: [Errno 2] No such file or directory: "
        f"'/nowhere/python'; a look after 10 s tries it again"
    )
    monkeypatch.setattr(repository._models["linear"], "_clock", lambda: 1e9)
    repository.poll()
    assert ask(repository, 3) == 2


def test_the_helper_process_stands_still_while_requests_run(publish, opened, started):
    publish(1, rows=[4])
    repository = opened()
    publish(2, rows=[16])
    polling = threading.Thread(target=repository.poll)
    polling.start()
    process = started.get(timeout=60)
    idle = repository._loader._pool.idle
    idle.update(False)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    # Where memory is short the system ends it first.
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
    idle.update(True)
    polling.join(120)
    assert process.returncode == 0
    assert ask(repository, 3) == 2


def test_a_rollback_is_of_the_version_that_answered_when_it_was_asked(publish, opened):
    publish(1)
    publish(2)
    repository = opened()
    model, change = repository._models["linear"], repository._change_first

    def change_after_a_swap(*words):
        publish(3)
        repository._change_first = change
        repository.poll()
        assert ask(repository, 3) == 3
        return change(*words)

    repository._change_first = change_after_a_swap
    assert repository.rollback("linear") == 1
    assert sorted(model.routes.versions) == [1]
    assert ask(repository, 3) == 1


def test_beside_an_accelerator_the_helper_process_does_not_wait_for_requests(opened, publish, monkeypatch):
    publish(1)
    repository = opened()
    loader = repository._loader

    def helper_of(*platforms):
        devices = [SimpleNamespace(platform=platform) for platform in platforms]
        monkeypatch.setattr(device, "platforms_of", lambda _: ())
        made = VersionLoader(
            loader._pool, loader._metrics, loader._options, {}, devices=devices, warm_share=1
        )
        return made._helper

    assert helper_of("gpu", "gpu")._idle is None
    assert helper_of("gpu", "cpu")._idle is loader._pool.idle


def test_a_repository_that_closes_ends_the_helper_process(linear_version, cold_cache, started):
    platforms = device.platforms_of(device.devices())
    helper = CompileHelper(platforms=platforms, use_bundle_code=False, compile_cache=cold_cache)
    failed = []

    def compile_version():
        try:
            helper.compile(linear_version)
        except UnavailableError as error:
            failed.append(str(error))

    compiling = threading.Thread(target=compile_version)
    compiling.start()
    process = started.get(timeout=60)
    helper.close()
    compiling.join(60)
    assert process.returncode == -signal.SIGKILL
    assert failed == [f"{linear_version}: not loaded: the server is stopping"]


SERVER = """
import os, subprocess, sys, threading
from pathlib import Path
from xlarank.runtime.compile_helper import CompileHelper
from xlarank.runtime.yielding import IdleSignal

class Told(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        threading.Thread(target=self.tell, daemon=True).start()

    def tell(self):
        if idle is not None:
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        print(self.pid, flush=True)

idle = None
if sys.argv[3] == "stopped":
    idle = IdleSignal()
    idle.update(False)
subprocess.Popen = Told
helper = CompileHelper(num_devices=1, use_bundle_code=False, compile_cache=Path(sys.argv[2]), idle=idle)
helper.compile(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_helper_whose_server_is_killed_ends_and_compiles_nothing(state, linear_version, tmp_path):
    """Also before it has imported anything; as a supervisor starts a server, whose session ends with it."""
    command = [sys.executable, "-c", SERVER, str(linear_version), str(tmp_path), state]
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment(), "start_new_session": True}
    with subprocess.Popen(command, **options) as server:
        ended = os.pidfd_open(int(server.stdout.readline()))
        server.kill()
    try:
        assert select.select([ended], [], [], 180)[0]
    finally:
        os.close(ended)
    assert list(tmp_path.glob("*-cache")) == []


def test_a_helper_has_the_lowest_priority_before_it_imports_anything(linear_version, tmp_path):
    """JAX's imports are seconds of CPU."""
    told = "import os\nraise SystemExit(f'niceness {os.getpriority(os.PRIO_PROCESS, 0)}')\n"
    for module in ("jax", "numpy"):
        (tmp_path / f"{module}.py").write_text(told)
    helper = CompileHelper(num_devices=1, use_bundle_code=False, compile_cache=tmp_path / "cache")
    with pytest.raises(ModelError, match="niceness 19"):
        helper.compile(linear_version, {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})


def test_code_is_compiled_for_nothing_if_the_cache_does_not_keep_it(linear_version, cold_cache, monkeypatch):
    monkeypatch.setattr(device, "seed_compile_cache", lambda files, **_: None)
    with pytest.raises(ModelError, match=r"expected it to keep what is compiled, \d+ programs weren't there"):
        warming.compile_into_cache(open_bundle(linear_version), devices=device.devices(1))


def test_beside_a_version_that_serves_each_program_is_read_by_itself_and_rested_after(
    publish, opened, monkeypatch
):
    publish(1, rows=[4])
    repository = opened()
    beside, pieces = PacedRuns.beside, []

    def noted(self, work):
        pieces.append(work)
        return beside(self, work)

    monkeypatch.setattr(PacedRuns, "beside", noted)
    publish(2, rows=[8, 16])
    repository.poll()
    assert ask(repository, 3) == 2
    num_programs = len(open_bundle(repository._root / "linear" / "2").manifest.programs)
    # Twice to open it, the table, which is one piece, and on two devices programs and what prepares weights.
    assert len(pieces) == 2 + 1 + 2 * (num_programs + 1)
