"""Prometheus metrics under the names that Triton's dashboards know, and a few of our own: `Metrics`.

`Metrics` holds one `ModelMetrics` a model version; engines write into those, `Metrics.text` is what
`/metrics` answers. Names (labels `model` and `version`; durations in microseconds, summed over requests):

    nv_inference_request_success            requests answered
    nv_inference_request_failure            requests refused or failed, by `reason`: REJECTED, CANCELED,
                                            BACKEND, OTHER (bad input)
    nv_inference_count                      rows scored
    nv_inference_exec_count                 batches executed
    nv_inference_request_duration_us        arrival (over gRPC of a call's headers) to answer: wait, decode,
                                            and the four below
    nv_inference_queue_duration_us          submit to the start of gather
    nv_inference_compute_input_duration_us  gather
    nv_inference_compute_infer_duration_us  execute
    nv_inference_compute_output_duration_us respond
    nv_inference_pending_request_count      requests submitted and not yet answered
    nv_inference_*_duration_histogram_us    the same five durations as histograms
    xlarank_wait_duration_histogram_us      arrival until the request had come whole, a thread had it and its
                                            message (over HTTP its JSON) was parsed, of answered ones, as a
                                            histogram; a part of the request's duration
    xlarank_request_candidates              candidates of accepted requests that have any, as a histogram
    xlarank_bucket_batches_total            batches executed, by `bucket` (rows x requests)
    xlarank_batch_rows_total                valid rows in them, by `bucket`
    xlarank_padding_rows_total              rows of them that held no candidate, by `bucket`
    xlarank_gather_seconds_total            time spent gathering, summed over batches
    xlarank_execute_seconds_total           time spent executing, summed over batches
    xlarank_outside_seconds_total           time that answered requests spent in the server before submit and
                                            after the answer: decode, encode, threads' hand-offs; summed
    xlarank_request_path_compiles_total     compiles that a request had to wait for: a defect
    xlarank_table_bytes                     bytes of the embedding tables
    xlarank_table_checked_bytes             bytes of them found as written; grows while mapped ones serve
    xlarank_table_version                   updates of a table's rows since it was loaded, by `table`
    xlarank_table_updated_rows_total        rows that they wrote, by `table`
    xlarank_table_age_seconds               since the last of them, or since the load, by `table`
    xlarank_table_huge_page_bytes           bytes of them that lay in huge pages when they were loaded
    xlarank_table_memory_bytes              bytes of a table, by `table` and by `memory`: huge (read into
                                            memory of the process) or mmap (mapped from its file)

Of models that are served with a feature store, see `FeatureStoreStats`:

    xlarank_feature_store_rows              candidates that a lookup finds
    xlarank_feature_store_bytes             memory of what was put in; a file's pages are not counted
    xlarank_feature_store_hits_total        candidates looked up and found
    xlarank_feature_store_misses_total      candidates looked up and not found
    xlarank_feature_store_evictions_total   rows that made room for others, or didn't fit
    xlarank_feature_store_fetches_total     times that the source was asked, to their end
    xlarank_feature_store_fetch_seconds_total   time that they took, summed
    xlarank_feature_store_fetch_failures_total  requests refused as the source failed or took too long
    xlarank_feature_store_version           updates so far
    xlarank_feature_store_age_seconds       time since the newest update
    xlarank_feature_store_oldest_seconds    time since the oldest row in memory was put in or asked for
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import prometheus_client
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from xlarank.errors import ConfigError
from xlarank.host import FeatureStoreStats
from xlarank.runtime.answer import Timings
from xlarank.runtime.table_versions import TableVersion
from xlarank.spec import Bucket
from xlarank.spec.ladder import CANDIDATES_METRIC

__all__ = ["FAILURE_REASONS", "BatchTime", "Metrics", "ModelMetrics", "ModelStatistics"]

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
"""Triton's: refused unrun or timed out in the queue; given up by the caller; failed while running; else."""

