"""Policies and labels that change while versions serve, load or are another process's."""

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from xlarank.bundle import open_bundle
from xlarank.errors import ConfigError, UnavailableError
from xlarank.runtime import ModelPolicy, ModelRepository, Policy, VersionLabel, VersionOptions
from xlarank.runtime.tables import HeldTables, load_tables


@pytest.fixture
def opened(root):
    """Opens the repository; closed at the end."""
    repositories = []

    def opened(*policies, watch_seconds=None, **options):
        versions = VersionOptions(warm_share=1.0, models=policies, watch_seconds=watch_seconds)
        repositories.append(ModelRepository.open(root, num_devices=2, versions=versions, **options))
        return repositories[-1]

    yield opened
    for repository in repositories:
        repository.close()


def labelled(policy=Policy.LATEST, versions=(), **labels):
    """A policy of `linear`; (version, traffic) by label."""
    made = [VersionLabel(name=name, version=v, traffic=traffic) for name, (v, traffic) in labels.items()]
    return ModelPolicy(name="linear", policy=policy, versions=versions, labels=made)


def answering(repository, num_requests=20):
    """The versions that requests go to that name none."""
    versions = set()
    for _ in range(num_requests):
        with repository.lease("linear") as engine:
            versions.add(engine.version)
    return versions


def states(repository):
    return {status.version: status.state for status in repository.index()}


def stopped(started):
    """The next helper process, which stands still."""
    process = started.get(timeout=60)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    return process


def test_labels_move_at_once_while_another_version_is_compiled(publish, opened, started):
    publish(1, rows=[4])
    publish(2, rows=[4])
    repository = opened(labelled(stable=(1, 1.0), canary=(2, 0.0)))
    assert answering(repository) == {1}
    publish(3, rows=[16])
    polled = threading.Thread(target=repository.poll)
    polled.start()
    process = stopped(started)
    repository.set_policies([labelled(stable=(1, 0.0), canary=(2, 1.0))])
    assert answering(repository) == {2}
    repository.set_policies([labelled(stable=(2, 0.5), canary=(1, 0.5))])
    assert answering(repository) == {1, 2}
    assert repository.engine("linear", "stable").version == 2
    assert states(repository)[3] == "LOADING"
    process.send_signal(signal.SIGCONT)
    polled.join(120)
    assert states(repository) == {1: "READY", 2: "READY", 3: "READY"}
    assert answering(repository) == {1, 2}


def test_a_label_that_answers_is_not_moved_before_its_version_does(publish, opened):
    publish(1)
    publish(2)
    repository = opened(labelled(Policy.SPECIFIC, (1,), stable=(1, 1.0)))
    repository.set_policies([labelled(stable=(2, 1.0))])
    assert repository.engine("linear", "stable").version == 1
    assert answering(repository) == {1}
    repository.poll()
    assert repository.engine("linear", "stable").version == 2
    assert answering(repository) == {2}
    repository.set_policies([])
    repository.poll()
    assert repository._models["linear"].routes.policy == ModelPolicy()


@pytest.mark.parametrize("label", [2, 22])
def test_a_label_that_leads_to_a_version_that_fails_or_never_comes_is_not_moved(
    publish, opened, caplog, label
):
    publish(1)
    repository = opened(labelled(stable=(1, 1.0)))
    publish(2, golden_error=0.5)
    publish(3)
    repository.set_policies([labelled(stable=(label, 1.0))])
    for _ in range(2):
        repository.poll()
    assert answering(repository) == {1}
    assert repository.engine("linear", "stable").version == 1
    waiting = [message for message in caplog.messages if "a policy waits for versions" in message]
    assert waiting == [
        "model linear: a policy waits for versions of its labels, and the one before it stays in force: "
        f"labels lead to [{label}], there are [1, 3]"
    ]
    repository.set_policies([labelled(stable=(3, 1.0))])
    repository.poll()
    assert answering(repository) == {3}


@pytest.mark.parametrize("canary", [None, 2])
def test_a_rollback_is_done_though_a_policy_waits(publish, opened, canary):
    """It leaves the version that the policy before leads to: there is a reason to."""
    publish(1)
    publish(2)
    if canary is None:
        repository, waiting = opened(labelled(stable=(2, 1.0))), labelled(stable=(22, 1.0))
    else:
        repository = opened(labelled(stable=(1, 0.5), canary=(2, 0.5)))
        waiting = labelled(stable=(1, 0.5), canary=(22, 0.5))
    repository.set_policies([waiting])
    repository.poll()
    assert 2 in answering(repository)
    assert repository.rollback("linear") == 1
    for _ in range(2):
        assert answering(repository) == {1}
        reasons = {status.version: status.reason for status in repository.index()}
        assert reasons[2] == "rolled back from, to version 1"
        repository.poll()


def test_a_version_that_waits_for_those_of_labels_is_not_ready(publish, opened):
    for version in (1, 2, 3):
        publish(version)
    repository = opened(labelled(Policy.SPECIFIC, (2,), stable=(1, 1.0)))
    repository.set_policies([labelled(stable=(22, 1.0))])
    repository.poll()
    assert states(repository) == {1: "READY", 2: "READY", 3: "LOADING", 22: "UNAVAILABLE"}
    why = r"waits for all versions that the policy's labels lead to: \[22\]"
    with pytest.raises(UnavailableError, match=f"version 3 is not at ready state: {why}"):
        repository.engine("linear", "3")
    repository.set_policies([labelled(stable=(3, 1.0))])
    repository.poll()
    assert states(repository) == {1: "UNAVAILABLE", 2: "UNAVAILABLE", 3: "READY"}


