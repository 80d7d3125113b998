"""A server under mixed load for a while: nothing fails but what must, and nothing grows.

    python tools/soak.py --minutes 10          about half a minute more for compiling a model
    python tools/soak.py --seconds 20          the short form

Clients send requests of 0 to 3,000 candidates over gRPC, in streams and over HTTP, bad ones, such that they
cancel or give a deadline too short, connections that break off with requests under way, updates of rows, and
bursts that the server's queue can't hold. It writes an access log, and new versions of the model take the
place of those that serve. Meanwhile the server's resident
memory, threads, open files and /metrics are sampled; after warming up none of them may grow (`Limits`).
Ends with status 1 and says what grew or failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import run_tool
from rich.console import Console
from server_process import server_samples, serving
from soak_clients import Clients

from xlarank.bundle import Verify, open_bundle

__all__ = ["Limits", "Sample", "growth", "problems", "soak"]

CONFIG = Path(__file__).parent.parent / "configs" / "ranker_light.toml"
LADDER = (16, 128, 512)
UPDATABLE = "c24"
_WARM_SHARE = 0.4
"""Of the time: allocators, thread pools and caches reach their size."""

_MAX_QUEUED_ROWS = 8192
_WATCH_SECONDS = 0.2
_SWAPS, _FAILED_LOADS = "xlarank_swaps_total", "xlarank_model_load_failures_total"

console = Console()


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the server's process is like at one time."""

    at: float
    """Seconds."""

    resident_bytes: int
    threads: int
    files: int
    metrics_bytes: int
    metrics_lines: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be added from the end of warming up to the end, by the slope of all samples between."""

    resident_bytes: float
    """Fragmentation; a leak of 100 bytes a request is more than this within minutes."""

    threads: float = 2.0
    """gRPC's own come and go."""

    files: float = 4.0
    """Connections that broke off are noticed some time later."""

    metrics_bytes: float = 512.0
    """Counters get longer."""

    metrics_lines: float = 0.0
    """Series."""


def growth(samples: Sequence[Sample], name: str) -> float:
    """Growth of a field over the samples' time, by the median slope of all pairs (Theil and Sen)."""
    at = np.array([sample.at for sample in samples], np.float64)
    values = np.array([getattr(sample, name) for sample in samples], np.float64)
    first, second = np.triu_indices(len(samples), k=1)
    slopes = (values[second] - values[first]) / (at[second] - at[first])
    return float(np.median(slopes)) * (at[-1] - at[0])


