"""`xlarank simulate` runs made-up or recorded traffic through the server's scheduler."""

import json
import re

import pytest
from measured import write_bundle

from xlarank.cli import main
from xlarank.runtime.bucket_plan import SECONDS_A_RUN


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Runs of 128 rows take 10 ms, those of 8 rows 2 ms."""

    def seconds(bucket):
        return {"cpu": {8: 2e-3, 128: 10e-3}[bucket.rows] - SECONDS_A_RUN}

    return write_bundle(tmp_path_factory.mktemp("models"), seconds)


@pytest.fixture
def run(capsys, bundle):
    """Runs the command on the bundle; gives its facts, its page and its errors."""

    def run(*words, bundle=bundle):
        status = main.main(main.parse(["xlarank", "simulate", str(bundle), *words]))
        output = capsys.readouterr()
        return (json.loads(output.out) if status == 0 and "--json" in words else {}), output.out, output.err

    return run


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_trace_is_run_by_hand(run, tmp_path):
    trace = write(
        tmp_path / "trace.csv",
        # As a spreadsheet writes it, with a mark in front.
        "\ufeffseconds,candidates,priority,timeout_ms,user\n1.0,100,,,ann\n1.001,120,3,,\n1.002,8,1,,\n1.003,8,2,5,\n",
    )
    facts, _, _ = run("--trace", trace, "--json", "--slo-ms", "15")
    # 100 rows until 1.010; the eight of level 1 go first, with them in one run of 128 nothing else fits.
    assert facts["requests"] == 4
    assert facts["refused"] == 1  # its 5 ms are over before the device is free
    assert facts["batches"] == 2
    assert facts["latency_ms"]["p50"] == pytest.approx(18.0)
    assert facts["utilisation"] == pytest.approx(1.0)
    assert facts["goodput"] == pytest.approx(1 / 0.02)
    assert facts["padding_share"] == pytest.approx(1 - 228 / 256)


def test_poisson_traffic_at_a_share_of_capacity(run):
    facts, _, _ = run(
        "--load", "0.5", "--candidates", "128", "--requests", "2000", "--devices", "2", "--json"
    )
    assert facts["offered_requests_per_second"] == pytest.approx(0.5 * 2 / 10e-3, rel=0.1)
    assert facts["utilisation"] == pytest.approx(0.5, rel=0.1)
    assert 10 <= facts["latency_ms"]["p50"] < facts["latency_ms"]["p99"]
    assert facts["devices"] == [{"kind": "cpu", "speed": 1.0, "cost": 1.0}] * 2


def test_a_slower_device_takes_what_the_faster_one_has_no_time_for(run):
    options = ("--load", "0.6", "--candidates", "128", "--requests", "2000", "--json")
    both, _, _ = run(*options, "--speeds", "1,0.25")
    assert both["refused"] == 0
    assert both["latency_ms"]["p99"] < 80
    spread, _, _ = run(*options, "--speeds", "1,0.25", "--dispatch-policy", "spread")
    assert spread["latency_ms"]["mean"] > both["latency_ms"]["mean"]


def test_devices_of_several_kinds_have_times_of_their_own(run, tmp_path):
    """One takes 3 ms for any rows, the other 2 ms for 8 and 40 ms for 128: each has what it does sooner."""
    times = {"wide": {8: 3e-3, 128: 3e-3}, "quick": {8: 2e-3, 128: 40e-3}}
    path = write_bundle(
        tmp_path / "kinds",
        lambda bucket: {kind: own[bucket.rows] - SECONDS_A_RUN for kind, own in times.items()},
    )
    trace = write(tmp_path / "trace.csv", "seconds,candidates\n1.0,8\n2.0,100\n3.0,100\n3.0,8\n")
    kinds = ("--device-kind", "wide", "--device-kind", "quick")
    facts, _, _ = run("--trace", trace, *kinds, "--json", bundle=path)
    assert [device["kind"] for device in facts["devices"]] == ["wide", "quick"]
    assert facts["latency_ms"]["mean"] == pytest.approx((2 + 3 + 3 + 2) / 4)
    _, _, err = run("--trace", trace, *kinds, "--speeds", "1,1,2", bundle=path)
    assert "--device-kind: expected one, or one for each of 3 devices, got ['wide', 'quick']" in err
    assert "choose one with --device-kind" in run("--trace", trace, bundle=path)[2]


def test_the_page_reads_well(run, tmp_path):
    sizes = write(tmp_path / "sizes.txt", "8\n8\n120\n")
    _, page, _ = run("--rate", "50", "--sizes", sizes, "--requests", "300")
    lines = page.splitlines()
    assert lines[0].startswith("feed version 7 on 1 device like cpu, policy affinity: 300 requests of ")
    assert [line.split()[0] for line in lines[1:]] == [
        "offered",
        "answered",
        "goodput",
        "latency",
        "refused",
        "batches",
        "devices",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seconds\n1\n", r"expected a header of seconds, candidates and of .*, got \['seconds'\]"),
        ("seconds,candidates,colour\n1,1,red\n", r"got \['seconds', 'candidates', 'colour'\]"),
        ("seconds,candidates\n", r"expected at least one arrival, got none"),
        ("seconds,candidates\n1,many\n", r"line 2: expected candidates as a number >= 1, got 'many'"),
        ("seconds,candidates\n1,1.5\n", r"line 2: expected candidates as a whole number, got '1\.5'"),
        ("seconds,candidates\n-1,1\n", r"line 2: expected seconds as a number >= 0, got '-1'"),
        ("seconds,candidates,priority\n1,1,9\n", r"line 2: expected priority of 1 to 4, got '9'"),
    ],
)
def test_a_trace_that_can_not_be_read_is_refused(run, tmp_path, text, message):
    _, _, err = run("--trace", write(tmp_path / "trace.csv", text))
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "0"), "simulation: rate must be > 0; was 0.0"),
        (("--rate", "1", "--devices", "0"), "--devices must be >= 1; was 0"),
        (
            ("--rate", "1", "--devices", "3", "--speeds", "1,2"),
            "--speeds: expected one for each of 3 devices, got 2",
        ),
        (("--rate", "1", "--costs", "1,2"), "--costs: expected one for each of 1 devices, got 2"),
        (("--rate", "1", "--slo-ms", "0"), "--slo-ms must be > 0; was 0.0"),
        (("--rate", "1", "--slo-ms", "nan"), "--slo-ms must be > 0; was nan"),
        (("--rate", "1", "--slowdown", "0"), "--slowdown must be > 0; was 0.0"),
        (("--rate", "1", "--capacity", "0"), "--capacity must be > 0; was 0.0"),
        (("--rate", "1", "--capacity", "1", "--alone-ms", "0"), "--alone-ms must be > 0; was 0.0"),
        (
            ("--rate", "1", "--alone-ms", "1"),
            "--alone-ms: expected --capacity beside it, which says what a batch takes",
        ),
        (("--rate", "1", "--overhead-ms", "-1"), "--overhead-ms must be >= 0; was -1.0"),
        (("--rate", "1", "--timeout-ms", "-1"), "--timeout-ms must be >= 0; was -1.0"),
        (("--rate", "1", "--requests", "0"), "--requests must be >= 1; was 0"),
        (
            ("--rate", "1", "--candidates", "65537"),
            "traffic: expected at most 65536 candidates a request, the server's max_candidates, got 65537",
        ),
        (("--trace", "nowhere.csv"), "nowhere.csv: expected a CSV file: "),
    ],
)
def test_options_that_make_no_sense_are_refused(run, options, message):
    _, _, err = run(*options)
    assert message in err


COUNTERS = (
    ("xlarank_bucket_batches_total", 'bucket="8x1",'),
    ("xlarank_bucket_batches_total", 'bucket="128x128",'),
    ("xlarank_gather_seconds_total", ""),
    ("xlarank_execute_seconds_total", ""),
    ("nv_inference_request_success", ""),
    ("nv_inference_compute_output_duration_us", ""),
    ("xlarank_outside_seconds_total", ""),
)


def page_of(*values, model="feed", version=7):
    """A page of /metrics, as far as it is read."""
    labels = f'model="{model}",version="{version}"'
    lines = [f"{name}{{{own}{labels}}} {value}" for (name, own), value in zip(COUNTERS, values, strict=True)]
    return "\n".join(["# TYPE nv_inference_request_success counter", *lines, ""])


def test_slowdown_and_overhead_are_added_by_hand(run, tmp_path):
    trace = write(tmp_path / "trace.csv", "seconds,candidates,timeout_ms\n0,128,\n0,128,32\n0,128,34\n")
    facts, _, _ = run("--trace", trace, "--slowdown", "1.5", "--overhead-ms", "3", "--json")
    # By the bundle's times of 10 ms all would be in time, of which 3 are over before they are queued. But
    # runs take 15: when the second one ends, at 30, the third can't be through by 34 less 3.
    assert facts["latency_ms"]["p50"] == pytest.approx((15 + 3 + 30 + 3) / 2)
    assert (facts["late"], facts["slowdown"], facts["overhead_ms"]) == (1, 1.5, 3.0)
    _, page, _ = run("--trace", trace, "--slowdown", "1.5")
    assert "server     batches take 1.50 times what was measured, and a request 0.00 ms beside them" in page


def test_load_is_a_share_of_what_a_slowed_server_can_do(run):
    options = ("--load", "0.5", "--candidates", "128", "--requests", "2000", "--json")
    idle, _, _ = run(*options)
    slowed, _, _ = run(*options, "--slowdown", "2", "--overhead-ms", "1")
    assert slowed["offered_requests_per_second"] == pytest.approx(idle["offered_requests_per_second"] / 2)
    assert slowed["latency_ms"]["mean"] == pytest.approx(2 * idle["latency_ms"]["mean"] + 1, rel=1e-6)


def test_a_server_is_simulated_by_what_a_client_saw_of_it(run):
    # Runs of 128 rows take 10 ms and answer one request; 40 a second are 25 ms each, and 7 of 32 are beside.
    options = ("--candidates", "128", "--requests", "2000", "--capacity", "40", "--json")
    facts, _, _ = run("--load", "0.5", *options, "--alone-ms", "32")
    assert facts["slowdown"] == pytest.approx(2.5)
    assert facts["overhead_ms"] == pytest.approx(7.0)
    assert facts["offered_requests_per_second"] == pytest.approx(20, rel=0.1)
    # An M/D/1 queue at half its load waits half a service on average.
    assert facts["latency_ms"]["mean"] == pytest.approx(25 + 12.5 + 7, rel=0.1)
    saturated, _, _ = run("--rate", "1000", *options, "--max-queue-ms", "1e6")
    assert saturated["requests_per_second"] == pytest.approx(40, rel=0.01)
    assert saturated["overhead_ms"] == 0  # nobody saw a request alone
    given, _, _ = run("--load", "0.5", *options, "--overhead-ms", "3")
    assert (given["slowdown"], given["overhead_ms"]) == (pytest.approx(2.5), 3.0)


def test_a_lone_request_faster_than_its_batch_is_told(run):
    # 40 a second are 25 ms each: busy cores or noise may make that of 12.5, and nothing that of less.
    options = ("--rate", "1", "--candidates", "128", "--requests", "50", "--capacity", "40")
    facts, _, _ = run(*options, "--alone-ms", "12.6", "--json")
    assert facts["overhead_ms"] == 0
    seen = (
        "at 40 requests/s (--capacity) the batch of a lone request takes 25.00 ms, and one that came alone "
        "was answered in {:.2f} ms (--alone-ms)"
    )
    note = f"{seen.format(12.6)}: busy cores or noise; no time beside batches is simulated"
    assert facts["note"] == note
    _, page, _ = run(*options, "--alone-ms", "12.6")
    assert f"\nnote       {note}\n" in page
    _, page, err = run(*options, "--alone-ms", "12.4")
    assert page == ""
    assert f"{seen.format(12.4)}; expected at least 12.50 ms, as busy cores make batches 2 times" in err
    fits, page, _ = run(*options, "--alone-ms", "25.1", "--json")
    assert fits["note"] == ""
    assert fits["overhead_ms"] == pytest.approx(0.1)


def test_a_lone_request_is_split_where_requests_are_spread(run):
    # Of 16 rows each device runs 8 in 2 ms, where one device alone takes 4. Of 64 at once the first one runs
    # alone and the others in four runs of 16 and of 10 ms: half as many a second are a slowdown of 2.
    traffic = ("--rate", "1", "--candidates", "16", "--requests", "64", "--devices", "2")
    seen = ("--capacity", str(64 / (0.002 + 4 * 0.010) / 2), "--alone-ms", "5")
    facts, _, _ = run(*traffic, "--dispatch-policy", "spread", *seen, "--json")
    assert facts["slowdown"] == pytest.approx(2)
    assert facts["note"] == ""
    assert facts["overhead_ms"] == pytest.approx(5 - 2 * 2)


def test_a_page_of_metrics_says_how_fast_a_server_is(run, tmp_path):
    # 100 batches of 2 ms and 80 of 10 ms are 1 s by the bundle's times, and took 1.2 + 0.21, and 0.5 ms each
    # to answer; 400 requests were elsewhere for 0.6 s.
    page = page_of(100, 80, 0.21, 1.2, 400, 0.2e6, 0.6)
    other = page_of(0, 9, 1, 2, 3, 4, 5, model="other")
    path = write(tmp_path / "page.txt", page + other)
    options = ("--rate", "20", "--candidates", "8", "--requests", "50", "--json")
    facts, _, _ = run(*options, "--server-metrics", path)
    assert facts["slowdown"] == pytest.approx(1.5)
    assert facts["overhead_ms"] == pytest.approx(1.5)
    assert facts["latency_ms"]["p50"] == pytest.approx(1.5 * 2 + 1.5)
    numbers, _, _ = run(*options, "--server-metrics", path, "--overhead-ms", "7")
    assert numbers["slowdown"] == pytest.approx(1.5)
    assert numbers["overhead_ms"] == 7
    # Two versions are one server; of two pages what happened between them counts.
    later = write(tmp_path / "later.txt", page + page_of(50, 90, 1, 1.9, 100, 0.1e6, 0.2, version=8))
    facts, _, _ = run(*options, "--server-metrics", path, later)
    assert facts["slowdown"] == pytest.approx(3.0)
    assert facts["overhead_ms"] == pytest.approx(2.0)


def test_a_page_is_of_devices_of_the_speeds_that_are_named(run, tmp_path):
    page = write(tmp_path / "page.txt", page_of(100, 80, 0.21, 1.2, 400, 0.2e6, 0.6))  # 1.5 times 1 s
    options = ("--rate", "20", "--candidates", "8", "--requests", "50", "--server-metrics", page)
    facts, _, _ = run(*options, "--speeds", "2,2", "--json")
    assert facts["slowdown"] == pytest.approx(1.5 / (1.0 / 2 + 180 * SECONDS_A_RUN / 2), rel=1e-6)
    _, _, err = run(*options, "--speeds", "2,1")
    assert "expected devices of one kind and speed, got kinds ['one'] and speeds [2.0, 1.0]: a page" in err


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("hello\n", "page.txt: expected the /metrics of an xlarank server, got no line of nv_inference_"),
        (page_of(1, 1, 1, 1, 1, 1, 1, model="other"), r"requests of model 'feed', got those of \['other'\]"),
        (page_of(0, 0, 0, 0, 0, 0, 0), "model 'feed' has answered no requests; expected a page after some"),
        (page_of(1, 1, 0, 0, 1, 0, 0), "expected xlarank_gather_seconds_total and .* above 0, got 0"),
        (page_of(1, 1, 1, "x", 1, 1, 1), r"page.txt:5: expected xlarank_execute_seconds_total\{model="),
        (page_of(1, -1, 1, 1, 1, 1, 1), r'page.txt:3: expected xlarank_bucket_batches_total\{bucket="'),
        (
            page_of(1, 1, 1, 1, 1, 1, 1).replace("128x128", "64x8"),
            r"expected batches of the bundle's buckets, \['8x1', .*, got 64x8; was it another version",
        ),
    ],
)
def test_a_page_that_says_nothing_of_the_bundle_is_refused(run, tmp_path, page, message):
    path = write(tmp_path / "page.txt", page)
    _, _, err = run("--rate", "1", "--server-metrics", path)
    assert re.search(message, err), err


def test_pages_that_are_no_two_of_one_server_are_refused(run, tmp_path):
    early = write(tmp_path / "early.txt", page_of(1, 1, 1, 1, 1, 1, 1))
    late = write(tmp_path / "late.txt", page_of(2, 2, 2, 2, 2, 2, 2))
    _, _, err = run("--rate", "1", "--server-metrics", late, early)
    assert re.search(
        r"early.txt: expected a later page of the server of .*late.txt, got a \w+ that fell from 2 to 1", err
    )
    _, _, err = run("--rate", "1", "--server-metrics", early, early)
    assert "early.txt: model 'feed' has answered no requests" in err
    _, _, err = run("--rate", "1", "--server-metrics", early, late, late)
    assert "--server-metrics: expected one page or two, got 3" in err
    _, _, err = run("--rate", "1", "--server-metrics", str(tmp_path / "nowhere"))
    assert "nowhere: can't be read: No such file or directory" in err
