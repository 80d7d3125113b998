"""A server under mixed load for a while: nothing fails but what must, and nothing grows.

    python tools/soak.py --minutes 10          about half a minute more for compiling a model
    python tools/soak.py --seconds 20          the short form

Clients send requests of 0 to 3,000 candidates, bad ones, such that they cancel or give a deadline too short,
connections that break off with requests under way, and updates of rows. Meanwhile the server's resident
memory, threads, open files and /metrics are sampled; after warming up none of them may grow (`Limits`).
Ends with status 1 and says what grew or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from bench_server import encode
from figures import run_tool
from rich.console import Console
from server_process import serving
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient
from xlarank_serving.layout import SERVICE_NAME

from xlarank.bundle import Verify, open_bundle
from xlarank.compiler import random_requests
from xlarank.spec import ModelSpec

__all__ = ["Limits", "Sample", "growth", "problems", "soak"]

CONFIG = Path(__file__).parent.parent / "configs" / "ranker_light.toml"
LADDER = (16, 128, 512)
UPDATABLE = "c24"
SIZES = (0, 1, 2, 7, 16, 17, 100, 128, 129, 500, 512, 513, 1000, 1024, 2000, 3000)

_NUM_CLIENTS = 4
_WARM_SHARE = 0.4
"""Of the time: allocators, thread pools and caches reach their size."""

_ANSWERS = {"OK", "RESOURCE_EXHAUSTED"}
_TIMEOUT_SECONDS = 30.0

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


class _Clients:
    """Threads that send requests of all kinds until they are told to stop."""

    def __init__(self, ready: dict[str, Any], spec: ModelSpec) -> None:
        self._address, self._admin_address, self._spec = ready["grpc"], ready["admin"], spec
        self._valid = {
            size: [encode(spec, r) for r in random_requests(spec, 2, num_candidates=size, seed=size)]
            for size in SIZES
        }
        self._bad = list(_bad_requests(self._valid[7][0]))
        self._table = next(table for table in spec.tables if table.updatable)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # guarded by _lock
        self._failures: list[str] = []  # guarded by _lock
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(_NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> tuple[Counter[tuple[str, str]], list[str]]:
        """Waits for the threads; what became of the requests, and what went wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self._counts, self._failures

    def _work(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds: list[tuple[Callable[..., None], int]] = [
            (self._valid_one, 60),
            (self._bad_one, 15),
            (self._cancelled_one, 10),
            (self._hurried_one, 10),
            (self._disconnected_ones, 2),
            (self._update, 3),
        ]
        methods, weights = zip(*kinds, strict=True)
        with grpc.insecure_channel(self._address) as channel, AdminClient(self._admin_address) as admin:
            while not self._stop.is_set():
                (method,) = rng.choices(methods, weights)
                try:
                    method(rng, channel=channel, admin=admin)
                except Exception as error:  # a thread's boundary: whatever it is, it is a failure
                    self._count("client", type(error).__name__, set(), str(error))

    def _count(self, kind: str, code: str, expected: set[str], detail: str = "") -> None:
        with self._lock:
            self._counts[kind, code] += 1
            if code not in expected and len(self._failures) < 20:
                wanted = " or ".join(sorted(expected)) or "nothing of the kind"
                self._failures.append(f"{kind}: expected {wanted}, got {code}: {detail[:300]}")

    def _valid_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        size = rng.choice(SIZES)
        call = _send(channel, rng.choice(self._valid[size]), _TIMEOUT_SECONDS)
        code, detail = _outcome(call)
        if code == "OK":
            answer = messages.ModelInferResponse.FromString(call.result())
            scores = np.frombuffer(answer.raw_output_contents[0], "<f4")
            if scores.shape != (size,) or not np.isfinite(scores).all():
                code, detail = "WRONG", f"expected {size} finite scores, got {scores.shape}"
        self._count("valid", code, _ANSWERS, detail)

    def _bad_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        data, code = rng.choice(self._bad)
        self._count(f"bad ({code})", *self._told(channel, data, _TIMEOUT_SECONDS, {code}))

    def _cancelled_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        call = _send(channel, rng.choice(self._valid[rng.choice(SIZES)]), _TIMEOUT_SECONDS)
        self._stop.wait(rng.uniform(0, 0.02))
        call.cancel()
        code, detail = _outcome(call)
        self._count("cancelled", code, _ANSWERS | {"CANCELLED"}, detail)

    def _hurried_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        data = rng.choice(self._valid[rng.choice(SIZES)])
        expected = _ANSWERS | {"DEADLINE_EXCEEDED"}
        self._count("hurried", *self._told(channel, data, rng.uniform(0.001, 0.03), expected))

    def _disconnected_ones(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        own = grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])
        calls = [_send(own, rng.choice(self._valid[500]), _TIMEOUT_SECONDS) for _ in range(3)]
        self._stop.wait(rng.uniform(0, 0.02))
        own.close()
        for call in calls:
            code, detail = _outcome(call)
            self._count("disconnected", code, _ANSWERS | {"CANCELLED"}, detail)

    def _update(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        rows = np.array([rng.randrange(self._table.rows or 1) for _ in range(10)])
        values = np.array([[rng.uniform(-1, 1) for _ in range(self._table.dim)] for _ in rows], np.float32)
        admin.update_rows(self._spec.name, self._table.name, rows, values)
        self._count("update", "OK", {"OK"})

    def _told(
        self, channel: grpc.Channel, data: bytes, timeout: float, expected: set[str]
    ) -> tuple[str, set[str], str]:
        code, detail = _outcome(_send(channel, data, timeout))
        return code, expected, detail


def _send(channel: grpc.Channel, data: bytes, timeout: float) -> Any:
    return channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer").future(data, timeout=timeout)


def _outcome(call: Any) -> tuple[str, str]:
    with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
        call.exception(timeout=2 * _TIMEOUT_SECONDS)
    return call.code().name, call.details() or ""


def _bad_requests(valid: bytes) -> Iterator[tuple[bytes, str]]:
    """Bytes and the status that they must get."""

    def changed(change: Callable[[Any], object]) -> bytes:
        message = messages.ModelInferRequest.FromString(valid)
        change(message)
        return message.SerializeToString()

    yield b"\xff" * 40, "INVALID_ARGUMENT"
    yield valid[: len(valid) // 2], "INVALID_ARGUMENT"
    yield changed(lambda m: setattr(m, "model_name", "nobody")), "NOT_FOUND"
    yield changed(lambda m: setattr(m, "model_version", "99")), "NOT_FOUND"
    yield changed(lambda m: setattr(m.inputs[1], "name", "strange")), "INVALID_ARGUMENT"
    yield changed(lambda m: setattr(m.inputs[1], "datatype", "INT64")), "INVALID_ARGUMENT"
    yield changed(lambda m: m.inputs[1].shape.append(2**40)), "INVALID_ARGUMENT"
    yield changed(lambda m: m.raw_input_contents.pop()), "INVALID_ARGUMENT"


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
      bundle: version folder, alone in its repository; one of its tables is updatable.
      seconds: of load.
      tell: shown each sample.

    Returns:
      What became of the requests; samples of the whole time.
    """
    spec = open_bundle(bundle, verify=Verify.SIZES).spec
    interval = max(0.2, seconds / 300)
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory() as cache,
        serving(bundle.parents[1], Path(cache), "--admin-port", 0) as ready,
    ):
        clients = _Clients(ready, spec)
        begin = time.monotonic()
        try:
            while time.monotonic() - begin < seconds:
                time.sleep(interval)
                samples.append(_sample(ready, begin))
                tell(samples[-1])
        finally:
            counts, failures = clients.stop()
    return Report(counts, failures, samples)


def after_warming_up(samples: Sequence[Sample]) -> list[Sample]:
    """Those that `problems` judges."""
    return [sample for sample in samples if sample.at >= _WARM_SHARE * samples[-1].at]


def limits_of(seconds: float) -> Limits:
    """In short runs allocators have not settled yet: more is allowed, and less is found."""
    return Limits(resident_bytes=(8 if seconds >= 300 else 32) * 2**20)


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
