"""Compiled sizes: `Bucket` and `BucketLadder`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from xlarank.errors import BucketError, ConfigError

__all__ = ["DEFAULT_ROWS", "Bucket", "BucketLadder"]

DEFAULT_ROWS = (8, 32, 128, 512, 1024)
"""Row counts of the default ladder."""

_ROWS_A_REQUEST = 32
"""The middle bucket of a row count holds requests of this many rows on average."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One compiled size. Static."""

    rows: int
    """B: candidates of all requests in the batch, padding included."""

    requests: int
    """Q: contexts in the batch, padding included."""

    def __post_init__(self) -> None:
        if not 1 <= self.requests <= self.rows:
            raise ConfigError(f"bucket: expected 1 <= requests <= rows, got {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.requests}"

    def holds(self, num_rows: int, num_requests: int) -> bool:
        """Whether a batch of this size fits."""
        return num_rows <= self.rows and num_requests <= self.requests


@dataclasses.dataclass(frozen=True)
class BucketLadder:
    """The buckets a bundle is compiled for, ascending. Static.

    The largest row count has a bucket with as many requests as rows, so that any mix of small requests
    fits up to there.
    """

    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if not self.buckets:
            raise ConfigError("bucket ladder: expected at least one bucket, got none")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"bucket ladder: expected distinct ascending buckets, got {self}")

    def __str__(self) -> str:
        return ", ".join(str(bucket) for bucket in self.buckets)

    @classmethod
    def of_rows(cls, rows: Iterable[int] = DEFAULT_ROWS) -> BucketLadder:
        """For each row count B: buckets of 1, B/32 and B requests."""
        buckets = set()
        for count in rows:
            if count < 1:
                raise ConfigError(f"bucket ladder: row counts must be >= 1; was {count}")
            buckets |= {Bucket(count, q) for q in (1, max(1, count // _ROWS_A_REQUEST), count)}
        return cls(tuple(sorted(buckets)))

    @functools.cached_property
    def max_rows(self) -> int:
        """Most rows that one batch can hold; larger requests are split."""
        return self.buckets[-1].rows

    @functools.cached_property
    def max_requests(self) -> int:
        """Most requests that one batch can hold."""
        return max(bucket.requests for bucket in self.buckets)

    def bucket_for(self, num_rows: int, num_requests: int) -> Bucket:
        """Smallest bucket that holds both; raises BucketError when none does."""
        for bucket in self.buckets:
            if bucket.holds(num_rows, num_requests):
                return bucket
        raise BucketError(
            f"no bucket holds {num_rows} rows of {num_requests} requests; the largest is "
            f"{self.buckets[-1]} (rows x requests); batches are planned to fit before this point"
        )

    def fits(self, num_rows: int, num_requests: int) -> bool:
        """Whether `bucket_for` has an answer."""
        return any(bucket.holds(num_rows, num_requests) for bucket in self.buckets)
