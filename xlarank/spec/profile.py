"""Measured service times: `LatencyProfile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from xlarank.errors import BucketError, ConfigError
from xlarank.spec.buckets import Bucket
from xlarank.spec.fields import to_number

__all__ = ["LatencyProfile"]

_KNEE_SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class LatencyProfile:
    """Median seconds that one device kind takes for one batch, by bucket.

    Batcher, scheduler and admission all read this one table. A bundle's is a prior; a server measures its
    own while warming up.
    """

    seconds: Mapping[Bucket, float]
    """Seconds a batch, by bucket; at least one, each > 0."""

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, Mapping) or not self.seconds:
            raise ConfigError(f"latency profile: expected seconds by bucket, got {self.seconds!r}")
        for bucket, seconds in self.seconds.items():
            if not isinstance(bucket, Bucket):
                raise ConfigError(f"latency profile: expected a Bucket as key, got {bucket!r}")
            if to_number("latency profile", f"seconds of bucket {bucket}", seconds) <= 0:
                raise ConfigError(f"latency profile: seconds of bucket {bucket} must be > 0; was {seconds!r}")

    def seconds_of(self, bucket: Bucket) -> float:
        """Service time of a bucket; raises BucketError when it was never measured."""
        try:
            return self.seconds[bucket]
        except KeyError:
            raise BucketError(
                f"bucket {bucket} has no measured time; measured: {[str(b) for b in sorted(self.seconds)]}"
            ) from None

    def knee_rows(self) -> int:
        """Rows beyond which batching stops paying.

        The smallest row count whose throughput reaches 95% of the best one's: past it latency grows in
        proportion and throughput doesn't (PREBA, arXiv 2411.19114, batch_knee).
        """
        throughput: dict[int, float] = {}
        for bucket, seconds in self.seconds.items():
            rate = bucket.rows / seconds
            throughput[bucket.rows] = max(rate, throughput.get(bucket.rows, 0.0))
        best = max(throughput.values())
        return min(rows for rows, rate in throughput.items() if rate >= _KNEE_SHARE * best)
