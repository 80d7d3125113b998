"""What a supervisor makes of what it hears, with a clock and processes that the test makes up."""

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest

from xlarank.errors import ModelError
from xlarank.runtime.processes import supervisor
from xlarank.runtime.processes.messages import (
    Failed,
    Hello,
    Policies,
    Retire,
    SuccessorEnded,
    VersionsElsewhere,
    open_link,
)
from xlarank.runtime.processes.scrapes import Worker
from xlarank.runtime.processes.supervisor import Supervisor
from xlarank.runtime.processes.version_plan import VersionPlan
from xlarank.spec.versions import (
    ModelPolicy,
    Policy,
    VersionLabel,
    VersionOptions,
    VersionState,
    VersionStatus,
)

OLD, NEW, NEWER = ("feed", 1), ("feed", 2), ("feed", 3)
PLAIN = ModelPolicy(name="feed")
PINNED = ModelPolicy(name="feed", policy=Policy.SPECIFIC, versions=(1,))
DEATH = Failed(reason="process 0 ended while it started: signal 9 (SIGKILL)", version=None)


class Plan:
    """Wants version 1, then version 2 as well."""

    def __init__(self):
        self.versions, self.blocked, self.failed, self.removed = (OLD,), [], [], set()
        self.models, self.is_awaited = (PLAIN,), False
        self.models_on_disk = {"feed"}

    def wanted(self, served, former=(), *, is_lost=False):
        return tuple(v for v in self.versions if v not in self.blocked)

    def left(self, versions):
        return tuple(v for v in versions if v not in self.removed)

    def set_policies(self, models):
        self.models = models

    def policies(self, versions, before=(), *, is_all=False):
        kept = {policy.name: policy for policy in before} if self.is_awaited and not is_all else {}
        return tuple(kept.get(policy.name, policy) for policy in self.models)

    def gone(self, versions):
        return {*versions} & self.removed

    def block(self, versions, reason):
        self.blocked += versions

    def statuses(self, *, with_idle=False):
        return self.failed


@pytest.fixture
def told(tmp_path):
    """A supervisor, its plan and clock, and the orders that it has given."""
    told = SimpleNamespace(now=0.0, orders=[], plan=Plan(), ready=[], policies=[])

    def spawn(order):
        told.orders.append(order)
        return 2**30  # nobody's

    told.supervisor = Supervisor(
        told.plan,
        spawn,
        num_workers=2,
        folder=tmp_path / "own",
        watch_seconds=5.0,
        grace_seconds=0.0,
        on_ready=told.ready.append,
        changed_policies=lambda: told.policies.pop() if told.policies else None,
        clock=lambda: told.now,
    )
    yield told
    told.supervisor.close()


def begin(told):
    told.now = max(told.now, told.supervisor._look_at)
    told.supervisor._begin_next()
    assert told.supervisor._starting is not None
    return told.supervisor._starting


def serve(told):
    """Has the first generation serve; it holds the tables over a link."""
    first = begin(told)
    first.holder = SimpleNamespace(send=told.orders.append)
    first.has_had_holder = True
    told.supervisor._see_complete(first)
    return first


def test_a_process_that_dies_at_the_first_start_is_started_again_and_no_version_is_blamed(told):
    for seconds in (1, 2):
        told.supervisor._see_failure(begin(told), DEATH, is_death=True)
        assert told.supervisor._look_at == told.now + seconds
    with pytest.raises(ModelError, match="process 0 ended while it started: signal 9"):
        told.supervisor._see_failure(begin(told), DEATH, is_death=True)
    assert told.plan.blocked == []
    assert len(told.orders) == 3


def test_beside_what_serves_a_version_is_given_up_after_several_deaths_in_a_row(told):
    serve(told)
    told.plan.versions = (OLD, NEW)
    for _ in range(3):
        assert told.plan.blocked == []
        told.supervisor._see_failure(begin(told), DEATH, is_death=True)
    assert told.plan.blocked == [NEW]
    assert told.supervisor._serving.versions == (OLD,)


