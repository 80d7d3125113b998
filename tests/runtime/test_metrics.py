"""What `/metrics` says after known events."""

import threading

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from xlarank.errors import ConfigError
from xlarank.runtime.answer import Timings
from xlarank.runtime.metrics import FAILURE_REASONS, Metrics
from xlarank.spec import Bucket

LABELS = '{model="feed",version="3"}'


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def feed(metrics):
    return metrics.model("feed", 3)


def lines(metrics):
    return metrics.text().decode().splitlines()


def value(metrics, name, labels=LABELS):
    (line,) = [line for line in lines(metrics) if line.startswith(f"{name}{labels} ")]
    return float(line.rpartition(" ")[2])


def succeed(model, num_rows=1, before=0.0, **seconds):
    timings = Timings(**{"queue": 0, "gather": 0, "execute": 0, "total": 0} | seconds)
    model.record_success(num_rows, timings, before)


def test_a_success_counts_once_with_its_rows_and_durations(metrics, feed):
    succeed(feed, 500, queue=1.0, gather=0.25, execute=0.5, total=2.0)
    succeed(feed, 20, before=8.0, queue=0.5, gather=0.25, execute=0.5, total=1.5)
    assert value(metrics, "nv_inference_request_success") == 2
    assert value(metrics, "nv_inference_count") == 520
    assert value(metrics, "nv_inference_request_duration_us") == 11.5e6  # from the arrival on
    assert value(metrics, "nv_inference_queue_duration_us") == 1.5e6
    assert value(metrics, "nv_inference_compute_input_duration_us") == 0.5e6
    assert value(metrics, "nv_inference_compute_infer_duration_us") == 1e6
    assert value(metrics, "nv_inference_compute_output_duration_us") == 0.5e6  # what is left of the total


def test_time_outside_of_the_engine_is_summed(metrics, feed):
    feed.record_outside(0.5)
    feed.record_outside(0.25, wait_seconds=8.0)
    assert value(metrics, "xlarank_outside_seconds_total") == 0.75


def test_waits_for_a_thread_are_counted_by_length(metrics, feed):
    feed.record_outside(0.5)
    feed.record_outside(0.5, wait_seconds=0.05)
    name = "xlarank_wait_duration_histogram_us"
    counts = [
        value(metrics, f"{name}_bucket", f'{{le="{bound}",model="feed",version="3"}}')
        for bound in (10, 40960, 81920, "+Inf")
    ]
    assert counts == [1, 1, 2, 2]
    assert value(metrics, f"{name}_sum") == 50_000


def test_a_batch_counts_its_rows_padding_and_bucket(metrics, feed):
    feed.record_batch(Bucket(512, 1), 500, 1, 0.25, 0.5)
    feed.record_batch(Bucket(512, 16), 300, 9, 0.25, 0.5)
    feed.record_batch(Bucket(512, 1), 512, 1, 0.25, 0.5)
    assert value(metrics, "nv_inference_exec_count") == 3
    assert value(metrics, "xlarank_gather_seconds_total") == 0.75
    assert value(metrics, "xlarank_execute_seconds_total") == 1.5
    for bucket, batches, rows, padding in (("512x1", 2, 1012, 12), ("512x16", 1, 300, 212)):
        labels = f'{{bucket="{bucket}",model="feed",version="3"}}'
        assert value(metrics, "xlarank_bucket_batches_total", labels) == batches
        assert value(metrics, "xlarank_batch_rows_total", labels) == rows
        assert value(metrics, "xlarank_padding_rows_total", labels) == padding


def test_tables_are_stated_once_and_what_is_checked_of_them_at_each_scrape(metrics, feed):
    checked = [10]
    places = {"users": ("mmap", 18), "videos": ("huge", 32)}
    feed.set_tables(places=places, huge_page_bytes=32, checked_bytes=lambda: checked[0])
    for num_bytes in (10, 50):
        checked[0] = num_bytes
        assert value(metrics, "xlarank_table_checked_bytes") == num_bytes
    assert value(metrics, "xlarank_table_bytes") == 50
    assert value(metrics, "xlarank_table_huge_page_bytes") == 32
    for table, (memory, num_bytes) in places.items():
        labels = f'{{memory="{memory}",model="feed",table="{table}",version="3"}}'
        assert value(metrics, "xlarank_table_memory_bytes", labels) == num_bytes


def test_failures_are_counted_by_reason(metrics, feed):
    for count, reason in enumerate(FAILURE_REASONS):
        for _ in range(count):
            feed.record_failure(reason)
    for count, reason in enumerate(FAILURE_REASONS):
        labels = f'{{model="feed",reason="{reason}",version="3"}}'
        assert value(metrics, "nv_inference_request_failure", labels) == count
    with pytest.raises(ConfigError, match=r"expected one of .*, got 'BORED'"):
        feed.record_failure("BORED")


