"""Rollbacks and unloads that are asked for while a version compiles, in a real helper process."""

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import linear
import numpy as np
import pytest

from xlarank.errors import ModelNotFoundError, UnavailableError
from xlarank.runtime import (
    Metrics,
    ModelPolicy,
    ModelRepository,
    Policy,
    VersionOptions,
    version_loading,
)
from xlarank.runtime.pacing import PacedRuns

OTHER = dataclasses.replace(linear.SPEC, name="other")


@pytest.fixture
def repository(root):
    """A function that opens it; closed at the end."""
    with contextlib.ExitStack() as stack:

        def opened(*policies, metrics=None):
            versions = VersionOptions(warm_share=1.0, models=policies)
            repository = ModelRepository.open(root, num_devices=2, versions=versions, metrics=metrics)
            return stack.enter_context(contextlib.closing(repository))

        yield opened


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def version_of(repository, model="linear"):
    """That answers, after a check of its scores."""
    with repository.lease(model) as engine:
        future = engine.submit(engine.request(linear.features(3)))
    scores = future.result(timeout=60).scores["value"]
    np.testing.assert_allclose(scores, linear.expected(3, engine.version), rtol=1e-6)
    return engine.version


def stopped(started):
    """The next helper process, which would take for ever."""
    process = started.get(timeout=60)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    return process


def states(repository, model="linear"):
    return {status.version: status.state for status in repository.index() if status.model == model}


def test_a_rollback_does_not_wait_for_a_version_that_is_being_compiled(publish, repository, started, pool):
    """And leaves the version that answered when it was asked."""
    publish(1, rows=[4])
    publish(2, rows=[4])
    repository = repository()
    assert version_of(repository) == 2
    publish(3, rows=[16])
    polled = pool.submit(repository.poll)
    process = stopped(started)
    assert repository.rollback("linear") == 1
    polled.result(60)
    assert process.returncode == -signal.SIGKILL
    assert version_of(repository) == 1
    repository.poll()
    assert version_of(repository) == 1


def test_an_unload_does_not_wait_for_a_version_that_is_being_compiled(publish, repository, started, pool):
    publish(1, rows=[4])
    repository = repository()
    publish(2, rows=[16])
    polled = pool.submit(repository.poll)
    process = stopped(started)
    repository.unload("linear")
    polled.result(60)
    assert process.returncode == -signal.SIGKILL
    assert not repository.models()


def test_a_rollback_that_is_given_up_for_another_has_changed_nothing(publish, repository, started, pool):
    path = publish(1, rows=[16])
    publish(2, rows=[4])
    repository = repository()
    first = pool.submit(repository.rollback, "linear")
    stopped(started)
    with pytest.raises(ModelNotFoundError, match="rollback: expected version 9 below 2"):
        repository.rollback("linear", 9)
    with pytest.raises(UnavailableError, match=f"^{path}: not loaded: a rollback or an unload came first$"):
        first.result(60)
    repository.poll()
    assert version_of(repository) == 2
    assert states(repository) == {1: "UNAVAILABLE", 2: "READY"}


def compiled_by(process):
    """Model and version."""
    *_, model, version = process.args[-1].split("/")
    return model, int(version)


def test_a_version_gives_way_to_changes_of_another_model_and_is_tried_again_by_itself(
    publish, repository, started, pool
):
    publish(1, rows=[4])
    publish(1, spec=OTHER)
    publish(2, rows=[4], spec=OTHER)
    metrics = Metrics()
    repository = repository(metrics=metrics)
    publish(2, rows=[16])
    polled = pool.submit(repository.poll)
    process = stopped(started)
    assert repository.rollback("other") == 1
    assert version_of(repository, "other") == 1
    polled.result(60)
    assert version_of(repository) == 2
    assert process.returncode == -signal.SIGKILL
    after = [started.get(timeout=60), started.get(timeout=60)]
    assert [compiled_by(each) for each in (process, *after)] == [("linear", 2), ("other", 1), ("linear", 2)]
    assert 'xlarank_model_load_failures_total{model="linear"} 0.0' in metrics.text().decode()


def test_a_version_whose_turn_has_not_come_says_so(publish, repository, started, pool):
    publish(1, rows=[4])
    repository = repository(ModelPolicy(num_versions=2))
    publish(2, rows=[16])
    publish(3, rows=[16])
    polled = pool.submit(repository.poll)
    stopped(started)
    reasons = {status.version: (status.state, status.reason) for status in repository.index()}
    assert reasons == {1: ("READY", ""), 2: ("LOADING", "waits to be loaded"), 3: ("LOADING", "")}
    with pytest.raises(UnavailableError, match=r"version 2 is not at ready state: waits to be loaded$"):
        repository.engine("linear", "2")
    repository.unload("linear")
    polled.result(60)