_STAGES = ("request", "queue", "compute_input", "compute_infer", "compute_output")

_WAIT = "xlarank_wait_duration_histogram_us"

_BOUNDS_US = tuple(10.0 * 2**i for i in range(21))
"""Upper bounds of the histograms: 10 us to 10.5 s, each twice the one before."""

_SIZE_BOUNDS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
"""Upper bounds of candidates a request; each may be a bucket's row count."""

_HELP = {
    "nv_inference_request_success": "Requests answered",
    "nv_inference_request_failure": "Requests refused or failed, by reason",
    "nv_inference_count": "Rows scored",
    "nv_inference_exec_count": "Batches executed",
    "nv_inference_request_duration_us": "Microseconds from arrival to answer, summed over requests",
    "nv_inference_queue_duration_us": "Microseconds from submit to gather, summed over requests",
    "nv_inference_compute_input_duration_us": "Microseconds of gather, summed over requests",
    "nv_inference_compute_infer_duration_us": "Microseconds of execute, summed over requests",
    "nv_inference_compute_output_duration_us": "Microseconds of respond, summed over requests",
    "nv_inference_pending_request_count": "Requests submitted and not yet answered",
    "xlarank_bucket_batches_total": "Batches executed, by bucket (rows x requests)",
    "xlarank_batch_rows_total": "Valid rows in executed batches, by bucket",
    "xlarank_padding_rows_total": "Rows of executed batches that held no candidate, by bucket",
    "xlarank_gather_seconds_total": "Seconds of gather, summed over batches",
    "xlarank_execute_seconds_total": "Seconds of execute, summed over batches",
    "xlarank_outside_seconds_total": "Seconds of decode, encode and hand-offs, summed over answered requests",
    "xlarank_request_path_compiles_total": "Compiles that a request had to wait for",
    "xlarank_table_bytes": "Bytes of the embedding tables",
    "xlarank_table_checked_bytes": "Bytes of the embedding tables found to be as written",
    "xlarank_table_huge_page_bytes": "Bytes of the embedding tables in huge pages when they were loaded",
    "xlarank_table_memory_bytes": "Bytes of a table, by where it is",
    "xlarank_table_version": "Updates of a table's rows since it was loaded",
    "xlarank_table_updated_rows_total": "Rows that were written while serving",
    "xlarank_table_age_seconds": "Seconds since a table was last updated, or loaded",
}

_GAUGES = {
    "nv_inference_pending_request_count",
    "xlarank_table_bytes",
    "xlarank_table_checked_bytes",
    "xlarank_table_huge_page_bytes",
    "xlarank_table_memory_bytes",
    "xlarank_table_version",
    "xlarank_table_age_seconds",
    "xlarank_feature_store_rows",
    "xlarank_feature_store_bytes",
    "xlarank_feature_store_version",
    "xlarank_feature_store_age_seconds",
    "xlarank_feature_store_oldest_seconds",
}

_OF_TABLES = {
    "xlarank_table_version": "version",
    "xlarank_table_updated_rows_total": "num_rows",
    "xlarank_table_age_seconds": "age_seconds",
}
"""Series by table: fields of `TableVersion`."""

_OF_BUCKETS: Mapping[str, Callable[[Bucket, int, int], int]] = {
    "xlarank_bucket_batches_total": lambda bucket, num_batches, num_rows: num_batches,
    "xlarank_batch_rows_total": lambda bucket, num_batches, num_rows: num_rows,
    "xlarank_padding_rows_total": lambda bucket, num_batches, num_rows: num_batches * bucket.rows - num_rows,
}
"""Series by bucket: from its batches, and the valid rows in them."""

