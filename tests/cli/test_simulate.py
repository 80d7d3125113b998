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

    def run(*words):
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
        "seconds,candidates,priority,timeout_ms,user\n1.0,100,,,ann\n1.001,120,3,,\n1.002,8,1,,\n1.003,8,2,5,\n",
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
    assert facts["devices"] == [{"speed": 1.0, "cost": 1.0}] * 2


def test_a_slower_device_takes_what_the_faster_one_has_no_time_for(run):
    options = ("--load", "0.6", "--candidates", "128", "--requests", "2000", "--json")
    both, _, _ = run(*options, "--speeds", "1,0.25")
    assert both["refused"] == 0
    assert both["latency_ms"]["p99"] < 80
    spread, _, _ = run(*options, "--speeds", "1,0.25", "--dispatch-policy", "spread")
    assert spread["latency_ms"]["mean"] > both["latency_ms"]["mean"]


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
        (("--rate", "1", "--requests", "0"), "--requests must be >= 1; was 0"),
        (("--trace", "nowhere.csv"), "nowhere.csv: expected a CSV file: "),
    ],
)
def test_options_that_make_no_sense_are_refused(run, options, message):
    _, _, err = run(*options)
    assert message in err
