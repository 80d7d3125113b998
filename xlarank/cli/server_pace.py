"""How a server that runs compares with the measured times of its bundle: `read_pace`, `observed_pace`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from xlarank.errors import ConfigError

if TYPE_CHECKING:
    from xlarank.runtime.bucket_plan import BucketPlan
    from xlarank.spec import QueueConfig

__all__ = ["ServerPace", "observed_pace", "read_pace"]

_BATCHES = "xlarank_bucket_batches_total"
_REQUESTS = "nv_inference_request_success"
_RESPOND = "nv_inference_compute_output_duration_us"
_OUTSIDE = "xlarank_outside_seconds_total"
_SERVICE = ("xlarank_gather_seconds_total", "xlarank_execute_seconds_total")
_NAMES = (_BATCHES, _REQUESTS, _RESPOND, _OUTSIDE, *_SERVICE)

_MOST_SEEN = 2000
"""Requests that what a client saw is simulated with, at most: evenly from all."""

_SHARED_CORES = 2.0
"""A batch of a busy server takes at most this many times what it takes alone, as its cores are shared: 1.6 by
the CPU time that a light model's server was measured to take beside its batches, and some noise."""

_SHOWN = 80  # characters of a wrong line in a message

_Counts = dict[tuple[str, str], float]
"""Of one model: by metric and bucket, "" where it has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerPace:
    """What serving adds to measured times."""

    slowdown: float = 1.0
    """What a batch takes, gather to its first answers, over what its plan says; > 0."""

    overhead_seconds: float = 0.0
    """Of a request before it is queued and after it is answered; >= 0."""

    note: str = ""
    """What doesn't fit in what was seen, for people; "" if all does."""


def read_pace(pages: Sequence[Path], model: str, plan: BucketPlan) -> ServerPace:
    """Reads from pages of a server's /metrics how fast it was.

    Args:
      pages: a saved page, of everything since the server's start; or two, the earlier first, of what happened
        between them.
      model: name; its versions are added up.
      plan: the times to compare with, of the buckets that the server has.

    Returns:
      The slowdown over all batches, and the mean overhead in the server: decode, encode and threads'
      hand-offs. What gRPC, the network and clients take is in no page.

    Raises:
      ConfigError: if a page can't be read, isn't one of an xlarank server that has answered requests of the
        model, or has other buckets than the plan; or if the second page isn't the later one.
    """
    if len(pages) > 2:
        raise ConfigError(f"--server-metrics: expected one page or two, got {len(pages)}")
    *before, after = [_read_counts(page, model) for page in pages]
    counts = dict(after)
    for key, value in before[0].items() if before else ():
        counts[key] = counts.get(key, 0.0) - value
        if counts[key] < 0:
            raise ConfigError(
                f"{pages[1]}: expected a later page of the server of {pages[0]}, got a {key[0]} that fell "
                f"from {value:g} to {counts[key] + value:g}; was it started again, or a version unloaded?"
            )
    where = " to ".join(map(str, pages))
    num_requests = counts.get((_REQUESTS, ""), 0.0)
    num_batches = sum(count for (name, _), count in counts.items() if name == _BATCHES)
    predicted = _predicted_seconds(where, counts, plan)
    if not num_requests or not predicted:
        raise ConfigError(f"{where}: model {model!r} has answered no requests; expected a page after some")
    service = sum(counts.get((name, ""), 0.0) for name in _SERVICE)
    if not service:
        raise ConfigError(f"{where}: expected {' and '.join(_SERVICE)} above 0, got {service:g}")
    # The device's thread answers before it takes the next batch; a request in several runs is answered once.
    respond = 1e-6 * counts.get((_RESPOND, ""), 0.0) / num_requests
    service += respond * min(num_batches, num_requests)
    outside = counts.get((_OUTSIDE, ""), 0.0)
    return ServerPace(slowdown=service / predicted, overhead_seconds=outside / num_requests)


