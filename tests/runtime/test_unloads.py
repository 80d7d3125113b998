"""Models that are unloaded by hand, and what is asked of them after that."""

import contextlib
import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import linear
import pytest

from xlarank.errors import ModelNotFoundError
from xlarank.runtime import ModelPolicy, ModelRepository, Policy, VersionOptions

OTHER = dataclasses.replace(linear.SPEC, name="other")


@pytest.fixture
def repository(root):
    """A function that opens it; closed at the end."""
    with contextlib.ExitStack() as stack:

        def opened(*policies):
            versions = VersionOptions(warm_share=1.0, models=policies)
            repository = ModelRepository.open(root, num_devices=2, versions=versions)
            return stack.enter_context(contextlib.closing(repository))

        yield opened


def test_a_rollback_that_waits_behind_an_unload_has_the_model_serve_again(publish, repository, queued):
    """It was asked last."""
    publish(1)
    publish(2)
    repository = repository()
    end, queued = threading.Event(), queued(repository)
    with ThreadPoolExecutor(3) as pool:
        working = pool.submit(repository._changes.do, lambda: end.wait(60))
        assert queued.acquire(timeout=60)
        unload = pool.submit(repository.unload, "linear")
        assert queued.acquire(timeout=60)
        rollback = pool.submit(repository.rollback, "linear")
        assert queued.acquire(timeout=60)
        end.set()
        for change in (working, unload):
            change.result(60)
        assert rollback.result(60) == 1
    assert repository.is_ready
    assert repository.models() == [("linear", 1, True)]
    assert {s.version: s.reason for s in repository.index()} == {1: "", 2: "rolled back from, to version 1"}
    publish(3)
    repository.poll()
    assert repository.models() == [("linear", 3, True)]


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_load_that_finds_no_version_leaves_the_model_unloaded(publish, repository, root, is_removed):
    publish(1)
    publish(1, spec=OTHER)
    publish(2, spec=OTHER)
    policy = {} if is_removed else {"policy": Policy.SPECIFIC, "versions": (2,)}
    repository = repository(ModelPolicy(name="other", **policy))
    repository.unload("other")
    shutil.rmtree(root / "other" / ("" if is_removed else "2"))
    for _ in range(2):
        with pytest.raises(ModelNotFoundError, match=r"unknown model: 'other' has no available versions$"):
            repository.load("other")
        assert repository.is_ready
    publish(2, spec=OTHER)
    repository.poll()
    assert repository.models() == [("linear", 1, True)]
    repository.load("other")
    assert repository.models() == [("linear", 1, True), ("other", 2, True)]