_STORE_HELP = {
    "xlarank_feature_store_rows": "Candidates that a lookup in the feature store finds",
    "xlarank_feature_store_bytes": "Bytes of memory of rows put into the feature store",
    "xlarank_feature_store_hits_total": "Candidates looked up in the feature store and found",
    "xlarank_feature_store_misses_total": "Candidates looked up in the feature store and not found",
    "xlarank_feature_store_evictions_total": "Rows that left the feature store for others, or didn't fit",
    "xlarank_feature_store_fetches_total": "Times that the feature store asked its source, to their end",
    "xlarank_feature_store_fetch_seconds_total": "Seconds that the feature store's source took to answer",
    "xlarank_feature_store_fetch_failures_total": "Requests refused as the source failed or took too long",
    "xlarank_feature_store_version": "Updates of the feature store so far",
    "xlarank_feature_store_age_seconds": "Seconds since the newest update of the feature store",
    "xlarank_feature_store_oldest_seconds": "Seconds since the oldest row in memory was put in or asked for",
}


@dataclasses.dataclass(frozen=True)
class BatchTime:
    """Batches of buckets of one size."""

    num_batches: int = 0
    gather_seconds: float = 0.0
    """Summed."""

    execute_seconds: float = 0.0
    """Summed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """What one model version did since it was loaded, of one moment."""

    num_successes: int
    num_failures: int
    num_rows: int
    """Of requests answered."""

    num_batches: int
    failure_seconds: float
    """Until failures were told, summed."""

    stage_seconds: Mapping[str, float]
    """Summed over successes: request (the whole, from its arrival), queue, compute_input, compute_infer,
    compute_output."""

    batches: Mapping[int, BatchTime]
    """By rows of the bucket."""

    last_success_at: float
    """Seconds since 1970; 0: none yet."""

    table_bytes: int
    """Of the embedding tables."""


# prometheus_client writes counters' headers with the suffix _total, which Triton's names don't have.
_TRITON_HEADER = re.compile(r"^(# (?:HELP|TYPE) nv_inference_\w+)_total ", re.MULTILINE)


class ModelMetrics:
    """What one model version did. Any thread may write; a write costs a few microseconds.

    The engine counts batches, and requests that it accepts and answers. Failures are counted by whoever tells
    the caller (the server), because only there the bad input that no engine saw and the caller who left are
    known too.
    """

    def __init__(
        self,
        model: str,
        version: int,
        *,
        pending: Callable[[], int] = lambda: 0,
        features: Callable[[], FeatureStoreStats] | None = None,
    ) -> None:
        """
        Args:
          model: its name.
          version: its version.
          pending: requests submitted and not yet answered; asked at each scrape.
          features: what its feature store holds and did, asked likewise; None without one.
        """
        self.labels = {"model": model, "version": str(version)}
        self._pending = pending
        self._features = features
        self._lock = threading.Lock()
        # All below guarded by _lock.
        self._values = dict.fromkeys(_HELP, 0.0)  # by metric name
        self._failures: Counter[str] = Counter(dict.fromkeys(FAILURE_REASONS, 0))
        self._failure_seconds = 0.0
        self._last_success_at = 0.0
        self._batches: Counter[Bucket] = Counter()
        self._batch_rows: Counter[Bucket] = Counter()  # valid ones
        self._batch_seconds: dict[Bucket, tuple[float, float]] = {}  # of gather and execute
        self._sums_us = [0.0] * len(_STAGES)
        self._histograms = [[0] * (len(_BOUNDS_US) + 1) for _ in _STAGES]  # not cumulative
        self._wait_us = 0.0
        self._waits = [0] * (len(_BOUNDS_US) + 1)  # their histogram, not cumulative
        self._num_candidates = 0  # of all accepted requests
        self._candidates = [0] * (len(_SIZE_BOUNDS) + 1)  # their histogram, not cumulative
        self._checked_table_bytes: Callable[[], int] = lambda: 0
        self._table_places: Mapping[str, tuple[str, int]] = {}
        self._table_versions: Callable[[], Mapping[str, TableVersion]] = dict

    def record_accepted(self, num_candidates: int) -> None:
        """Counts the N >= 1 of a queued request, whatever becomes of it: what the traffic asks for."""
        assert num_candidates >= 1
        with self._lock:
            self._num_candidates += num_candidates
            self._candidates[bisect.bisect_left(_SIZE_BOUNDS, num_candidates)] += 1

    def record_batch(
        self, bucket: Bucket, num_rows: int, num_requests: int, gather_seconds: float, execute_seconds: float
    ) -> None:
        """Counts one executed batch.

        Args:
          bucket: the compiled size that ran.
          num_rows: rows in it that are candidates; the rest is padding.
          num_requests: requests with rows in it.
          gather_seconds: looking up and filling the buffers.
          execute_seconds: dispatch to scores on the host.
        """
        assert 0 < num_rows <= bucket.rows
        assert 0 < num_requests <= bucket.requests
        with self._lock:
            values = self._values
            values["nv_inference_exec_count"] += 1
            values["xlarank_gather_seconds_total"] += gather_seconds
            values["xlarank_execute_seconds_total"] += execute_seconds
            self._batches[bucket] += 1
            self._batch_rows[bucket] += num_rows
            before = self._batch_seconds.get(bucket, (0.0, 0.0))
            self._batch_seconds[bucket] = (before[0] + gather_seconds, before[1] + execute_seconds)

    def record_success(self, num_rows: int, timings: Timings, before_seconds: float = 0.0) -> None:
        """Counts one answered request; its share of a batch counts as the whole batch's time, as in Triton.

        What is left of the total beside queue, gather and execute counts as respond.

        Args:
          num_rows: N.
          timings: of it.
          before_seconds: from its arrival to its submit; part of the request's duration, and of no stage.
        """
        respond = max(0.0, timings.total - timings.queue - timings.gather - timings.execute)
        total = before_seconds + timings.total
        durations = (total, timings.queue, timings.gather, timings.execute, respond)
        with self._lock:
            self._values["nv_inference_request_success"] += 1
            self._values["nv_inference_count"] += num_rows
            self._last_success_at = time.time()
            for stage, seconds in enumerate(durations):
                duration_us = seconds * 1e6
                self._sums_us[stage] += duration_us
                self._histograms[stage][bisect.bisect_left(_BOUNDS_US, duration_us)] += 1

    def record_outside(self, seconds: float, wait_seconds: float = 0.0) -> None:
        """Counts what an answered request took beside the `Timings.total` of its answer.

        Args:
          seconds: that the server spent on it.
          wait_seconds: from its arrival until a thread of the server had it to read; no part of `seconds`.
        """
        wait_us = wait_seconds * 1e6
        with self._lock:
            self._values["xlarank_outside_seconds_total"] += seconds
            self._wait_us += wait_us
            self._waits[bisect.bisect_left(_BOUNDS_US, wait_us)] += 1

    def record_failure(self, reason: str, seconds: float = 0.0) -> None:
        """Counts one refused or failed request.

        Args:
          reason: one of FAILURE_REASONS.
          seconds: from its arrival until the caller was told.
        """
        if reason not in FAILURE_REASONS:
            raise ConfigError(f"failure reason: expected one of {list(FAILURE_REASONS)}, got {reason!r}")
        with self._lock:
            self._failures[reason] += 1
            self._failure_seconds += seconds

    def set_compiles(self, count: int) -> None:
        """States how many compiles happened on the request path so far."""
        with self._lock:
            self._values["xlarank_request_path_compiles_total"] = count

    def set_tables(
        self,
        *,
        places: Mapping[str, tuple[str, int]],
        huge_page_bytes: int,
        checked_bytes: Callable[[], int],
    ) -> None:
        """States what tables there are.

        Args:
          places: by table, the name of the memory that it is in, and its bytes.
          huge_page_bytes: how many lay in huge pages.
          checked_bytes: how many were found to be as written; asked at each scrape.
        """
        with self._lock:
            self._values["xlarank_table_bytes"] = sum(num_bytes for _, num_bytes in places.values())
            self._table_places = dict(places)
            self._values["xlarank_table_huge_page_bytes"] = huge_page_bytes
            self._checked_table_bytes = checked_bytes

    def set_table_versions(self, now: Callable[[], Mapping[str, TableVersion]]) -> None:
        """States whom to ask, at each scrape, how often the updatable tables were updated."""
        with self._lock:
            self._table_versions = now

    def statistics(self) -> ModelStatistics:
        """What was counted so far, for those who ask by RPC."""
        with self._lock:
            batches: dict[int, BatchTime] = {}
            for bucket, (gather, execute) in sorted(self._batch_seconds.items()):
                one = batches.get(bucket.rows, BatchTime())
                batches[bucket.rows] = BatchTime(
                    one.num_batches + self._batches[bucket],
                    one.gather_seconds + gather,
                    one.execute_seconds + execute,
                )
            return ModelStatistics(
                num_successes=int(self._values["nv_inference_request_success"]),
                num_failures=self._failures.total(),
                num_rows=int(self._values["nv_inference_count"]),
                num_batches=int(self._values["nv_inference_exec_count"]),
                failure_seconds=self._failure_seconds,
                stage_seconds={s: us * 1e-6 for s, us in zip(_STAGES, self._sums_us, strict=True)},
                batches=batches,
                last_success_at=self._last_success_at,
                table_bytes=int(self._values["xlarank_table_bytes"]),
            )

    def detach(self) -> None:
        """Asks nobody any more: who holds these metrics doesn't hold the engine that they are of."""
        with self._lock:
            self._pending = lambda: 0
            self._features = None
            self._checked_table_bytes = lambda: 0
            self._table_versions = dict

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name, labels and value of every series but the histograms', of one moment."""
        with self._lock:
            values, failures = self._values.copy(), self._failures.copy()
            batches, batch_rows = self._batches.copy(), self._batch_rows.copy()
            sums_us = list(self._sums_us)
            checked_table_bytes, table_versions = self._checked_table_bytes, self._table_versions
            pending, features = self._pending, self._features
            table_places = self._table_places
        values["xlarank_table_checked_bytes"] = checked_table_bytes()
        for stage, total_us in zip(_STAGES, sums_us, strict=True):
            values[f"nv_inference_{stage}_duration_us"] = total_us
        values["nv_inference_pending_request_count"] = pending()
        tables = table_versions()
        for name in _HELP:
            if name == "nv_inference_request_failure":
                for reason, count in failures.items():
                    yield name, {**self.labels, "reason": reason}, count
            elif name == "xlarank_table_memory_bytes":
                for table, (memory, num_bytes) in table_places.items():
                    yield name, {**self.labels, "table": table, "memory": memory}, num_bytes
            elif name in _OF_TABLES:
                for table, state in tables.items():
                    yield name, {**self.labels, "table": table}, getattr(state, _OF_TABLES[name])
            elif name in _OF_BUCKETS:
                for bucket, count in sorted(batches.items()):
                    value = _OF_BUCKETS[name](bucket, count, batch_rows[bucket])
                    yield name, {**self.labels, "bucket": str(bucket)}, value
            else:
                yield name, self.labels, values[name]
        if features is not None:
            fields = dataclasses.asdict(features())
            for name in _STORE_HELP:
                field = name.removeprefix("xlarank_feature_store_").removesuffix("_total")
                yield name, self.labels, fields[field]

    def histograms(self) -> Iterator[tuple[str, list[tuple[str, int]], float]]:
        """Metric name, cumulative counts by upper bound, and sum of what is counted, of one moment."""
        with self._lock:
            histograms, sums_us = [list(counts) for counts in self._histograms], list(self._sums_us)
            waits, wait_us = list(self._waits), self._wait_us
            candidates, num_candidates = list(self._candidates), self._num_candidates
        for stage, counts, total_us in zip(_STAGES, histograms, sums_us, strict=True):
            yield f"nv_inference_{stage}_duration_histogram_us", _cumulative(_BOUNDS_US, counts), total_us
        yield _WAIT, _cumulative(_BOUNDS_US, waits), wait_us
        yield CANDIDATES_METRIC, _cumulative(_SIZE_BOUNDS, candidates), num_candidates


