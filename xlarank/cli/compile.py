"""`xlarank compile`: from a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank compile configs/movielens.toml --checkpoint artifacts/checkpoint --out artifacts/models
writes artifacts/models/movielens/1 (then 2, 3, ...), compiled for every bucket and device and proven against
the Flax reference on the labelled requests that training left beside the checkpoint.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a checkpoint for every bucket, ahead of time",
        description="Compiles a trained model for every batch bucket, proves its scores and publishes it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the model's TOML file")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of `xlarank train`")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="REPOSITORY", help="writes REPOSITORY/<model>/<version>/"
    )
    parser.add_argument(
        "--buckets",
        type=_rows,
        metavar="ROWS,...",
        help="row counts to compile for (config's, 8,32,128,512,1024)",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="devices to compile for (all there are)")
    parser.add_argument("--version", type=int, metavar="V", help="version to publish (highest there + 1)")
    parser.add_argument(
        "--golden", type=Path, metavar="FILE", help="requests to prove with (those beside the checkpoint)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles; returns path, version and what was measured of each bucket."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from xlarank import device
    from xlarank.bundle import read_requests
    from xlarank.cli.console import output_console, progress_console
    from xlarank.compiler import BuildOptions, build
    from xlarank.spec import Bucket, BucketLadder
    from xlarank.spec.config import load_config
    from xlarank.training.checkpoint import VALIDATION_FILE, restore

    device.configure(num_devices=args.devices)
    config = load_config(args.config)
    rows = args.buckets or config.bucket_rows
    console = progress_console()
    with console.status("reading the checkpoint"):
        module, spec, tables = restore(config, args.checkpoint)
        requests, _ = read_requests(args.golden or args.checkpoint / VALIDATION_FILE, spec)
    options = BuildOptions(
        version=args.version,
        bucket_rows=rows,
        num_devices=args.devices,
        provenance={
            "config": config.path.read_text(encoding="utf-8"),
            "checkpoint": args.checkpoint.name,
        },
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Where nobody watches, a bar leaves but an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(BucketLadder.of_rows(rows).buckets))

        def on_bucket(bucket: Bucket, number: int, _: int) -> None:
            progress.update(task, completed=number, description=f"compiled {bucket}")

        result = build(
            module, spec, tables, out=args.out, options=options, golden=requests, on_bucket=on_bucket
        )
    manifest = result.manifest
    table = Table(title=f"{spec.name} version {manifest.version}: {result.path}")
    for name in ("rows", "requests", "ms", "rows/s", *(f"error {t.name}" for t in spec.tasks)):
        table.add_column(name, justify="right")
    for entry in manifest.programs:
        seconds = next(iter(entry.seconds.values()))
        errors = [f"{entry.max_error[t.name]:.1e}" for t in spec.tasks]
        bucket = entry.bucket
        table.add_row(
            str(bucket.rows),
            str(bucket.requests),
            f"{seconds * 1e3:.3f}",
            f"{bucket.rows / seconds:,.0f}",
            *errors,
        )
    output_console().print(table)
    return {
        "path": str(result.path),
        "model": spec.name,
        "version": manifest.version,
        "parameters": result.analysis.num_parameters,
        "flops_per_row": result.analysis.flops_per_row,
        "buckets": [
            {
                "rows": entry.bucket.rows,
                "requests": entry.bucket.requests,
                "seconds": dict(entry.seconds),
                "max_error": dict(entry.max_error),
            }
            for entry in manifest.programs
        ],
    }


def _rows(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected row counts like 8,32,128, got {text!r}") from None
    if list(rows) != sorted(set(rows)) or rows[0] < 1:
        raise argparse.ArgumentTypeError(f"expected ascending row counts >= 1, got {text!r}")
    return rows
