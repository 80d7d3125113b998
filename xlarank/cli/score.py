"""`xlarank score`: offline scores, through the engine that serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from xlarank.cli.console import output_console, progress_console
from xlarank.cli.table_memory import add_table_memory, table_progress
from xlarank.errors import ConfigError
from xlarank.spec.wording import counted

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank score artifacts/models/movielens --data data/ml-100k --out scores.parquet
writes one line a candidate of the test split: request, row and a column a task (.csv works too).
"""

# Requests in flight: enough to keep every device busy, few enough to hold in memory.
_WINDOW = 256


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "score",
        help="score a data set offline",
        description="Scores a split of a data set with a bundle, through the same engine as the server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a version, or of a model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="for the config's reader")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".parquet or .csv")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="(%(default)s)"
    )
    parser.add_argument(
        "--config", type=Path, help="names the reader (the config that the bundle was compiled from)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="devices to score on (all there are)")
    add_table_memory(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Scores; returns the file and the number of requests and rows."""
    if args.out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--out: expected a .parquet or .csv file, got {args.out.name!r}")
    if not args.out.parent.is_dir():  # before the work, not after it
        raise ConfigError(f"--out {args.out}: expected a folder to write into, {args.out.parent} is none")

    import collections

    import numpy as np
    import pyarrow as pa
    from pyarrow import csv, parquet
    from rich.progress import track

    from xlarank.bundle import resolve_bundle
    from xlarank.cli.bundle_config import config_of
    from xlarank.runtime import Engine
    from xlarank.training.readers import read_data

    path = resolve_bundle(args.bundle)
    data = getattr(read_data(config_of(path, args.config), args.data), args.split)
    with table_progress() as on_table_bytes:
        loaded = Engine.load(
            path,
            num_devices=args.devices,
            table_memory=args.table_memory,
            on_table_bytes=on_table_bytes,
        )
    with loaded as engine:
        tasks = [task.name for task in engine.spec.tasks]
        scores: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
        sizes: list[int] = []
        in_flight: collections.deque = collections.deque()

        def take_oldest() -> None:
            own = in_flight.popleft().result().scores
            for task in tasks:
                scores[task].append(own[task])
            sizes.append(len(own[tasks[0]]))

        requests = track(
            data.requests(engine.spec),
            total=data.num_requests,
            description="scoring",
            console=progress_console(),
            transient=True,
            disable=not sys.stderr.isatty(),  # where nobody watches, a bar leaves but an empty line
        )
        for request in requests:
            if len(in_flight) == _WINDOW:
                take_oldest()
            in_flight.append(engine.submit(request))
        while in_flight:
            take_oldest()
    columns: dict[str, np.ndarray] = {
        "request": np.repeat(np.arange(len(sizes)), sizes),
        "row": np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, np.int64)]),
    }
    columns |= {task: np.concatenate(parts or [np.zeros(0, np.float32)]) for task, parts in scores.items()}
    table = pa.table(columns)
    try:
        if args.out.suffix == ".csv":
            csv.write_csv(table, args.out)
        else:
            parquet.write_table(table, args.out)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: {error}") from error
    output_console().print(f"{counted(len(sizes), 'request')}, {counted(table.num_rows, 'row')}: {args.out}")
    return {"out": str(args.out), "requests": len(sizes), "rows": table.num_rows}
