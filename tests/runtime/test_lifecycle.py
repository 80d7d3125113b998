"""Versions that come, fail, are rolled back and vanish in a repository's folder, with real engines."""

import logging
import os
import queue
import shutil
import threading
from pathlib import Path

import linear
import numpy as np
import pytest
from executors import Faulty, wrap
from xlarank_serving.service import InferenceService

from xlarank import device
from xlarank.errors import (
    BundleError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    UnavailableError,
)
from xlarank.runtime import (
    Metrics,
    ModelPolicy,
    ModelRepository,
    Policy,
    VersionLabel,
    VersionOptions,
    lifecycle,
)
from xlarank.runtime.device_health import DeviceState
from xlarank.runtime.version_loading import VersionLoader
from xlarank.spec import FaultConfig
from xlarank.spec.versions import VersionState, VersionStatus

READY, UNAVAILABLE = "READY", "UNAVAILABLE"


class Looks:
    """A watcher's clock: each look happens when the test says so."""

    def __init__(self):
        self.seconds = []
        self._ends = queue.SimpleQueue()
        self._waiting = threading.Semaphore(0)

    def wait(self, timeout):
        self.seconds.append(timeout)
        self._waiting.release()
        return self._ends.get()

    def set(self):
        self._ends.put(True)

    def look(self):
        """Returns when the look is done."""
        self._waiting.acquire()
        self._ends.put(False)
        self._waiting.acquire()
        self._waiting.release()


@pytest.fixture
def opened(root):
    """Opens the repository; closed at the end."""
    repositories = []

    def opened(policy=None, *, metrics=None, stop=None, faults=None, **options):
        options = {"watch_seconds": 10.0, "warm_share": 1.0, "models": (policy,) if policy else ()} | options
        root.mkdir(exist_ok=True)
        repository = ModelRepository.open(
            root,
            num_devices=2,
            versions=VersionOptions(**options),
            metrics=metrics,
            faults=faults,
            stop=stop or Looks(),
        )
        repositories.append(repository)
        return repository

    yield opened
    for repository in repositories:
        repository.close()


def scores(repository, version="", key=None):
    """The version that a request went to, by its answer's scores and by what the engine says."""
    with repository.lease("linear", version, key) as engine:
        future = engine.submit(engine.request(linear.features(5)))
    value = future.result().scores["value"]
    np.testing.assert_allclose(value, linear.expected(5, engine.version), rtol=1e-6)
    return engine.version


def version_of(repository, key=None):
    """That a request would go to."""
    with repository.lease("linear", "", key) as engine:
        return engine.version


def states(repository):
    return {status.version: status.state for status in repository.index()}


def reason(repository, version):
    (status,) = [status for status in repository.index() if status.version == version]
    return status.reason


def values_of(metrics, name):
    lines = [line.rpartition(" ") for line in metrics.text().decode().splitlines()]
    return {series.removeprefix(name): float(value) for series, _, value in lines if series.startswith(name)}


def test_a_version_with_a_pipe_in_place_of_a_file_fails_and_later_ones_are_served(publish, opened):
    publish(1)
    repository = opened()
    for version, name in ((2, "manifest.json"), (3, "tables/topics.npy")):
        file = publish(version) / name
        file.unlink()
        os.mkfifo(file)
        repository.poll()
        assert reason(repository, version) == f"{file}: can't be read: expected a file, found a pipe"
    publish(4)
    repository.poll()
    assert scores(repository) == 4


