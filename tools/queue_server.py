"""The server around one bundle, with any queue options and, to compare with, another rule of batching.

    python tools/queue_server.py build/models/dcn_v2/1 --compile-cache build/cache --rule 5000

Prints a ready line as `xlarank serve --json` does, with the seconds that each bucket was measured to take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fixed_delay import fixed_delay
from prometheus_client import Metric
from server_process import started
from xlarank_serving.server import RankingServer, ServerConfig, stop_on_signals
from xlarank_serving.threads import short_turns

from xlarank import device
from xlarank.errors import ModelNotFoundError
from xlarank.host import Gatherer
from xlarank.runtime import Engine, Metrics
from xlarank.runtime.batcher import Batcher
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.scheduler import BatcherMaker
from xlarank.spec.serving import QueueConfig

__all__ = ["CPU_SECONDS", "OURS", "batcher_of", "queue_server"]

CPU_SECONDS = "bench_gather_execute_cpu_seconds"
"""CPU of the threads that call gather and execute, within these calls: a metric of servers that count it."""

OURS = "ours"


def batcher_of(rule: str) -> BatcherMaker:
    """The batchers of a rule; see `queue_server`."""
    return Batcher if rule == OURS else fixed_delay(float(rule))


@contextlib.contextmanager
def queue_server(
    bundle: Path,
    cache: Path,
    *,
    rule: str = OURS,
    host_threads: int | None = None,
    counts_cpu: bool = False,
    **queue: Any,
) -> Iterator[dict[str, Any]]:
    """Starts it on one device; yields its ready line.

    Args:
      bundle: version folder.
      cache: compilation cache.
      rule: `OURS`, or a number: Triton's rule with so many microseconds of delay.
      host_threads: of the gather.
      counts_cpu: whether /metrics has `CPU_SECONDS`.
      queue: fields of `QueueConfig`.
    """
    words = [str(bundle), "--compile-cache", str(cache), "--queue", json.dumps(queue), "--rule", rule]
    if host_threads is not None:
        words += ["--host-threads", str(host_threads)]
    if counts_cpu:
        words.append("--count-cpu")
    with started([sys.executable, __file__, *words]) as ready:
        yield ready


class _CpuCounter:
    """Counts for `CPU_SECONDS` from the moment that it is made."""

    def __init__(self) -> None:
        self._seconds = 0.0  # written by the device's thread alone
        for owner, name in ((Gatherer, "gather"), (device.Replica, "run")):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        family = Metric(CPU_SECONDS, "CPU of gather and execute in the threads that call them", "gauge")
        family.add_sample(CPU_SECONDS, {}, self._seconds)
        yield family

    def describe(self) -> list[Metric]:
        """For prometheus_client: nothing to compare at registration."""
        return []

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any) -> Any:
            begin = time.thread_time()
            result = method(*words)
            self._seconds += time.thread_time() - begin
            return result

        return counted


class _OneModel:
    """A repository of one engine, for `RankingServer`."""

    is_ready = True

    def __init__(self, engine: Engine, pool: DevicePool) -> None:
        self._engine = engine
        self.overload, self.abandon = pool.overload, pool.abandon

    def engine(self, name: str, version: str = "") -> Engine:
        if name != self._engine.spec.name or version not in ("", str(self._engine.version)):
            raise ModelNotFoundError(f"Request for unknown model: '{name}' version '{version}' is not found")
        return self._engine

    @contextlib.contextmanager
    def lease(
        self, name: str, version: str = "", key: str | None = None, *, by_traffic: bool = True
    ) -> Iterator[Engine]:
        yield self.engine(name, version)

    def models(self) -> list[tuple[str, int, bool]]:
        return [(self._engine.spec.name, self._engine.version, self._engine.fault is None)]

    def index(self) -> list[Any]:
        return []

    def close(self) -> None:
        self._engine.close()


@short_turns()
def _serve(args: argparse.Namespace) -> None:
    device.configure(num_devices=1, compile_cache=args.compile_cache)
    pool, metrics = DevicePool(1, make_batcher=batcher_of(args.rule)), Metrics()
    if args.count_cpu:
        metrics.register(_CpuCounter())
    engine = Engine.load(
        args.bundle,
        host_threads=args.host_threads,
        pool=pool,
        metrics=metrics,
        queue=QueueConfig(**json.loads(args.queue)),
    )
    config = ServerConfig(port=0, http_port=0)
    with stop_on_signals() as stop, RankingServer(_OneModel(engine, pool), metrics.text, config) as server:
        (profile,) = engine.profiles
        seconds = [[bucket.rows, bucket.requests, value] for bucket, value in profile.seconds.items()]
        ready = {"grpc": server.address, "http": server.http_address, "profile": seconds}
        print(json.dumps(ready), flush=True)
        stop.wait()
    pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="version folder")
    parser.add_argument("--compile-cache", type=Path, required=True, help="folder of compiled code")
    parser.add_argument("--queue", default="{}", help="JSON object of QueueConfig's fields")
    parser.add_argument("--rule", default=OURS, help=f"{OURS}, or a delay in us: Triton's rule")
    parser.add_argument("--host-threads", type=int, help="threads of the gather (CPUs, 4 at most)")
    parser.add_argument("--count-cpu", action="store_true", help=f"/metrics has {CPU_SECONDS}")
    _serve(parser.parse_args())


if __name__ == "__main__":
    main()
