"""Ranking requests that no model version counts as its own: `Refusals`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import grpc
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xlarank_serving.status import status_of

__all__ = ["Refusals"]


class Refusals(Collector):
    """Counts requests that failed before an engine had them, by the status that callers got. Any thread.

    `nv_inference_request_failure` is by model and version, which aren't known of a request that is malformed,
    names no version that serves, has a bad token, is refused unread, or doesn't arrive (CANCELLED).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()  # guarded by _lock

    def count(self, error: Exception) -> None:
        """One more, answered with this error."""
        self.count_as(status_of(error)[0])

    def count_as(self, code: grpc.StatusCode) -> None:
        """One more, answered with what is this over gRPC."""
        with self._lock:
            self._counts[code.name] += 1

    def describe(self) -> Iterable[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        family = CounterMetricFamily(
            "xlarank_requests_refused",
            "Ranking requests refused before a model version had them, by gRPC status",
            labels=["status"],
        )
        with self._lock:
            counts = dict(self._counts)
        for code, count in sorted(counts.items()):
            family.add_metric([code], count)
        yield family
