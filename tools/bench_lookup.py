"""Pooled embedding lookup: the native gather against XLA's gather + sum.

8 tables of 2M x 64 float32 (4 GB), a batch of 512 candidates, 20 ids a bag, uniform ids; both read the same
memory and use as many threads as the process has cores. Calls take turns, on ids that no cache still holds.

    python tools/bench_lookup.py --seconds 10

The last line of the output is a JSON object with every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from embedding_lookups import NUM_BAGS, Shape, huge_tables, ours

__all__ = ["measure"]

NUM_TABLES = 8
NUM_ROWS = 2_000_000
DIM = 64
IDS_A_BAG = 20

_NUM_ID_SETS = 24
"""Batches of different ids, taken in turn: together they read 500 MB of rows, more than caches hold."""


def measure(seconds: float, num_rows: int = NUM_ROWS) -> dict[str, Any]:
    """Times both, interleaved. Call it before anything else of the process uses JAX.

    Args:
      seconds: how long to measure, set-up not counted.
      num_rows: R of each table.

    Returns:
      ``ours_ms`` and ``xla_ms``: milliseconds of each call, pairs in order. Ours holds `Gatherer.bind` and
      `Gatherer.gather`; XLA's holds the compiled call until its result is ready. ``how``: sizes in words.

    Raises:
      AssertionError: if the two disagree.
    """
    # As the server runs programs: inline, without the wake-up of a pool thread. Such a thread may also let go
    # of a shared table last, while Python shuts down, and abort the process.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    shape = Shape(name="lookup", num_tables=NUM_TABLES, num_rows=num_rows, dim=DIM)
    rng = np.random.default_rng(0)
    bags = rng.integers(0, num_rows, (_NUM_ID_SETS, NUM_TABLES, NUM_BAGS, IDS_A_BAG))
    num_threads = len(os.sched_getaffinity(0))  # what XLA takes for its pool
    native = ours(shape, bags, num_threads)
    xla = _xla([table.rows.view(np.float32) for table in huge_tables(shape)], bags)
    for index in range(_NUM_ID_SETS):
        np.testing.assert_allclose(native(index), xla(index), rtol=1e-5, atol=1e-5)
    samples: dict[str, list[float]] = {"ours_ms": [], "xla_ms": []}
    deadline = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < deadline:
        # Half the sets apart, so that neither finds its rows in the cache of the other.
        samples["ours_ms"].append(_time_ms(native, turn % _NUM_ID_SETS))
        samples["xla_ms"].append(_time_ms(xla, (turn + _NUM_ID_SETS // 2) % _NUM_ID_SETS))
        turn += 1
    how = (
        f"{NUM_TABLES} tables x {num_rows} x {DIM} float32, batch {NUM_BAGS}, {IDS_A_BAG} ids a bag, "
        f"uniform, sum, {num_threads} threads each"
    )
    return {"how": how, **samples}


def _xla(tables: list[np.ndarray], bags: np.ndarray) -> Callable[[int], jax.Array]:
    @jax.jit
    def look_up(tables: list[jax.Array], ids: jax.Array) -> jax.Array:
        # In range by construction, so XLA needn't check: the fastest form that it has.
        pooled = [
            table.at[bag].get(mode="promise_in_bounds").sum(axis=1)
            for table, bag in zip(tables, ids, strict=True)
        ]
        return jax.numpy.concatenate(pooled, axis=1)

    shared = [jax.dlpack.from_dlpack(table) for table in tables]
    id_sets = [jax.numpy.asarray(id_set.astype(np.int32)) for id_set in bags]
    return lambda index: jax.block_until_ready(look_up(shared, id_sets[index]))


def _time_ms(call: Callable[[int], object], index: int) -> float:
    begin = time.perf_counter()
    call(index)
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="how long to measure (%(default)s)")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows a table (%(default)s)")
    args = parser.parse_args()
    samples = measure(args.seconds, args.rows)
    native, xla = (statistics.median(samples[name]) for name in ("ours_ms", "xla_ms"))
    print(f"ours {native:.3f} ms, XLA {xla:.3f} ms, ratio {xla / native:.2f}")
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
