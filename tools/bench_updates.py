"""p99 of lookups while rows are written, over the same without: `update_p99`.

    python tools/bench_updates.py --out bench/updates.json    about a minute
    python tools/bench_updates.py --short                     about five seconds

One thread gathers batches, another writes rows at a steady rate; spells with and without writing take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
from figures import Figure, Goal, command, environment, ratio_figure, report
from rich.console import Console

from xlarank.host import Gatherer, Segment, aligned_empty, huge_empty
from xlarank.spec import (
    Bucket,
    Combiner,
    FeatureKind,
    FeatureSpec,
    ModelSpec,
    Ragged,
    RankRequest,
    Scope,
    TableSpec,
    TaskSpec,
)

DIM, IDS_A_BAG, BAGS = 64, 20, 512
ROWS_A_SECOND = 100_000
ROWS_AN_UPDATE = 200


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to measure."""

    note: str
    rows: int
    """Of the table."""

    spells: int
    """Pairs of spells with and without updates."""

    seconds: float
    """Of a spell."""


FULL = Size("", 2_000_000, 15, 1.5)
SHORT = Size("short form; ", 200_000, 3, 0.5)


class Lookups:
    """A batch of random bags of an updatable table, gathered over and over."""

    def __init__(self, size: Size) -> None:
        rng = np.random.default_rng(0)
        spec = ModelSpec(
            name="updates",
            features=(
                FeatureSpec(
                    name="bag",
                    kind=FeatureKind.ID_LIST,
                    scope=Scope.CANDIDATE,
                    table="t",
                    combiner=Combiner.SUM,
                ),
            ),
            tables=(TableSpec(name="t", dim=DIM, rows=size.rows, updatable=True),),
            tasks=(TaskSpec(name="click"),),
        )
        table = huge_empty(4 * size.rows * DIM).view(np.float32).reshape(size.rows, DIM)
        table[...] = rng.standard_normal(DIM, np.float32)
        self.gatherer = Gatherer(spec, {"t": table})
        lengths = np.full(BAGS, IDS_A_BAG, np.int32)
        ids = rng.integers(0, size.rows, (8, BAGS * IDS_A_BAG))
        self._bucket = Bucket(BAGS, 1)
        self._batches = [
            [Segment(self.gatherer.bind(RankRequest(spec, {"bag": Ragged(each, lengths)})), 0, BAGS)]
            for each in ids
        ]
        self._out = {
            leaf.name: aligned_empty(leaf.shape(self._bucket), leaf.dtype)
            for leaf in self.gatherer.signature.leaves
        }

    def p99_seconds(self, seconds: float) -> float:
        """Of the gathers of a spell."""
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            self.gatherer.gather(self._batches[len(taken) % len(self._batches)], self._bucket, self._out)
            taken.append(time.perf_counter() - start)
        return float(np.percentile(taken, 99))


class Updates:
    """Writes random rows at a steady rate in a thread, as long as it is entered."""

    def __init__(self, gatherer: Gatherer, size: Size) -> None:
        rng = np.random.default_rng(1)
        self._gatherer = gatherer
        self._rows = rng.integers(0, size.rows, (64, ROWS_AN_UPDATE))
        self._values = rng.standard_normal((ROWS_AN_UPDATE, DIM)).astype(np.float32)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_rows, self.seconds = 0, 0.0

    def __enter__(self) -> Updates:
        self._stop.clear()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _write(self) -> None:
        start, count = time.perf_counter(), 0
        while not self._stop.is_set():
            self._gatherer.update_rows("t", self._rows[count % len(self._rows)], self._values)
            count += 1
            due = start + count * ROWS_AN_UPDATE / ROWS_A_SECOND
            self._stop.wait(max(0.0, due - time.perf_counter()))
        self.num_rows += count * ROWS_AN_UPDATE
        self.seconds += time.perf_counter() - start


def update_p99(size: Size) -> Figure:
    """p99 of lookups with rows being written over p99 without."""
    lookups = Lookups(size)
    updates = Updates(lookups.gatherer, size)
    lookups.p99_seconds(size.seconds)
    without, during = [], []
    for _ in range(size.spells):
        without.append(lookups.p99_seconds(size.seconds))
        with updates:
            during.append(lookups.p99_seconds(size.seconds))
    return ratio_figure(
        "update_p99",
        during,
        without,
        target=1.3,
        goal=Goal.AT_MOST,
        how=(
            f"{size.note}{command()}: {BAGS} bags of {IDS_A_BAG} random ids of a table of {size.rows:,} x "
            f"{DIM} float32, 1 thread: p99 while another writes {updates.num_rows / updates.seconds:,.0f} "
            f"rows/s, over p99 without; {size.spells} spells of {size.seconds} s each, in turns; "
            f"{environment()}"
        ),
        beside={"p99 ms without and during": f"{_ms(without)} and {_ms(during)}"},
    )


def _ms(seconds: list[float]) -> str:
    return f"{np.median(seconds) * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--short", action="store_true", help="a smaller table, fewer spells")
    args = parser.parse_args()
    report([update_p99(SHORT if args.short else FULL)], args.out, console=Console())


if __name__ == "__main__":
    main()
