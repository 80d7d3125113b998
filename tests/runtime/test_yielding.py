"""A process beside a server: it stands still while requests run, and comes to its end all the same."""

import os
import signal
import subprocess
import sys

import pytest

from xlarank.runtime.yielding import IdleSignal, YieldingProcess


@pytest.fixture
def start():
    processes = []

    def start(code, **options):
        processes.append(subprocess.Popen([sys.executable, "-c", code], **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_until_stopped(process):
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # takes the report, so that the next stop gives another


def wait_until_continued(process):
    os.waitid(os.P_PID, process.pid, os.WCONTINUED)


def test_it_stands_still_while_requests_run_and_goes_on_after_them(start):
    process = start("import sys; sys.stdin.read()", stdin=subprocess.PIPE)
    yielding = YieldingProcess(process, period_seconds=1e6)
    idle = IdleSignal()
    idle.update(False)
    with idle.told(yielding.on_idle):
        wait_until_stopped(process)
        idle.update(False)  # another request changes nothing
        idle.update(True)
        wait_until_continued(process)
        idle.update(False)
        wait_until_stopped(process)
        idle.update(True)
        process.stdin.close()
        assert yielding.wait() == 0
    idle.update(False)  # nobody is told any more


def test_beside_a_server_that_is_never_idle_it_comes_to_its_end_and_its_status_is_told(start):
    process = start("raise SystemExit(sum(range(10**6)) % 7 + 5)")
    yielding = YieldingProcess(process, least_share=0.5, period_seconds=0.02)
    yielding.on_idle(False)
    wait_until_stopped(process)
    assert yielding.wait() == sum(range(10**6)) % 7 + 5


class Told:
    """A process of which only the signals and the waits are looked at, in a time of its own."""

    def __init__(self):
        self.now, self.events, self.waits = 0.0, [], []

    def send_signal(self, number):
        self.events.append((self.now, signal.Signals(number).name))

    def wait(self, seconds):
        self.waits.append((self.now, round(seconds, 9)))
        if len(self.waits) == 6:
            return 0
        self.now += seconds
        raise subprocess.TimeoutExpired("", seconds)


def test_in_each_period_it_runs_for_its_share_whatever_requests_do():
    process = Told()
    yielding = YieldingProcess(process, least_share=0.25, period_seconds=4, clock=lambda: process.now)
    yielding.on_idle(False)
    yielding.wait()
    assert process.waits == [(0, 3), (3, 1), (4, 3), (7, 1), (8, 3), (11, 1)]
    stop, go = "SIGSTOP", "SIGCONT"
    assert process.events == [(0, stop), (3, go), (4, stop), (7, go), (8, stop), (11, go)]


def test_what_it_ran_between_requests_counts_as_its_share():
    process = Told()
    yielding = YieldingProcess(process, least_share=0.25, period_seconds=4, clock=lambda: process.now)
    process.now = 0.5
    yielding.on_idle(False)  # after half of its second
    process.now = 0.0
    yielding.wait()
    assert process.waits[:3] == [(0, 3), (3, 0.5), (3.5, 3)]
    process = Told()
    yielding = YieldingProcess(process, least_share=0.25, period_seconds=4, clock=lambda: process.now)
    yielding.wait()  # no request at all
    assert process.waits[:3] == [(0, 3), (3, 3), (6, 3)]
    assert process.events == []


def test_requests_that_come_in_its_share_stop_it_at_the_end_of_it_alone():
    process = Told()
    yielding = YieldingProcess(process, least_share=0.25, period_seconds=4, clock=lambda: process.now)
    yielding.on_idle(False)
    process.now = 3.0
    assert yielding._grant() == 1.0
    yielding.on_idle(True)
    yielding.on_idle(False)
    assert process.events == [(0, "SIGSTOP"), (3, "SIGCONT")]
    process.now = 4.0
    yielding._begin_period()
    assert process.events[2:] == [(4, "SIGSTOP")]