def test_the_watcher_finds_a_new_version_and_swaps_to_it(publish, opened):
    publish(1)
    looks, metrics = Looks(), Metrics()
    repository = opened(stop=looks, metrics=metrics)
    assert scores(repository) == 1
    looks.look()
    assert scores(repository) == 1
    publish(2)
    assert scores(repository) == 1
    looks.look()
    assert scores(repository) == 2
    assert set(looks.seconds) == {10.0}
    repository._models["linear"].wait_until_drained()
    assert states(repository) == {1: UNAVAILABLE, 2: READY}
    assert reason(repository, 1) == "not served under policy latest"
    assert repository.models() == [("linear", 2, True)]
    with pytest.raises(ModelNotFoundError, match=r"'linear' version 1 is not found; version 2 is served"):
        repository.engine("linear", "1")
    assert values_of(metrics, "xlarank_swaps_total") == {'{model="linear"}': 1}
    assert values_of(metrics, "xlarank_swap_seconds")['{model="linear"}'] > 0
    assert set(values_of(metrics, "nv_model_load_duration_secs")) == {'{model="linear",version="2"}'}
    assert values_of(metrics, "xlarank_model_version_state") == {
        '{model="linear",state="READY",version="2"}': 1
    }
    assert values_of(metrics, "xlarank_serving_compiles_total") == {"": 0}


def test_an_empty_repository_that_is_watched_is_not_ready_until_a_model_comes(publish, opened):
    repository = opened()
    assert not repository.is_ready
    assert repository.index() == repository.models() == []
    with pytest.raises(ModelNotFoundError, match=r"unknown model: 'linear' is not found"):
        repository.engine("linear")
    publish(3)
    repository.poll()
    assert repository.is_ready
    assert scores(repository) == 3


def test_a_version_that_fails_its_golden_check_is_not_served_and_says_why_once(publish, opened, caplog):
    publish(1)
    metrics = Metrics()
    repository = opened(metrics=metrics)
    publish(2, golden_error=0.5)
    for _ in range(3):
        repository.poll()
    assert scores(repository) == 1
    assert repository.is_ready
    assert states(repository) == {1: READY, 2: UNAVAILABLE}
    why = "model 'linear', task 'value', bucket"
    assert why in reason(repository, 2)
    assert caplog.text.count("model linear version 2 isn't served") == 1
    assert values_of(metrics, "xlarank_model_load_failures_total") == {'{model="linear"}': 1}
    with pytest.raises(UnavailableError, match=r"'linear' version 2 is not at ready state: .*golden replay"):
        repository.engine("linear", "2")
    with pytest.raises(ModelError, match=r"failed to load 'linear': version 2: .*golden replay on"):
        repository.load("linear")
    assert scores(repository) == 1
    publish(3)
    repository.poll()
    assert scores(repository) == 3


def test_the_index_tells_of_versions_that_failed_in_other_processes(publish, opened):
    publish(1)
    repository = opened()
    elsewhere = [
        VersionStatus(model, version, VersionState.UNAVAILABLE, "golden replay")
        for model, version in (("a", 7), ("linear", 1), ("linear", 2))
    ]
    repository.show_elsewhere(elsewhere)
    index = [(status.model, status.version, status.state, status.reason) for status in repository.index()]
    assert index == [
        ("a", 7, UNAVAILABLE, "golden replay"),
        ("linear", 1, READY, ""),
        ("linear", 2, UNAVAILABLE, "golden replay"),
    ]
    assert [status.version for status in repository.index(with_idle=False)] == [1]
    repository.show_elsewhere([])
    assert [(status.model, status.version) for status in repository.index()] == [("linear", 1)]


def test_requests_and_readiness_know_of_versions_that_other_processes_see_to(publish, opened):
    """As one process does of its own: who loads or has failed is unavailable, who isn't wanted not found."""
    publish(1)
    repository = opened()
    repository.show_elsewhere(
        [
            VersionStatus("linear", 2, VersionState.UNAVAILABLE, "golden replay"),
            VersionStatus("linear", 3, VersionState.LOADING),
            VersionStatus("broken", 7, VersionState.UNAVAILABLE, "params.safetensors: damaged"),
        ],
        [VersionStatus("linear", 4, VersionState.UNAVAILABLE, "not wanted")],
        ["broken"],
    )
    for model, version, told in (
        ("linear", "2", r"'linear' version 2 is not at ready state: golden replay$"),
        ("linear", "3", r"'linear' version 3 is not at ready state$"),
        ("broken", "", r"'broken' is not at ready state: version 7: params.safetensors: damaged$"),
    ):
        with pytest.raises(UnavailableError, match=told):
            repository.engine(model, version)
    for model, version in (("linear", "4"), ("linear", "02"), ("other", "")):
        with pytest.raises(ModelNotFoundError):
            repository.engine(model, version)
    assert scores(repository) == 1
    assert not repository.is_ready
    repository.show_elsewhere([])
    assert repository.is_ready