def problems(samples: Sequence[Sample], limits: Limits) -> list[str]:
    """What grew more than it may, in words; `samples` are those after warming up, at least two."""
    found = []
    for field in dataclasses.fields(Limits):
        grown, limit = growth(samples, field.name), getattr(limits, field.name)
        if grown > limit:
            found.append(
                f"{field.name} grew by {grown:,.0f} within {samples[-1].at - samples[0].at:.0f} s, from "
                f"{getattr(samples[0], field.name):,} to {getattr(samples[-1], field.name):,}; "
                f"{limit:,.0f} are allowed"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Report:
    """What a soak found."""

    counts: Counter[tuple[str, str]]
    """Requests by kind and status code."""

    failures: list[str]
    """Answers that no kind expects, in words; the first of them."""

    samples: list[Sample]


def _sample(ready: dict[str, Any], begin: float) -> Sample:
    status = Path(f"/proc/{ready['pid']}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    with urllib.request.urlopen(f"http://{ready['http']}/metrics") as response:
        metrics = response.read()
    return Sample(
        at=time.monotonic() - begin,
        resident_bytes=int(fields["VmRSS"].split()[0]) * 1024,
        threads=int(fields["Threads"]),
        files=len(list(Path(f"/proc/{ready['pid']}/fd").iterdir())),
        metrics_bytes=len(metrics),
        metrics_lines=metrics.count(b"\n"),
    )


def soak(bundle: Path, seconds: float, *, tell: Callable[[Sample], None] = lambda _: None) -> Report:
    """Serves a bundle under mixed load.

    Args:
      bundle: version folder; one of its tables is updatable.
      seconds: of load.
      tell: shown each sample.

    Returns:
      What became of the requests; samples of the whole time.
    """
    spec = open_bundle(bundle, verify=Verify.SIZES).spec
    interval = max(0.2, seconds / 300)
    swap_seconds, burst_seconds = max(4.0, seconds / 40), max(2.0, seconds / 120)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = folder / "models" / spec.name
        models.mkdir(parents=True)
        versions = itertools.count(1)

        def publish() -> None:
            (models / str(next(versions))).symlink_to(bundle.resolve())

        publish()
        options = ["--admin-port", 0, "--rest-port", 0, "--access-log", folder / "access.jsonl"]
        options += ["--watch-seconds", _WATCH_SECONDS, "--max-queued-rows", _MAX_QUEUED_ROWS]
        with serving(models.parent, folder / "cache", *options) as ready:
            clients = Clients(ready, spec, burst_seconds=burst_seconds)
            begin = time.monotonic()
            swap_at = begin
            try:
                while time.monotonic() - begin < seconds:
                    time.sleep(interval)
                    samples.append(_sample(ready, begin))
                    tell(samples[-1])
                    if time.monotonic() >= swap_at:
                        publish()
                        swap_at += swap_seconds
            finally:
                counts, failures = clients.stop()
            return Report(counts, [*failures, *_undone(ready, counts)], samples)


def _undone(ready: dict[str, Any], counts: Counter[tuple[str, str]]) -> list[str]:
    """What should have happened and hasn't: a soak without it shows less than it says."""
    found = []
    values: Counter[str] = Counter()
    for name, _, value in server_samples(ready["http"]):
        values[name] += round(float(value)) if name in (_SWAPS, _FAILED_LOADS) else 0
    if values[_SWAPS] == 0 or values[_FAILED_LOADS]:
        found.append(
            f"swaps: {values[_SWAPS]:g} versions took another's place, {values[_FAILED_LOADS]:g} failed"
        )
    for needed in (("burst", "RESOURCE_EXHAUSTED"), ("burst", "OK"), ("streamed", "OK"), ("rest", "OK")):
        if not counts[needed]:
            found.append(f"{needed[0]}: expected some {needed[1]}, got none")
    return found


def after_warming_up(samples: Sequence[Sample]) -> list[Sample]:
    """Those that `problems` judges."""
    return [sample for sample in samples if sample.at >= _WARM_SHARE * samples[-1].at]


def limits_of(seconds: float) -> Limits:
    """In short runs allocators and thread pools have not settled yet, and a swap is a large part of the time:
    more is allowed, and less is found."""
    if seconds >= 300:
        return Limits(resident_bytes=8 * 2**20)
    return Limits(resident_bytes=128 * 2**20, threads=16.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10, help="of load (%(default)s)")
    length.add_argument("--seconds", type=float, help="of load")
    parser.add_argument("--bundle", type=Path, help="version folder to serve (one is compiled)")
    parser.add_argument("--out", type=Path, help="JSON file for the samples")
    args = parser.parse_args()
    seconds = 60 * args.minutes if args.seconds is None else args.seconds
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, console.status("compiling") as status:
        bundle = args.bundle
        if bundle is None:
            buckets = ",".join(map(str, LADDER))
            words = ["--out", folder, "--buckets", buckets, "--golden", 8, "--updatable", UPDATABLE]
            bundle = Path(run_tool("random_bundle.py", CONFIG, *words)["path"])
        report = soak(
            bundle,
            seconds,
            tell=lambda sample: status.update(
                f"{sample.at:.0f} of {seconds:.0f} s, {sample.resident_bytes / 2**20:.1f} MiB, "
                f"{sample.threads} threads"
            ),
        )
    judged = after_warming_up(report.samples)
    for (kind, code), count in sorted(report.counts.items()):
        console.print(f"{kind}: {code} {count}", highlight=False)
    for field in dataclasses.fields(Limits):
        console.print(
            f"{field.name}: {getattr(judged[0], field.name):,} to {getattr(judged[-1], field.name):,} within "
            f"{judged[-1].at - judged[0].at:.0f} s, slope {growth(judged, field.name):+,.1f}",
            highlight=False,
        )
    if args.out is not None:
        args.out.write_text(json.dumps([dataclasses.asdict(sample) for sample in report.samples]))
    found = [*report.failures, *problems(judged, limits_of(seconds))]
    for problem in found:
        console.print(problem, style="red", highlight=False, markup=False, soft_wrap=True)
    if found:
        sys.exit(1)
    console.print(f"flat for {judged[-1].at - judged[0].at:.0f} s, {report.counts.total():,} requests")


if __name__ == "__main__":
    main()
