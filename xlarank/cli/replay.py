"""`xlarank replay`: requests that a server kept, scored again."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from xlarank.cli.console import output_console
from xlarank.cli.table_memory import add_table_memory, table_progress
from xlarank.errors import BundleError, ConfigError, XlarankError
from xlarank.spec.wording import counted

if TYPE_CHECKING:
    from xlarank.runtime import Engine

__all__ = ["add_parser", "run"]

_EPILOG = """\
example:
  xlarank serve artifacts/models --captures /var/lib/xlarank/kept --capture-slow-ms 50
  xlarank replay /var/lib/xlarank/kept --bundle artifacts/models/movielens

FILE is a request as `xlarank serve` keeps them, slow ones and those that made a batch fail, or a folder of
them. Each is scored alone, several times; the scores are held against those that were answered.
"""

_DIFFERS = 1e-3
"""Scores that differ by more than this are pointed out: another version, updated tables, or a fault."""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "replay",
        help="score requests again that a server kept",
        description="Scores kept requests with a bundle, and says what is different from then.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="kept requests, or their folder")
    parser.add_argument(
        "--bundle", type=Path, required=True, help="folder of a version, or of a model: its latest"
    )
    parser.add_argument("--repeats", type=int, default=5, help="times to score each (%(default)s)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="devices (%(default)s)")
    add_table_memory(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what became of each request; returns the same as JSON values.

    Raises:
      ConfigError: if there is no kept request, or numbers make no sense.
      BundleError: for a bundle that can't be read, or if no kept request can.
    """
    from xlarank.bundle import resolve_bundle
    from xlarank.runtime import Engine

    if args.repeats < 1:
        raise ConfigError(f"--repeats must be >= 1; was {args.repeats}")
    files = _files(args.files)
    path = resolve_bundle(args.bundle)
    with (
        table_progress() as on_table_bytes,
        Engine.load(
            path, num_devices=args.devices, table_memory=args.table_memory, on_table_bytes=on_table_bytes
        ) as engine,
    ):
        replayed = [_replay(engine, file, args.repeats) for file in files]
        if all(entry["candidates"] is None for entry in replayed):
            raise BundleError(replayed[0]["error"])
        facts = {
            "bundle": str(path),
            "model": engine.spec.name,
            "version": engine.version,
            "requests": replayed,
        }
    _show(facts, output_console(is_json=args.json))
    return facts


def _files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: expected kept requests (*.safetensors), found none")
        files += found
    return files


def _replay(engine: Engine, file: Path, repeats: int) -> dict[str, Any]:
    import numpy as np

    from xlarank.bundle import read_requests

    facts = {"file": str(file), "candidates": None, "error": None, "ms": None, "max_difference": None}
    facts |= {"reason": None, "then": None, "version": None}
    try:
        requests, values = read_requests(file, engine.spec)
        if len(requests) != 1:
            raise BundleError(f"{file}: expected one kept request, got {len(requests)}")
        facts |= _then(file)
    except XlarankError as error:
        return facts | {"error": str(error)}
    (request,) = requests
    facts["candidates"] = request.num_candidates
    milliseconds = []
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            scores = engine.score(request)
            milliseconds.append(1e3 * (time.perf_counter() - start))
    except XlarankError as error:
        return facts | {"error": str(error)}
    then = values.get("scores", {})
    differences = [float(np.abs(scores[task] - then[task]).max(initial=0.0)) for task in then]
    return facts | {
        "ms": statistics.median(milliseconds),
        "max_difference": max(differences, default=None),
    }


def _then(file: Path) -> dict[str, Any]:
    """What the server said of it."""
    beside = file.with_suffix(".json")
    try:
        facts = json.loads(beside.read_text())
        if not isinstance(facts, dict):
            raise ValueError(f"expected an object, got {type(facts).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BundleError(f"{beside}: expected the facts of a kept request: {error}") from error
    return {"reason": facts.get("reason"), "then": facts.get("detail"), "version": facts.get("version")}


def _show(facts: Mapping[str, Any], console: Console) -> None:
    replayed = facts["requests"]
    console.print(
        f"{facts['model']} version {facts['version']}: {counted(len(replayed), 'request')} scored again",
        style="bold",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    table = Table()
    for name, justify in (("request", "left"), ("candidates", "right"), ("now", "left"), ("then", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in replayed:
        candidates = "" if entry["candidates"] is None else str(entry["candidates"])
        table.add_row(Path(entry["file"]).stem, candidates, _now(entry), entry["then"] or "unknown")
    console.print(table, markup=False)


def _now(entry: Mapping[str, Any]) -> str:
    if entry["error"] is not None:
        return f"{'fails' if entry['candidates'] is not None else 'unreadable'}: {entry['error']}"
    text = f"{entry['ms']:.3f} ms"
    difference = entry["max_difference"]
    if difference is None:
        return text
    if difference <= _DIFFERS:
        return f"{text}, the same scores within {difference:.1g}"
    return f"{text}, scores differ by up to {difference:.3g} from version {entry['version']}'s"