def test_a_version_whose_compiling_is_killed_is_tried_again_and_given_up_after_several_times(told):
    serve(told)
    told.plan.versions = (OLD, NEW)
    told.plan.versions += (("ads", 2),)
    failed = Failed(reason="was ended by signal 9 (SIGKILL)", version=NEW, is_death=True)
    for _ in range(3):
        assert told.plan.blocked == []
        told.supervisor._hear_holder(begin(told), failed)
    assert told.plan.blocked == [NEW]
    assert begin(told).versions == (OLD, ("ads", 2))


def test_a_failure_long_after_another_is_the_first_again(told):
    serve(told)
    told.plan.versions = (OLD, NEW)
    failed = Failed(reason="access log /none: no such folder", version=None)
    for well, wait in ((0, 1), (1, 2), (2, 4), (60, 1), (1, 2)):
        told.now += well
        told.supervisor._see_failure(begin(told), failed)
        assert told.supervisor._look_at == told.now + wait


def test_starts_that_take_long_to_fail_are_tried_ever_later(told):
    """What they take is no time without a failure."""
    serve(told)
    told.plan.versions = (OLD, NEW)
    for wait in (1, 2, 4):
        generation = begin(told)
        told.now += 90
        told.supervisor._see_failure(generation, Failed(reason="no such folder", version=None))
        assert told.supervisor._look_at == told.now + wait


def test_what_is_no_version_s_fault_ends_the_first_start_and_is_tried_again_later(told):
    failed = Failed(reason="access log /none: no such folder", version=None)
    with pytest.raises(ModelError, match="access log /none"):
        told.supervisor._see_failure(begin(told), failed)
    told.supervisor._starting = None
    serve(told)
    told.plan.versions = (OLD, NEW)
    told.supervisor._see_failure(begin(told), failed)
    assert told.plan.blocked == []
    assert begin(told).versions == (OLD, NEW)


def test_a_version_that_says_it_is_at_fault_is_left_alone_at_once(told):
    serve(told)
    told.plan.versions = (OLD, NEW)
    told.supervisor._see_failure(begin(told), Failed(reason="golden replay", version=NEW))
    assert told.plan.blocked == [NEW]


def test_who_has_failed_takes_nobodys_place(told):
    first = serve(told)
    told.plan.versions = (OLD, NEW)
    second = begin(told)
    told.supervisor._see_failure(second, DEATH, is_death=True)
    told.supervisor._see_complete(second)
    assert told.supervisor._serving is first
    assert not first.is_ending


def test_a_successor_that_ends_before_it_says_a_word_is_noticed(told):
    serve(told)
    told.plan.versions = (OLD, NEW)
    starting = begin(told)
    told.supervisor._hear_holder(
        told.supervisor._serving, SuccessorEnded(generation=starting.number, why="signal 9 (SIGKILL)")
    )
    assert told.supervisor._starting is None
    assert begin(told).number > starting.number


def test_workers_are_told_of_versions_that_failed_when_they_serve_and_when_it_changes(told):
    first = serve(told)
    sent = {index: [] for index in (0, 1)}
    for index, messages in sent.items():
        link = SimpleNamespace(send=messages.append)
        first.workers[index] = Worker(index, 2**30 + index, link, is_ready=not index)
    status = VersionStatus(*NEW, VersionState.UNAVAILABLE, "golden replay")
    told.plan.failed = [status]
    told.supervisor._tell_versions_elsewhere()
    told.supervisor._tell_versions_elsewhere()
    assert sent == {0: [VersionsElsewhere((status,))], 1: []}
    first.workers[1].is_ready = True
    told.supervisor._tell_versions_elsewhere()
    told.plan.failed = []
    told.supervisor._tell_versions_elsewhere()
    assert sent == {index: [VersionsElsewhere((status,)), VersionsElsewhere(())] for index in (0, 1)}


