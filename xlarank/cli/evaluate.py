"""`xlarank evaluate`: how good the scores of a checkpoint, a bundle or a server are."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from xlarank.cli.console import output_console
from xlarank.errors import ConfigError
from xlarank.spec import Column, ModelSpec, RankRequest
from xlarank.spec.config import ModelConfig, load_config
from xlarank.spec.wording import counted

__all__ = ["add_parser", "run"]

_EXAMPLE = """examples:
  xlarank evaluate configs/movielens.toml --checkpoint checkpoints/movielens --data ml-100k
  xlarank evaluate models/movielens --data ml-100k
  xlarank evaluate configs/movielens.toml --server localhost:8001 --data ml-100k

Each scores the test split, request by request, and the three agree. A bundle whose data are read by code
of yours needs --config too.
"""

_COLUMNS = ("auc", "gauc", "log_loss", "normalised_entropy", "mean_squared_error")

_Scorer = Callable[[Mapping[str, Column]], Mapping[str, np.ndarray]]


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to those of `argparse`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="compare scores with the labels of the test split",
        description="Prints AUC, gAUC, log loss and normalised entropy of each task, beside an additive "
        "user-and-item-bias baseline fitted to the same data.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", type=Path, metavar="CONFIG|BUNDLE", help="TOML file of a model, or folder of a bundle"
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="folder that the model's reader reads")
    parser.add_argument("--checkpoint", metavar="DIR", help="score with the Flax model of this checkpoint")
    parser.add_argument("--server", metavar="HOST:PORT", help="score over the wire")
    parser.add_argument(
        "--config", type=Path, metavar="CONFIG", help="of a BUNDLE whose data are read by code of yours"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a table; returns ``{"tasks": {task: metrics}, "rows": n}``.

    Raises:
      ConfigError: when the arguments don't name one scorer, or config, data and model don't fit together.
    """
    from xlarank.training.evaluate import evaluate, score_requests
    from xlarank.training.readers import read_data

    console = output_console(is_json=args.json)
    with _open_target(args) as (spec, config, scorer):
        with console.status("reading data"):
            splits = read_data(config, args.data)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("scoring requests", total=splits.test.num_requests)
            scores = score_requests(
                splits.test,
                scorer,
                features=tuple(f.name for f in spec.features),
                tasks=spec.tasks,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    report = evaluate(spec.tasks, splits, scores)
    _show(report, console)
    return report


@contextlib.contextmanager
def _open_target(args: argparse.Namespace) -> Iterator[tuple[ModelSpec, ModelConfig, _Scorer]]:
    """The model's spec, the config that says how its data are read, and its scorer while open."""
    modes = [name for name in ("checkpoint", "server") if getattr(args, name)]
    if args.target.is_dir():
        if modes:
            raise ConfigError(f"{args.target} is a folder, so a bundle; --{modes[0]} goes with a config file")
        with _bundle_scorer(args.target, args.config) as opened:
            yield opened
        return
    if args.config is not None:
        raise ConfigError("--config goes with a bundle; the config file is the first argument here")
    config = load_config(args.target)
    if len(modes) != 1:
        raise ConfigError(f"{args.target}: expected one of --checkpoint and --server, got {modes or 'none'}")
    scorer_of = _checkpoint_scorer if args.checkpoint else _server_scorer
    with scorer_of(config, getattr(args, modes[0])) as (spec, scorer):
        yield spec, config, scorer


@contextlib.contextmanager
def _checkpoint_scorer(config: ModelConfig, directory: str) -> Iterator[tuple[ModelSpec, _Scorer]]:
    from xlarank import device
    from xlarank.training.checkpoint import load_ranker
    from xlarank.training.scoring import Scorer

    device.configure()
    spec, ranker = load_ranker(config, directory)
    scorer = Scorer(spec, ranker)
    yield spec, lambda features: scorer.score(RankRequest(spec, features))


@contextlib.contextmanager
def _server_scorer(config: ModelConfig, address: str) -> Iterator[tuple[ModelSpec, _Scorer]]:
    from xlarank_serving.client import RankingClient

    outputs = {task.name: task.output for task in config.spec.tasks}
    with RankingClient(address) as client:

        def score(features: Mapping[str, Column]) -> dict[str, np.ndarray]:
            answer = client.score(config.spec.name, features)
            return {task: answer[output] for task, output in outputs.items()}

        yield config.spec, score


@contextlib.contextmanager
def _bundle_scorer(path: Path, config: Path | None) -> Iterator[tuple[ModelSpec, ModelConfig, _Scorer]]:
    from xlarank.bundle import resolve_bundle
    from xlarank.cli.bundle_config import config_of
    from xlarank.runtime import Engine

    version = resolve_bundle(path)
    how_to_read = config_of(version, config)
    with Engine.load(version) as engine:
        yield engine.spec, how_to_read, lambda features: engine.score(RankRequest(engine.spec, features))


def _show(report: Mapping[str, Any], console: Console) -> None:
    entries = report["tasks"]
    metrics = [name for name in _COLUMNS if any(name in entry for entry in entries.values())]
    table = Table(title=f"{counted(report['rows'], 'row')} of the test split")
    table.add_column("task")
    table.add_column("scores of")
    for name in metrics:
        table.add_column(name.replace("_", " "), justify="right")
    for task, entry in entries.items():
        for label, values in (
            ("model", entry),
            *((k, entry[k]) for k in ("baseline", "truth") if k in entry),
        ):
            cells = ["" if name not in values else _text(values[name]) for name in metrics]
            table.add_row(task, label, *cells)
    console.print(table)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
