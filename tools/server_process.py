"""Servers as processes of their own, and what they say of themselves."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["server_samples", "serving", "started"]

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)  # of Prometheus text: name, labels, value


@contextlib.contextmanager
def serving(repository: Path, cache: Path, *options: object) -> Iterator[dict[str, Any]]:
    """The server as a user starts it, on one device; yields its ready line."""
    words = ["serve", str(repository), "--port", "0", "--http-port", "0", "--devices", "1", "--json"]
    command = [sys.executable, "-m", "xlarank.cli", *words, "--compile-cache", str(cache), *map(str, options)]
    with started(command) as ready:
        yield ready


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[dict[str, Any]]:
    """A process that serves until SIGTERM; yields its ready line, with its process id as `pid`.

    Args:
      command: prints a line of JSON once it is ready.

    Raises:
      RuntimeError: if it ends before it is ready.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with status {process.wait()} before it was ready")
        yield {**json.loads(line), "pid": process.pid}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def server_samples(http: str) -> list[tuple[str, str, str]]:
    """Name, labels and value of every sample of a server's metrics."""
    with urllib.request.urlopen(f"http://{http}/metrics") as response:
        return _SAMPLE.findall(response.read().decode())
