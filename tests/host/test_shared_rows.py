"""Rows that several processes read and write: never a half row, and who is killed leaves none."""

import os
import subprocess
import sys

import numpy as np
import pytest

from xlarank.host import SharedRows
from xlarank.host.memory import huge_empty

SCRIPT = """
import os, signal, sys, time
import numpy as np
from xlarank.host import Gatherer, HostTable, Segment, SharedRows
from xlarank.host.memory import huge_empty
from xlarank.host.tables import aligned_empty
from xlarank.spec import Bucket, FeatureSpec, ModelSpec, RankRequest, RowFormat, TableSpec, TaskSpec

NUM_ROWS, DIM = 8, 16384
spec = ModelSpec(
    name="changing",
    features=[FeatureSpec(name="id", kind="id", scope="candidate", table="t")],
    tables=[TableSpec(name="t", dim=DIM, rows=NUM_ROWS, updatable=True)],
    tasks=[TaskSpec(name="click")],
)
memory = huge_empty(NUM_ROWS * DIM * 4, is_shared=True)
table = HostTable(memory.reshape(NUM_ROWS, DIM * 4), RowFormat.FLOAT32, DIM)
shared = SharedRows(table.rows)


def gatherer():
    return Gatherer(spec, {"t": table}, shared_rows={"t": shared}, lines_ahead=0)


def write(first):
    own, rows = gatherer(), np.arange(NUM_ROWS)
    value = first
    while True:
        own.update_rows("t", rows, np.full((NUM_ROWS, DIM), value, np.float32))
        shared.count(NUM_ROWS)
        value += 2


reader = gatherer()
request = reader.bind(RankRequest(spec, {"id": np.arange(NUM_ROWS)}))
bucket = Bucket(NUM_ROWS, 1)
out = {leaf.name: aligned_empty(leaf.shape(bucket), leaf.dtype) for leaf in reader.signature.leaves}
slot = reader.signature.slots["id"]


def read():
    reader.gather([Segment(request, 0, NUM_ROWS)], bucket, out)
    values = out[slot.leaf][:, slot.begin : slot.end]
    assert (values == values[:, :1]).all(), values
    return values[:, 0]


seen = num_journaled = num_rounds = 0
while num_journaled < 3:  # until some were killed in the middle of a row
    num_rounds += 1
    assert num_rounds < 2000
    writers = []
    for first in (1, 2):
        pid = os.fork()
        if not pid:
            write(2 * seen + first)
        writers.append(pid)
    before = shared.state[0]
    while shared.state[0] < before + 3:
        seen = max(seen, int(read().max()))
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    num_journaled += bool(shared.journal[:8].view(np.int64)[0])
    shared.repair()
    assert not (shared.stamps & 1).any()
    assert not shared.journal[:8].any()
    read()
print(num_rounds, shared.state[0], shared.state[1] == NUM_ROWS * shared.state[0])
"""


# Two processes with two threads each, a table a thread: whoever waits for one table holds no other.
TWO_TABLES = """
import os, threading, time
from xlarank.host import SharedRows
from xlarank.host.memory import huge_empty

tables = [SharedRows(huge_empty(640, is_shared=True).reshape(10, 64)) for _ in range(2)]
inside = [huge_empty(8, is_shared=True) for _ in tables]


def write(table, inside):
    for _ in range(200):
        with table.writing():
            assert not inside[0]
            inside[0] = 1
            time.sleep(0.0005)  # so that others come meanwhile
            inside[0] = 0
    num_done.append(1)


num_done = []
pid = os.fork()
threads = [threading.Thread(target=write, args=each) for each in [*zip(tables, inside)] * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if not pid:
    os._exit(len(num_done) != 4)
assert len(num_done) == 4
assert os.waitpid(pid, 0)[1] == 0
"""


# Each generation is a fork of the one before, makes rows of its own, and lets go of those that it inherits.
GENERATIONS = """
import os
from xlarank.host import SharedRows
from xlarank.host.memory import huge_empty


def made():
    return SharedRows(huge_empty(640, is_shared=True).reshape(10, 64))


def num_files():
    return len(os.listdir("/proc/self/fd"))


table = made()
num_open = num_files()
for _ in range(5):
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or table.count(1) != 1)
    table = made()
    assert num_files() == num_open, os.listdir("/proc/self/fd")
"""


LET_GO = """
import fcntl, os
from xlarank.host import SharedRows
from xlarank.host.memory import huge_empty

table = SharedRows(huge_empty(640, is_shared=True).reshape(10, 64))
with table.writing():
    pid = os.fork()
    if not pid:
        file = os.open(f"/proc/self/fd/{table._file}", os.O_RDWR)
        del table  # and of what `writing` opened, the fork still has a copy
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
assert table.count(1) == 1
"""


# A process is killed in the first update, before its first row and after its last.
FIRST_UPDATE = """
import os, signal
from xlarank.host import SharedRows
from xlarank.host.memory import huge_empty

rows = huge_empty(640, is_shared=True).reshape(10, 64)
for is_written in (False, True):
    table = SharedRows(rows)
    pid = os.fork()
    if not pid:
        with table.writing():
            rows[3] += is_written
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    table.repair()
    assert table.has_updates
    assert table.state[:2] == (0, 0)
assert rows[3].all()
assert not SharedRows(rows).has_updates
"""


def run(script):
    """In a process of its own, without threads: only such a one may be forked."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_that_are_killed_while_they_write_leave_no_half_row():
    result = run(SCRIPT)
    assert result.returncode == 0, result.stderr
    num_rounds, num_updates, are_rows_counted = result.stdout.split()
    assert int(num_updates) >= 3 * int(num_rounds)
    assert are_rows_counted == "True"


def test_writers_of_two_tables_wait_for_their_own_table_alone():
    result = run(TWO_TABLES)
    assert result.returncode == 0, result.stderr


def test_a_fork_that_lets_go_of_rows_closes_its_file_of_them():
    result = run(GENERATIONS)
    assert result.returncode == 0, result.stderr


def test_a_fork_that_lets_go_of_rows_takes_no_lock_from_who_writes_them():
    result = run(LET_GO)
    assert result.returncode == 0, result.stderr


def test_rows_count_as_updated_though_who_wrote_them_first_was_killed():
    result = run(FIRST_UPDATE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stamp", [6, 7], ids=["before the stamp", "after the stamp"])
def test_a_row_that_is_finished_for_a_killed_writer_is_written_under_an_odd_stamp(stamp):
    memory = huge_empty(640, is_shared=True).reshape(10, 64)
    shared = SharedRows(memory)
    during = []

    class Watched:
        def __setitem__(self, row, values):
            during.append(int(shared.stamps[at]))
            memory[row] = values

    at = (3 * 2654435761 & 0xFFFFFFFF) >> 20  # row 3's, as native/stamps.h has it
    shared.stamps[at] = stamp
    shared.journal[:8].view(np.int64)[0] = 3 + 1
    shared.journal[8:] = 9
    shared._rows = Watched()
    shared.repair()
    assert during == [7]
    assert shared.stamps[at] == 8
    assert (memory[3] == 9).all()
    assert memory.sum() == 64 * 9
    assert not (shared.stamps & 1).any()
    shared.repair()
    assert during == [7]