def test_a_damaged_version_is_tried_again_when_its_folder_changes_and_not_before(publish, opened, caplog):
    publish(1)
    path = publish(2)
    program = next((path / "programs").glob("4x1*"))
    whole = program.read_bytes()
    program.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    repository = opened()  # the next older one is served then
    assert scores(repository) == 1
    assert str(program) in reason(repository, 2)
    assert "expected sha256" in reason(repository, 2)
    repository.poll()
    assert caplog.text.count("isn't served") == 1
    program.write_bytes(whole)
    repository.poll()
    assert scores(repository) == 2


def test_when_the_log_says_that_a_version_failed_the_index_has_its_reason(publish, opened, monkeypatch):
    publish(1)
    repository = opened()
    seen = []

    def look(record):
        if "isn't served" in record.getMessage():
            seen.append((states(repository)[2], reason(repository, 2)))
        return True

    log = logging.getLogger("xlarank.runtime.model_versions")
    monkeypatch.setattr(log, "filters", [look])
    publish(2, golden_error=0.5)
    repository.poll()
    ((state, why),) = seen
    assert state == UNAVAILABLE
    assert "golden replay on" in why


def test_without_watching_a_damaged_version_is_an_error_at_the_start(publish, opened):
    publish(1)
    (publish(2) / "params.safetensors").unlink()
    with pytest.raises(BundleError, match=r"linear/2/params\.safetensors"):
        opened(watch_seconds=None)


def test_another_model_s_bundle_is_refused_by_name(publish, opened, root):
    publish(1)
    repository = opened()
    shutil.copytree(root / "linear", root / "other")
    repository.poll()
    other = [status for status in repository.index() if status.model == "other"]
    assert [status.state for status in other] == [UNAVAILABLE]
    assert "folder 'other' holds model 'linear'" in other[0].reason
    assert repository.is_ready  # a model that has never answered takes no traffic away from the others
    assert scores(repository) == 1


def test_tables_that_do_not_fit_beside_the_others_are_refused_with_figures(
    publish, opened, monkeypatch, tmp_path
):
    from xlarank.host import memory
    from xlarank.host.memory import AvailableMemory
    from xlarank.runtime import tables

    (tmp_path / "enabled").write_text("[madvise]")
    monkeypatch.setattr(memory, "_ENABLED", tmp_path / "enabled")
    publish(1)
    repository = opened()
    assert set(repository.engine("linear").load_report.table_memory.values()) == {"huge"}
    publish(2)
    little = AvailableMemory(machine=100, cgroup=None)
    defaults = (tables.load_tables.__kwdefaults__ or {}) | {"available": lambda: little}
    monkeypatch.setattr(tables.load_tables, "__kwdefaults__", defaults)
    repository.poll()
    assert scores(repository) == 1
    assert "need 0.00 GiB of memory, available are 0.00 GiB (MemAvailable 0.00" in reason(repository, 2)


