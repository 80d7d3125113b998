"""Rollbacks and unloads that are asked for while a version compiles, in a real helper process."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import linear
import numpy as np
import pytest

from xlarank.errors import ModelNotFoundError, UnavailableError
from xlarank.runtime import ModelRepository, VersionOptions


@pytest.fixture
def repository(root):
    """A function that opens it; closed at the end."""
    with contextlib.ExitStack() as stack:

        def opened():
            repository = ModelRepository.open(root, num_devices=2, versions=VersionOptions(warm_share=1.0))
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
    with pytest.raises(UnavailableError, match=f"^{path}: not compiled: a rollback or an unload came first$"):
        first.result(60)
    repository.poll()
    assert version_of(repository) == 2
    assert states(repository) == {1: "UNAVAILABLE", 2: "READY"}
