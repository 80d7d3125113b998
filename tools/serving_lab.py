"""What the serving benchmark measures with: models, requests, arrivals, a server to start, a simulator."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_server import encode
from figures import run_tool
from open_loop import LoadGenerator, save_requests
from queue_server import OURS, queue_server
from server_process import server_samples

from xlarank.bundle import Verify, open_bundle, resolve_bundle
from xlarank.cli.profiles import profile_of
from xlarank.cli.server_pace import ServerPace
from xlarank.compiler import random_requests
from xlarank.errors import BundleError
from xlarank.runtime.batcher import Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.scheduler import BatcherMaker, Scheduler
from xlarank.runtime.simulation import Arrival, SimulationResult, poisson_arrivals, simulate
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, ModelSpec
from xlarank.spec.serving import QueueConfig

__all__ = [
    "HUGE_QUEUE",
    "Lab",
    "Served",
    "ServerMeans",
    "Traffic",
    "arrivals_of",
    "build",
    "demo_model",
    "fixed_sizes",
    "md1_latencies",
    "mixed_sizes",
    "run_simulation",
    "server_means",
    "small_sizes",
]

CONFIGS = Path(__file__).parent.parent / "configs"

DEMO = Path(__file__).parent.parent / "artifacts" / "demo"
"""Where `make demo` leaves its model."""

HUGE_QUEUE = {"max_queue_ms": 1e6, "max_queued_rows": 2**30}
"""Of `QueueConfig`, where nothing shall be refused."""

_NUM_GOLDEN = 4
"""Requests that each load of the heavy model runs in every bucket, one at a time in some."""

_CONTEXTS_A_SIZE = 16
"""Distinct requests in a traffic of one size."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests to draw from."""

    words: str
    """What they are."""

    sizes: tuple[int, ...]
    """Candidates of each; all are equally likely."""


def fixed_sizes(num_candidates: int) -> Traffic:
    """All of one size."""
    return Traffic(f"{num_candidates} candidates a request", (num_candidates,) * _CONTEXTS_A_SIZE)


def small_sizes() -> Traffic:
    """1 to 16 candidates, equally likely."""
    return Traffic("1 to 16 candidates a request, equally likely", tuple(range(1, 17)))