def observed_pace(
    plans: Sequence[BucketPlan],
    config: QueueConfig,
    sizes: Sequence[int],
    *,
    capacity: float,
    alone_seconds: float | None = None,
) -> ServerPace:
    """The pace at which a server would do what clients saw of it.

    Where batches share the CPUs with decoding, encoding and others, no batch is as much slower as the whole
    is: what bounds the server is all of them together, which a client sees and no counter of a stage does.

    Args:
      plans: times by device.
      config: the server's.
      sizes: candidates of requests as they come.
      capacity: requests of those sizes that it answered a second, when there were always some waiting.
      alone_seconds: latency of one that came alone; what its batch doesn't account for is overhead, never
        less than 0. None if it wasn't seen: there is no overhead then.

    Raises:
      ConfigError: if a lone request was answered in less than half of the time that its batch takes by
        `capacity`. Less than all of it, which noise and busy cores explain, gives a note and no overhead.
    """
    from xlarank.runtime.simulation import lone_seconds, saturated_rate

    sizes = sizes[:: -(-len(sizes) // _MOST_SEEN)]
    slowdown = saturated_rate(plans, config, sizes) / capacity
    if alone_seconds is None:
        return ServerPace(slowdown=slowdown)
    batch = slowdown * lone_seconds(plans, config, sizes)
    if alone_seconds >= batch:
        return ServerPace(slowdown=slowdown, overhead_seconds=alone_seconds - batch)
    seen = (
        f"at {capacity:g} requests/s (--capacity) the batch of a lone request takes {batch * 1e3:.2f} ms, "
        f"and one that came alone was answered in {alone_seconds * 1e3:.2f} ms (--alone-ms)"
    )
    if batch > _SHARED_CORES * alone_seconds:
        raise ConfigError(
            f"{seen}; expected at least {batch * 1e3 / _SHARED_CORES:.2f} ms, as busy cores make batches "
            f"{_SHARED_CORES:g} times as slow at most: see both with this traffic on these devices, or leave "
            f"--alone-ms out"
        )
    return ServerPace(
        slowdown=slowdown, note=f"{seen}: busy cores or noise; no time beside batches is simulated"
    )


def _predicted_seconds(where: str, counts: _Counts, plan: BucketPlan) -> float:
    """What the plan says that the batches of a page take."""
    buckets = {str(bucket): bucket for bucket in plan.ladder.buckets}
    seconds = 0.0
    for (name, text), count in counts.items():
        if name != _BATCHES or not count:
            continue
        if text not in buckets:
            raise ConfigError(
                f"{where}: expected batches of the bundle's buckets, {list(buckets)}, got {text}; was it "
                f"another version that served?"
            )
        seconds += count * plan.run_seconds(buckets[text].rows, buckets[text].requests)
    return seconds


def _read_counts(path: Path, model: str) -> _Counts:
    counts: _Counts = {}
    models: set[str] = set()
    for number, line in enumerate(_read(path).split("\n"), start=1):
        name = line.partition("{")[0]
        if name not in _NAMES:
            continue
        try:
            (family,) = text_string_to_metric_families(line)
            (sample,) = family.samples
            own, value = sample.labels["model"], float(sample.value)
            bucket = sample.labels["bucket"] if name == _BATCHES else ""
        # What prometheus_client raises for a line that it can't read; a missing label is a KeyError.
        except (ValueError, IndexError, KeyError):
            value, own, bucket = math.nan, "", ""
        if not 0 <= value < math.inf:
            label = 'bucket="...",' if name == _BATCHES else ""
            raise ConfigError(
                f'{path}:{number}: expected {name}{{{label}model="...",version="..."}} NUMBER, '
                f"got {line[:_SHOWN]!r}"
            )
        models.add(own)
        if own == model:
            counts[name, bucket] = counts.get((name, bucket), 0.0) + value
    if not models:
        raise ConfigError(f"{path}: expected the /metrics of an xlarank server, got no line of {_REQUESTS}")
    if model not in models:
        raise ConfigError(f"{path}: expected requests of model {model!r}, got those of {sorted(models)}")
    return counts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a text file, got other bytes at {error.start}") from None
