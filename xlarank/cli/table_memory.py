"""`--table-memory` of the subcommands that load a bundle, and the bar that shows tables being read."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

from xlarank.cli.console import progress_console

__all__ = ["add_table_memory", "table_progress"]


def add_table_memory(parser: argparse.ArgumentParser) -> None:
    """Adds the option; not given it is None."""
    parser.add_argument(
        "--table-memory",
        choices=("huge", "mmap"),
        help="huge: read the tables into huge pages; mmap: use them from their files, shared between "
        "processes and larger than memory if need be (huge where the kernel has such pages and they fit)",
    )


@contextlib.contextmanager
def table_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of the bytes of tables read; the callback takes those done and all."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # Where nobody watches, a bar leaves but an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tables", total=None)

        def on_bytes(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_bytes
