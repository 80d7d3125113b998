"""Policies and labels as rules: which versions are wanted, and who gets which."""

import pytest

from xlarank.errors import ConfigError
from xlarank.runtime.watching import Watcher, folder_stamp
from xlarank.spec.fields import from_mapping
from xlarank.spec.versions import ModelPolicy, Policy, VersionLabel, VersionOptions


@pytest.mark.parametrize(
    ("policy", "available", "blocked", "wanted"),
    [
        ({}, [1, 2, 3], [], [3]),
        ({}, [1, 2, 3], [3], [2]),
        ({}, [], [], []),
        ({"num_versions": 2}, [1, 2, 3], [2], [3, 1]),
        ({"policy": "all"}, [1, 2, 3], [2], [3, 1]),
        ({"policy": "specific", "versions": [1, 3, 9]}, [1, 2, 3], [], [3, 1]),
        ({"name": "m", "labels": [{"name": "old", "version": 1}]}, [1, 2, 3], [], [3, 1]),
        ({"name": "m", "labels": [{"name": "old", "version": 1}]}, [1, 2, 3], [1, 3], [2]),
    ],
)
def test_a_policy_wants_versions_newest_first(policy, available, blocked, wanted):
    assert from_mapping(ModelPolicy, policy, "model").wanted(available, (), blocked) == wanted


def test_a_loaded_version_whose_folder_has_vanished_is_wanted_on_but_under_policy_all_if_others_are_there():
    latest, everything = ModelPolicy(), ModelPolicy(policy=Policy.ALL)
    assert latest.wanted([1], loaded=[2]) == [2]
    assert everything.wanted([1], loaded=[2]) == [1]
    assert everything.wanted([], loaded=[1, 2]) == [2, 1]


def labelled(**traffic):
    numbers = {"stable": 3, "canary": 4, "next": 5}
    labels = tuple(VersionLabel(name=n, version=numbers[n], traffic=t) for n, t in traffic.items())
    return ModelPolicy(name="m", labels=labels)


def test_a_canary_that_grows_keeps_those_who_were_on_it():
    on_canary = set()
    for share in (0.01, 0.1, 0.5, 0.9, 1.0):
        policy = labelled(stable=1 - share, canary=share)
        now = {i for i in range(2000) if policy.version_for(policy.position(f"user{i}"), [3, 4]) == 4}
        assert on_canary <= now
        assert len(now) == pytest.approx(2000 * share, abs=80)
        on_canary = now


def test_the_traffic_of_a_version_that_is_not_ready_goes_to_the_others():
    policy = labelled(stable=0.5, canary=0.25, next=0.25)
    positions = [i / 1200 for i in range(1200)]

    def counts(ready):
        answers = [policy.version_for(position, ready) for position in positions]
        return {version: answers.count(version) for version in set(answers)}

    assert counts([3, 4, 5]) == {5: 300, 4: 300, 3: 600}
    assert counts([3, 5]) == {5: 400, 3: 800}
    assert counts([4]) == {4: 1200}
    assert counts([2, 1]) == {2: 1200}
    assert counts([]) == {None: 1200}


@pytest.mark.parametrize(
    ("before", "after", "is_at_once"),
    [
        ({}, {}, True),
        ({"stable": 1.0}, {"stable": 0.0, "canary": 1.0}, True),
        ({"stable": 1.0}, {"stable": 0.5, "next": 0.5}, False),  # 5 isn't ready, and this is to be its share
        ({"stable": 1.0, "next": 0.0}, {"stable": 0.5, "next": 0.5}, False),
        ({"stable": 1.0}, {"stable": 1.0, "next": 0.0}, True),
        ({}, {"next": 0.9, "canary": 0.1}, False),
        ({"stable": 1.0}, {"next": 1.0}, False),
        ({"stable": 1.0}, {}, False),  # the newest is to answer, which may be still to come
        ({"next": 1.0}, {"next": 0.5, "canary": 0.5}, True),
    ],
)
def test_a_policy_waits_for_no_version_that_its_traffic_can_do_without(before, after, is_at_once):
    assert labelled(**after).moves_at_once(labelled(**before), [3, 4]) == is_at_once


def test_a_policy_whose_label_leads_to_a_version_that_is_to_come_waits_for_it():
    def named(version):
        return ModelPolicy(name="m", labels=(VersionLabel(name="stable", version=version),))

    assert named(4).moves_at_once(named(3), [3, 4])
    assert named(5).moves_at_once(ModelPolicy(), [3, 4])
    assert named(6).moves_at_once(named(5), [3, 4])
    assert not named(5).moves_at_once(named(3), [3, 4])


