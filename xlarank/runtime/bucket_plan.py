"""Which compiled buckets rows run in, by what each was measured to take: `BucketPlan`."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable

from xlarank.errors import BucketError
from xlarank.spec import Bucket, BucketLadder, LatencyProfile
from xlarank.spec.serving import QueueConfig

__all__ = ["LEAST_GAIN", "SECONDS_A_RUN", "BucketPlan"]

LEAST_GAIN = 0.05
"""Share of time that more runs must save to be worth it: what two measurements of one bucket differ by."""

SECONDS_A_RUN = 100e-6
"""Forming, gathering and answering a batch, whatever its size; profiles time the device alone."""


_Table = tuple[list[tuple[float, int]], tuple[int, float]]
"""`BucketPlan._table`."""


class BucketPlan:
    """Prices of one model on one kind of device. Immutable, but for what it remembers; any thread.

    Attributes:
      ladder: the compiled buckets.
      max_requests: that a bucket holds at most.
      knee_rows: rows beyond which merging requests stops paying, see `LatencyProfile.knee_rows`.
      fills_buckets: whether a larger request takes company along, as far as its bucket has room.
      knee_seconds: a run of that many rows.
      seconds_a_row: at the best throughput up to the knee: what a row costs where batches are full.
      lone_runs: rows of the first run of a request that nobody joins, by its rows: what a `Batcher` has found
        and would find again, at nearly every turn of a server that isn't busy.
    """

    def __init__(
        self,
        ladder: BucketLadder,
        profile: LatencyProfile,
        *,
        seconds_a_run: float = SECONDS_A_RUN,
        max_batch_rows: int | None = None,
    ) -> None:
        """
        Args:
          ladder: the compiled buckets.
          profile: measured seconds of each of them.
          seconds_a_run: what a run takes beside, whatever its size.
          max_batch_rows: merges no more rows than this; by default the profile's knee, or what a larger
            request leaves free of its bucket.

        Raises:
          BucketError: if a bucket has no measured time, or `max_batch_rows` isn't a row count of the ladder's
            range.
        """
        limit = profile.knee_rows() if max_batch_rows is None else max_batch_rows
        if not 1 <= limit <= ladder.max_rows:
            raise BucketError(f"max_batch_rows must be in [1, {ladder.max_rows}]; was {limit}")
        self.ladder = ladder
        # What disturbs a measurement adds time: a bucket counts as no slower than one that holds it.
        self._seconds = {
            bucket: seconds_a_run
            + min(profile.seconds_of(b) for b in ladder.buckets if b.holds(bucket.rows, bucket.requests))
            for bucket in ladder.buckets
        }
        self.row_counts = sorted({bucket.rows for bucket in ladder.buckets})
        self._request_counts = sorted({bucket.requests for bucket in ladder.buckets})
        # By the places of both counts; what is asked while a batch is chosen is asked under a lock.
        self._cheapest = [
            [self._cheapest_of(rows, requests) for requests in self._request_counts]
            for rows in self.row_counts
        ]
        self.max_requests = self._request_counts[-1]
        self.knee_rows = limit
        self.fills_buckets = max_batch_rows is None
        merged = [bucket for bucket in ladder.buckets if bucket.rows <= limit] or [ladder.buckets[0]]
        self.seconds_a_row = min(self._seconds[bucket] / bucket.rows for bucket in merged)
        self.knee_seconds = self.seconds_a_row * limit
        self.bucket = functools.cache(self._bucket)
        self.run_seconds = functools.cache(self._run_seconds)
        self.lone_runs: dict[int, int] = {}
        # By the place of the requests' count.
        self._tables: dict[int, _Table] = {}

    @classmethod
    def of_config(cls, ladder: BucketLadder, profile: LatencyProfile, config: QueueConfig) -> BucketPlan:
        """With a queue's limit, where it is below the ladder's own; all prices are worked out."""
        plan = cls(ladder, profile, max_batch_rows=min(config.max_batch_rows, ladder.max_rows) or None)
        for requests in plan._request_counts:
            plan.seconds(1, requests)
        return plan

    def _cheapest_of(self, num_rows: int, num_requests: int) -> Bucket | None:
        """Of the buckets that hold them; of equals the smallest: what is less never takes longer."""
        holding = [bucket for bucket in self.ladder.buckets if bucket.holds(num_rows, num_requests)]
        return min(holding, key=self._seconds.__getitem__, default=None)

    def _bucket(self, num_rows: int, num_requests: int) -> Bucket | None:
        """The cheapest that holds them; None when none does."""
        place = bisect.bisect_left(self.row_counts, num_rows)
        requests_place = bisect.bisect_left(self._request_counts, num_requests)
        if place == len(self.row_counts) or requests_place == len(self._request_counts):
            return None
        return self._cheapest[place][requests_place]

    def _run_seconds(self, num_rows: int, num_requests: int) -> float:
        """Of one run of the bucket that they take; inf when none holds them."""
        bucket = self.bucket(num_rows, num_requests)
        return math.inf if bucket is None else self._seconds[bucket]

    def seconds(self, num_rows: int, num_requests: int = 1) -> float:
        """Of the cheapest set of runs for rows of so many requests; see `runs`."""
        return self.runs(num_rows, num_requests)[0]

    def seconds_taken(self, taken: Callable[[float], float], num_rows: int, num_requests: int = 1) -> float:
        """As `seconds`, where one run of a price takes `taken(price)`; the runs of a set count as alike."""
        seconds, num_runs = self.runs(num_rows, num_requests)
        return num_runs * taken(seconds / num_runs) if num_runs else 0.0

    def runs(self, num_rows: int, num_requests: int = 1) -> tuple[float, int]:
        """Seconds of the cheapest set of runs for rows of so many requests, and how many runs they are.

        Args:
          num_rows: 0 or more; beyond two of the largest bucket those that are cheapest a row come first.
          num_requests: any part of them may be in each of the runs.
        """
        if num_rows == 0:
            return 0.0, 0
        # Fewer requests may run in a bucket of more; rows without a bucket of so many requests run in parts.
        place = min(bisect.bisect_left(self._request_counts, num_requests), len(self._request_counts) - 1)
        if place not in self._tables:
            self._tables[place] = self._table(self._request_counts[place])
        table, (rows, price) = self._tables[place]
        num_full = max(0, -((len(table) - 1 - num_rows) // rows))
        seconds, num_runs = table[num_rows - num_full * rows]
        return num_full * price + seconds, num_full + num_runs

    def work_seconds(self, num_rows: int) -> float:
        """What a request adds to a busy device's time: alone where it is large, its share where it merges."""
        if 2 * num_rows > self.knee_rows:
            return self.seconds(num_rows)
        return max(num_rows * self.seconds_a_row, self.seconds(num_rows) / self.max_requests)

    def _table(self, num_requests: int) -> _Table:
        """[2 max_rows + 1] seconds of the cheapest set of buckets and their number (dynamic program over
        rows); and rows and seconds of the bucket that is cheapest a row."""
        prices = [
            (rows, self.run_seconds(rows, min(rows, num_requests)))
            for rows in self.row_counts
            if self.run_seconds(rows, min(rows, num_requests)) < math.inf
        ]
        if not prices:  # so many requests fit no bucket at once
            return self._table(self._request_counts[self._request_counts.index(num_requests) - 1])
        table = [(0.0, 0)]
        for num_rows in range(1, 2 * self.ladder.max_rows + 1):
            left = [(price, *table[max(0, num_rows - rows)]) for rows, price in prices]
            table.append(min((price + seconds, 1 + num_runs) for price, seconds, num_runs in left))
        return table, min(prices, key=lambda entry: entry[1] / entry[0])
