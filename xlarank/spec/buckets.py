"""Compiled sizes: `Bucket` and `BucketLadder`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from xlarank.errors import BucketError, ConfigError
from xlarank.spec.fields import to_integer, to_tuple

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
        for name in ("rows", "requests"):
            size = to_integer("bucket", name, getattr(self, name), least=0, below=2**31)
            object.__setattr__(self, name, size)
        if not 1 <= self.requests <= self.rows:
            raise ConfigError(f"bucket: expected 1 <= requests <= rows, got {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.requests}"

    def holds(self, num_rows: int, num_requests: int) -> bool:
        """Whether a batch of this size fits."""
        return num_rows <= self.rows and num_requests <= self.requests


@dataclasses.dataclass(frozen=True)
class BucketLadder:
    """The buckets a bundle is compiled for. Static."""

    buckets: tuple[Bucket, ...]
    """At least one, distinct, ascending by rows, then by requests."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", to_tuple("bucket ladder", "buckets", self.buckets))
        for bucket in self.buckets:
            if not isinstance(bucket, Bucket):
                raise ConfigError(f"bucket ladder: buckets must be Buckets; one was {bucket!r}")
        if not self.buckets:
            raise ConfigError("bucket ladder: expected at least one bucket, got none")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"bucket ladder: expected distinct ascending buckets, got {self}")

    def __str__(self) -> str:
        return ", ".join(str(bucket) for bucket in self.buckets)

    @classmethod
    def of_rows(cls, rows: Iterable[int] = DEFAULT_ROWS) -> BucketLadder:
        """For each row count B: buckets of 1, B/32 and B requests.

        Any mix of requests that has no more rows than the largest row count fits a bucket.

        Raises:
          ConfigError: for no row counts, or one that isn't an integer >= 1.
        """
        buckets = set()
        for value in rows:
            count = to_integer("bucket ladder", "row counts", value, least=1, below=2**31)
            buckets |= {Bucket(count, q) for q in (1, max(1, count // _ROWS_A_REQUEST), count)}
        return cls(tuple(sorted(buckets)))

    @functools.cached_property
    def max_rows(self) -> int:
        """Most rows that one batch can hold; larger requests are split."""
        return self.buckets[-1].rows

    def smallest(self, num_rows: int, num_requests: int) -> Bucket | None:
        """Smallest bucket that holds both; None when none does."""
        return next((bucket for bucket in self.buckets if bucket.holds(num_rows, num_requests)), None)

    def bucket_for(self, num_rows: int, num_requests: int) -> Bucket:
        """Smallest bucket that holds both; raises BucketError when none does."""
        bucket = self.smallest(num_rows, num_requests)
        if bucket is None:
            raise BucketError(
                f"no bucket holds {num_rows} rows of {num_requests} requests; the largest is "
                f"{self.buckets[-1]} (rows x requests); batches are planned to fit before this point"
            )
        return bucket
