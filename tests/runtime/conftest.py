"""Bundles that the tests of this room share."""

import functools
import queue
import subprocess
import threading

import linear
import pytest
import shop
from flax import nnx

from xlarank.compiler import build_bundle


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A repository with a compiled version of `shop.Shop`; copy it to change it."""
    folder = tmp_path_factory.mktemp("repository")
    build_bundle(
        shop.Shop(rngs=nnx.Rngs(0)),
        shop.SPEC,
        shop.make_tables(),
        out=folder,
        buckets=[8, 128, 1024],
        tune_seconds=0,
    )
    return folder


@pytest.fixture
def root(tmp_path):
    """A folder of models."""
    return tmp_path / "models"


@pytest.fixture
def publish(linear_version, root):
    """Publishes a version of `linear.Linear` into `root`, by its number; see `linear.publish`."""
    return functools.partial(linear.publish, linear_version, root)


@pytest.fixture
def queued(monkeypatch):
    """A function of a repository: a semaphore, released when a change has got its place in the queue."""

    def queued(repository):
        queued, thread = threading.Semaphore(0), repository._changes._thread
        submit = thread.submit

        def note(*words):
            future = submit(*words)
            queued.release()
            return future

        monkeypatch.setattr(thread, "submit", note)
        return queued

    return queued


@pytest.fixture
def started(monkeypatch):
    """Processes that are started from now on."""
    started = queue.SimpleQueue()

    class Started(subprocess.Popen):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            started.put(self)

    monkeypatch.setattr(subprocess, "Popen", Started)
    return started
