"""Row counts that fit the traffic: `SizeHistogram`, `plan_ladder`.

Few row counts pad small requests; each one more is programs to compile, to prove and to load. `plan_ladder`
finds the best K of them for the sizes of requests that a server has seen and the times that a bundle was
measured at.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec.fields import to_integer, to_number
from xlarank.spec.profile import LatencyProfile

__all__ = [
    "CANDIDATES_METRIC",
    "SMALL_ROWS",
    "BucketUse",
    "LadderEstimate",
    "LadderPlan",
    "SizeHistogram",
    "estimate_ladder",
    "plan_ladder",
    "seconds_by_rows",
]

CANDIDATES_METRIC = "xlarank_request_candidates"
"""Name of the histogram of candidates a request, which the server writes and `xlarank plan` reads."""

# Row counts to choose from are multiples of this, and the powers of two below it.
_STEP = 8

SMALL_ROWS = 8
"""Row count that measured times must reach down to for a ladder of small requests to be planned by them."""

# Times that differ by less than this share are equal but for the rounding of their sums.
_TIE = 1e-9

# What rows count beside time, so that of equal times the fewer padded rows win; less than a tie, so that they
# are never worth a bucket more.
_ROWS_SHARE = 1e-13


@dataclasses.dataclass(frozen=True)
class SizeHistogram:
    """How many candidates the requests of some traffic have."""

    counts: Mapping[int, int]
    """Requests by N, ascending; each N >= 1. At least one request; an N of no requests is left out."""

    def __post_init__(self) -> None:
        if not isinstance(self.counts, Mapping):
            raise ConfigError(f"size histogram: expected requests by size, got {self.counts!r}")
        counts: dict[int, int] = {}
        for key, value in self.counts.items():
            size = to_integer("size histogram", "a size", key, least=1, below=2**31)
            counts[size] = to_integer(
                "size histogram", f"requests of size {size}", value, least=0, below=2**53
            )
        kept = {size: count for size, count in sorted(counts.items()) if count}
        if not kept:
            raise ConfigError("size histogram: expected at least one request, got none")
        object.__setattr__(self, "counts", kept)

    @classmethod
    def of_sizes(cls, sizes: Iterable[int]) -> SizeHistogram:
        """Counts requests from the N of each."""
        return cls(collections.Counter(sizes))

    @property
    def num_requests(self) -> int:
        """Requests of all sizes."""
        return sum(self.counts.values())

    @property
    def largest(self) -> int:
        """N of the largest request."""
        return next(reversed(self.counts))  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketUse:
    """What one row count of a ladder does for some traffic."""

    rows: int
    """B."""

    seconds: float
    """Time of one run."""

    share_of_requests: float
    """Requests with a run in it, of all; a request that is split may have runs in two row counts."""

    runs_per_request: float
    """Runs in it, by the number of all requests; more than 1 where most requests are split."""

    padding_share: float
    """Rows without a candidate, of all rows that it runs; 0 where it never runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderEstimate:
    """What a ladder of row counts costs for some traffic."""

    uses: tuple[BucketUse, ...]
    """One a row count, ascending."""

    seconds_per_request: float
    """Mean device time."""

    padding_share: float
    """Rows without a candidate, of all rows that run."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The row counts, ascending."""
        return tuple(use.rows for use in self.uses)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderPlan:
    """The best ladder of a traffic, beside the usual one."""

    chosen: LadderEstimate
    """Of the least device time; of those, of the fewest row counts; of those, of the least padding."""

    powers_of_two: LadderEstimate
    """8, 16, 32 and so on until the largest request fits; the last one is `max_rows` where that is less."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The chosen row counts, ascending."""
        return self.chosen.rows


