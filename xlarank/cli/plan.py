"""`xlarank plan`: the row counts that suit the traffic."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xlarank.bundle import Verify, open_bundle, resolve_bundle
from xlarank.cli.console import output_console
from xlarank.cli.profiles import profile_of
from xlarank.spec import DEFAULT_ROWS
from xlarank.spec.ladder import (
    SMALL_ROWS,
    LadderEstimate,
    SizeHistogram,
    estimate_ladder,
    plan_ladder,
    seconds_by_rows,
)
from xlarank.spec.wording import counted

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  curl -s localhost:8002/metrics > page.txt
  xlarank plan artifacts/models/movielens --sizes page.txt --num-buckets 4
shows what to give to `xlarank compile --buckets`. FILE may also be the candidate count of one request a line.

Times are the bundle's measured ones, and straight lines in between. Every request counts as if it ran alone:
that requests share batches under load is not counted.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="choose buckets that suit the traffic",
        description="Chooses the row counts that cost the requests of a server, or of a list of sizes, the "
        "least device time, by the times that a bundle was measured at.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a version, or of a model")
    parser.add_argument(
        "--sizes",
        type=Path,
        required=True,
        metavar="FILE",
        help="a saved page of a server's /metrics, or one candidate count a line",
    )
    parser.add_argument(
        "--num-buckets", type=int, default=5, metavar="K", help="most row counts to choose (%(default)s)"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        metavar="B",
        help=f"split requests of more (the most rows of the bundle's buckets, at least {DEFAULT_ROWS[-1]})",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="whose requests to read from the page (BUNDLE's own model)"
    )
    parser.add_argument(
        "--largest",
        type=int,
        metavar="N",
        help="candidates to count a request as that is above the page's last edge",
    )
    parser.add_argument("--device-kind", metavar="KIND", help="whose times count, where BUNDLE has several")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the chosen row counts and what they buy; returns the same as JSON values.

    Raises:
      BundleError: if the bundle isn't whole.
      ConfigError: for sizes that can't be read, an unknown device kind, or numbers that are no counts.
    """
    from xlarank.cli.sizes import read_sizes  # prometheus_client takes a while: only this subcommand pays

    bundle = open_bundle(resolve_bundle(args.bundle), verify=Verify.SIZES)
    manifest = bundle.manifest
    kind, profile = profile_of(manifest, str(bundle.path), args.device_kind)
    histogram = read_sizes(args.sizes, model=args.model or manifest.spec.name, largest=args.largest)
    measured = sorted({bucket.rows for bucket in profile.seconds})
    max_rows = max(measured[-1], DEFAULT_ROWS[-1]) if args.max_rows is None else args.max_rows
    seconds_of = seconds_by_rows(profile)
    plan = plan_ladder(histogram, seconds_of, num_buckets=args.num_buckets, max_rows=max_rows)
    facts = {
        "path": str(bundle.path),
        "model": manifest.spec.name,
        "version": manifest.version,
        "device_kind": kind,
        "measured_rows": measured,
        "share_below_measured": _share_below(measured[0], histogram),
        "sizes": _size_facts(args.sizes, histogram),
        "max_rows": max_rows,
        "planned": _estimate_facts(plan.chosen),
        "powers_of_two": _estimate_facts(plan.powers_of_two),
        "bundle": _estimate_facts(estimate_ladder(histogram, seconds_of, measured)),
        "compile_option": f"--buckets {','.join(map(str, plan.rows))}",
    }
    _show(facts, output_console(is_json=args.json))
    return facts


def _share_below(rows: int, histogram: SizeHistogram) -> float:
    """Requests of fewer candidates, of all."""
    return sum(count for size, count in histogram.counts.items() if size < rows) / histogram.num_requests


def _size_facts(file: Path, histogram: SizeHistogram) -> dict[str, Any]:
    rows = sum(size * count for size, count in histogram.counts.items())
    return {
        "file": str(file),
        "requests": histogram.num_requests,
        "mean": rows / histogram.num_requests,
        "largest": histogram.largest,
    }


def _estimate_facts(estimate: LadderEstimate) -> dict[str, Any]:
    return {
        "rows": list(estimate.rows),
        "seconds_per_request": estimate.seconds_per_request,
        "padding_share": estimate.padding_share,
        "buckets": [
            {
                "rows": use.rows,
                "share_of_requests": use.share_of_requests,
                "runs_per_request": use.runs_per_request,
                "seconds": use.seconds,
                "padding_share": use.padding_share,
            }
            for use in estimate.uses
        ],
    }


def _show(facts: Mapping[str, Any], console: Console) -> None:
    sizes, planned, measured = facts["sizes"], facts["planned"], facts["measured_rows"]
    heading = (
        f"{facts['model']} version {facts['version']} on {facts['device_kind']}: "
        f"{counted(sizes['requests'], 'request')} of {sizes['mean']:,.1f} "
        f"candidates on average, {sizes['largest']:,} at most"
    )
    console.print(heading, style="bold", soft_wrap=True, highlight=False, markup=False)
    table = Table()
    for column in ("rows", "share of requests", "ms", "padding"):
        table.add_column(column, justify="right")
    for use in planned["buckets"]:
        table.add_row(
            str(use["rows"]),
            f"{use['share_of_requests']:.1%}",
            f"{use['seconds'] * 1e3:.3f}",
            f"{use['padding_share']:.1%}",
        )
    console.print(table)
    ladders = {"planned": planned, "powers of two": facts["powers_of_two"], "this bundle": facts["bundle"]}
    lines = [
        f"{name:<14} {ladder['seconds_per_request'] * 1e3:8.3f} ms a request  "
        f"{ladder['padding_share']:6.1%} padding  {','.join(map(str, ladder['rows']))}"
        for name, ladder in ladders.items()
    ]
    share = facts["share_below_measured"]
    if measured[0] > SMALL_ROWS and share:
        further = ",".join(map(str, (SMALL_ROWS, *measured)))
        lines.append(
            f"Warning: {share:.1%} of the requests have fewer than {measured[0]} candidates, the fewest rows "
            f"that were measured: smaller row counts count as no faster, so none is planned for them. "
            f"Compile with --buckets {further} first, or with --buckets auto."
        )
    last = planned["rows"][-1]
    if sizes["largest"] > last:
        lines.append(f"Requests of more than {last} candidates are split.")
    if last > measured[-1]:
        lines.append(
            f"Times of more than {measured[-1]} rows, the most that were measured, are extrapolated."
        )
    lines.append(f"To use it: xlarank compile ... {facts['compile_option']}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
