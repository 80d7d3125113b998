"""The distance of the prefetch: chosen by a clock, never a matter of results."""

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.host import Gatherer, HostTable, native_available
from xlarank.host.prefetch import DEFAULT_LINES, DISTANCES, fastest, measure_lines_ahead
from xlarank.spec import Bucket, ModelSpec, Ragged, RankRequest

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")
SOME = (0, 8, DEFAULT_LINES, 128)


class Machine:
    """A clock that work moves forward."""

    def __init__(self, seconds):
        self.now = 100.0
        self.seconds = seconds
        self.calls = []

    def clock(self):
        return self.now

    def work(self, distance):
        self.calls.append(distance)
        taken = self.seconds[distance]
        self.now += taken(len(self.calls)) if callable(taken) else taken


def choose(machine, budget_s):
    return fastest(machine.work, SOME, budget_s=budget_s, clock=machine.clock)


def test_the_fastest_distance_is_chosen_within_the_budget():
    machine = Machine({0: 4.0, 8: 1.0, DEFAULT_LINES: 2.0, 128: 3.0})
    assert choose(machine, 95.0) == 8
    assert machine.calls == list(SOME) * 10  # a round takes 10 s; the tenth passes the budget


def test_one_slow_sample_decides_nothing():
    machine = Machine({0: 4.0, 8: lambda call: 50.0 if call == 2 else 1.0, DEFAULT_LINES: 2.0, 128: 3.0})
    assert choose(machine, 140.0) == 8


def test_a_gain_that_is_noise_leaves_the_default():
    machine = Machine({0: 4.0, 8: 1.98, DEFAULT_LINES: 2.0, 128: 3.0})
    assert choose(machine, 100.0) == DEFAULT_LINES


def test_a_ceiling_takes_the_plain_minimum():
    machine = Machine({0: 4.0, 8: 1.98, DEFAULT_LINES: 2.0, 128: 3.0})
    assert fastest(machine.work, SOME, budget_s=100.0, min_gain=0.0, clock=machine.clock) == 8


def test_a_budget_of_too_few_rounds_leaves_the_default():
    machine = Machine({0: 4.0, 8: 1.0, DEFAULT_LINES: 2.0, 128: 3.0})
    assert choose(machine, 30.0) == DEFAULT_LINES
    assert len(machine.calls) == 12


@needs_native
def test_tables_of_one_row_size_share_a_measurement_and_small_ones_need_none():
    large = HostTable.of_floats(np.zeros((300_000, 32), np.float32))
    tables = {
        "a": large,
        "b": large.take(np.arange(3)),
        "c": HostTable.of_floats(np.zeros((9, 2), np.float32)),
    }
    chosen = measure_lines_ahead(tables)
    assert chosen["a"] == chosen["b"]
    assert chosen["a"] in DISTANCES
    assert chosen["c"] == DEFAULT_LINES


SPEC = ModelSpec.from_dict(
    {
        "name": "m",
        "features": [
            {"name": "one", "kind": "id", "scope": "candidate", "table": "t"},
            {"name": "some", "kind": "id_list", "scope": "candidate", "table": "t", "combiner": "sum"},
            {"name": "past", "kind": "sequence", "scope": "context", "table": "t", "max_length": 5},
        ],
        "tables": [{"name": "t", "dim": 20, "rows": 50}],
        "tasks": [{"name": "like"}],
    }
)


@needs_native
@pytest.mark.parametrize("lines", [0, 1, 3, 1000])
def test_no_distance_changes_a_bit(lines, gather):
    rng = np.random.default_rng(0)
    tables = {"t": rng.standard_normal((50, 20)).astype(np.float32)}
    bags = Ragged(rng.integers(50, size=60), rng.permutation([0, 0, 3, 7, 20, 30]).astype(np.int32))
    values = {"one": rng.integers(50, size=6), "some": bags, "past": [[1, 2, 3]]}
    request = RankRequest(SPEC, values)
    gatherer = Gatherer(SPEC, tables, lines_ahead=lines)
    assert gatherer.lines_ahead == {"t": lines}
    ours = gather(gatherer, [(request, 0, 6)], Bucket(8, 1))
    theirs = gather(Gatherer(SPEC, tables, backend="numpy"), [(request, 0, 6)], Bucket(8, 1))
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


@needs_native
@pytest.mark.parametrize(("lines", "rows"), [(0, 0), (1, 1), (3, 1), (1000, 500)])
def test_the_distance_reaches_the_kernel_in_rows(lines, rows):
    tables = {"t": np.zeros((50, 20), np.float32)}  # 80 bytes are two lines
    assert Gatherer(SPEC, tables, lines_ahead=lines)._kernel.rows_ahead == [rows]


@needs_native
def test_the_measured_distance_reaches_the_kernel():
    gatherer = Gatherer(SPEC, {"t": np.zeros((50, 20), np.float32)})
    assert gatherer._kernel.rows_ahead == [gatherer.lines_ahead["t"] // 2] == [DEFAULT_LINES // 2]


def test_a_negative_distance_is_refused():
    with pytest.raises(ConfigError, match="lines_ahead must be >= 0; was -1"):
        Gatherer(SPEC, {"t": np.zeros((50, 20), np.float32)}, lines_ahead=-1)