def test_histogram_buckets_are_cumulative_and_their_bounds_inclusive(metrics, feed):
    for seconds in (5e-6, 1e-5, 1.5e-5, 0.05, 100.0):
        succeed(feed, total=seconds)
    name = "nv_inference_request_duration_histogram_us"

    def up_to(bound):
        return value(metrics, f"{name}_bucket", f'{{le="{bound}",model="feed",version="3"}}')

    assert [up_to(bound) for bound in (10, 20, 40960, 81920, 10485760, "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert value(metrics, f"{name}_count") == 5
    assert value(metrics, f"{name}_sum") == pytest.approx(100_050_030, rel=1e-12)


def test_accepted_requests_are_counted_by_their_candidates(metrics, feed):
    for num_candidates in (1, 2, 3, 8, 9, 500, 500, 4096, 4097):
        feed.record_accepted(num_candidates)
    name = "xlarank_request_candidates"

    def up_to(bound):
        return value(metrics, f"{name}_bucket", f'{{le="{bound}",model="feed",version="3"}}')

    bounds = (1, 2, 4, 8, 16, 384, 512, 2048, 4096, "+Inf")
    assert [up_to(bound) for bound in bounds] == [1, 2, 3, 4, 5, 5, 7, 7, 8, 9]
    assert value(metrics, f"{name}_count") == 9
    assert value(metrics, f"{name}_sum") == 1 + 2 + 3 + 8 + 9 + 500 + 500 + 4096 + 4097
    assert value(metrics, "nv_inference_request_success") == 0  # accepted is not yet answered
    with pytest.raises(AssertionError):
        feed.record_accepted(0)


def test_compiles_and_pending_are_what_they_were_set_to(metrics):
    pending = [4]
    model = metrics.model("feed", 3, pending=lambda: pending[0])
    assert value(metrics, "xlarank_request_path_compiles_total") == 0
    model.set_compiles(2)
    pending[0] = 7
    assert value(metrics, "xlarank_request_path_compiles_total") == 2
    assert value(metrics, "nv_inference_pending_request_count") == 7


def test_names_and_types_are_triton_s(metrics, feed):
    types = [line.split()[2:] for line in lines(metrics) if line.startswith("# TYPE")]
    stages = ("request", "queue", "compute_input", "compute_infer", "compute_output")
    expected = {
        "nv_inference_request_success": "counter",
        "nv_inference_request_failure": "counter",
        "nv_inference_count": "counter",
        "nv_inference_exec_count": "counter",
        "nv_inference_pending_request_count": "gauge",
        "xlarank_batch_rows_total": "counter",
        "xlarank_padding_rows_total": "counter",
        "xlarank_bucket_batches_total": "counter",
        "xlarank_gather_seconds_total": "counter",
        "xlarank_execute_seconds_total": "counter",
        "xlarank_outside_seconds_total": "counter",
        "xlarank_request_path_compiles_total": "counter",
        "xlarank_request_candidates": "histogram",
        "xlarank_wait_duration_histogram_us": "histogram",
        "xlarank_table_bytes": "gauge",
        "xlarank_table_checked_bytes": "gauge",
        "xlarank_table_huge_page_bytes": "gauge",
        "xlarank_table_memory_bytes": "gauge",
        "xlarank_table_version": "gauge",
        "xlarank_table_updated_rows_total": "counter",
        "xlarank_table_age_seconds": "gauge",
        **{f"nv_inference_{stage}_duration_us": "counter" for stage in stages},
        **{f"nv_inference_{stage}_duration_histogram_us": "histogram" for stage in stages},
    }
    assert dict(types) == expected
    assert len(types) == len(expected)


def test_a_scraper_can_read_all_of_it(metrics, feed):
    metrics.model('odd "name"', 1)
    families = list(text_string_to_metric_families(metrics.text().decode()))
    models = {sample.labels["model"] for family in families for sample in family.samples}
    assert models == {"feed", 'odd "name"'}


def test_a_model_version_loaded_again_starts_anew_and_a_removed_one_is_gone(metrics, feed):
    succeed(feed)
    metrics.model("feed", 3)
    metrics.model("feed", 4)
    assert value(metrics, "nv_inference_request_success") == 0
    metrics.remove("feed", 3)
    text = metrics.text().decode()
    assert 'version="3"' not in text
    assert 'version="4"' in text


def test_the_process_s_own_metrics_stand_beside():
    assert b"process_resident_memory_bytes " in Metrics().text()


def test_no_event_of_several_threads_is_lost(metrics, feed):
    def work():
        for _ in range(500):
            feed.record_accepted(2)
            succeed(feed, 2, total=1.0)
            feed.record_batch(Bucket(8, 1), 2, 1, 0.0, 0.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "nv_inference_request_success") == 2000
    assert value(metrics, "nv_inference_count") == 4000
    bucket = '{bucket="8x1",model="feed",version="3"}'
    assert value(metrics, "xlarank_batch_rows_total", bucket) == 4000
    assert value(metrics, "xlarank_padding_rows_total", bucket) == 12000
    count = value(metrics, "nv_inference_request_duration_histogram_us_count")
    assert count == 2000
    assert value(metrics, "xlarank_request_candidates_count") == 2000
