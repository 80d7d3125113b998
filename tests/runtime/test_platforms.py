"""A server of several platforms: here JAX's two CPU devices are told to be one of each."""

import contextlib
import math
import time

import jax
import linear
import numpy as np
import pytest

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.runtime import ModelRepository
from xlarank.runtime.loading import fingerprint_differences
from xlarank.spec import LatencyProfile, PlatformOptions, RequestOptions


@pytest.fixture
def devices(monkeypatch):
    """One of platform cpu and of kind "quick", one of platform other and of kind "slow"."""
    here = jax.local_devices()[:2]
    of_platform = {None: here, "cpu": here[:1], "other": here[1:]}
    monkeypatch.setattr(jax, "local_devices", lambda *, backend=None: of_platform[backend])
    kinds = dict(zip(here, ("quick", "slow"), strict=True))
    monkeypatch.setattr(device, "device_kind", kinds.__getitem__)
    return here


def test_a_request_goes_to_the_cheapest_device_that_meets_its_deadline_by_the_times_of_its_kind(
    publish, root, devices, monkeypatch
):
    def measured(replica, *_words, **_options):
        seconds = {"quick": 1e-4, "slow": 1.0}[device.device_kind(replica.device)]
        return LatencyProfile(dict.fromkeys(replica.executables, seconds))

    monkeypatch.setattr(device, "measure_profile", measured)
    publish(1)
    platforms = [PlatformOptions.parse(text) for text in ("other,cost=0.1", "cpu,devices=1")]
    with contextlib.closing(ModelRepository.open(root, platforms=platforms)) as repository:
        engine = repository.engine("linear")

        def batches_after(seconds):
            options = RequestOptions(deadline=time.monotonic() + seconds)
            future = engine.submit(engine.request(linear.features(3)), options)
            scores = future.result(timeout=60).scores["value"]
            np.testing.assert_allclose(scores, linear.expected(3, 1), rtol=1e-6)
            return [each.num_batches for each in repository._pool.snapshot().devices]

        assert batches_after(60) == [1, 0]
        assert batches_after(0.5) == [1, 1]  # the cheap one is predicted to take a second
        assert batches_after(math.inf) == [1, 2]  # the soonest
        assert batches_after(60) == [2, 2]


def test_devices_of_a_kind_have_the_times_of_their_slowest(publish, root, devices, monkeypatch):
    monkeypatch.setattr(device, "device_kind", lambda _: "alike")
    seconds = dict(zip(devices, (1.0, 2.0), strict=True))
    monkeypatch.setattr(
        device,
        "measure_profile",
        lambda replica, *_, **__: LatencyProfile(dict.fromkeys(replica.executables, seconds[replica.device])),
    )
    publish(1)
    with contextlib.closing(ModelRepository.open(root, num_devices=2)) as repository:
        first, second = repository.engine("linear").profiles
        assert first is second
        assert set(first.seconds.values()) == {2.0}


def test_a_bundle_is_compared_with_the_kind_of_device_that_is_most_like_where_it_was_compiled(
    linear_version, devices, monkeypatch
):
    bundle = open_bundle(linear_version)
    there = bundle.manifest.fingerprint
    here = {devices[0]: {**there, "device_kind": "tpu", "jax": "1"}, devices[1]: {**there, "jax": "1"}}
    monkeypatch.setattr(device, "fingerprint", here.__getitem__)
    assert fingerprint_differences(bundle, devices) == {"jax": (there["jax"], "1")}
    assert set(fingerprint_differences(bundle, devices[:1])) == {"device_kind", "jax"}
