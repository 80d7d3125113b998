"""What the process that holds the tables loads, for `xlarank serve --processes`."""

import multiprocessing.connection
import os
import subprocess
import sys

import bundles
import numpy as np
import pytest
from xlarank_serving.config import ProcessesConfig

from xlarank.cli import table_memory
from xlarank.cli.serve_config import ModelsConfig, ServeConfig
from xlarank.cli.serve_processes import load_for_workers
from xlarank.errors import ConfigError
from xlarank.host import TableMemory, memory
from xlarank.host.memory import AvailableMemory
from xlarank.runtime import tables
from xlarank.runtime.processes.messages import Complete, Failed, Order, Stop, WorkerStarted

NUM_BYTES = 4000
VERSION = ("bare", 1)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a version beside others, with so much memory as is said."""
    (tmp_path / "enabled").write_text("[madvise]")
    monkeypatch.setattr(memory, "_ENABLED", tmp_path / "enabled")

    def load(available, others=(), is_beside=False, **published):
        bundles.publish(tmp_path / "models", {"a": np.zeros((1000, 1), np.float32)}, **published)
        defaults = (tables.load_tables.__kwdefaults__ or {}) | {
            "available": lambda: AvailableMemory(available, None)
        }
        monkeypatch.setattr(tables.load_tables, "__kwdefaults__", defaults)
        config = ServeConfig(
            models=ModelsConfig(repository=tmp_path / "models"), processes=ProcessesConfig(num_processes=3)
        )
        return load_for_workers(config, VERSION, is_beside, others)

    return load


def test_a_first_version_that_does_not_fit_is_mapped(load):
    assert load(NUM_BYTES).memory == {"a": TableMemory.MMAP}


def test_one_beside_a_version_in_memory_is_refused(load):
    with pytest.raises(ConfigError, match=r"need 0\.00 GiB of memory, available are"):
        load(NUM_BYTES, [{"a": TableMemory.HUGE}], is_beside=True)


def test_what_the_workers_devices_hold_is_counted(load):
    with pytest.raises(ConfigError, match="their rows on CPU devices of 3 processes"):
        load(3 * (NUM_BYTES + 4) - 1, on_devices=["a"])


def test_reading_for_long_is_told_in_lines(load, monkeypatch, capsys):
    monkeypatch.setattr(table_memory, "_QUIET_SECONDS", 0.0)
    assert load(2**30).memory == {"a": TableMemory.HUGE}
    assert capsys.readouterr().err.splitlines() == [
        "loading bare 1: tables",
        "loading tables: 100%, 0.00 of 0.00 GiB are read and right",
    ]


HOLDER = """
import sys, time
from pathlib import Path
from xlarank.errors import ConfigError
from xlarank.host import TableMemory
from xlarank.runtime.processes.holder import Holder
from xlarank.runtime.processes.messages import Order
from xlarank.runtime.table_check import TableCheck
from xlarank.runtime.tables import LoadedTables

def load(version, is_beside, others):
    if is_beside:
        raise ConfigError(repr([dict(other) for other in others]))
    where = TableMemory.HUGE if version[0] == "ours" else TableMemory.MMAP
    return LoadedTables({}, {version[0]: where}, None, TableCheck([]), None)

def work(order, index, tables, is_again, say_ready):
    say_ready()
    while True:
        time.sleep(60)

link = Path(sys.argv[1])
versions = (("ours", 1), ("others", 1))
order = Order(generation=1, versions=versions, num_workers=1, is_beside=False, link=link)
sys.exit(Holder(load, work).run(order))
"""


def test_a_version_is_loaded_knowing_where_the_one_before_it_is(tmp_path):
    """The tables of that one are let go of by then."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "link")]
    with (
        multiprocessing.connection.Listener(str(tmp_path / "link"), "AF_UNIX", backlog=2) as listener,
        subprocess.Popen(command, env=environment) as process,
        listener.accept() as holder,
    ):
        worker = None
        try:
            holder.recv()  # Hello
            started = holder.recv()
            assert isinstance(started, WorkerStarted)
            worker = started.pid
            assert isinstance(holder.recv(), Complete)
            versions = (("ours", 2), ("others", 1))
            holder.send(
                Order(generation=2, versions=versions, num_workers=1, is_beside=True, link=tmp_path / "link")
            )
            with listener.accept() as successor:
                successor.recv()
                failed = successor.recv()
            assert isinstance(failed, Failed)
            assert failed.version == ("ours", 2)
            assert failed.reason == "[{'ours': <TableMemory.HUGE: 'huge'>}]"
            holder.send(Stop())
        finally:
            if worker is not None:
                os.kill(worker, 9)
        assert process.wait(60) == 0


def test_lines_are_said_of_each_tenth_once_reading_takes_long(capsys):
    now = 0.0
    on_bytes = table_memory.table_lines(clock=lambda: now)
    for _ in range(2):  # one load after the other
        for done in range(1, 41):
            now += 1.0
            on_bytes(done << 28, 40 << 28)
    lines = capsys.readouterr().err.splitlines()
    # Of the first tenth nothing: it was read in three seconds.
    assert lines == 2 * [
        f"loading tables: {10 * tenth}%, {tenth:.2f} of 10.00 GiB are read and right"
        for tenth in range(2, 11)
    ]


def test_where_stderr_is_no_terminal_there_are_lines_for_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(table_memory, "_QUIET_SECONDS", 0.0)
    with table_memory.table_progress() as on_bytes:
        on_bytes(5, 10)
        on_bytes(9, 10)
    assert [line[:19] for line in capsys.readouterr().err.splitlines()] == [
        "loading tables: 50%",
        "loading tables: 90%",
    ]
