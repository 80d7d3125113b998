"""The `xlarank` command."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import app
from absl.flags import argparse_flags

from xlarank.cli import compile as compile_command
from xlarank.cli import evaluate, features, inspect, plan, replay, score, serve, simulate, train
from xlarank.cli.log_levels import set_log_levels
from xlarank.errors import XlarankError

__all__ = ["main", "parse", "run"]

_EPILOG = """\
example, from data to a server:
  xlarank train configs/movielens.toml --data data/ml-100k --out artifacts/checkpoint
  xlarank compile configs/movielens.toml --checkpoint artifacts/checkpoint --out artifacts/models
  xlarank serve artifacts/models

`xlarank COMMAND --help` shows the options of each, with an example.
"""

# By the order in which a model goes through them.
_COMMANDS = (train, compile_command, plan, simulate, inspect, score, evaluate, features, serve, replay)


def run() -> None:
    """Entry point of the console script."""
    app.run(main, flags_parser=parse)


def main(args: argparse.Namespace) -> int:
    """Runs one subcommand.

    Returns:
      The exit status: 0, or 1 after an error that is told in one line.
    """
    set_log_levels()
    try:
        result = args.run(args)
    except XlarankError as error:
        print(f"xlarank {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk or a folder that may not be written, wherever it shows: the text names the file.
        print(f"xlarank {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"xlarank {args.command}: interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result), flush=True)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line for `main`.

    Args:
      argv: the program's name, the subcommand and its arguments.

    Raises:
      SystemExit: with 2 and the usage on stderr when they are wrong, with 0 after --help.
    """
    parser = argparse_flags.ArgumentParser(
        prog="xlarank",
        description="Trains, compiles and serves ranking models written in Flax.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser_class: Any = functools.partial(argparse_flags.ArgumentParser, inherited_absl_flags=None)
    subparsers: Any = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=parser_class
    )
    for command in _COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument(
            "--json", action="store_true", help="print one JSON object as the last line of the output"
        )
    return parser.parse_args(argv[1:])