def test_workers_are_told_of_models_that_were_there_at_the_start_and_are_not_served(told):
    """One process isn't ready then; a model that came later and failed changes nothing."""
    messages = []
    told.plan.models_on_disk = {"feed", "ads"}
    generation = serve(told)
    told.supervisor._tell = lambda link, message: messages.append(message)
    generation.workers[1] = Worker(0, 1, link=object(), is_ready=True)
    idle = VersionStatus("feed", 7, VersionState.UNAVAILABLE, "no policy names it")
    held_back = VersionStatus("feed", 8, VersionState.LOADING, "waits")
    failed = VersionStatus("ads", 1, VersionState.UNAVAILABLE, "golden replay")
    told.plan.failed = [failed]
    told.plan.statuses = lambda *, with_idle=False: [failed, idle, held_back] if with_idle else [failed]
    told.plan.models_on_disk = {"feed", "ads", "late"}
    told.supervisor._tell_versions_elsewhere()
    assert messages == [VersionsElsewhere((failed, held_back), (idle,), ("ads",))]
    told.plan.models_on_disk = {"feed"}  # it was removed
    told.supervisor._tell_versions_elsewhere()
    assert messages[-1].unserved == ()


def test_policies_are_a_worker_s_first_word_and_told_again_when_they_change(told, tmp_path):
    first = serve(told)
    link = open_link(tmp_path / "own" / "link", Hello(generation=first.number, pid=2**30, index=0))
    told.supervisor._accept()
    assert link.recv() == Policies((PLAIN,))
    (worker,) = first.workers.values()

    def hears():
        told.now += 5
        told.supervisor._follow_policies()
        told.supervisor._tell_policies()
        return link.recv() if link.poll(0) else None

    told.policies = [(PINNED,)]
    assert hears() is None  # it doesn't read before it serves
    worker.is_ready = True
    assert hears() == Policies((PINNED,))
    assert hears() is None
    told.policies = [(PLAIN,)]
    worker.asked_at = told.now
    assert hears() is None  # it may not be reading
    worker.asked_at = None
    assert hears() == Policies((PLAIN,))
    link.close()


def test_policies_that_wait_for_versions_are_those_of_the_processes_that_have_them(told):
    first = serve(told)
    told.plan.versions, told.plan.is_awaited = (OLD, NEW), True
    told.policies = [(PINNED,)]
    told.supervisor._follow_policies()
    assert first.policies == (PLAIN,)
    second = begin(told)
    assert (first.policies, second.policies) == ((PLAIN,), (PINNED,))
    # Once nothing more is to come they are in force as far as they can be.
    told.supervisor._see_failure(second, Failed(reason="golden replay", version=NEW))
    told.supervisor._begin_next()
    assert told.supervisor._starting is None
    assert first.policies == (PINNED,)


def test_a_start_ends_when_other_policies_or_the_folder_have_its_versions_no_more(told, caplog):
    first = serve(told)
    told.plan.versions = (OLD, NEW)

    def look():
        told.now += 5
        told.supervisor._follow_policies()
        return told.supervisor._starting

    second = begin(told)
    assert look() is second
    told.plan.versions = (OLD, NEWER)  # a newer one waits for its turn
    assert look() is second
    told.plan.removed = {NEW}
    assert look() is None
    third = begin(told)
    assert third.versions == (OLD, NEWER)
    told.policies = [(PINNED,)]
    assert look() is third
    told.policies, told.plan.versions = [(PLAIN,)], (OLD,)
    assert look() is None
    assert [message for message in caplog.messages if "started no further" in message] == [
        f"versions {[version]} aren't wanted any more, and started no further" for version in (NEW, NEWER)
    ]
    told.supervisor._see_failure(second, DEATH, is_death=True)  # they have ended by then
    told.supervisor._see_complete(third)
    told.supervisor._begin_next()
    assert told.supervisor._starting is None
    assert told.supervisor._serving is first
    assert told.plan.blocked == []


