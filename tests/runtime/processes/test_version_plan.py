"""What processes are to serve, by what is in a folder."""

import pytest

from xlarank.runtime.processes.version_plan import VersionPlan
from xlarank.spec.versions import ModelPolicy, Policy, VersionLabel, VersionOptions


@pytest.fixture
def put(tmp_path):
    def put(*versions):
        for model, number in versions:
            (tmp_path / model / str(number)).mkdir(parents=True, exist_ok=True)

    return put


def plan_of(tmp_path, **policies):
    models = tuple(ModelPolicy(name=name, **fields) for name, fields in policies.items())
    return VersionPlan(tmp_path, VersionOptions(models=models))


def test_policies_say_what_is_wanted(tmp_path, put):
    put(("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 1), ("c", 3))
    plan = plan_of(tmp_path, b={"policy": Policy.ALL}, c={"policy": Policy.SPECIFIC, "versions": (1,)})
    assert plan.wanted(()) == (("a", 2), ("b", 1), ("b", 2), ("c", 1))


def test_an_ordinary_start_and_a_new_version_warn_of_nothing(tmp_path, put, caplog):
    put(("a", 1))
    plan = plan_of(tmp_path)
    served = plan.wanted(())
    put(("a", 2))
    plan.wanted(served, plan.policies(served))
    assert caplog.messages == []


def test_a_version_that_failed_is_left_alone_until_its_folder_changes(tmp_path, put):
    put(("a", 1), ("a", 2))
    plan = plan_of(tmp_path)
    plan.block([("a", 2)], "wrong scores")
    assert plan.wanted((("a", 1),)) == (("a", 1),)
    (status,) = plan.statuses()
    assert (status.version, status.state, status.reason) == (2, "UNAVAILABLE", "wrong scores")
    (tmp_path / "a" / "2" / "file").write_text("another")
    assert plan.wanted((("a", 1),)) == (("a", 2),)
    assert plan.statuses() == []


def test_what_is_served_stays_when_its_folder_or_the_whole_repository_vanishes(tmp_path, put, caplog):
    put(("a", 1), ("b", 1))
    plan = plan_of(tmp_path)
    served = (("a", 1), ("b", 1))
    (tmp_path / "a" / "1").rmdir()
    for _ in range(2):
        assert plan.wanted(served) == served
    assert caplog.messages == [
        f"{tmp_path / 'a' / '1'}: was removed; model a version 1 goes on serving until other processes come, "
        f"which can't load it"
    ]
    assert plan.gone(served) == {("a", 1)}
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert plan.wanted(served) is None


def test_new_processes_come_without_what_was_removed_as_they_could_not_load_it(tmp_path, put):
    put(("a", 1), ("b", 1), ("c", 1), ("c", 2), ("c", 3))
    plan = plan_of(tmp_path, c={"num_versions": 2})
    served = (("a", 1), ("b", 1), ("c", 2), ("c", 3))
    assert plan.wanted(()) == served
    for removed in ("a/1", "c/3"):
        (tmp_path / removed).rmdir()
    assert plan.wanted(served) == served
    assert plan.left(served) == (("b", 1), ("c", 2))
    assert plan.models_on_disk == {"b", "c"}  # or a server that isn't watched would wait for a for ever
    lost = (("b", 1), ("c", 1), ("c", 2))
    assert plan.wanted(served, is_lost=True) == lost
    put(("b", 2))
    newer = (("b", 2), ("c", 1), ("c", 2))
    assert plan.wanted(served) == plan.wanted(newer) == newer
    told = {(status.model, status.version) for status in plan.statuses(with_idle=True)}
    assert told == {("b", 1)}  # and nothing of what was removed
    put(("a", 1))
    assert plan.wanted(newer) == (("a", 1), ("b", 2), ("c", 1), ("c", 2))


def test_processes_of_nothing_at_all_take_nobodys_place(tmp_path, put):
    put(("a", 1), ("a", 2))
    plan = plan_of(tmp_path, a={"policy": Policy.ALL})
    served = plan.wanted(())
    for version in served:
        (tmp_path / "a" / str(version[1])).rmdir()
    plan.set_policies((ModelPolicy(name="a"),))
    assert plan.wanted(served) == (("a", 2),)
    assert plan.left(served) == served


LABELLED = ModelPolicy(name="a", labels=(VersionLabel(name="stable", version=1, traffic=1.0),))
SPECIFIC = ModelPolicy(name="a", policy=Policy.SPECIFIC, versions=(1,))


@pytest.mark.parametrize("label", [2, 22])
@pytest.mark.parametrize(("former", "kept"), [(LABELLED, (("a", 1), ("a", 3))), (SPECIFIC, (("a", 1),))])
def test_the_policy_before_is_followed_while_the_version_of_a_label_fails_or_never_comes(
    tmp_path, put, caplog, label, former, kept
):
    put(("a", 1), ("a", 2), ("a", 3))
    plan = plan_of(tmp_path)
    plan.block([("a", 2)], "wrong scores")
    newer = ModelPolicy(name="a", labels=(VersionLabel(name="stable", version=label, traffic=1.0),))
    plan.set_policies((newer,))
    caplog.clear()
    for _ in range(2):
        assert plan.wanted((("a", 1),), [former]) == kept
    assert caplog.messages == [
        "model a: a policy waits for versions of its labels, and the one before it stays in force: labels "
        f"lead to [{label}], there are {[version for _, version in kept]}"
    ]
    states = {(s.version, s.state, s.reason) for s in plan.statuses(with_idle=True)}
    if label == 22:
        where = tmp_path / "a" / "22"
        assert (22, "UNAVAILABLE", f"{where}: expected a version, found none") in states
    if former is SPECIFIC:
        waits = f"waits for all versions that the policy's labels lead to: [{label}]"
        assert (3, "LOADING", waits) in states
    assert plan.policies(kept, [former], is_all=True) == (former,)
    caplog.clear()
    assert plan.wanted(()) == (("a", 3),)  # of processes that serve nothing of it yet
    assert caplog.messages == [
        f"model a: labels {{'stable': {label}}} lead to versions that aren't served, and their share of the "
        f"requests goes to others: [3]"
    ]
    (tmp_path / "a" / "2" / "file").write_text("another")  # it is whole now
    if label == 2:
        assert plan.wanted(kept, [former]) == (better := (("a", 2), ("a", 3)))
        assert plan.policies(better, [former], is_all=True) == (newer,)
        assert plan.statuses(with_idle=True) == []  # of what is served its process tells
        assert plan.wanted(better, [newer]) == better
        (status,) = plan.statuses(with_idle=True)
        assert (status.version, status.reason) == (1, "not served under policy latest")


@pytest.mark.parametrize("former", [SPECIFIC, ModelPolicy(name="a")])
def test_a_canary_does_not_get_what_is_the_stable_versions_if_that_one_is_missing(tmp_path, put, former):
    put(("a", 1))
    plan = VersionPlan(tmp_path, VersionOptions(models=(former,)))
    served = plan.wanted(())
    before = plan.policies(served)
    put(("a", 3))
    labels = (
        VersionLabel(name="stable", version=2, traffic=0.9),
        VersionLabel(name="canary", version=3, traffic=0.1),
    )
    plan.set_policies((after := ModelPolicy(name="a", labels=labels),))
    assert plan.wanted(served, before) == served
    assert plan.policies(served, before) == plan.policies(served, before, is_all=True) == before == (former,)
    put(("a", 2))
    assert plan.wanted(served, before) == (both := (("a", 2), ("a", 3)))
    assert plan.policies(served, before) == before
    assert plan.policies(both, before, is_all=True) == (after,)


def test_a_policy_before_of_which_nothing_can_answer_is_not_waited_by(tmp_path, put):
    """As in one process: what was withdrawn must not take over once its version comes."""
    put(("a", 1))
    plan = plan_of(tmp_path)
    served = plan.wanted(())
    withdrawn = ModelPolicy(name="a", policy=Policy.SPECIFIC, versions=(2,))
    plan.set_policies((withdrawn,))
    assert plan.wanted(served, plan.policies(served)) == served
    before = plan.policies(served, is_all=True)
    assert before == (withdrawn,)
    label = VersionLabel(name="next", version=5, traffic=1.0)
    pinned = ModelPolicy(name="a", policy=Policy.SPECIFIC, versions=(1,), labels=(label,))
    plan.set_policies((pinned,))
    assert plan.wanted(served, before) == served
    before = plan.policies(served, before, is_all=True)
    assert before == (pinned,)
    put(("a", 2))
    assert plan.wanted(served, before) == served


def test_other_policies_are_planned_by_and_wait_only_for_versions_that_processes_do_not_have(tmp_path, put):
    put(("a", 1), ("a", 2), ("b", 1))
    plan = plan_of(tmp_path)
    assert plan.wanted(()) == (served := (("a", 2), ("b", 1)))
    default = {name: ModelPolicy(name=name) for name in "ab"}
    assert plan.policies(served) == (default["a"], default["b"])
    older = ModelPolicy(name="a", labels=(VersionLabel(name="old", version=1, traffic=1.0),))
    named = ModelPolicy(name="b", labels=(VersionLabel(name="only", version=1),))
    plan.set_policies((older, named))
    assert plan.wanted(served) == (wanted := (("a", 1), ("a", 2), ("b", 1)))
    assert plan.policies(served, default.values()) == (default["a"], named)
    assert plan.policies(wanted) == plan.policies(wanted, default.values()) == (older, named)
