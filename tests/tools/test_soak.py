"""What the soak calls growth."""

import numpy as np
import pytest
from soak import Limits, Sample, after_warming_up, growth, limits_of, problems

MIB = 2**20


def samples(resident=lambda at: 0.0, threads=lambda at: 70, seconds=600, step=2):
    rng = np.random.default_rng(0)
    return [
        Sample(
            at=float(at),
            resident_bytes=int(300 * MIB + resident(at) + rng.normal(0, MIB)),
            threads=threads(at),
            files=20,
            metrics_bytes=9000 + at // 100,
            metrics_lines=150,
        )
        for at in range(step, seconds + 1, step)
    ]


def test_what_is_flat_is_flat():
    flat = after_warming_up(samples())
    assert flat[0].at == 240
    assert problems(flat, limits_of(600)) == []
    assert abs(growth(flat, "resident_bytes")) < MIB


def test_growth_while_warming_up_does_not_count():
    settled = samples(resident=lambda at: 100 * MIB * min(at, 200) / 200)
    assert problems(after_warming_up(settled), limits_of(600)) == []


def test_a_leak_is_found_and_a_spike_is_none():
    leaks = samples(resident=lambda at: 0.05 * MIB * at)  # 18 MiB in the 360 s that count
    (found,) = problems(after_warming_up(leaks), limits_of(600))
    assert found.startswith("resident_bytes grew by 18,")
    assert found.endswith("8,388,608 are allowed")
    spike = samples(resident=lambda at: 200 * MIB * (at == 500))
    assert problems(after_warming_up(spike), limits_of(600)) == []


def test_threads_that_are_never_ended_are_found():
    found = problems(samples(threads=lambda at: 70 + at // 60), Limits(resident_bytes=8 * MIB))
    assert len(found) == 1
    assert "threads grew by" in found[0]


def test_growth_is_the_median_slope():
    line = [Sample(float(at), 5 * at, 1, 1, 1, 1) for at in range(11)]
    assert growth(line, "resident_bytes") == pytest.approx(50)