def mixed_sizes(num_requests: int = 64) -> Traffic:
    """As DeepRecSys found them (arXiv 2001.02772): lognormal, mu 5.1, sigma 0.2."""
    # Evenly spaced quantiles, so that few requests have the distribution's moments.
    normal = statistics.NormalDist(5.1, 0.2)
    levels = [(place + 0.5) / num_requests for place in range(num_requests)]
    sizes = tuple(round(float(np.exp(normal.inv_cdf(level)))) for level in levels)
    return Traffic("lognormal candidates a request (mu 5.1, sigma 0.2: 167 on average)", sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that was compiled for the benchmark."""

    name: str
    """Of what is served, for files and messages."""

    bundle: Path
    """Version folder, alone in its repository."""

    flops_per_row: float
    spec: ModelSpec
    ladder: BucketLadder
    profile: LatencyProfile
    """As it was measured when it was compiled."""

    @property
    def words(self) -> str:
        """What it is."""
        return f"{self.spec.name}, {self.flops_per_row / 1e6:.2g} MFLOP a row"


def build(
    name: str,
    folder: Path,
    bucket_rows: Sequence[int],
    *,
    config: str,
    options: str | None = None,
) -> Served:
    """Compiles a config with random weights, in a process of its own.

    Args:
      name: for messages.
      folder: where repositories go, one a model.
      bucket_rows: of the ladder.
      config: name of a file in configs/.
      options: JSON in place of its model_options.
    """
    words = ["--out", folder / name, "--buckets", ",".join(map(str, bucket_rows)), "--golden", _NUM_GOLDEN]
    if options is not None:
        words += ["--options", options]
    built = run_tool("random_bundle.py", CONFIGS / config, *words)
    return _served(name, Path(built["path"]))


def demo_model(folder: Path) -> Served:
    """The trained model of `make demo`: as it left it, or made now, which takes two minutes.

    Args:
      folder: where to make it.
    """
    try:
        return _served("demo", resolve_bundle(DEMO / "models" / "feed"))
    except BundleError:  # there is none, or one that another version of ours made
        artifacts = folder / "demo"
    script = Path(__file__).with_name("demo.py")
    words = [sys.executable, script, "--artifacts", artifacts, "--devices", "1"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return _served("demo", resolve_bundle(artifacts / "models" / "feed"))


def _served(name: str, path: Path) -> Served:
    bundle = open_bundle(path, verify=Verify.SIZES)
    _, profile = profile_of(bundle.manifest, str(path), None)
    return Served(
        name=name,
        bundle=path,
        flops_per_row=json.loads((path / "analysis.json").read_text())["flops_per_row"],
        spec=bundle.spec,
        ladder=bundle.manifest.ladder,
        profile=profile,
    )


class Lab:
    """A folder to work in, and what servers have measured so far.

    Attributes:
      folder: where all of it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiles: dict[str, list[list[float]]] = {}  # by name of what was served

    @contextlib.contextmanager
    def server(self, served: Served, *, rule: str = OURS, **queue: Any) -> Iterator[dict[str, Any]]:
        """Starts a server; see `queue_server`."""
        with queue_server(served.bundle, self.folder / "cache", rule=rule, **queue) as ready:
            self._profiles.setdefault(served.name, ready["profile"])
            yield ready

    def plan(self, served: Served, **options: Any) -> BucketPlan:
        """Prices by the profile that the model's first server measured at its start."""
        if served.name not in self._profiles:
            with self.server(served):
                pass
        seconds = {
            Bucket(int(rows), int(requests)): value for rows, requests, value in self._profiles[served.name]
        }
        return BucketPlan(served.ladder, LatencyProfile(seconds), **options)

    def requests(self, served: Served, traffic: Traffic) -> Path:
        """A file of the traffic's requests, encoded, for a `LoadGenerator`; made once."""
        sizes = traffic.sizes
        path = self.folder / f"{served.spec.name}-{len(sizes)}-{min(sizes)}-{max(sizes)}.npz"
        if not path.exists():
            requests = [
                random_requests(served.spec, 1, num_candidates=size, seed=place)[0]
                for place, size in enumerate(sizes)
            ]
            save_requests(path, [encode(served.spec, request) for request in requests])
        return path

    def generator(self, served: Served, traffic: Traffic, ready: Mapping[str, Any]) -> LoadGenerator:
        """A process that sends the traffic to a server."""
        return LoadGenerator(ready["grpc"], self.requests(served, traffic))


def arrivals_of(
    traffic: Traffic, rate: float, num_requests: int, *, seed: int
) -> tuple[list[Arrival], list[int]]:
    """Poisson arrivals, and which of the traffic's requests each one is."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(len(traffic.sizes), size=count)

    drawn = poisson_arrivals(rate, draw, num_requests, seed=seed)
    choices = [arrival.num_rows for arrival in drawn]
    arrivals = [Arrival(arrival.at, traffic.sizes[arrival.num_rows]) for arrival in drawn]
    return arrivals, choices


def md1_latencies(at: Sequence[float], service_seconds: float) -> np.ndarray:
    """[A] seconds that requests spend at one server that takes the same time for each (an M/D/1 queue)."""
    latencies, free_at = [], 0.0
    for arrival in at:
        free_at = max(arrival, free_at) + service_seconds
        latencies.append(free_at - arrival)
    return np.array(latencies)


def run_simulation(
    plan: BucketPlan,
    arrivals: Sequence[Arrival],
    *,
    num_devices: int = 1,
    make_batcher: BatcherMaker = Batcher,
    pace: ServerPace | None = None,
    **queue: Any,
) -> SimulationResult:
    """The server's scheduler on devices of these prices; nothing is refused.

    Args:
      plan: of each device.
      arrivals: by time.
      num_devices: alike.
      make_batcher: the rule.
      pace: what serving adds to the prices; nothing by default.
      queue: fields of `QueueConfig`.
    """
    scheduler: Scheduler[int] = Scheduler(num_devices, make_batcher=make_batcher)
    attached = scheduler.attach("model", [plan] * num_devices, QueueConfig(**{**HUGE_QUEUE, **queue}))
    pace = pace or ServerPace()
    return simulate(
        scheduler,
        [attached],
        arrivals,
        service_seconds=lambda turn: pace.slowdown * turn.predicted_seconds,
        overhead_seconds=pace.overhead_seconds,
    )


_INSIDE = ("queue", "compute_input", "compute_infer", "compute_output")
"""The stages of a request between submit and answer, as metrics name them."""


@dataclasses.dataclass(frozen=True)
class ServerMeans:
    """What a server says of its work between two looks."""

    gather: float
    """Seconds a batch, as the next."""

    execute: float
    queue: float
    """Seconds a request, as the next ones."""

    respond: float
    total: float
    """Submit to answer."""

    rows_a_batch: float

    @property
    def service(self) -> float:
        """Seconds that a batch keeps the device."""
        return self.gather + self.execute


def server_means(http: str) -> Callable[[], ServerMeans]:
    """Looks at a server's metrics; what it returns looks again, and says what happened between."""

    def look() -> dict[str, float]:
        values: dict[str, float] = defaultdict(float)
        for name, _, value in server_samples(http):
            values[name] += float(value)  # of all buckets
        return values

    before = look()

    def means() -> ServerMeans:
        after = look()

        def rate(name: str, over: str, scale: float = 1.0) -> float:
            return scale * (after[name] - before[name]) / max(1.0, after[over] - before[over])

        batches, requests = "nv_inference_exec_count", "nv_inference_request_success"
        return ServerMeans(
            gather=rate("xlarank_gather_seconds_total", batches),
            execute=rate("xlarank_execute_seconds_total", batches),
            queue=rate("nv_inference_queue_duration_us", requests, 1e-6),
            respond=rate("nv_inference_compute_output_duration_us", requests, 1e-6),
            total=sum(rate(f"nv_inference_{stage}_duration_us", requests, 1e-6) for stage in _INSIDE),
            rows_a_batch=rate("xlarank_batch_rows_total", batches),
        )

    return means