@pytest.mark.parametrize("is_watched", [True, False])
def test_processes_for_those_whose_holder_has_ended_come_without_what_was_removed(told, tmp_path, is_watched):
    for name in ("ads", "feed"):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
    told.supervisor._plan = VersionPlan(tmp_path / "models", VersionOptions())
    serving = serve(told)
    assert serving.versions == (("ads", 1), OLD)
    (tmp_path / "models" / "ads" / "1").rmdir()
    told.supervisor._is_watched = is_watched
    told.now = told.supervisor._look_at
    told.supervisor._begin_next()
    assert told.supervisor._starting is None
    told.supervisor._hear_holder(serving, None)
    assert begin(told).versions == (OLD,)


def test_why_a_process_that_was_started_again_can_not_start_is_in_the_log(told, caplog):
    first = serve(told)
    worker = Worker(0, 2**30)
    told.supervisor._hear_worker(first, worker, Failed(reason="no such file", version=OLD))
    assert caplog.messages == [f"process 0 (pid {2**30}) can't start: feed/1: no such file"]
    assert told.plan.blocked == []


def test_a_policy_that_was_taken_back_while_processes_start_does_not_come_in_force(told, tmp_path):
    """Though what it was taken back to waits: the one that serves goes on."""
    (tmp_path / "models" / "feed" / "1").mkdir(parents=True)
    first, second, typo = (
        ModelPolicy(name="feed", labels=(VersionLabel(name="stable", version=version, traffic=1.0),))
        for version in (1, 2, 11)
    )
    told.supervisor._plan = VersionPlan(tmp_path / "models", VersionOptions(models=(first,)))
    serving = serve(told)
    (tmp_path / "models" / "feed" / "2").mkdir()

    def follow(policy):
        told.policies = [(policy,)]
        told.now += 5
        told.supervisor._follow_policies()

    follow(second)
    starting = begin(told)
    assert (serving.policies, starting.policies) == ((first,), (second,))
    follow(typo)
    assert told.supervisor._starting is starting
    assert (serving.policies, starting.policies) == ((first,), (first,))


def test_the_end_of_a_start_that_was_given_up_is_not_the_next_one_s(told):
    given_up = begin(told)  # nothing serves: its holder is a child of the supervisor
    told.policies, told.plan.versions = [(PINNED,)], (NEW,)
    told.now += 5
    told.supervisor._follow_policies()
    following = begin(told)
    told.supervisor._see_mute_end(given_up.number, "signal 9")
    assert told.supervisor._starting is following
    assert list(told.supervisor._generations.values()) == [following]


def test_a_start_that_takes_long_is_in_the_log_and_in_the_index(told, caplog):
    first = serve(told)
    messages = []
    first.workers[0] = Worker(0, 2**30, SimpleNamespace(send=messages.append), is_ready=True)
    told.plan.versions = (OLD, NEW)
    second = begin(told)
    second.workers[1] = Worker(0, 2**30 + 1, is_ready=True)
    told.supervisor._tell_versions_elsewhere()
    loading = VersionStatus(*NEW, VersionState.LOADING)
    assert messages == [VersionsElsewhere((loading,))]
    told.plan.versions = (OLD, NEW, NEWER)
    told.supervisor._reconsider(second, have_policies_changed=False)
    told.supervisor._tell_versions_elsewhere()
    waits = VersionStatus(*NEWER, VersionState.LOADING, "waits to be loaded")
    assert messages[1:] == [VersionsElsewhere((loading, waits))]
    told.plan.versions = (OLD, NEW)
    told.supervisor._reconsider(second, have_policies_changed=False)
    for seconds in (59.0, 2.0, 58.0, 2.0):
        told.now += seconds
        told.supervisor._beat()
    assert [message for message in caplog.messages if "starting" in message] == [
        f"processes for versions {second.versions} have been starting for {seconds} s; 1 of 2 are ready, and "
        f"what else is new comes after them"
        for seconds in (61, 121)
    ]
    told.supervisor._see_complete(second)
    told.supervisor._tell_versions_elsewhere()
    assert messages[-1] == Retire()  # it owes an answer: what nobody reads would fill the link
    first.workers[0].asked_at = None
    told.supervisor._tell_versions_elsewhere()
    newer = VersionStatus(*NEW, VersionState.LOADING, "newer processes serve it: connect again")
    assert messages[-1] == VersionsElsewhere((newer,))


