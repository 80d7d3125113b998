"""What of the log a command shows: `set_log_levels`, `server_log`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from absl import logging as absl_logging

__all__ = ["server_log", "set_log_levels"]


def set_log_levels() -> None:
    """Warnings and errors alone."""
    # absl's default, INFO, shows every step of JAX and Orbax.
    absl_logging.set_verbosity(absl_logging.WARNING)


@contextlib.contextmanager
def server_log() -> Iterator[None]:
    """Until the end of the block also how versions and processes come and go."""
    loggers = [logging.getLogger(name) for name in ("xlarank", "xlarank_serving")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
