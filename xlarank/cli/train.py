"""`xlarank train`: from a config and data to a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from xlarank.cli.console import output_console
from xlarank.spec.config import load_config

__all__ = ["add_parser", "run"]

_EXAMPLE = """example:
  xlarank train configs/movielens.toml --data ml-100k --out checkpoints/movielens
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to those of `argparse`."""
    parser = subparsers.add_parser(
        "train",
        help="fit a model to data",
        description="Fits vocabularies and statistics, trains embedding tables and model together, and "
        "writes a checkpoint with labelled validation requests beside it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the model")
    parser.add_argument("--data", metavar="DIR", required=True, help="folder that the config's reader reads")
    parser.add_argument(
        "--out", metavar="CHECKPOINT", required=True, help="folder to write; an older checkpoint is replaced"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; prints a line an epoch; returns losses and times as JSON values.

    Raises:
      ConfigError: when config, data and output folder don't fit together.
      ModelError: when the model's outputs are not logits.
    """
    # Flax, Optax and Orbax take seconds to import: only this subcommand pays.
    from xlarank import device
    from xlarank.training import checkpoint
    from xlarank.training.readers import read_data
    from xlarank.training.trainer import EpochReport, train

    device.configure()
    console = output_console(is_json=args.json)
    config = load_config(args.config)
    checkpoint.check_destination(args.out)
    with console.status("reading data"):
        splits = read_data(config, args.data)
    rows = [f"{data.num_rows:,} {name}" for name, data in vars(splits).items()]
    console.print(f"{config.spec.name}: {', '.join(rows)} rows")

    with console.status("compiling the training step") as status:

        def show(report: EpochReport) -> None:
            held_back = "refit" if report.is_refit else f"validation loss {report.validation_loss:.4f}"
            console.print(
                f"epoch {report.epoch:>3}   train loss {report.train_loss:.4f}   {held_back}   "
                f"{report.seconds:.1f} s"
            )
            status.update(f"training, at most {report.num_epochs} epochs")

        trained = train(config, splits, progress=show)
    with console.status("writing the checkpoint"):
        checkpoint.save(args.out, config, trained, splits.validation)
    console.print(f"epoch {trained.best_epoch} was best; checkpoint in [bold]{args.out}[/bold]")
    return {
        "checkpoint": str(args.out),
        "best_epoch": trained.best_epoch,
        "seconds": trained.seconds,
        "rows": {name: data.num_rows for name, data in vars(splits).items()},
        "epochs": checkpoint.epochs_as_json(trained),
    }