def plan_ladder(
    histogram: SizeHistogram,
    seconds_of: Callable[[int], float],
    *,
    num_buckets: int,
    candidates: Iterable[int] | None = None,
    max_rows: int | None = None,
) -> LadderPlan:
    """Chooses at most K row counts that cost the traffic the least device time.

    A request of N candidates runs in the smallest row count B >= N. One of more than the largest, L, runs as
    the batcher splits it: in (N - 1) // L full buckets L, and what is left, at least one row, in the smallest
    that holds it. The choice minimises the mean of the sum of these times, over all subsets of the candidates
    (a dynamic program over the largest row count so far, O(K m^2) for m candidates). It counts every request
    alone: requests that share a batch behind a busy device fill buckets better than this says.

    The largest row count holds the largest request, so that nothing is split, unless `max_rows` or
    `candidates` end below it: then it is the largest that these allow.

    Args:
      histogram: the requests.
      seconds_of: seconds of one run by B; > 0. `seconds_by_rows` makes it of a profile.
      num_buckets: K >= 1, the most row counts to choose. A further one is chosen only where it saves time.
      candidates: row counts to choose from. By default the sizes of requests, and of what is left of split
        ones, rounded up to 1, 2, 4 or a multiple of 8: while time doesn't fall with rows, no other choice of
        such numbers is better.
      max_rows: the most rows of a bucket; None for no bound.

    Raises:
      ConfigError: for num_buckets, max_rows or candidates that are no integers >= 1, candidates of which none
        is <= max_rows, or a time that isn't a number > 0.
    """
    num_buckets = to_integer("ladder plan", "num_buckets", num_buckets, least=1, below=2**31)
    if max_rows is not None:
        max_rows = to_integer("ladder plan", "max_rows", max_rows, least=1, below=2**31)
    if candidates is None:
        rows = _rows_of_sizes(histogram, max_rows)
    else:
        rows = _rows_of_candidates(candidates, max_rows)
    seconds = np.array([_seconds_at(seconds_of, row) for row in rows])  # [m]
    last, _, weights = _split(histogram, rows[-1])
    place = np.searchsorted(rows, last)
    held = np.cumsum(np.bincount(place, weights, minlength=len(rows)))  # [m] requests that fit, by rows
    # Nothing is split where a candidate holds the largest request: any such one may be the last.
    first_end = int(np.searchsorted(rows, min(histogram.largest, rows[-1])))
    padded = seconds * (1 + _ROWS_SHARE * np.array(rows) / rows[-1])
    chosen = _choose(held, padded, num_buckets, first_end)
    return LadderPlan(
        chosen=estimate_ladder(histogram, seconds_of, [rows[j] for j in chosen]),
        powers_of_two=estimate_ladder(
            histogram, seconds_of, _powers_of_two(histogram.largest, rows[-1], max_rows)
        ),
    )


def estimate_ladder(
    histogram: SizeHistogram, seconds_of: Callable[[int], float], rows: Iterable[int]
) -> LadderEstimate:
    """What a ladder costs for some traffic, by the same rule as `plan_ladder`.

    Args:
      histogram: the requests; those of more than the largest row count are split.
      seconds_of: seconds of one run by B; > 0.
      rows: row counts, in any order.

    Raises:
      ConfigError: for no row counts, one that isn't an integer >= 1, or a time that isn't a number > 0.
    """
    ladder = _to_rows("ladder estimate", "row counts", rows)
    seconds = [_seconds_at(seconds_of, row) for row in ladder]
    last, num_full, weights = _split(histogram, ladder[-1])
    place, end = np.searchsorted(ladder, last), len(ladder) - 1
    requests = np.bincount(place, weights, minlength=len(ladder))
    requests[end] = weights[(place == end) | (num_full > 0)].sum()
    runs = np.bincount(place, weights, minlength=len(ladder))
    runs[end] += weights @ num_full
    filled = np.bincount(place, weights * last, minlength=len(ladder))
    filled[end] += weights @ num_full * ladder[end]
    executed = runs * ladder
    empty = executed - filled
    total = weights.sum()
    uses = tuple(
        BucketUse(
            rows=row,
            seconds=seconds[j],
            share_of_requests=float(requests[j] / total),
            runs_per_request=float(runs[j] / total),
            padding_share=float(empty[j] / executed[j]) if executed[j] else 0.0,
        )
        for j, row in enumerate(ladder)
    )
    return LadderEstimate(
        uses=uses,
        seconds_per_request=float(runs @ seconds / total),
        padding_share=float(empty.sum() / executed.sum()),
    )


def seconds_by_rows(profile: LatencyProfile) -> Callable[[int], float]:
    """Seconds of one run by any row count, from the buckets that were measured.

    Of a row count the bucket of the fewest requests counts, which is the one that a request alone runs in.
    A row count that took longer than a larger one counts as that one: what disturbs a measurement adds time,
    and time must not fall with rows. Between two row counts time is a straight line; below the smallest it is
    the smallest's, for there it is the cost of a run at all; above the largest the last line goes on. A
    profile of one row count is taken in proportion above it.

    Args:
      profile: of the device kind that will serve.

    Returns:
      A function of B >= 1, non-decreasing, > 0.
    """
    alone: dict[int, float] = {}
    for bucket in sorted(profile.seconds):
        alone.setdefault(bucket.rows, profile.seconds[bucket])
    rows = np.array(list(alone), np.float64)
    seconds = np.minimum.accumulate(np.array(list(alone.values()))[::-1])[::-1]
    rows_before, seconds_before = (rows[-2], seconds[-2]) if len(rows) > 1 else (0.0, 0.0)
    slope = (seconds[-1] - seconds_before) / (rows[-1] - rows_before)

    def seconds_of(num_rows: int) -> float:
        return float(np.interp(num_rows, rows, seconds) + slope * max(0.0, num_rows - rows[-1]))

    return seconds_of


