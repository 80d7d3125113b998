"""`--table-memory` of the subcommands that load a bundle, and how they show tables being read."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

from xlarank.cli.lines import say

__all__ = ["add_table_memory", "table_lines", "table_progress"]

_QUIET_SECONDS = 5.0
"""Tables that are read in so little time need no word of how far they are."""


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
    """A bar of the bytes of tables read, or lines where stderr is no terminal; the callback takes those done
    and all. Lines are also said after the end of the block."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from xlarank.cli.console import progress_console

    console = progress_console()
    if not console.is_terminal:
        yield table_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tables", total=None)

        def on_bytes(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_bytes


def table_lines(clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """A callback that takes the bytes of tables read and all, of one load after the other, and says on
    stderr each tenth that is read once a load has taken some seconds.

    Args:
      clock: seconds, monotonic.
    """
    last_done, tenth, begun = 0, 0, 0.0

    def on_bytes(done: int, total: int) -> None:
        nonlocal last_done, tenth, begun
        if not last_done or done < last_done:
            tenth, begun = 0, clock()
        last_done = 0 if done >= total else done
        before, tenth = tenth, 10 * done // total
        if tenth > before and clock() - begun >= _QUIET_SECONDS:
            gib = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB"
            say(f"loading tables: {10 * tenth}%, {gib} are read and right")

    return on_bytes