def test_a_version_that_is_being_read_is_not_compiled_before_a_rollback(
    publish, repository, started, pool, monkeypatch
):
    publish(1, rows=[4])
    publish(2, rows=[4])
    repository = repository()
    publish(3, rows=[16])
    is_reading, has_given_way, open_bundle = threading.Event(), threading.Event(), version_loading.open_bundle
    give_way = repository._loader.give_way

    def read(*words, **options):
        is_reading.set()
        assert has_given_way.wait(60)
        return open_bundle(*words, **options)

    def note(order):
        give_way(order)
        has_given_way.set()

    monkeypatch.setattr(version_loading, "open_bundle", read)
    monkeypatch.setattr(repository._loader, "give_way", note)
    polled = pool.submit(repository.poll)
    assert is_reading.wait(60)
    assert repository.rollback("linear") == 1
    polled.result(60)
    assert version_of(repository) == 1
    assert started.empty() or compiled_by(started.get()) == ("linear", 1)
    assert started.empty()


@pytest.mark.parametrize("step", ["tables", "compile", "replay", "profile"])
def test_a_rollback_does_not_wait_for_a_version_that_is_being_read_or_proven(
    publish, repository, started, pool, monkeypatch, caplog, step
):
    """It comes before its next piece."""
    caplog.set_level("INFO", "xlarank")
    publish(1, rows=[4])
    publish(2, rows=[4])
    repository = repository()
    publish(3, rows=[16])
    steps = []
    is_at_step, has_given_way = threading.Event(), threading.Event()
    give_way = repository._loader.give_way

    def held(pace):
        def piece(*words):
            if steps[-1:] == [step]:
                is_at_step.set()
                assert has_given_way.wait(60)
            return pace(*words)

        return piece

    def note(order):
        give_way(order)
        has_given_way.set()

    for pace in ("beside", "_run"):
        monkeypatch.setattr(PacedRuns, pace, held(getattr(PacedRuns, pace)))
    options = dataclasses.replace(
        repository._loader._options, on_progress=lambda text: steps.append(text.split()[-1])
    )
    monkeypatch.setattr(repository._loader, "_options", options)
    monkeypatch.setattr(repository._loader, "give_way", note)
    polled = pool.submit(repository.poll)
    assert is_at_step.wait(60)
    assert repository.rollback("linear") == 1
    polled.result(60)
    assert version_of(repository) == 1
    assert "model linear: versions [1] answer, before [2]" in caplog.messages
    repository.poll()
    assert version_of(repository) == 1


def test_a_load_goes_on_after_a_change_of_another_model(publish, repository, started, pool):
    publish(1, rows=[4])
    publish(1, rows=[4], spec=OTHER)
    repository = repository()
    publish(2, rows=[16])
    load = pool.submit(repository.load, "linear")
    process = stopped(started)
    repository.unload("other")
    load.result(60)
    assert process.returncode == -signal.SIGKILL
    assert version_of(repository) == 2


def test_a_load_does_not_undo_what_was_asked_of_its_model_later(publish, repository, started, pool):
    publish(1, rows=[4])
    repository = repository()
    path = publish(2, rows=[16])
    load = pool.submit(repository.load, "linear")
    stopped(started)
    repository.unload("linear")
    with pytest.raises(UnavailableError, match=f"^{path}: not loaded: a rollback or an unload came first$"):
        load.result(60)
    assert repository.models() == []
    assert states(repository) == {1: "UNAVAILABLE", 2: "UNAVAILABLE"}


def test_a_load_that_has_nothing_to_load_does_not_go_before_a_rollback_asked_earlier(
    publish, repository, started, pool, queued
):
    publish(1, rows=[16])
    publish(2, rows=[4])
    publish(1, rows=[4], spec=OTHER)
    repository = repository()
    rollback = pool.submit(repository.rollback, "linear")
    stopped(started)
    queued = queued(repository)
    load = pool.submit(repository.load, "linear")
    assert queued.acquire(timeout=60)
    repository.unload("other")
    assert rollback.result(120) == 1
    load.result(120)
    assert repository.models() == [("linear", 2, True)]
    assert states(repository) == {1: "UNAVAILABLE", 2: "READY"}