def _choose(held: np.ndarray, seconds: np.ndarray, num_buckets: int, first_end: int) -> list[int]:
    """The dynamic program.

    Args:
      held: [m] float64, requests that fit in candidate j, non-decreasing; all of them from `first_end` on.
      seconds: [m] float64, time of candidate j.
      num_buckets: K.
      first_end: the last one chosen is this candidate or one after it.

    Returns:
      Ascending indices of the chosen candidates.
    """
    layers = [held * seconds]  # [t][m]: least time of the requests that fit in j, with t + 1 buckets up to j
    befores: list[np.ndarray] = []  # [t][m]: the bucket before j in layers[t + 1]
    for _ in range(1, min(num_buckets, len(held))):
        layer, before = _with_one_more(layers[-1], held, seconds)
        layers.append(layer)
        befores.append(before)
    totals = [layer[first_end:].min() for layer in layers]
    more = next(t for t, total in enumerate(totals) if total <= min(totals) * (1 + _TIE))
    chosen = [first_end + int(np.argmin(layers[more][first_end:]))]
    for before in reversed(befores[:more]):
        chosen.append(int(before[chosen[-1]]))
    return chosen[::-1]


def _with_one_more(fewer: np.ndarray, held: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[m] least time with one bucket more than in `fewer`, and [m] the bucket before the last."""
    layer = np.full(len(held), np.inf)
    before = np.zeros(len(held), np.int64)
    for j in range(1, len(held)):
        times = fewer[:j] + (held[j] - held[:j]) * seconds[j]
        before[j] = np.argmin(times)
        layer[j] = times[before[j]]
    return layer, before


def _split(histogram: SizeHistogram, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By size of request [S]: rows of its last part, in [1, limit]; full parts before it; requests."""
    sizes = np.array(list(histogram.counts), np.int64)
    num_full = (sizes - 1) // limit
    return sizes - num_full * limit, num_full, np.array(list(histogram.counts.values()), np.float64)


def _rows_of_sizes(histogram: SizeHistogram, max_rows: int | None) -> list[int]:
    """Row counts worth choosing from, ascending; the last one ends every ladder."""
    limit = _round_up(histogram.largest)
    if max_rows is not None:
        limit = min(limit, max_rows)
    last, _, _ = _split(histogram, limit)
    return sorted({limit, *(min(_round_up(size), limit) for size in last.tolist())})


def _rows_of_candidates(candidates: Iterable[int], max_rows: int | None) -> list[int]:
    rows = _to_rows("ladder plan", "candidates", candidates)
    kept = [row for row in rows if max_rows is None or row <= max_rows]
    if not kept:
        raise ConfigError(f"ladder plan: expected candidates <= max_rows, {max_rows}, got {rows}")
    return kept


def _powers_of_two(largest: int, limit: int, max_rows: int | None) -> list[int]:
    top = limit
    if largest <= limit:
        top = max(_STEP, 1 << (largest - 1).bit_length())
        top = top if max_rows is None else min(top, max_rows)
    rows = [top]
    power = _STEP
    while power < top:
        rows.append(power)
        power *= 2
    return rows


def _round_up(size: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, ... that is no less."""
    return 1 << (size - 1).bit_length() if size <= _STEP else -(-size // _STEP) * _STEP


def _to_rows(where: str, field: str, values: Iterable[int]) -> list[int]:
    rows = sorted({to_integer(where, field, value, least=1, below=2**31) for value in values})
    if not rows:
        raise ConfigError(f"{where}: expected at least one of {field}, got none")
    return rows


def _seconds_at(seconds_of: Callable[[int], float], rows: int) -> float:
    seconds = to_number("ladder", f"seconds of {rows} rows", seconds_of(rows))
    if seconds <= 0:
        raise ConfigError(f"ladder: seconds of {rows} rows must be > 0; was {seconds!r}")
    return seconds
