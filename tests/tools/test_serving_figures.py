"""The serving benchmark's own arithmetic: windows of swaps, CPU of a process, names of groups."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench_serving import GROUPS, groups_of
from open_loop import Played
from queue_server import OURS
from request_cpu import process_cpu_seconds
from serving_lab import ServerMeans
from serving_latency import Point, p99_over_md1, simulator_error
from serving_overload import Overload, overload_figures
from serving_rules import LOADS, Curves, vs_fixed_delay
from serving_swaps import COLD, REFRESH, WARM, Swap, SwapRun, swap_p99, wait_until_alone

from xlarank.cli.server_pace import ServerPace


def run_of(swaps, latency_at):
    """A request each 10 ms."""
    began_at, at = 1000.0, np.arange(0, 100, 0.01)
    latencies = np.array([latency_at(began_at + start) for start in at])
    played = Played(at, latencies, ["OK"] * len(at), np.zeros(len(at)), began_at)
    return SwapRun(swaps, played, num_compiles=0)


def test_requests_belong_to_the_window_that_they_were_meant_to_start_in():
    run = run_of([], lambda now: now)
    inside = run.latencies(1048.0, 1052.0)
    assert (inside.min(), inside.max()) == pytest.approx((1048.0, 1051.99))
    assert len(inside) == 400


def test_the_figure_is_of_the_worst_kind_and_of_each_swap_over_its_own_pause():
    def latency(now):
        """Of swaps 20, 30 and 10 ms, of pauses 10, but once the machine is ten times slower."""
        slower = 10 if 1060 <= now < 1080 else 1
        return slower * (0.03 if 1020 <= now < 1030 else 0.02 if now % 20 < 10 and now < 1090 else 0.01)

    def swap(kind, begin):
        return Swap(kind=kind, begin=begin, end=begin + 9, pause_begin=begin + 10, pause_end=begin + 20)

    swaps = [swap(COLD, 1000.0), swap(REFRESH, 1020.0), swap(COLD, 1040.0), swap(COLD, 1060.0)]
    figure = swap_p99([run_of([*swaps, swap(WARM, 1080.0)], latency)], how="x")
    assert figure.value == pytest.approx(3.0)
    assert "the worst of cold, warm, new weights: new weights" in figure.how
    assert figure.beside["cold, 3 swaps of 9.0 s"] == (
        "2.000 (2.000 to 2.000); all together p50 20.00 and p99 200.00 ms of 2700 requests, after them "
        "p50 10.00 and p99 100.00 ms of 3000 requests"
    )
    assert figure.beside["failures, compiles in the server"] == "0 of 10000 requests, 0 programs"


def test_a_swap_ends_when_the_version_before_has_ended():
    answers = [
        {1: ("READY", "")},
        {1: ("READY", ""), 2: ("LOADING", "")},
        {1: ("UNLOADING", ""), 2: ("READY", "")},
        {1: ("UNAVAILABLE", "not served under policy latest"), 2: ("READY", "")},
    ]
    asked = iter(answers)
    wait_until_alone(2, lambda: next(asked), sleep=lambda seconds: None)
    assert next(asked, None) is None


def test_a_version_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"version 2 isn't served: golden scores differ"):
        wait_until_alone(2, lambda: {2: ("UNAVAILABLE", "golden scores differ")}, sleep=lambda seconds: None)


SPINNING = """
import threading, time

def spin():
    while time.process_time() < 0.4:
        pass
    both.wait()
    threading.Event().wait()

both = threading.Barrier(3)
for _ in range(2):
    threading.Thread(target=spin, daemon=True).start()