@pytest.mark.parametrize(
    ("former", "answers"),
    [
        (labelled(debug=(1, 0.0)), {3}),
        (labelled(stable=(1, 0.5), canary=(2, 0.5)), {1, 2}),
        (labelled(Policy.SPECIFIC, (2,), debug=(1, 0.0)), {2}),
    ],
)
def test_while_a_policy_waits_versions_come_and_go_by_the_one_before(publish, opened, former, answers):
    """A typo in a label neither stops what is published nor lets it answer where it shouldn't."""
    publish(1)
    publish(2)
    repository = opened(former)
    typo = [VersionLabel(name=label.name, version=99, traffic=label.traffic) for label in former.labels]
    waiting = ModelPolicy(name="linear", labels=typo)
    repository.set_policies([waiting])
    publish(3)
    for _ in range(2):
        repository.poll()
        assert answering(repository) == answers
    repository.unload("linear")
    repository.load("linear")
    assert answering(repository) == answers


def test_an_ordinary_start_with_labels_warns_of_nothing(publish, opened, caplog):
    publish(1)
    publish(2)
    opened(labelled(stable=(1, 0.9), canary=(2, 0.1)))
    assert caplog.messages == []


def test_a_policy_before_of_which_nothing_can_answer_is_not_waited_by(publish, opened):
    publish(2, golden_error=0.5)
    repository = opened(labelled(Policy.SPECIFIC, (2,)), watch_seconds=3600.0)
    publish(3)
    repository.set_policies([labelled(stable=(4, 1.0))])
    repository.poll()
    assert answering(repository) == {3}


def test_labels_whose_versions_are_not_there_at_a_start_are_told_of(publish, root, opened, caplog):
    publish(2)
    canary = labelled(stable=(9, 0.9), canary=(2, 0.1))
    missing = r"model 'linear': its policy names versions \[9\], found \[2\]"
    with pytest.raises(ConfigError, match=missing):
        opened(canary)
    versions = VersionOptions(watch_seconds=3600.0, models=(canary,))
    with contextlib.closing(ModelRepository.open(root, num_devices=1, versions=versions)) as repository:
        assert answering(repository) == {2}
    assert caplog.messages == [
        "model linear: labels {'stable': 9} lead to versions that aren't served, and their share of the "
        "requests goes to others: [2]"
    ]


def answering_at_loads(repository, monkeypatch):
    """A list of what answers as each load begins, filled as they do."""
    seen = []
    load = repository._loader.load

    def looking(*words, **options):
        seen.append(answering(repository))
        return load(*words, **options)

    monkeypatch.setattr(repository._loader, "load", looking)
    return seen


def test_labels_wait_until_all_of_their_versions_are_there(publish, opened, monkeypatch):
    for version in (1, 2):
        publish(version)
    repository = opened(labelled(stable=(1, 0.5), canary=(2, 0.5)))
    for version in (3, 4):
        publish(version)
    seen = answering_at_loads(repository, monkeypatch)
    repository.set_policies([labelled(stable=(3, 0.5), canary=(4, 0.5))])
    repository.poll()
    assert seen == [{1, 2}, {1, 2}]
    assert answering(repository) == {3, 4}


@pytest.mark.parametrize("former", [labelled(Policy.SPECIFIC, (1,)), labelled()])
@pytest.mark.parametrize("is_good", [True, False])
def test_a_canary_does_not_get_what_is_the_stable_versions_while_that_one_loads_or_if_it_fails(
    publish, opened, monkeypatch, former, is_good
):
    publish(1)
    repository = opened(former)
    publish(2, golden_error=0.0 if is_good else 0.5)
    publish(3)
    seen = answering_at_loads(repository, monkeypatch)
    repository.set_policies([labelled(stable=(2, 0.9), canary=(3, 0.1))])
    assert answering(repository) == {1}
    repository.poll()
    assert seen == [{1}, {1}]
    assert answering(repository) == ({2, 3} if is_good else {1})
    if not is_good:
        assert states(repository) == {1: "READY", 2: "UNAVAILABLE", 3: "LOADING"}
        publish(4)
        repository.poll()
        assert answering(repository) == ({1} if former.versions else {4})


def test_a_version_that_is_no_longer_wanted_once_it_is_loaded_does_not_answer(
    publish, opened, started, caplog
):
    publish(1, rows=[4])
    publish(2, rows=[4])
    repository = opened()
    caplog.set_level("INFO", "xlarank")
    publish(3, rows=[16])
    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(repository.poll)
        process = stopped(started)
        repository.set_policies([labelled(Policy.SPECIFIC, (1,))])
        process.send_signal(signal.SIGCONT)
        polled.result(120)
    assert answering(repository) == {1}
    swaps = [message for message in caplog.messages if "answer, before" in message]
    assert swaps == ["model linear: versions [1] answer, before [2]"]


def test_of_versions_that_another_process_holds_none_is_loaded_or_ended_by_a_policy(publish, opened):
    bundles = {("linear", version): open_bundle(publish(version)) for version in (1, 2)}
    tables = {
        version: load_tables(bundle, None, num_threads=1, platforms=["cpu"])
        for version, bundle in bundles.items()
    }
    publish(3)
    repository = opened(labelled(Policy.SPECIFIC, (3,), stable=(1, 1.0)), held=HeldTables(tables))
    assert answering(repository) == {1}
    for policy in (labelled(stable=(2, 1.0)), labelled(Policy.SPECIFIC, (2, 3), stable=(2, 1.0))):
        repository.set_policies([policy])
        assert repository.models() == [("linear", 1, True), ("linear", 2, True)]
        assert answering(repository) == {2}
