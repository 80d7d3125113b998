"""Files that others have put where they are: `open_file`, `read_file`, `check_kind`, `parse_toml`."""

from __future__ import annotations

import errno
import io
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from xlarank.errors import ConfigError

__all__ = ["check_kind", "open_file", "parse_toml", "read_file"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path) -> io.FileIO:
    """Opens a file to read it, unbuffered. A pipe or a device, whose reader could wait for ever, is none.

    Raises:
      OSError: if it can't be opened, or is something else; says what.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe's open would wait for its writer
    try:
        check_kind(path, os.fstat(number).st_mode)
        os.set_blocking(number, True)
        return open(number, "rb", buffering=0)
    except BaseException:
        os.close(number)
        raise


def check_kind(path: Path, mode: int) -> None:
    """Raises OSError unless a path's mode, of its status, is that of a file."""
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        found = _KINDS.get(kind, "something else")
        raise OSError(errno.EINVAL, f"expected a file, found {found}", str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a file; raises as `open_file`."""
    with open_file(path) as file:
        return file.readall()


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The document of a config file's text; ConfigError, which names the file, if it isn't TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: expected a TOML file: values are nested too deeply") from None
    except ValueError as error:  # TOML's, and Python's for integers without end
        raise ConfigError(f"{path}: expected a TOML file: {error}") from error