def test_rollback_goes_back_and_the_version_that_was_left_is_not_picked_up_again(publish, opened):
    publish(1)
    publish(2)
    repository = opened()
    with pytest.raises(ModelNotFoundError, match=r"rollback: expected version 2 below 2, there are \[1, 2\]"):
        repository.rollback("linear", 2)
    assert repository.rollback("linear") == 1
    assert scores(repository) == 1
    repository.poll()
    assert scores(repository) == 1
    assert reason(repository, 2) == "rolled back from, to version 1"
    with pytest.raises(UnavailableError, match=r"version 2 is not at ready state: rolled back from"):
        repository.engine("linear", "2")
    publish(3)
    repository.poll()
    assert scores(repository) == 3
    repository.rollback("linear", 1)
    repository.load("linear")  # forgets both
    assert scores(repository) == 3


def test_a_rollback_to_a_version_that_fails_changes_nothing(publish, opened):
    publish(1, golden_error=0.5)
    publish(2)
    repository = opened()
    with pytest.raises(ModelError, match=r"rollback to version 1 failed: model 'linear', task 'value'"):
        repository.rollback("linear")
    repository.poll()
    assert scores(repository) == 2
    assert states(repository)[2] == READY


def test_a_rollback_that_fails_for_no_fault_of_the_version_is_not_tried_again(publish, opened, monkeypatch):
    """Nor does what befell it count when the version is wanted later."""
    publish(1)
    publish(2)
    repository = opened()

    def load(version, peers):
        raise MemoryError("none is left")

    model = repository._models["linear"]
    monkeypatch.setattr(model, "_load", load)
    with pytest.raises(ModelError, match=r"rollback to version 1 failed: MemoryError: none is left$"):
        repository.rollback("linear")
    assert not model._num_deaths
    assert scores(repository) == 2


def test_a_model_unloaded_by_hand_stays_so_until_it_is_loaded(publish, opened):
    publish(1)
    repository = opened()
    repository.unload("linear")
    assert states(repository) == {1: UNAVAILABLE}
    assert reason(repository, 1) == "unloaded by hand"
    publish(2)
    repository.poll()
    assert repository.models() == []
    with pytest.raises(ModelNotFoundError, match=r"unknown model: 'linear' has no available versions"):
        repository.engine("linear")
    assert not repository.is_ready  # nothing is left that could answer
    repository.load("linear")
    assert scores(repository) == 2
    for verb in (repository.load, repository.unload, repository.rollback):
        with pytest.raises(ModelNotFoundError, match=r"unknown model: 'nothing' is not found"):
            verb("nothing")


def test_a_version_whose_folder_vanishes_goes_on_serving_and_the_log_says_so_once(
    publish, opened, root, caplog
):
    publish(1)
    publish(2)
    repository = opened()
    shutil.rmtree(root / "linear" / "2")
    for _ in range(2):
        repository.poll()
    assert scores(repository) == 2
    assert caplog.text.count("linear/2: was removed; model linear version 2 goes on serving") == 1
    shutil.rmtree(root / "linear")
    repository.poll()
    assert scores(repository) == 2
    publish(3)
    repository.poll()
    assert scores(repository) == 3


def test_a_version_that_is_removed_while_it_loads_does_not_answer(publish, opened, root, monkeypatch, caplog):
    publish(1)
    repository = opened()
    published = publish(2)
    load = repository._loader.load

    def load_and_remove(*words, **options):
        engine = load(*words, **options)
        shutil.rmtree(published)
        return engine

    monkeypatch.setattr(repository._loader, "load", load_and_remove)
    for _ in range(2):
        repository.poll()
        assert scores(repository) == 1
    assert caplog.messages == [
        f"model linear version 2 isn't served: {published}: was removed while it was loaded"
    ]
    monkeypatch.undo()
    publish(2)
    repository.poll()
    assert scores(repository) == 2


def test_a_version_that_was_changed_under_its_number_is_named_and_goes_on(publish, opened, root, caplog):
    publish(1)
    repository = opened()
    shutil.rmtree(root / "linear" / "1")
    publish(1, scale=7.0)
    repository.poll()
    assert scores(repository) == 1
    assert "linear/1: was changed; what was loaded goes on serving" in caplog.text