def test_models_draw_their_canaries_from_different_users():
    one, other = labelled(canary=1.0), ModelPolicy(name="n")
    both = [i for i in range(2000) if one.position(f"user{i}") < 0.1 and other.position(f"user{i}") < 0.1]
    assert len(both) == pytest.approx(20, abs=15)


def test_options_are_read_from_tables_at_every_level():
    table = {
        "watch_seconds": 5,
        "models": [
            {"policy": "latest", "num_versions": 2},
            {"name": "feed", "labels": [{"name": "stable", "version": 3, "traffic": 1}]},
        ],
    }
    options = from_mapping(VersionOptions, table, "versions")
    assert options.policy_of("other").num_versions == 2
    assert options.policy_of("feed").labels == (VersionLabel(name="stable", version=3, traffic=1),)
    assert VersionOptions().policy_of("feed") == ModelPolicy(policy=Policy.LATEST)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"watch": 5}, r"versions: unknown keys \['watch'\]; expected of \['watch_seconds',"),
        ({"watch_seconds": 0}, r"versions: watch_seconds must be > 0; was 0"),
        ({"warm_share": 1.5}, r"versions: warm_share must be in \(0, 1\]; was 1.5"),
        ({"drain_seconds": -1}, r"versions: drain_seconds must be >= 0; was -1"),
        ({"models": [{}, {}]}, r"versions: expected one policy a model, got policies of \['', ''\]"),
        ({"models": [{"name": []}]}, r"model: expected a name of .*, got \[\]"),
        ({"models": [{"polcy": 1}]}, r"model: unknown keys \['polcy'\]"),
        (
            {"models": [{"policy": "newest"}]},
            r"models: policy must be one of \['latest', 'specific', 'all'\]",
        ),
        (
            {"models": [{"policy": "specific"}]},
            r"policy specific lists versions and no other does; policy is",
        ),
        ({"models": [{"versions": [1]}]}, r"policy is 'latest' and versions are \[1\]"),
        ({"models": [{"name": "m", "versions": [0]}]}, r"model 'm': versions must be an integer >= 1; was 0"),
        ({"models": [{"num_versions": 0}]}, r"models: num_versions must be an integer >= 1; was 0"),
        ({"models": [{"policy": "all", "num_versions": 2}]}, r"num_versions is for policy latest; policy is"),
        (
            {"models": [{"labels": [{"name": "a", "version": 1}]}]},
            r"labels are of one model: expected its name",
        ),
        (
            {"models": [{"name": "m", "labels": [{"name": "a", "version": 1, "traffic": 0.5}]}]},
            r"model 'm': expected traffic of labels that sums to 1, got 0.5 of \{'a': 0.5\}",
        ),
        (
            {"models": [{"name": "m", "labels": [{"name": "a", "version": 1}, {"name": "a", "version": 2}]}]},
            r"model 'm': expected distinct labels, got \['a', 'a'\]",
        ),
        (
            {"models": [{"name": "m", "labels": [{"name": "a", "version": 1, "traffic": 2}]}]},
            r"version label 'a': traffic must be in \[0, 1\]; was 2",
        ),
        (
            {"models": [{"name": "m", "labels": [{"name": "3", "version": 1}]}]},
            r"version label: expected a name",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(VersionOptions, table, "versions")


def test_a_stamp_tells_every_change_in_a_folder(tmp_path):
    folder = tmp_path / "1"
    assert folder_stamp(folder) is None
    (folder / "tables").mkdir(parents=True)
    file = folder / "tables" / "a.npy"
    file.write_bytes(b"1234")
    stamps = [folder_stamp(folder)]
    assert folder_stamp(folder) == stamps[0]
    file.rename(folder / "b.npy")
    stamps.append(folder_stamp(folder))
    (folder / "b.npy").write_bytes(b"12345")
    stamps.append(folder_stamp(folder))
    (folder / "b.npy").unlink()
    stamps.append(folder_stamp(folder))
    assert len({*stamps, None}) == 5


class ThreeLooks:
    """A clock that ends after three looks."""

    def __init__(self):
        self.waits = 0

    def wait(self, timeout):
        self.waits += 1
        return self.waits > 3

    def set(self):
        pass


def test_a_look_that_fails_is_logged_and_the_next_one_comes(caplog):
    looks = []

    def look():
        looks.append(len(looks))
        if len(looks) == 2:
            raise OSError("no disk")

    Watcher(look, 3.0, ThreeLooks()).stop()
    assert looks == [0, 1, 2]
    assert "the look at the repository failed; the next one comes in 3 s" in caplog.text