class Metrics(Collector):
    """The metrics of a process, one `ModelMetrics` a model version."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """
        Args:
          registry: where to register; a new one, with the process's own metrics, by default.
        """
        if registry is None:
            registry = CollectorRegistry()
            prometheus_client.ProcessCollector(registry=registry)
        self._registry = registry
        self._lock = threading.Lock()
        self._models: dict[tuple[str, int], ModelMetrics] = {}  # guarded by _lock
        registry.register(self)

    def model(
        self,
        name: str,
        version: int,
        *,
        pending: Callable[[], int] = lambda: 0,
        features: Callable[[], FeatureStoreStats] | None = None,
    ) -> ModelMetrics:
        """New metrics of a model version; they replace those of an earlier load of the same version."""
        metrics = ModelMetrics(name, version, pending=pending, features=features)
        with self._lock:
            self._models[name, version] = metrics
        return metrics

    @property
    def num_successes(self) -> int:
        """Requests answered, of all versions that there are."""
        with self._lock:
            models = list(self._models.values())
        return sum(model.statistics().num_successes for model in models)

    def remove(self, name: str, version: int) -> None:
        """Forgets an unloaded version, and lets go of its engine."""
        with self._lock:
            metrics = self._models.pop((name, version), None)
        if metrics is not None:
            metrics.detach()

    def register(self, collector: Collector) -> None:
        """Lets /metrics say what another collector has to say."""
        self._registry.register(collector)

    def unregister(self, collector: Collector) -> None:
        """Ends what `register` began."""
        self._registry.unregister(collector)

    def text(self) -> bytes:
        """Prometheus text format 0.0.4, with the names exactly as above."""
        text = prometheus_client.generate_latest(self._registry).decode()
        return _TRITON_HEADER.sub(r"\1 ", text).encode()

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        with self._lock:
            models = list(self._models.values())
        families = {
            name: Metric(name.removesuffix("_total"), text, _type_of(name))
            for name, text in (_HELP | _STORE_HELP).items()
        }
        for name, labels, value in itertools.chain.from_iterable(model.samples() for model in models):
            families[name].add_sample(name, labels, value)
        yield from (family for name, family in families.items() if name in _HELP or family.samples)
        for stage in _STAGES:
            help_text = _HELP[f"nv_inference_{stage}_duration_us"].removesuffix(", summed over requests")
            yield self._histogram(f"nv_inference_{stage}_duration_histogram_us", help_text, models)
        yield self._histogram(_WAIT, "Microseconds from arrival until a thread had the request", models)
        yield self._histogram(CANDIDATES_METRIC, "Candidates of an accepted request", models)

    def describe(self) -> Iterable[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []

    def _histogram(self, name: str, help_text: str, models: list[ModelMetrics]) -> Metric:
        family = HistogramMetricFamily(name, help_text, labels=["model", "version"])
        for model in models:
            for own_name, buckets, total in model.histograms():
                if own_name == name:
                    family.add_metric(list(model.labels.values()), buckets, total)
        return family


def _cumulative(bounds: Sequence[float], counts: Iterable[int]) -> list[tuple[str, int]]:
    names = [*(f"{bound:.0f}" for bound in bounds), "+Inf"]
    return list(zip(names, itertools.accumulate(counts), strict=True))


def _type_of(name: str) -> str:
    return "gauge" if name in _GAUGES else "counter"
