"""What of the log a command shows: `set_log_levels`."""

from __future__ import annotations

import logging

from absl import logging as absl_logging

__all__ = ["set_log_levels"]


def set_log_levels(*, is_server: bool = False) -> None:
    """Warnings and errors; of a server that its versions and processes come and go, too."""
    # absl's default, INFO, shows every step of JAX and Orbax.
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("xlarank", "xlarank_serving"):
        logging.getLogger(name).setLevel(logging.INFO if is_server else logging.NOTSET)
