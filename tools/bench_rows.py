"""Pooled lookup by row format, pooling and threads, and beside each what the memory gives.

8 tables of 2M x 64, a batch of 512 candidates, uniform ids. The ceiling reads the same rows at random with
the prefetch that is best for it, and decodes and adds nothing. All take turns, on ids that no cache still
holds. One thread is measured in its CPU time, which other programs disturb least; more in wall time.

    python tools/bench_rows.py --formats float32 int8 --pooling 1 20 --threads 1 2

The last line of the output is a JSON object of medians in milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xlarank.host import Gatherer, HostTable, Segment, aligned_empty, encode_rows
from xlarank.host._extension import native
from xlarank.host.plan import native_table
from xlarank.spec import Bucket, ModelSpec, Ragged, RankRequest, RowFormat

__all__ = ["measure"]

NUM_TABLES = 8
NUM_CANDIDATES = 512

_CEILING_LINES = (16, 32, 64, 128)
_BLOCK_ROWS = 1 << 15
_NUM_ID_SETS = 12

_WARM_CALLS = 2
"""Calls before those that are timed. A server reads one model's tables again and again, so that the page
tables over them are in the caches, which counts most in a virtual machine; after other tables they aren't."""

_TIMED_CALLS = 4


def measure(
    row_formats: Sequence[RowFormat],
    poolings: Sequence[int],
    thread_counts: Sequence[int],
    *,
    rounds: int,
    num_rows: int,
    dim: int,
) -> dict[str, float]:
    """Medians in ms by "<what> <format> pool<ids a bag> threads<n>"; what is ours, noprefetch or ceiling.

    Args:
      row_formats: of the tables, all of them in memory at once.
      poolings: ids a bag.
      thread_counts: threads that gather.
      rounds: turns of each, of some calls.
      num_rows: R of each of the tables.
      dim: D.
    """
    block = np.random.default_rng(0).standard_normal((_BLOCK_ROWS, dim), np.float32)
    tables = {f: [_table(encode_rows(block, f), num_rows) for _ in range(NUM_TABLES)] for f in row_formats}
    medians: dict[str, float] = {}
    for pooling in poolings:
        bags = np.random.default_rng(pooling).integers(
            num_rows, size=(_NUM_ID_SETS, NUM_TABLES, NUM_CANDIDATES * pooling), dtype=np.int32
        )
        for num_threads in thread_counts:
            works: dict[str, Callable[[int], object]] = {}
            for row_format, ours in tables.items():
                name = f"{row_format} pool{pooling} threads{num_threads}"
                works[f"ours {name}"] = _gather(ours, bags, pooling, num_threads, None)
                works[f"noprefetch {name}"] = _gather(ours, bags, pooling, num_threads, 0)
                for lines in _CEILING_LINES:
                    works[f"ceiling{lines} {name}"] = _read(ours, bags, num_threads, lines)
            clock = time.thread_time if num_threads == 1 else time.perf_counter
            medians |= _take_turns(works, rounds, clock)
    return _best_ceilings(medians)


def _table(block: HostTable, num_rows: int) -> HostTable:
    """One block, repeated: the values cost no time, their addresses do."""
    rows = aligned_empty((num_rows, block.rows.shape[1]), np.uint8)
    for begin in range(0, num_rows, _BLOCK_ROWS):
        rows[begin : begin + _BLOCK_ROWS] = block.rows[: num_rows - begin]
    return HostTable(rows, block.format, block.dim)


def _spec(table: HostTable) -> ModelSpec:
    names = [f"f{i}" for i in range(NUM_TABLES)]
    size = {"dim": table.dim, "rows": table.num_rows, "dtype": table.format}
    bag = {"kind": "id_list", "scope": "candidate", "combiner": "sum"}
    return ModelSpec.from_dict(
        {
            "name": "lookup",
            "features": [{"name": n, "table": n, **bag} for n in names],
            "tables": [{"name": n, **size} for n in names],
            "tasks": [{"name": "score"}],
        }
    )


def _gather(
    tables: Sequence[HostTable], bags: np.ndarray, pooling: int, num_threads: int, lines_ahead: int | None
) -> Callable[[int], object]:
    spec = _spec(tables[0])
    by_name = {f"f{i}": table for i, table in enumerate(tables)}
    gatherer = Gatherer(spec, by_name, num_threads=num_threads, backend="native", lines_ahead=lines_ahead)
    bucket = Bucket(NUM_CANDIDATES, 1)
    out = {leaf.name: aligned_empty(leaf.shape(bucket), leaf.dtype) for leaf in gatherer.signature.leaves}
    lengths = np.full(NUM_CANDIDATES, pooling, np.int32)
    segments = []
    for id_set in bags:
        columns = {f"f{i}": Ragged(ids.astype(np.int64), lengths) for i, ids in enumerate(id_set)}
        request = RankRequest(spec, columns, check=gatherer.check)
        segments.append(Segment(gatherer.bind(request), 0, NUM_CANDIDATES))
    return lambda index: gatherer.gather([segments[index]], bucket, out)


def _read(
    tables: Sequence[HostTable], bags: np.ndarray, num_threads: int, lines: int
) -> Callable[[int], object]:
    assert native is not None
    read_rows = native.read_rows
    forms = [native_table(table, lines) for table in tables]
    threads = ThreadPoolExecutor(num_threads)

    def read(index: int, first: int) -> None:
        for table in range(first, NUM_TABLES, num_threads):
            read_rows(forms[table], bags[index, table])

    if num_threads == 1:
        return functools.partial(read, first=0)
    return lambda index: list(threads.map(functools.partial(read, index), range(num_threads)))


def _take_turns(
    works: Mapping[str, Callable[[int], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in works}
    turn = 0
    for _ in range(rounds):
        for name, work in works.items():
            for call in range(_WARM_CALLS + _TIMED_CALLS):
                turn += 1
                begin = clock()
                work(turn % _NUM_ID_SETS)
                if call >= _WARM_CALLS:
                    samples[name].append(1e3 * (clock() - begin))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _best_ceilings(medians: Mapping[str, float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, value in medians.items():
        what, rest = name.split(" ", 1)
        key = f"{'ceiling' if what.startswith('ceiling') else what} {rest}"
        best[key] = min(value, best.get(key, value))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["float32", "int8"], help="row formats (%(default)s)")
    parser.add_argument(
        "--pooling", nargs="+", type=int, default=[1, 20, 150], help="ids a bag (%(default)s)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows a table (%(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="D (%(default)s)")
    args = parser.parse_args()
    row_formats = [RowFormat(f) for f in args.formats]
    medians = measure(
        row_formats, args.pooling, args.threads, rounds=args.rounds, num_rows=args.rows, dim=args.dim
    )
    for pooling in args.pooling:
        for num_threads in args.threads:
            for row_format in row_formats:
                name = f"{row_format} pool{pooling} threads{num_threads}"
                ours, ceiling = medians[f"ours {name}"], medians[f"ceiling {name}"]
                first = medians[f"ours {row_formats[0]} pool{pooling} threads{num_threads}"]
                print(
                    f"{name}: {ours:.3f} ms, {first / ours:.2f} of {row_formats[0]}; share of ceiling "
                    f"{ceiling / ours:.2f}; prefetch {medians[f'noprefetch {name}'] / ours:.2f}"
                )
    print(json.dumps({name: round(value, 4) for name, value in medians.items()}))


if __name__ == "__main__":
    main()
