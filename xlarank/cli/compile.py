"""`xlarank compile`: from a checkpoint to a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlarank.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from xlarank.spec import ModelSpec, Ragged, RankRequest
    from xlarank.spec.config import ModelConfig

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank compile configs/movielens.toml --checkpoint artifacts/checkpoint --out artifacts/models
writes artifacts/models/movielens/1 (then 2, 3, ...), compiled for every bucket and device and proven against
the Flax reference on the labelled requests that training left beside the checkpoint. For every bucket the
forms of the network are tried on this machine and the fastest whose scores hold is kept. A checkpoint of an
architecture compiled before takes the forms and programs of that version. With --buckets auto --sizes FILE
the row counts suit the traffic; --explain lists what could not run once a request, and why.
"""

_AUTO = "auto"
_NUM_GOLDEN = 512
"""Most requests taken of a data set given as --golden."""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a checkpoint for every bucket, ahead of time",
        description="Compiles a trained model for every batch bucket in its fastest form, proves its scores "
        "and publishes it.",
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
        metavar="ROWS,...|auto",
        help="row counts to compile for (config's, 8,32,128,512,1024); auto: those that suit --sizes",
    )
    parser.add_argument(
        "--sizes",
        type=Path,
        metavar="FILE",
        help="for --buckets auto: a saved page of a server's /metrics, or one candidate count a line",
    )
    parser.add_argument(
        "--num-buckets", type=int, default=5, metavar="K", help="most row counts of auto (%(default)s)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="devices to compile for (all there are)")
    parser.add_argument("--version", type=int, metavar="V", help="version to publish (highest there + 1)")
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="DATA",
        help="requests to prove with: a file of requests, or a data folder for the config's reader, whose "
        "validation rows are taken (those beside the checkpoint)",
    )
    parser.add_argument(
        "--precision",
        choices=(_AUTO, "float32", "bfloat16", "float16", "int8"),
        default=_AUTO,
        help="of matmuls; auto: the fastest that keeps to both limits below (%(default)s)",
    )
    parser.add_argument(
        "--table-precision",
        choices=(_AUTO, "float32", "float16", "bfloat16", "int8", "int4"),
        default=_AUTO,
        help="of embedding tables; auto: by table the smallest that keeps to both limits below (%(default)s)",
    )
    parser.add_argument(
        "--table-placement",
        choices=(_AUTO, "host", "device", "split"),
        default=_AUTO,
        help="of embedding tables; device: all rows; split: the rows that are read most; auto: on "
        "accelerators what fits, on CPUs host (%(default)s)",
    )
    parser.add_argument(
        "--device-table-bytes",
        type=int,
        metavar="BYTES",
        help="most bytes of table rows on a device (half of its memory)",
    )
    parser.add_argument(
        "--placement-trace",
        action="append",
        default=[],
        metavar="DATA|TABLES=FILE",
        help="what says which rows are read most: requests, as --golden takes them (the golden requests), or "
        "a trace of some tables: users,items=FILE with the row numbers read of these tables in order (.npz, "
        ".safetensors, .pt), or users=FILE.npy with the number of reads of each row; may come again",
    )
    parser.add_argument(
        "--max-score-error",
        type=_positive,
        default=2e-3,
        metavar="E",
        help="of a lower precision and smaller tables: 99th percentile over golden rows of the difference in "
        "probability (%(default)s)",
    )
    parser.add_argument(
        "--max-auc-loss",
        type=_positive,
        default=5e-4,
        metavar="L",
        help="of a lower precision and smaller tables, on labelled golden rows (%(default)s)",
    )
    parser.add_argument(
        "--tune-seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="most time for trying forms, and as much for tables; 0 takes the hoisted form and tables as "
        "they are, untried (%(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="don't take programs and forms of an earlier version"
    )
    parser.add_argument(
        "--keep-failed",
        type=Path,
        metavar="REPOSITORY",
        help="write a bundle whose scores leave the limits there, for study; it is never published",
    )
    parser.add_argument(
        "--explain", action="store_true", help="list what had to be repeated for every candidate, and why"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles; returns path, version and what was tried, chosen and measured of each bucket."""
    # The collector needn't walk what the imports make, while they do or later: a twentieth of a refresh.
    gc.disable()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from xlarank import device
    from xlarank.cli.compile_output import explain, facts_of, show
    from xlarank.cli.console import output_console, progress_console
    from xlarank.compiler import BuildOptions, PlacementPolicy, build
    from xlarank.spec import ErrorBudget, PrecisionPolicy
    from xlarank.spec.config import load_config
    from xlarank.training.checkpoint import VALIDATION_FILE, restore

    gc.freeze()
    gc.enable()
    device.configure(num_devices=args.devices)
    config = load_config(args.config)
    traffic = _traffic(args, config)
    console = progress_console()
    with console.status("reading the checkpoint"):
        module, spec, tables = restore(config, args.checkpoint)
        requests, labels = _golden(args.golden or args.checkpoint / VALIDATION_FILE, config, spec)
        placement = PlacementPolicy.named(args.table_placement, args.device_table_bytes)
        for given in args.placement_trace:
            if "=" in given and not Path(given).exists():
                reads = {**placement.row_reads, **_row_reads(given)}
                placement = dataclasses.replace(placement, row_reads=reads)
            else:
                trace = [*(placement.trace or ()), *_golden(Path(given), config, spec)[0]]
                placement = dataclasses.replace(placement, trace=trace)
    options = BuildOptions(
        version=args.version,
        bucket_rows=config.bucket_rows if args.buckets in (None, _AUTO) else args.buckets,
        traffic=traffic,
        num_devices=args.devices,
        policy=PrecisionPolicy.named(
            args.precision,
            ErrorBudget(args.max_score_error, args.max_auc_loss),
            tables=args.table_precision,
        ),
        placement=placement,
        tune_seconds=args.tune_seconds,
        reuse=not args.fresh,
        keep_failed=args.keep_failed,
        provenance={
            "config": config.path.read_text(encoding="utf-8"),
            "checkpoint": args.checkpoint.name,
        },
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Where nobody watches, a bar leaves but an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=None)

        def on_progress(text: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=text)

        result = build(
            module,
            spec,
            tables,
            out=args.out,
            options=options,
            golden=requests,
            labels=labels,
            on_progress=on_progress,
        )
    output = output_console(is_json=args.json)
    show(result, output)
    if args.explain:
        explain(result, output)
    return facts_of(result)


def _traffic(args: argparse.Namespace, config: ModelConfig) -> Any:
    """The requests that `--buckets auto` plans for; None for named row counts."""
    if args.buckets != _AUTO:
        if args.sizes is not None:
            raise ConfigError(f"--sizes {args.sizes} goes with --buckets auto")
        return None
    if args.sizes is None:
        raise ConfigError(
            "--buckets auto needs --sizes FILE: a saved page of a server's /metrics, or one candidate count "
            "a line"
        )
    from xlarank.cli.sizes import read_sizes
    from xlarank.compiler import Traffic

    return Traffic(read_sizes(args.sizes, model=config.spec.name), args.num_buckets)


def _golden(
    data: Path, config: ModelConfig, spec: ModelSpec
) -> tuple[list[RankRequest], dict[str, np.ndarray]]:
    """Requests of a file or a data folder, and their labels as far as there are any."""
    from xlarank.bundle import read_requests
    from xlarank.training.readers import read_data

    if data.is_dir():
        sample = read_data(config, data).validation.sample(_NUM_GOLDEN)
        return list(sample.requests(spec)), sample.labels_of(spec)
    requests, values = read_requests(data, spec)
    return requests, values.get("labels", {})


def _row_reads(given: str) -> dict[str, np.ndarray | Ragged]:
    """What a file says of the reads of tables, such as ``users,items=trace.pt``."""
    import numpy as np

    from xlarank.host.traces import read_trace

    names, _, file = given.partition("=")
    tables = names.split(",")
    where = f"--placement-trace {given}"
    try:
        if file.endswith(".npy"):
            reads: list[np.ndarray | Ragged] = [np.load(file, allow_pickle=False)]
        else:
            reads = [*read_trace(file)]
    except OSError as error:
        raise ConfigError(f"{where}: can't be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{where}: expected an array as numpy.save writes it: {error}") from error
    if len(reads) != len(tables) or len(set(tables)) != len(tables):
        raise ConfigError(f"{where}: expected the names of {len(reads)} different tables, got {tables}")
    return dict(zip(tables, reads, strict=True))


def _rows(text: str) -> tuple[int, ...] | str:
    if text == _AUTO:
        return text
    try:
        rows = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected row counts like 8,32,128, or auto, got {text!r}"
        ) from None
    if list(rows) != sorted(set(rows)) or rows[0] < 1:
        raise argparse.ArgumentTypeError(f"expected ascending row counts >= 1, got {text!r}")
    return rows


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds >= 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value
