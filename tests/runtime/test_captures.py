"""Kept requests: how many, where, and that they can be scored again."""

import json
import os
import threading

import numpy as np
import pytest
import shop

from xlarank.bundle import read_requests, write_requests
from xlarank.compiler import random_requests
from xlarank.errors import ConfigError
from xlarank.runtime import Captures, Timings
from xlarank.runtime import captures as captures_module
from xlarank.spec import CaptureConfig

TIMINGS = Timings(queue=0.001, gather=0.002, execute=0.003, total=0.0075)


def keep(captures, count, seed=0):
    requests = random_requests(shop.SPEC, count, num_candidates=3, seed=seed)
    for request in requests:
        scores = {task.name: np.arange(3, dtype=np.float32) for task in shop.SPEC.tasks}
        captures.keep_slow("shop", 7, request, TIMINGS, scores, 0.004)
    return requests


def test_the_last_requests_of_each_reason_are_kept_in_memory():
    captures = Captures(CaptureConfig(num_kept=3))
    requests = keep(captures, 5)
    captures.keep_fault("shop", 7, requests[0], "row 1")
    kept = captures.kept()
    assert [capture.request for capture in kept] == [requests[0], *requests[2:]]
    assert [capture.reason for capture in kept] == ["fault", "slow", "slow", "slow"]
    times = "before 4.000 ms, queue 1.000 ms, gather 2.000 ms, execute 3.000 ms, total 7.500 ms"
    assert kept[1].detail == times
    captures.close()


@pytest.mark.parametrize(("slow_ms", "expected"), [(0.0, False), (7.0, True), (8.0, False)])
def test_what_is_slow_is_what_the_config_says(slow_ms, expected):
    assert Captures(CaptureConfig(slow_ms=slow_ms)).is_slow(0.0075) is expected


def test_files_are_written_whole_and_the_oldest_go_those_of_an_earlier_process_included(tmp_path):
    folder = tmp_path / "kept"
    for _ in range(2):
        captures = Captures(CaptureConfig(folder=folder, num_kept=4))
        requests = keep(captures, 3)
        captures.close()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(list(folder.glob("*.json"))) == 4
    (again,), values = read_requests(files[-1], shop.SPEC)
    assert again.columns[-1].tobytes() in {request.columns[-1].tobytes() for request in requests}
    np.testing.assert_array_equal(values["scores"]["click"], [0, 1, 2])
    facts = json.loads(files[-1].with_suffix(".json").read_text())
    assert (facts["model"], facts["version"], facts["reason"]) == ("shop", 7, "slow")


def test_processes_that_share_a_folder_keep_the_last_of_all_and_overwrite_none(tmp_path, monkeypatch):
    monkeypatch.setattr(captures_module.time, "time", lambda: 1000.0)
    processes = [Captures(CaptureConfig(folder=tmp_path, num_kept=4)) for _ in range(3)]
    requests = []
    for process, count in enumerate((3, 2, 3)):
        monkeypatch.setattr(os, "getpid", lambda process=process: 70 + process)
        requests += keep(processes[process], count, seed=process)
        processes[process].close()
        for path in tmp_path.glob(f"*-{70 + process}-*.safetensors"):
            os.utime(path, (process, process))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {path.stem for path in files} == {path.stem for path in tmp_path.glob("*.json")}
    found = [read_requests(path, shop.SPEC)[0][0].columns[-1].tobytes() for path in files]
    assert found == [request.columns[-1].tobytes() for request in requests[-4:]]


def test_a_model_whose_name_has_a_reason_in_it_is_kept_by_its_own(tmp_path):
    captures = Captures(CaptureConfig(folder=tmp_path, num_kept=1))
    (request,) = random_requests(shop.SPEC, 1, num_candidates=3, seed=0)
    captures.keep_fault("too-slow-7", 7, request, "row 1")
    keep(captures, 1)
    captures.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


class SlowDisk:
    """`write_requests` that waits until it may go on, as a disk that doesn't follow."""

    def __init__(self, monkeypatch):
        self.has_come, self.go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(captures_module, "write_requests", self)

    def __call__(self, *args):
        self.has_come.set()
        assert self.go_on.wait(60)
        write_requests(*args)


def test_the_folder_holds_the_last_though_the_disk_did_not_follow(tmp_path, monkeypatch, caplog):
    disk, now = SlowDisk(monkeypatch), [100.0]
    captures = Captures(CaptureConfig(folder=tmp_path, num_kept=3), clock=lambda: now[0])
    keep(captures, 1)
    assert disk.has_come.wait(60)  # the first is being written
    requests = keep(captures, 9)  # six of them don't wait any more
    captures.keep_fault("shop", 7, requests[0], "row 1")  # slow ones don't push it out
    now[0] += 59
    keep(captures, 1)
    assert messages(caplog) == [
        "captures: a request is in memory alone: too many at once, or the disk doesn't follow"
    ]
    now[0] += 1
    requests = keep(captures, 3, seed=1)
    disk.go_on.set()
    captures.close()
    again = "captures: a request is in memory alone: too many at once, or the disk doesn't follow"
    assert messages(caplog)[1:] == [f"{again} ({number} since the last such line)" for number in (7, 2)]
    files = sorted(tmp_path.glob("*-slow-*.safetensors"), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert len(files) == 3
    for file, request in zip(files, requests, strict=True):
        (again,), _ = read_requests(file, shop.SPEC)
        assert again.columns[-1].tobytes() == request.columns[-1].tobytes()
    assert len(list(tmp_path.glob("*-fault-*.safetensors"))) == 1


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_folder_that_can_not_be_written_is_said_once_a_minute(tmp_path, caplog):
    captures = Captures(CaptureConfig(folder=tmp_path / "kept", num_kept=9), clock=lambda: 5.0)
    (tmp_path / "kept").rmdir()
    keep(captures, 4)
    captures.close()
    first, rest = messages(caplog)
    assert first.startswith("captures: a request can't be written: shop-7-slow-")
    assert rest.startswith("captures: a request can't be written: shop-7-slow-")
    assert rest.endswith(" (3 since the last such line)")


def test_nothing_is_kept_where_none_is_wanted(tmp_path):
    captures = Captures(CaptureConfig(folder=tmp_path / "kept", num_kept=0))
    keep(captures, 2)
    captures.close()
    assert captures.kept() == []
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"captures: folder .*file/kept: "):
        Captures(CaptureConfig(folder=tmp_path / "file" / "kept"))
    with pytest.raises(ConfigError, match=r"captures: slow_ms must be >= 0; was -1"):
        CaptureConfig(slow_ms=-1)
