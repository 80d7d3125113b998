"""`xlarank features build`: candidate features from Parquet to a file that a server looks them up in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank features build --config configs/feed.toml --parquet data/videos.parquet --id-column video_id \\
    --out data/feed.features
  xlarank serve /models --features data/feed.features

The data have an integer column of ids, each once, and a column for every candidate feature, under its name;
one with a default may lack its column, or hold nulls. A feature that only a request knows is left out with
--without, and requests bring it.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "features",
        help="build a file of candidate features by id",
        description="Builds a file of candidate features, so that requests may name candidates by id.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["build"], help="what to do")
    parser.add_argument("--config", type=Path, required=True, help="the model's TOML file")
    parser.add_argument("--parquet", type=Path, required=True, help="a Parquet file, or a folder of them")
    parser.add_argument("--id-column", required=True, metavar="NAME", help="column of the candidates' ids")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--without", action="append", default=[], metavar="FEATURE", help="a feature that requests bring"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the file.

    Raises:
      ConfigError: for a config, data or a place that it can't be built from or at; data errors name file,
        column and row.
    """
    from xlarank.cli.console import output_console
    from xlarank.host import FeatureFileWriter, FeatureSchema, select_features
    from xlarank.spec.config import load_config
    from xlarank.spec.wording import counted
    from xlarank.training.feature_rows import read_feature_rows

    spec = load_config(args.config).spec
    schema = FeatureSchema.of(select_features(spec, args.without))
    with FeatureFileWriter(args.out, schema, model=spec.name) as writer:
        for ids, columns in read_feature_rows(args.parquet, args.id_column, schema.rows_spec(spec)):
            writer.add(ids, columns)
    num_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    output_console().print(
        f"{counted(writer.num_rows, 'candidate')}, {counted(len(schema.names), 'feature')}, "
        f"{counted(num_bytes, 'byte')}: {args.out}"
    )
    return {
        "out": str(args.out),
        "model": spec.name,
        "rows": writer.num_rows,
        "features": list(schema.names),
        "bytes": num_bytes,
    }