def test_a_policy_that_gave_way_does_not_undo_one_that_was_set_later(
    publish, repository, started, pool, queued
):
    publish(1, rows=[4])
    publish(2, rows=[16])
    publish(1, rows=[4], spec=OTHER)
    first, second = (ModelPolicy(name="linear", policy=Policy.SPECIFIC, versions=(v,)) for v in (1, 2))
    repository = repository(first)
    to_second = pool.submit(repository.set_policy, second)
    stopped(started)
    queued = queued(repository)
    to_first = pool.submit(repository.set_policy, first)
    assert queued.acquire(timeout=60)
    repository.unload("other")
    for change in (to_first, to_second):
        change.result(120)
    assert repository.models() == [("linear", 1, True)]


def test_a_rollback_that_gave_way_goes_before_loads_once_more(publish, repository, started, pool):
    """Whoever asks for it may take a while to be told that it gave way: nothing begins meanwhile."""
    third = dataclasses.replace(linear.SPEC, name="third")
    publish(1, rows=[16])
    publish(2, rows=[4])
    publish(1, rows=[4], spec=OTHER)
    publish(1, rows=[4], spec=third)
    repository = repository()
    publish(2, rows=[4, 16], spec=third)
    do, is_asked_again, may_go_on = repository._changes.do, threading.Event(), threading.Event()

    def slow(work):
        try:
            return do(work)
        except UnavailableError:
            if threading.current_thread() is asking:
                is_asked_again.set()
                assert may_go_on.wait(60)
            raise

    repository._changes.do = slow
    asking = threading.Thread(target=repository.rollback, args=("linear",))
    asking.start()
    processes = [stopped(started)]
    load = pool.submit(repository.load, "third")
    repository.unload("other")
    assert is_asked_again.wait(60)
    given_up = threading.Event()
    check = repository._loader._helper.check

    def note(path):
        try:
            check(path)
        except UnavailableError:
            given_up.set()
            raise

    repository._loader._helper.check = note
    assert given_up.wait(60)  # the load's turn came, and it gave way
    may_go_on.set()
    asking.join(120)
    load.result(120)
    while not started.empty():
        processes.append(started.get())
    assert [compiled_by(process) for process in processes] == [("linear", 1), ("linear", 1), ("third", 2)]
    assert repository.models() == [("linear", 1, True), ("third", 2, True)]


def test_a_rollback_that_gave_way_does_not_undo_what_came_before_it_could_ask_again(
    publish, repository, started, pool
):
    publish(1, rows=[16])
    publish(2, rows=[4])
    publish(1, rows=[4], spec=OTHER)
    repository = repository()
    do, asks_again, may_go_on = repository._changes.do, threading.Event(), threading.Event()
    asked = []  # by the rollback

    def slow(work):
        if threading.current_thread().name == "asking":
            asked.append(work)
            if len(asked) == 2:
                asks_again.set()
                assert may_go_on.wait(60)
        return do(work)

    def ask():
        threading.current_thread().name = "asking"
        return repository.rollback("linear")

    repository._changes.do = slow
    rollback = pool.submit(ask)
    stopped(started)
    repository.unload("other")
    assert asks_again.wait(60)
    repository.unload("linear")
    may_go_on.set()
    with pytest.raises(UnavailableError, match=r"not loaded: a rollback or an unload came first$"):
        rollback.result(60)
    assert repository.models() == []


def test_rollbacks_of_two_models_that_give_way_to_each_other_both_end(publish, repository, started, pool):
    """The one that was asked last goes first; the other doesn't interrupt it in turn."""
    for spec in (linear.SPEC, OTHER):
        publish(1, rows=[16] if spec is OTHER else [4, 16], spec=spec)
        publish(2, rows=[4], spec=spec)
    repository = repository()
    first = pool.submit(repository.rollback, "linear")
    processes = [stopped(started)]
    assert repository.rollback("other") == 1
    assert first.result(120) == 1
    while not started.empty():
        processes.append(started.get())
    assert [compiled_by(each) for each in processes] == [("linear", 1), ("other", 1), ("linear", 1)]


def test_a_load_that_is_given_up_forgets_no_rollback(publish, repository, started, pool):
    for version in (1, 2, 3):
        publish(version, rows=[4])
    repository = repository()
    assert repository.rollback("linear") == 2
    publish(4, rows=[16])
    load = pool.submit(repository.load, "linear")
    stopped(started)
    with pytest.raises(ModelNotFoundError, match="rollback: expected version 9 below 2"):
        repository.rollback("linear", 9)
    with pytest.raises(UnavailableError, match=r"not loaded: a rollback or an unload came first$"):
        load.result(60)
    reasons = {status.version: status.reason for status in repository.index()}
    assert reasons[3] == "rolled back from, to version 2"
    shutil.rmtree(repository._root / "linear" / "4")
    repository.poll()
    assert version_of(repository) == 2