def test_the_first_version_of_an_empty_repository_is_told_as_it_loads(told):
    told.plan.versions, told.plan.models_on_disk = (), set()
    first = serve(told)
    messages = []
    first.workers[0] = Worker(0, 1, SimpleNamespace(send=messages.append), is_ready=True)
    told.plan.versions = (OLD,)
    begin(told)
    told.supervisor._tell_versions_elsewhere()
    assert messages == [VersionsElsewhere((VersionStatus(*OLD, VersionState.LOADING),))]


def test_a_model_that_comes_while_the_first_processes_start_was_not_there_at_the_start(told):
    told.plan.models_on_disk = {"feed", "ads"}
    first = begin(told)
    told.plan.models_on_disk = {"feed", "ads", "late"}
    told.supervisor._reconsider(first, have_policies_changed=False)
    told.supervisor._see_complete(first)
    messages = []
    first.workers[0] = Worker(0, 1, SimpleNamespace(send=messages.append), is_ready=True)
    told.supervisor._tell_versions_elsewhere()
    assert messages == [VersionsElsewhere((), unserved=("ads",))]


def test_a_holder_that_does_not_end_is_killed(told):
    first = serve(told)
    with subprocess.Popen(["sleep", "600"]) as hung, contextlib.ExitStack() as stack:
        stack.callback(hung.kill)
        first.holder, first.holder_pid = SimpleNamespace(send=lambda message: None), hung.pid
        first.workers[0] = Worker(0, 2**30)  # without a link: it has ended
        told.supervisor._has_children = True
        told.supervisor._clock = itertools.count(1000.0, 4.0).__next__
        told.supervisor._end()
        assert hung.wait(60) == -signal.SIGKILL


def test_a_socket_that_was_cleaned_away_is_made_again(told, tmp_path):
    (tmp_path / "own" / "link").unlink()
    (tmp_path / "own").rmdir()
    told.supervisor._beat()
    assert (tmp_path / "own" / "link").is_socket()


def test_a_process_that_does_not_answer_is_asked_once_and_killed(told):
    ours, its = socket.socketpair()
    link, silent = Connection(ours.detach()), Connection(its.detach())
    first = serve(told)
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            worker = Worker(0, process.pid, link, is_ready=True)
            first.workers[process.pid] = worker
            for told.now in range(1000, 1030):
                told.supervisor._beat()
                assert told.supervisor._is_up(0) == (told.now < 1005)
            assert process.poll() is None
            told.now = 1030
            told.supervisor._beat()
            assert process.wait(30) == -9
        finally:
            process.kill()
    silent.recv()
    assert not silent.poll(0), "it was asked again"
    link.close()
    silent.close()


HALF_A_MESSAGE = """
import os, socket, sys, time
from multiprocessing.connection import Connection
from xlarank.runtime.processes.messages import Hello
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
if len(sys.argv) > 2:
    Connection(os.dup(link.fileno())).send(Hello(generation=int(sys.argv[2]), pid=os.getpid(), index=0))
link.sendall(bytes(2))
time.sleep(600)
"""


@pytest.mark.parametrize("has_greeted", [False, True])
def test_a_process_that_stands_still_in_the_middle_of_a_message_is_killed(
    told, tmp_path, monkeypatch, has_greeted
):
    monkeypatch.setattr(supervisor, "_MESSAGE_SECONDS", 0.2)
    generation = begin(told)
    words = [str(generation.number)] if has_greeted else []
    command = [sys.executable, "-c", HALF_A_MESSAGE, str(tmp_path / "own" / "link"), *words]
    with subprocess.Popen(command) as process:
        try:
            told.supervisor._accept()
            if has_greeted:
                (link,) = told.supervisor._links
                assert generation.workers[process.pid].link is link
                told.supervisor._hear(link)
            assert process.wait(30) == -9
            assert not told.supervisor._links
        finally:
            process.kill()
