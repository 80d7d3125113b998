"""What several processes count, added up: by hand, and as Prometheus's own parser reads it."""

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from xlarank.runtime.processes.metrics_merge import MergedMetrics


def text_of(requests=0, depth=0, version="1", seconds=(), rows=0):
    registry = prometheus_client.CollectorRegistry()
    labels = {"model": 'a "b" {c}', "version": version}
    names = list(labels)
    counter = prometheus_client.Counter("requests_total", "Requests", names, registry=registry)
    counter.labels(**labels).inc(requests)
    prometheus_client.Gauge("depth", "Depth", registry=registry).set(depth)
    prometheus_client.Gauge("width", "Width", names, registry=registry).labels(**labels).set(depth)
    histogram = prometheus_client.Histogram("seconds", "Time", names, buckets=(1, 10), registry=registry)
    for value in seconds:
        histogram.labels(**labels).observe(value)
    updated = prometheus_client.Counter("xlarank_table_updated_rows_total", "Rows", names, registry=registry)
    updated.labels(**labels).inc(rows)
    return prometheus_client.generate_latest(registry)


def values_of(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def of(name, version="1", **labels):
    return name, tuple(sorted({"model": 'a "b" {c}', "version": version, **labels}.items()))


def test_counters_and_histograms_are_summed_and_gauges_stand_by_themselves():
    merged = MergedMetrics()
    found = values_of(merged.text([(0, text_of(2, 5, seconds=[0.5])), (1, text_of(3, 7, seconds=[0.5, 5]))]))
    assert found[of("requests_total")] == 5
    assert [found["depth", (("process", process),)] for process in "01"] == [5, 7]
    assert [found[of("width", process=process)] for process in "01"] == [5, 7]
    assert [found[of("seconds_bucket", le=le)] for le in ("1.0", "10.0", "+Inf")] == [2, 3, 3]
    assert found[of("seconds_count")] == 3
    assert found[of("seconds_sum")] == 6


def test_what_is_told_of_a_device_is_of_the_process_that_has_it():
    """Device 0 of each is another: their busy seconds would add up to more than time."""

    def text_of_device(batches):
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.Counter("batches_total", "Batches", ["device"], registry=registry).labels(0).inc(
            batches
        )
        return prometheus_client.generate_latest(registry)

    def found(*texts):
        values = values_of(merged.text(enumerate(map(text_of_device, texts))))
        return [values["batches_total", (("device", "0"), ("process", process))] for process in "01"]

    merged = MergedMetrics()
    assert found(3, 5) == [3, 5]
    merged.keep(1, text_of_device(5))
    assert found(3, 1) == [3, 6]


def test_what_a_process_has_counted_outlives_it():
    merged = MergedMetrics()
    merged.keep(0, text_of(10, 3, seconds=[5]))
    merged.keep(0, text_of(1, 3))
    found = values_of(merged.text([(0, text_of(2, 8))]))
    assert found[of("requests_total")] == 13
    assert found[of("seconds_count")] == 1
    assert found["depth", (("process", "0"),)] == 8


def test_series_of_a_version_that_nobody_serves_end():
    merged = MergedMetrics()
    merged.keep(0, text_of(10, version="1"))
    merged.keep(0, text_of(1, version="2"))
    for _ in range(2):
        found = values_of(merged.text([(0, text_of(2, version="2"))]))
        assert found[of("requests_total", "2")] == 3
        assert of("requests_total", "1") not in found


def test_nothing_is_forgotten_while_no_process_says_what_is_served():
    merged = MergedMetrics()
    merged.keep(0, text_of(10))
    merged.text([])
    assert values_of(merged.text([(0, text_of(1))]))[of("requests_total")] == 11


def test_what_processes_share_is_counted_once():
    merged = MergedMetrics()
    merged.keep(0, text_of(rows=4))
    found = values_of(merged.text([(0, text_of(rows=9)), (1, text_of(rows=9))]))
    assert found[of("xlarank_table_updated_rows_total")] == 9


def test_what_is_said_of_all_processes_has_no_label_of_one():
    own = b"# HELP up Up\n# TYPE up gauge\nup 1.0\n# HELP n_total N\n# TYPE n_total counter\nn_total 2.0\n"
    text = MergedMetrics().text([(0, own)], own)
    assert values_of(text) == {("up", (("process", "0"),)): 1, ("up", ()): 1, ("n_total", ()): 4}
