"""What `/metrics` says of versions: `VersionMetrics`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from xlarank.spec.versions import VersionStatus

__all__ = ["VersionMetrics"]

_TYPES = {
    "xlarank_swaps_total": ("counter", "Times that a model's version took the place of another"),
    "xlarank_swap_seconds": ("gauge", "From finding a version to its first request, of the last swap"),
    "xlarank_model_load_failures_total": ("counter", "Versions that could not be loaded or proven"),
    "xlarank_model_version_state": ("gauge", "1 for the state that a version is in"),
    "xlarank_serving_compiles_total": ("counter", "Programs compiled in this process while it served"),
    "nv_model_load_duration_secs": ("gauge", "Seconds that loading a version took"),
}


class VersionMetrics(Collector):
    """Counts by model, and gauges by version for as long as there is the version. Any thread."""

    def __init__(
        self, statuses: Callable[[], Sequence[VersionStatus]], num_compiled: Callable[[], int]
    ) -> None:
        """
        Args:
          statuses: of the versions that are worth a series; asked at each scrape.
          num_compiled: programs compiled while serving; asked likewise.
        """
        self._statuses = statuses
        self._num_compiled = num_compiled
        self._lock = threading.Lock()
        # All below guarded by _lock, by model.
        self._swaps: Counter[str] = Counter()
        self._swap_seconds: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._load_seconds: dict[tuple[str, int], float] = {}

    def record_load(self, model: str, version: int, seconds: float) -> None:
        """A version is loaded and proven."""
        with self._lock:
            self._load_seconds[model, version] = seconds
            self._failures.setdefault(model, 0)
            self._swaps.setdefault(model, 0)

    def record_failure(self, model: str) -> None:
        """A version isn't served."""
        with self._lock:
            self._failures[model] += 1

    def record_swap(self, model: str, seconds: float) -> None:
        """A version has taken the place of another, so long after it was found."""
        with self._lock:
            self._swaps[model] += 1
            self._swap_seconds[model] = seconds

    def remove(self, model: str, version: int) -> None:
        """Forgets a version that has ended."""
        with self._lock:
            self._load_seconds.pop((model, version), None)

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        statuses, num_compiled = self._statuses(), self._num_compiled()
        families = {
            name: Metric(name.removesuffix("_total"), text, kind) for name, (kind, text) in _TYPES.items()
        }

        def add(name: str, value: float, **labels: object) -> None:
            families[name].add_sample(name, {key: str(label) for key, label in labels.items()}, value)

        for status in statuses:
            labels = {"model": status.model, "version": status.version, "state": status.state.value}
            add("xlarank_model_version_state", 1, **labels)
        add("xlarank_serving_compiles_total", num_compiled)
        with self._lock:
            for name, by_model in (
                ("xlarank_swaps_total", self._swaps),
                ("xlarank_swap_seconds", self._swap_seconds),
                ("xlarank_model_load_failures_total", self._failures),
            ):
                for model, value in by_model.items():
                    add(name, value, model=model)
            for (model, version), seconds in self._load_seconds.items():
                add("nv_model_load_duration_secs", seconds, model=model, version=version)
        return list(families.values())

    def describe(self) -> Iterable[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []
