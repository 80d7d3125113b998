"""`xlarank simulate`: what a server would do under some traffic, on devices that need not be there."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from xlarank_serving.config import LimitConfig

from xlarank.bundle import Verify, open_bundle, resolve_bundle
from xlarank.cli.console import output_console
from xlarank.cli.profiles import profile_of
from xlarank.cli.server_pace import ServerPace, observed_pace, read_pace
from xlarank.errors import ConfigError
from xlarank.spec import DEFAULT_PRIORITY, NUM_PRIORITIES, DispatchPolicy, LatencyProfile, QueueConfig
from xlarank.spec.ladder import SizeHistogram
from xlarank.spec.wording import counted

if TYPE_CHECKING:
    from xlarank.runtime.bucket_plan import BucketPlan
    from xlarank.runtime.simulation import Arrival

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank simulate artifacts/models/movielens --load 0.8 --candidates 500 --devices 2 --slo-ms 20
  xlarank simulate artifacts/models/movielens --trace arrivals.csv --dispatch-policy spread --devices 4
  xlarank simulate artifacts/models/movielens --load 0.8 --capacity 280 --alone-ms 5.1
  curl -s http://server:8002/metrics > page.txt
  xlarank simulate artifacts/models/movielens --rate 90 --server-metrics page.txt

The batcher and the scheduler are the server's own; the devices take the times that the bundle was measured
at, on an idle machine. A trace is a CSV file with a header, of the columns seconds and candidates, and where
wanted priority, timeout_ms and user.

A server shares its CPUs with its own threads, and perhaps with others: its batches take longer, and decoding
and encoding come on top. The best that can be said of one is what a client saw: how many requests of this
traffic it answered a second when there were always some waiting (--capacity), and the latency of one that
came alone (--alone-ms). Without a load test, --server-metrics reads from what a server has counted how slow
its batches were, and its own time beside them; save a page before and one after a busy minute for just that
minute. What the network and clients take is in no page; --overhead-ms says it.
"""

_COLUMNS = ("seconds", "candidates", "priority", "timeout_ms", "user")


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "simulate",
        help="throughput and latency under some traffic, simulated",
        description="Runs arrivals through the server's batcher and scheduler on simulated devices.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a version, or of a model")
    traffic = parser.add_mutually_exclusive_group(required=True)
    traffic.add_argument("--rate", type=float, metavar="R", help="Poisson arrivals, requests a second")
    traffic.add_argument(
        "--load",
        type=float,
        metavar="SHARE",
        help="Poisson arrivals, share of the rate of requests one at a time (or of --capacity)",
    )
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="arrivals of a CSV file")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--candidates", type=int, metavar="N", help="candidates of a request (500)")
    sizes.add_argument(
        "--sizes",
        type=Path,
        metavar="FILE",
        help="drawn from these: see `xlarank plan`, which takes the same",
    )
    parser.add_argument("--requests", type=int, default=20_000, help="of Poisson arrivals (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their random numbers (%(default)s)")
    parser.add_argument("--devices", type=int, default=1, metavar="K", help="devices (%(default)s)")
    parser.add_argument(
        "--speeds",
        type=_numbers,
        metavar="S1,S2,..",
        help="of each device, in multiples of the measured one (1 for each of --devices)",
    )
    parser.add_argument(
        "--costs", type=_numbers, metavar="C1,C2,..", help="of a second of each device, to prefer the cheaper"
    )
    parser.add_argument(
        "--device-kind",
        action="append",
        metavar="KIND",
        help="whose times count, where BUNDLE has several; once for each of --devices: each has its own",
    )
    parser.add_argument(
        "--dispatch-policy",
        choices=[policy.value for policy in DispatchPolicy],
        default=QueueConfig().policy.value,
        help="(%(default)s)",
    )
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--capacity",
        type=float,
        metavar="R",
        help="requests of this traffic that the server answered a second with always some waiting; --load is "
        "a share of it",
    )
    pace.add_argument(
        "--server-metrics",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="slowdown and overhead of a server that serves BUNDLE on devices of one speed, that of "
        "--speeds: its /metrics saved to a file, or two files, for what happened between them",
    )
    pace.add_argument(
        "--slowdown",
        type=float,
        metavar="X",
        help="what a batch takes while serving, over the bundle's measured time (1)",
    )
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--alone-ms",
        type=float,
        metavar="MS",
        help="with --capacity: latency of a request that came alone, which says the overhead; less than half "
        "of what its batch takes by --capacity is refused",
    )
    beside.add_argument(
        "--overhead-ms",
        type=float,
        metavar="MS",
        help="what a request takes beside waiting and its batches (0, or as --server-metrics says)",
    )
    parser.add_argument("--slo-ms", type=float, default=100.0, help="goodput is what meets it (%(default)s)")
    parser.add_argument("--timeout-ms", type=float, default=0.0, help="deadline of each request (none)")
    parser.add_argument(
        "--max-queue-ms", type=float, default=QueueConfig.max_queue_ms, help="longest wait (%(default)s)"
    )
    parser.add_argument(
        "--max-defer-ms",
        type=float,
        default=QueueConfig.max_defer_ms,
        help="longest time that a free device waits for company under high load (%(default)s)",
    )
    parser.add_argument(
        "--max-batch-rows",
        type=int,
        default=QueueConfig.max_batch_rows,
        metavar="N",
        help="most rows that requests are merged to, 1 for none (the knee of the measured times)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what became of the requests; returns the same as JSON values.

    Raises:
      BundleError: if the bundle isn't whole.
      ConfigError: for traffic or metrics that can't be read, or numbers that make no sense.
    """
    from xlarank.runtime.bucket_plan import BucketPlan
    from xlarank.runtime.scheduler import Scheduler
    from xlarank.runtime.simulation import simulate

    bundle = open_bundle(resolve_bundle(args.bundle), verify=Verify.SIZES)
    manifest = bundle.manifest
    speeds, costs, kinds = _devices(args)
    measured = [profile_of(manifest, str(bundle.path), kind) for kind in kinds]
    profiles = dict(measured)
    named = [kind for kind, _ in measured] * (len(speeds) if len(kinds) == 1 else 1)
    config = QueueConfig(
        max_queue_ms=args.max_queue_ms,
        max_defer_ms=args.max_defer_ms,
        policy=args.dispatch_policy,
        max_batch_rows=args.max_batch_rows,
    )
    plans = {
        (kind, speed): BucketPlan.of_config(manifest.ladder, _scaled(profiles[kind], speed), config)
        for kind, speed in {*zip(named, speeds, strict=True)}
    }
    if not 0 < args.slo_ms < math.inf:
        raise ConfigError(f"--slo-ms must be > 0; was {args.slo_ms}")
    by_device = [plans[device] for device in zip(named, speeds, strict=True)]
    pace = _stated_pace(args, manifest.spec.name, by_device)
    scheduler: Scheduler[int] = Scheduler(len(speeds), costs=costs)
    queue = scheduler.attach(manifest.spec.name, by_device, config)
    if args.trace is not None:
        arrivals = _read_trace(args.trace)
    else:
        arrivals = _poisson(args, manifest.spec.name, by_device, slowdown=pace.slowdown)
    largest = max((arrival.num_rows for arrival in arrivals), default=0)
    if largest > LimitConfig.max_candidates:
        raise ConfigError(
            f"traffic: expected at most {LimitConfig.max_candidates} candidates a request, the server's "
            f"max_candidates, got {largest}"
        )
    if args.capacity is not None:
        observed = observed_pace(
            by_device,
            config,
            [arrival.num_rows for arrival in arrivals],
            capacity=args.capacity,
            alone_seconds=None if args.alone_ms is None else args.alone_ms / 1e3,
        )
        overhead = max(observed.overhead_seconds, pace.overhead_seconds)  # one of them is 0
        pace = dataclasses.replace(observed, overhead_seconds=overhead)
    result = simulate(
        scheduler,
        [queue],
        _limited(arrivals, args.timeout_ms),
        # Not in the plans: there a server has the times of its start too, and learns from what runs take.
        service_seconds=lambda turn: pace.slowdown * turn.predicted_seconds,
        overhead_seconds=pace.overhead_seconds,
    )
    facts = {
        "path": str(bundle.path),
        "model": manifest.spec.name,
        "version": manifest.version,
        "device_kind": ", ".join(profiles),
        "devices": [
            {"kind": kind, "speed": speed, "cost": cost}
            for kind, speed, cost in zip(named, speeds, costs, strict=True)
        ],
        "slowdown": pace.slowdown,
        "overhead_ms": pace.overhead_seconds * 1e3,
        "note": pace.note,
        "policy": args.dispatch_policy,
        "requests": len(arrivals),
        "candidates_per_request": float(result.sizes.mean()),
        "offered_requests_per_second": _rate(arrivals),
        "requests_per_second": result.requests_a_second,
        "rows_per_second": result.rows_a_second,
        "goodput": result.goodput(args.slo_ms / 1e3),
        "slo_ms": args.slo_ms,
        "latency_ms": {
            "mean": result.mean_latency * 1e3,
            **{f"p{100 * q:g}": result.latency(q) * 1e3 for q in (0.5, 0.95, 0.99, 0.999)},
        },
        "refused": result.num_refused,
        "late": result.num_late,
        "batches": result.num_batches,
        "padding_share": result.padding_share,
        "utilisation": result.utilisation,
    }
    _show(facts, output_console(is_json=args.json))
    return facts


def _stated_pace(args: argparse.Namespace, model: str, plans: Sequence[BucketPlan]) -> ServerPace:
    """As a server with devices of these plans says, where it was asked, but for what the options say."""
    for name in ("capacity", "slowdown", "alone_ms"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0; was {value}")
    if args.overhead_ms is not None and not 0 <= args.overhead_ms < math.inf:
        raise ConfigError(f"--overhead-ms must be >= 0; was {args.overhead_ms}")
    if args.alone_ms is not None and args.capacity is None:
        raise ConfigError("--alone-ms: expected --capacity beside it, which says what a batch takes")
    pace = ServerPace()
    if args.server_metrics is not None:
        if len(set(plans)) > 1:
            raise ConfigError(
                f"--server-metrics: expected devices of one kind and speed, got kinds "
                f"{args.device_kind or ['one']} and speeds {args.speeds or [1.0]}: a page doesn't say which "
                f"of them ran which batches; say what a client saw (--capacity, --alone-ms)"
            )
        pace = read_pace(args.server_metrics, model, plans[0])
    return ServerPace(
        slowdown=pace.slowdown if args.slowdown is None else args.slowdown,
        overhead_seconds=pace.overhead_seconds if args.overhead_ms is None else args.overhead_ms / 1e3,
    )


def _limited(arrivals: list[Arrival], timeout_ms: float) -> list[Arrival]:
    """With the deadline of every request, 0 for none."""
    if not 0 <= timeout_ms < math.inf:
        raise ConfigError(f"--timeout-ms must be >= 0; was {timeout_ms}")
    if not timeout_ms:
        return arrivals
    return [dataclasses.replace(each, timeout=min(each.timeout, timeout_ms / 1e3)) for each in arrivals]


def _devices(args: argparse.Namespace) -> tuple[list[float], list[float], list[str | None]]:
    """Speed and cost of each device; and its kind, one for all or one each, None where BUNDLE says."""
    kinds: list[str | None] = args.device_kind or [None]
    speeds = args.speeds or [1.0] * (args.devices if len(kinds) == 1 or args.devices > 1 else len(kinds))
    if args.devices < 1:
        raise ConfigError(f"--devices must be >= 1; was {args.devices}")
    if args.speeds and args.devices not in (1, len(args.speeds)):
        raise ConfigError(
            f"--speeds: expected one for each of {args.devices} devices, got {len(args.speeds)}"
        )
    if len(kinds) not in (1, len(speeds)):
        raise ConfigError(
            f"--device-kind: expected one, or one for each of {len(speeds)} devices, got {kinds}"
        )
    costs = args.costs or [1.0] * len(speeds)
    if len(costs) != len(speeds):
        raise ConfigError(f"--costs: expected one for each of {len(speeds)} devices, got {len(costs)}")
    return speeds, costs, kinds


def _scaled(profile: LatencyProfile, speed: float) -> LatencyProfile:
    return LatencyProfile({bucket: seconds / speed for bucket, seconds in profile.seconds.items()})


def _poisson(
    args: argparse.Namespace, model: str, plans: Sequence[BucketPlan], *, slowdown: float
) -> list[Arrival]:
    """Arrivals at a rate, or at a share of what devices can do with these plans, one request at a time."""
    from xlarank.cli.sizes import read_sizes  # these take a while: only this subcommand pays
    from xlarank.runtime.simulation import poisson_arrivals

    if args.requests < 1:
        raise ConfigError(f"--requests must be >= 1; was {args.requests}")
    if args.sizes is not None:
        histogram = read_sizes(args.sizes, model=model)
    else:
        histogram = SizeHistogram({500 if args.candidates is None else args.candidates: 1})
    sizes = np.array(list(histogram.counts), np.int64)
    shares = np.array(list(histogram.counts.values()), np.float64) / histogram.num_requests
    rate = args.rate
    if rate is None and args.capacity is not None:
        rate = args.load * args.capacity
    elif rate is None:
        means = [float(np.array([plan.seconds(int(size)) for size in sizes]) @ shares) for plan in plans]
        rate = args.load * sum(1 / seconds for seconds in means) / slowdown
    return poisson_arrivals(
        rate, lambda rng, count: rng.choice(sizes, count, p=shares), args.requests, seed=args.seed
    )


def _read_trace(path: Path) -> list[Arrival]:
    """Arrivals of a CSV file, by time."""
    arrivals = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            unknown = [name for name in names if name not in _COLUMNS]
            if unknown or not {"seconds", "candidates"} <= set(names):
                raise ConfigError(
                    f"{path}: expected a header of seconds, candidates and of {list(_COLUMNS[2:])}, "
                    f"got {names}"
                )
            for row in reader:
                arrivals.append(_arrival(f"{path} line {reader.line_num}", row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: expected a CSV file: {error}") from error
    if not arrivals:
        raise ConfigError(f"{path}: expected at least one arrival, got none")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrival(where: str, row: dict[str, str | None]) -> Arrival:
    from xlarank.runtime.simulation import Arrival

    def number(name: str, least: float) -> float:
        text = row.get(name) or ""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise ConfigError(f"{where}: expected {name} as a number >= {least:g}, got {text!r}")
        return value

    candidates = number("candidates", 1)
    if candidates != int(candidates):
        raise ConfigError(f"{where}: expected candidates as a whole number, got {row['candidates']!r}")
    priority = number("priority", 1) if row.get("priority") else DEFAULT_PRIORITY
    if priority not in range(1, NUM_PRIORITIES + 1):
        raise ConfigError(f"{where}: expected priority of 1 to {NUM_PRIORITIES}, got {row['priority']!r}")
    return Arrival(
        at=number("seconds", 0),
        num_rows=int(candidates),
        priority=int(priority),
        timeout=number("timeout_ms", 0) / 1e3 if row.get("timeout_ms") else math.inf,
        affinity_key=row.get("user") or None,
    )


def _rate(arrivals: list[Arrival]) -> float | None:
    """Requests a second that arrive; None of one."""
    seconds = arrivals[-1].at - arrivals[0].at
    return (len(arrivals) - 1) / seconds if seconds > 0 else None


def _show(facts: dict[str, Any], console: Console) -> None:
    devices = facts["devices"]
    console.print(
        f"{facts['model']} version {facts['version']} on {counted(len(devices), 'device')} like "
        f"{facts['device_kind']}, policy {facts['policy']}: {counted(facts['requests'], 'request')} of "
        f"{facts['candidates_per_request']:,.1f} candidates on average",
        style="bold",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    offered = facts["offered_requests_per_second"]
    lines = []
    if facts["slowdown"] != 1 or facts["overhead_ms"]:
        lines.append(
            (
                "server",
                f"batches take {facts['slowdown']:.2f} times what was measured, and a request "
                f"{facts['overhead_ms']:.2f} ms beside them",
            )
        )
    if facts["note"]:
        lines.append(("note", facts["note"]))
    if offered is not None:
        lines.append(("offered", f"{offered:,.1f} requests/s"))
    lines += [
        (
            "answered",
            f"{facts['requests_per_second']:,.1f} requests/s, {facts['rows_per_second']:,.0f} rows/s",
        ),
        ("goodput", f"{facts['goodput']:,.1f} requests/s within {facts['slo_ms']:g} ms"),
        ("latency", ", ".join(f"{name} {ms:,.2f} ms" for name, ms in facts["latency_ms"].items())),
        ("refused", f"{facts['refused']:,}, and {facts['late']:,} dropped from the queue as late"),
        ("batches", f"{facts['batches']:,}, {facts['padding_share']:.1%} padding"),
        ("devices", f"{facts['utilisation']:.1%} busy"),
    ]
    for name, text in lines:
        console.print(f"{name:<10} {text}", soft_wrap=True, highlight=False, markup=False)


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers > 0 with commas between, got {text!r}")
    return values
