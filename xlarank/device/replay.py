"""Replays golden requests through the path that serves: gather, buffers, compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from xlarank.device.replica import Replica
from xlarank.errors import VerifyError
from xlarank.host import BoundRequest, Gatherer, Segment
from xlarank.spec import Bucket, ModelSpec, RankRequest, Scope, TaskKind, take

__all__ = ["GoldenReplay", "ScoreError", "check_errors", "row_errors", "score_errors"]

_PERCENTILE = 99


@dataclasses.dataclass(frozen=True)
class ScoreError:
    """How far the scores of one task are from the reference; see `row_errors` for the unit."""

    p99: float
    """99th percentile over the rows."""

    max: float
    """Over the rows; infinite when a score isn't finite."""

    @classmethod
    def of(cls, errors: np.ndarray) -> ScoreError:
        """Of row errors [n]."""
        if not errors.size:
            return cls(0.0, 0.0)
        if not np.isfinite(errors).all():
            return cls(float("inf"), float("inf"))
        # The higher neighbour, so that few rows are not judged more mildly than many.
        return cls(float(np.percentile(errors, _PERCENTILE, method="higher")), float(errors.max()))


class GoldenReplay:
    """Golden requests that can fill a batch of any size, and the scores each row must get.

    A golden request is repeated, candidate by candidate, up to the largest bucket's rows, so that even a
    bucket of 1024 rows and one request is filled by one context.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        requests: Sequence[RankRequest],
        scores: Mapping[str, Sequence[np.ndarray]],
        max_rows: int,
    ) -> None:
        """
        Args:
          gatherer: of the bundle's tables.
          requests: G golden requests with at least one candidate each.
          scores: by task, one [N] float32 reference a request.
          max_rows: B of the largest bucket.
        """
        self._gatherer = gatherer
        self._requests = requests
        self._scores = scores
        self._max_rows = max_rows
        self._bound: dict[int, BoundRequest] = {}  # repeated up to max_rows
        self._as_sent: dict[int, BoundRequest] = {}

    @property
    def num_requests(self) -> int:
        """G."""
        return len(self._requests)

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """Reference scores of every golden row by task, request by request."""
        return {task: np.concatenate(parts) for task, parts in self._scores.items()}

    def fill(
        self, leaves: Mapping[str, np.ndarray], bucket: Bucket, num_rows: int, start: int = 0
    ) -> dict[str, np.ndarray]:
        """Gathers one batch.

        Args:
          leaves: buffers of the bucket, written whole (padding included).
          bucket: its size.
          num_rows: valid rows, in [1, B], spread evenly over as many requests as fit.
          start: number of the first golden request; different starts take different rows too.

        Returns:
          The expected scores [num_rows] by task.
        """
        num_requests = min(bucket.requests, num_rows)
        ends = [num_rows * (i + 1) // num_requests for i in range(num_requests)]
        segments: list[Segment] = []
        expected: dict[str, list[np.ndarray]] = {task: [] for task in self._scores}
        begin_row = 0
        for i, end_row in enumerate(ends):
            golden = (start + i) % len(self._requests)
            size = end_row - begin_row
            # Any spread will do, as long as small buckets get to see all candidates in time.
            begin = (start * 97 + i * 31) % (self._max_rows - size + 1)
            segments.append(Segment(self._bound_request(golden), begin, begin + size))
            for task, rows in expected.items():
                scores = self._scores[task][golden]
                rows.append(scores[np.arange(begin, begin + size) % len(scores)])
            begin_row = end_row
        self._gatherer.gather(segments, bucket, leaves)
        return {task: np.concatenate(rows) for task, rows in expected.items()}

    def score_all(
        self, replica: Replica, bucket: Bucket, leaves: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Scores every golden row once, in the order of `expected`, in batches of one bucket.

        Args:
          replica: the device.
          bucket: the one to run.
          leaves: its buffers, written and read here.
        """
        scores: dict[str, list[np.ndarray]] = {task: [] for task in self._scores}
        batch: list[Segment] = []
        num_rows = 0

        def run() -> None:
            self._gatherer.gather(batch, bucket, leaves)
            for task, values in replica.run(bucket, leaves).items():
                scores[task].append(np.array(values[:num_rows]))

        for golden, request in enumerate(self._requests):
            begin = 0
            while begin < request.num_candidates:
                if num_rows == bucket.rows or len(batch) == bucket.requests:
                    run()
                    batch, num_rows = [], 0
                end = min(request.num_candidates, begin + bucket.rows - num_rows)
                batch.append(Segment(self._request_as_sent(golden), begin, end))
                num_rows += end - begin
                begin = end
        run()
        return {task: np.concatenate(parts) for task, parts in scores.items()}

    def replay(
        self,
        run: Callable[[Bucket, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        buckets: Iterable[Bucket],
        leaves_of: Callable[[Bucket], Mapping[str, np.ndarray]],
        num_batches: int,
    ) -> dict[Bucket, dict[str, float]]:
        """Runs full batches in every bucket.

        Args:
          run: runs a batch: `Replica.run`, or what stands before it.
          buckets: to run.
          leaves_of: buffers by bucket.
          num_batches: batches a bucket; stops early once every golden request was seen.

        Returns:
          Largest error by bucket and task, as `score_errors` measures it.
        """
        spec = self._requests[0].spec
        errors: dict[Bucket, dict[str, float]] = {}
        for bucket in buckets:
            worst = dict.fromkeys(self._scores, 0.0)
            for start in range(0, min(self.num_requests, num_batches * bucket.requests), bucket.requests):
                leaves = leaves_of(bucket)
                expected = self.fill(leaves, bucket, bucket.rows, start)
                for task, error in score_errors(spec, run(bucket, leaves), expected).items():
                    worst[task] = max(worst[task], error.max)
            errors[bucket] = worst
        return errors

    def _bound_request(self, golden: int) -> BoundRequest:
        if golden not in self._bound:
            request = self._requests[golden]
            rows = np.arange(self._max_rows) % request.num_candidates
            features = {
                feature.name: take(column, rows) if feature.scope is Scope.CANDIDATE else column
                for feature, column in zip(request.spec.features, request.columns, strict=True)
            }
            self._bound[golden] = self._gatherer.bind(RankRequest(request.spec, features))
        return self._bound[golden]

    def _request_as_sent(self, golden: int) -> BoundRequest:
        if golden not in self._as_sent:
            self._as_sent[golden] = self._gatherer.bind(self._requests[golden])
        return self._as_sent[golden]


def row_errors(
    spec: ModelSpec, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Differences by task of the valid rows, [n] float64.

    Absolute for binary tasks, divided by max(1, |expected|) for regression; NaN when a score isn't finite.

    Args:
      spec: the model.
      actual: [B] or more rows by task, the valid ones first.
      expected: [n] rows by task.
    """
    errors: dict[str, np.ndarray] = {}
    for task in spec.tasks:
        wanted = expected[task.name]
        difference = np.abs(actual[task.name][: len(wanted)].astype(np.float64) - wanted)
        if task.kind is TaskKind.REGRESSION:
            difference /= np.maximum(1.0, np.abs(wanted))
        errors[task.name] = difference
    return errors


def score_errors(
    spec: ModelSpec, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, ScoreError]:
    """`row_errors` in two numbers a task."""
    return {task: ScoreError.of(errors) for task, errors in row_errors(spec, actual, expected).items()}


def check_errors(
    spec: ModelSpec,
    what: str,
    errors: Mapping[str, float],
    limits: Mapping[str, float],
    where: str,
    remedy: str = "",
) -> None:
    """Raises VerifyError naming task, bucket and error when one leaves its limit.

    Args:
      spec: the model.
      what: bucket and form, in words.
      errors: by task.
      limits: largest that may pass, by task.
      where: what was run, in words.
      remedy: closes the message.
    """
    for task in spec.tasks:
        limit = limits[task.name]
        if not errors[task.name] <= limit:
            raise VerifyError(
                f"model {spec.name!r}, task {task.name!r}, {what}, {where}: scores differ from the reference "
                f"by {errors[task.name]:.3g}, expected {limit:.3g} or less{remedy}"
            )