def test_a_folder_that_cannot_be_listed_keeps_nobody_else_away(publish, opened, root, caplog, monkeypatch):
    """lost+found of a volume, say, which is root's."""
    publish(1)
    (root / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refusing(path):
        if path.name in refused:
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    refused = {"lost+found"}
    repository = opened()
    for _ in range(2):
        repository.poll()
    publish(2)
    repository.poll()
    assert scores(repository) == 2
    text = (
        f"the repository can't be looked at, what is loaded goes on serving: {root / 'lost+found'}: can't be"
    )
    assert caplog.text.count(text) == 1
    refused = {"lost+found", "linear"}
    publish(3)
    repository.poll()
    assert scores(repository) == 2
    with pytest.raises(BundleError, match="linear: can't be listed: Permission denied"):
        repository.load("linear")
    refused = set()
    repository.poll()
    assert scores(repository) == 3


def test_a_repository_that_cannot_be_listed_changes_nothing(publish, opened, root, caplog):
    publish(1)
    repository = opened()
    root.rename(root.with_name("away"))
    for _ in range(2):
        repository.poll()
    assert scores(repository) == 1
    assert caplog.text.count("the repository can't be looked at") == 1
    root.with_name("away").rename(root)
    publish(2)
    repository.poll()
    assert scores(repository) == 2


def test_policy_all_serves_every_version_by_number_and_ends_those_whose_folders_go(publish, opened, root):
    publish(1)
    publish(2)
    repository = opened(ModelPolicy(policy=Policy.ALL))
    assert [scores(repository, version) for version in ("", "1", "2")] == [2, 1, 2]
    publish(3)
    repository.poll()
    shutil.rmtree(root / "linear" / "1")
    repository.poll()
    repository._models["linear"].wait_until_drained()
    assert [version for _, version, _ in repository.models()] == [2, 3]
    with pytest.raises(ModelNotFoundError, match=r"version 1 is not found; versions 2, 3 are served"):
        repository.engine("linear", "1")


def test_policy_specific_serves_what_it_lists_and_says_what_is_not_there(publish, opened):
    for version in (1, 2, 3):
        publish(version)
    repository = opened(ModelPolicy(name="linear", policy=Policy.SPECIFIC, versions=(2, 5)))
    assert scores(repository) == 2
    assert states(repository) == {1: UNAVAILABLE, 2: READY, 3: UNAVAILABLE, 5: UNAVAILABLE}
    assert reason(repository, 5).endswith("linear/5: expected a version, found none")
    with pytest.raises(ConfigError, match=r"policy specific names its versions"):
        repository.rollback("linear")


def test_another_policy_pins_a_version_goes_back_and_moves_a_label(publish, opened):
    for version in (1, 2, 3):
        publish(version)
    repository = opened()

    def pin(version):
        repository.set_policy(ModelPolicy(name="linear", policy=Policy.SPECIFIC, versions=(version,)))

    pin(2)
    assert scores(repository) == 2
    pin(1)
    assert scores(repository) == 1
    pin(7)  # not there: what serves goes on
    assert scores(repository) == 1
    publish(7)
    repository.poll()
    assert scores(repository) == 7
    for traffic in (0.25, 1.0):
        stable = VersionLabel(name="stable", version=2, traffic=1 - traffic)
        canary = VersionLabel(name="canary", version=3, traffic=traffic)
        repository.set_policy(
            ModelPolicy(name="linear", versions=(2,), policy=Policy.SPECIFIC, labels=(stable, canary))
        )
        counted = [version_of(repository) for _ in range(100)]
        assert counted.count(3) == pytest.approx(100 * traffic, abs=2)


def test_a_version_found_damaged_while_it_serves_makes_room_for_the_next_older_one(publish, opened, caplog):
    publish(1)
    publish(2)
    repository = opened()
    repository.engine("linear")._table_check._fault = "tables/topics.npy: damaged"
    with pytest.raises(UnavailableError, match=r"'linear' version 2 has failed: tables/topics\.npy: damaged"):
        repository.engine("linear")
    assert not repository.is_ready
    repository.poll()
    assert scores(repository) == 1
    assert repository.is_ready
    repository._models["linear"].wait_until_drained()
    assert reason(repository, 2) == "tables/topics.npy: damaged"


def test_without_watching_what_a_policy_asks_for_must_be_there(publish, opened):
    publish(1)
    with pytest.raises(ConfigError, match=r"policies of models \['other'\], found \['linear'\]"):
        opened(ModelPolicy(name="other"), watch_seconds=None)
    with pytest.raises(ConfigError, match=r"'linear': its policy names versions \[5\], found \[1\]"):
        opened(ModelPolicy(name="linear", policy=Policy.SPECIFIC, versions=(1, 5)), watch_seconds=None)
    with pytest.raises(
        ConfigError, match=r"'linear': no version is served under its policy: version 1: not serv"
    ):
        opened(ModelPolicy(policy=Policy.SPECIFIC, versions=(5,)), watch_seconds=None)


def test_labels_share_the_traffic_and_a_key_stays_on_its_side(publish, opened):
    publish(3)
    publish(4)
    labels = (
        VersionLabel(name="stable", version=3, traffic=0.75),
        VersionLabel(name="canary", version=4, traffic=0.25),
    )
    repository = opened(ModelPolicy(name="linear", labels=labels))
    assert scores(repository, "stable") == 3
    assert scores(repository, "canary") == 4
    counted = [version_of(repository) for _ in range(400)]
    assert counted.count(4) == pytest.approx(100, abs=3)
    sides = {f"user{i}": version_of(repository, f"user{i}") for i in range(400)}
    assert list(sides.values()).count(4) == pytest.approx(100, abs=30)
    assert all(version_of(repository, key) == side for key, side in sides.items())
    with pytest.raises(ModelNotFoundError, match=r"'linear' version beta is not found"):
        repository.engine("linear", "beta")
    repository.rollback("linear", 3)
    assert {version_of(repository, key) for key in sides} == {3}
    with pytest.raises(UnavailableError, match=r"'linear' version canary, which is 4, is not at ready state"):
        repository.engine("linear", "canary")


class Sick:
    """In the place of a version's executor: fails every batch."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, bucket, leaves):
        raise RuntimeError("the device is broken")


def test_one_sick_device_of_two_does_not_keep_a_new_version_away(publish, opened):
    publish(1)
    repository = opened(faults=FaultConfig(probe_seconds=1e6))
    engine = repository.engine("linear")
    first = engine._execution._executors[0]
    engine._execution._executors = [Sick(first), engine._execution._executors[1]]
    while repository._pool.statuses()[0].state is not DeviceState.QUARANTINED:
        assert scores(repository) == 1
    publish(2)
    repository.poll()
    assert scores(repository) == 2
    assert repository._pool.statuses()[0].state is DeviceState.QUARANTINED


def test_readiness_and_metrics_tell_of_devices_that_are_lost_and_of_those_that_come_back(publish, opened):
    publish(1)
    metrics = Metrics()
    repository = opened(metrics=metrics, faults=FaultConfig(probe_seconds=0.01))
    service = InferenceService(repository)
    devices = wrap(repository.engine("linear"), Faulty)

    def wait_for(state, *indices):
        with repository._pool._work:
            states = repository._pool._health.statuses
            assert repository._pool._work.wait_for(
                lambda: all(states()[index].state is state for index in indices), 60
            )

    def told():
        """Whether the server is ready, and by device whether it is told to be healthy, and its losses."""
        series = values_of(metrics, "xlarank_device_")
        devices = [
            [series[f'state{{device="{index}",state="{state}"}}'] for state in ("healthy", "quarantined")]
            + [series[f'quarantines_total{{device="{index}"}}']]
            for index in (0, 1)
        ]
        return service.server_ready(None, None).ready, devices

    def broken(bucket, leaves, scores):
        raise RuntimeError("the device is broken")

    assert told() == (True, [[1, 0, 0], [1, 0, 0]])
    devices[0].fault = broken
    while repository._pool.statuses()[0].state is not DeviceState.QUARANTINED:
        assert scores(repository) == 1
    assert told() == (True, [[0, 1, 1], [1, 0, 0]])
    devices[1].fault = broken
    with pytest.raises(UnavailableError, match=r"no device is healthy .*the device is broken"):
        scores(repository)
    wait_for(DeviceState.QUARANTINED, 0, 1)
    assert told() == (False, [[0, 1, 1], [0, 1, 1]])
    assert not repository.is_ready
    assert repository.models() == [("linear", 1, False)]
    devices[0].fault = None
    wait_for(DeviceState.HEALTHY, 0)
    assert told() == (True, [[1, 0, 1], [0, 1, 1]])
    assert scores(repository) == 1


def test_a_close_leaves_a_version_behind_whose_files_never_come(publish, opened, monkeypatch, caplog):
    publish(1)
    looks = Looks()
    repository = opened(stop=looks)
    reading, gate, told = threading.Event(), threading.Event(), queue.SimpleQueue()

    def hang(*_, **__):
        reading.set()
        gate.wait()
        raise BundleError("the file system has gone")

    def load():
        try:
            repository.load("linear")
        except UnavailableError as error:
            told.put(str(error))

    monkeypatch.setattr(VersionLoader, "load", hang)
    monkeypatch.setattr(lifecycle, "_LAST_CHANGE_SECONDS", 0.1)
    publish(2)
    looks._ends.put(False)
    assert reading.wait(60)
    threading.Thread(target=load, daemon=True).start()  # it waits for its turn
    with repository.lease("linear") as engine:
        accepted = engine.submit(engine.request(linear.features(5)))
    try:
        repository.close()
        assert repository.has_left_work
        assert told.get(timeout=60) == f"repository {repository._root} is shutting down"
    finally:
        gate.set()
    np.testing.assert_allclose(accepted.result(60).scores["value"], linear.expected(5, 1), rtol=1e-6)
    assert "left behind after 0.1 s, still loading: linear/2" in caplog.text
    assert "the look at the repository failed" not in caplog.text


def test_a_close_leaves_nothing_behind_that_ends_in_time(publish, opened):
    publish(1)
    repository = opened()
    publish(2)
    looking = threading.Thread(target=repository.poll)
    looking.start()
    looking.join()
    repository.close()
    assert not repository.has_left_work
    with pytest.raises(UnavailableError, match="is shutting down"):
        repository.poll()


def test_a_version_that_hangs_a_device_is_not_served_and_the_device_comes_back(publish, opened, monkeypatch):
    publish(1)
    repository = opened(faults=FaultConfig(watchdog_seconds=0.2, probe_seconds=0.01))
    assert scores(repository) == 1
    known = list(repository.engine("linear")._execution._executors)
    run, gate = device.Replica.run, threading.Event()

    def hang(replica, bucket, leaves):
        assert any(replica is other for other in known) or gate.wait(60)
        return run(replica, bucket, leaves)

    monkeypatch.setattr(device.Replica, "run", hang)
    publish(2)
    repository.poll()
    assert states(repository) == {1: READY, 2: UNAVAILABLE}
    assert reason(repository, 2) == "device 0 hangs in a golden replay of it"
    assert repository._pool.statuses()[0].reason == "a golden replay took more than 0.2 s"
    assert scores(repository) == 1  # on the other device
    gate.set()
    with repository._pool._work:
        healthy = [DeviceState.HEALTHY] * 2
        assert repository._pool._work.wait_for(
            lambda: [s.state for s in repository._pool._health.statuses()] == healthy, 60
        )
    repository.load("linear")
    assert scores(repository) == 2