both.wait()
print(flush=True)
input()
"""
"""Two threads that have used some CPU, live on and use no more."""


def test_cpu_of_a_process_is_that_of_its_threads():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SPINNING], **pipes) as process:
        process.stdout.readline()
        user, kernel = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        expected = (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")
        assert expected >= 0.3
        assert process_cpu_seconds(process.pid) == pytest.approx(expected, abs=0.05)
        assert process_cpu_seconds(process.pid, "no such thread") == 0
        process.communicate(b"\n")


def test_rules_are_compared_schedule_by_schedule():
    ours = [{0.5: 1.0, 0.99: 2.0}, {0.5: 2.0, 0.99: 10.0}, {0.5: 3.0, 0.99: 3.0}]
    theirs = [{0.5: 1.0, 0.99: 3.0}, {0.5: 2.0, 0.99: 12.0}, {0.5: 6.0, 0.99: 12.0}]
    curves = Curves("light", {OURS: {0.5: ours}, "500": {0.5: theirs}}, 3)
    assert curves.latency("500", 0.5, 0.99) == 12.0
    assert curves.ratio("500", 0.5) == 1.5  # the medians' own ratio would be 4
    assert curves.ratio("500", 0.5, 0.5) == 1.0


def test_what_was_served_is_compared_turn_by_turn_and_told_with_its_requests():
    ours = [np.full(50, 1.0), np.full(50, 1.0), np.full(60, 1.0)]
    theirs = [np.full(50, 2.0), np.full(50, 1.5), np.full(60, 9.0)]
    served = {OURS: ours, "500": theirs, "5000": theirs}
    schedule = [{0.5: 1.0, 0.99: 2.0}] * 3
    curves = Curves("light", {rule: dict.fromkeys(LOADS, schedule) for rule in served}, 700)
    light = SimpleNamespace(words="light")
    figure = vs_fixed_delay([curves, curves], light, served, how="x")
    assert (figure.value, figure.spread) == (1.0, (1.0, 2.0))
    assert figure.beside["light, 500 us, served at 50%"] == (
        "2.000; p50 2.000; our p99 1000.00 ms; of the requests of all turns together 9.000"
    )
    assert (
        figure.beside["requests of a rule"] == "simulated 3 x 700, 3 x 700 at a load; served 160: 50, 50, 60"
    )


def overload(latencies, *, service):
    """One of a hundred seconds, a request each."""
    at = np.arange(1.0, 101.0)
    played = Played(at, latencies, ["OK"] * 90 + ["RESOURCE_EXHAUSTED"] * 10, np.zeros(100), 0.0)
    return Overload(played=played, seconds=100.0, capacity=1.0, service=service)


def test_overload_is_told_by_the_requests_of_all_runs():
    """Of 100 requests 14 arrive while the queue fills, and 10 are refused."""
    runs = [
        overload(np.arange(1.0, 101.0), service=1.0),
        overload(np.arange(2.0, 202.0, 2.0), service=2.0),
        overload(np.full(100, 1000.0), service=1.0),
    ]
    _, p99 = overload_figures("", runs, target=1, how="x")
    assert p99.value == pytest.approx(200.0)
    assert p99.spread == pytest.approx((np.quantile(np.arange(15, 91) / 5, 0.99), 200.0))
    assert p99.beside["requests, all and of each run"] == "228: 76, 76, 76"


def test_the_tail_over_an_m_d_1_queue_is_of_all_runs_in_their_own_services():
    """The machine is half as fast in the second run, which is no longer a queue for it."""
    fast = point(0.7, 0.010, 0, 0)
    slow = dataclasses.replace(point(0.7, 0.024, 0, 0), capacity=50.0, md1=np.full(1, 0.020))
    fast = dataclasses.replace(fast, md1=np.full(1, 0.010))
    figure = p99_over_md1([fast, slow], [fast, point(0.3, 9.0, 0, 0)], how="x")
    assert figure.value == pytest.approx(np.quantile([1.0, 1.2], 0.99))
    assert figure.spread == pytest.approx((1.0, 1.2))
    assert figure.beside["requests, all and of each run"] == "2: 1, 1"
    assert figure.beside["light model, p99"] == "1.000; requests 1: 1"


def point(load, served, simulated, idle):
    """A run of one request."""
    latencies = np.array([served])
    return Point(
        load=load,
        capacity=100.0,
        alone=0.006,
        played=Played(np.zeros(1), latencies, ["OK"], np.zeros(1), 0.0),
        means=ServerMeans(gather=0, execute=0, queue=0, respond=0, total=0, rows_a_batch=500),
        md1=np.ones(1),
        pace=ServerPace(slowdown=1.5, overhead_seconds=0.002),
        simulated_mean=simulated,
        idle_mean=idle,
    )


def test_the_simulator_is_as_far_off_as_at_its_worst_load():
    demo = [point(load, 0.010, mean, 0.005) for load, mean in ((0.3, 0.009), (0.6, 0.012), (0.8, 0.011))]
    figure = simulator_error(demo, {"light": [point(0.7, 0.010, 0.030, 0.005)]}, how="x")
    assert figure.value == pytest.approx(0.2)
    assert figure.spread == pytest.approx((0.1, 0.2))
    assert figure.beside["demo model at 60%"].startswith(
        "simulated 12.00 ms, served 10.00 ms: +20.0% (with the bundle's times alone -50.0%); slowdown 1.50, "
        "alone 6.00 ms, overhead 2.00; "
    )
    assert figure.beside["light model at 70%"].startswith("simulated 30.00 ms, served 10.00 ms: +200.0%")


def test_groups_are_named_by_themselves_or_by_their_figures():
    assert groups_of("simulator_error,swaps,p99_over_md1") == ["latency", "swaps"]
    assert groups_of(",".join(GROUPS)) == list(GROUPS)
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected groups or figures, got \['speed'\]"):
        groups_of("swaps,speed")
