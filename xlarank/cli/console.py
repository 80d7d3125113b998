"""Where subcommands show things: `output_console`, `progress_console`."""

from __future__ import annotations

from rich.console import Console

__all__ = ["output_console", "progress_console"]

# Tables in a pipe or a log keep their lines whole; 80 columns would break every cell.
_PIPED_WIDTH = 160


def output_console(*, is_json: bool = False) -> Console:
    """For results: standard output, or standard error when the output's last line is to be JSON alone."""
    console = Console(stderr=is_json)
    return console if console.is_terminal else Console(stderr=is_json, width=_PIPED_WIDTH)


def progress_console() -> Console:
    """For bars and spinners: standard error."""
    return Console(stderr=True)
