"""Queues and devices on /metrics, of a real pool."""

import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from xlarank.errors import DeadlineError, OverloadError
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.pool_metrics import REFUSALS, PoolMetrics
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, RequestOptions
from xlarank.spec.serving import QueueConfig

PLAN = BucketPlan(BucketLadder((Bucket(8, 8),)), LatencyProfile({Bucket(8, 8): 1.0}), seconds_a_run=0.0)


class Work:
    def __init__(self):
        self.gate, self.has_come = threading.Event(), threading.Event()

    def run(self, batch, device_index):
        self.has_come.set()
        assert self.gate.wait(60)

    def answer(self, result):
        pass


def samples(pool):
    registry = CollectorRegistry()
    registry.register(PoolMetrics(pool.snapshot))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_queues_refusals_and_devices_are_told():
    work, pool = Work(), DevicePool(1, clock=lambda: 50.0)
    queue = pool.attach(work, "feed", [PLAN], QueueConfig(max_queued_rows=10, max_queue_ms=1e6), version=3)
    pool.submit(queue, "runs", 8, RequestOptions())
    assert work.has_come.wait(60)
    pool.submit(queue, "waits", 6, RequestOptions())
    with pytest.raises(OverloadError):
        pool.submit(queue, "one too many", 8, RequestOptions())
    with pytest.raises(DeadlineError):
        pool.submit(queue, "too late", 1, RequestOptions(deadline=50.5))
    pool.submit(queue, "leaves", 1, RequestOptions())
    pool.cancel(queue, "leaves")
    pool.cancel(queue, "leaves")
    model = (("model", "feed"), ("version", "3"))
    now = samples(pool)
    assert now["xlarank_queue_rows", *model] == 6
    assert now["xlarank_queue_requests", *model] == 1
    assert now["xlarank_queue_seconds", *model] == 1.0
    refused = {
        reason: now["xlarank_queue_refusals_total", model[0], ("reason", reason), model[1]]
        for reason in REFUSALS
    }
    assert refused == {"queue_full": 1, "deadline": 1, "late": 0, "canceled": 1, "no_device": 0}
    device = ("device", "0")
    assert now["xlarank_device_state", device, ("state", "healthy")] == 1
    assert now["xlarank_device_state", device, ("state", "quarantined")] == 0
    assert now["xlarank_device_batches_total", device] == 0
    assert now["xlarank_device_rows", device] == 8
    work.gate.set()
    pool.close()
    after = samples(pool)
    assert after["xlarank_device_batches_total", device] == 2
    assert after["xlarank_queue_rows", *model] == 0
    assert after["xlarank_device_rows", device] == 0
    pool.detach(queue)
    assert not any(name.startswith("xlarank_queue") for name, *_ in samples(pool))


@pytest.mark.parametrize(
    ("policy", "expected"),
    # 8 of 20 rows run at a time; what is left of them waits for the device that began, or for each its half.
    [("affinity", [20, 0]), ("spread", [10, 10])],
)
def test_rows_that_wait_for_one_device_alone_are_its_own(policy, expected):
    work, pool = Work(), DevicePool(2)
    queue = pool.attach(work, "feed", [PLAN, PLAN], QueueConfig(policy=policy))
    pool.submit(queue, "large", 20, RequestOptions())
    assert work.has_come.wait(60)
    now = samples(pool)
    assert sorted((now["xlarank_device_rows", ("device", str(i))] for i in (0, 1)), reverse=True) == expected
    work.gate.set()
    pool.close()
