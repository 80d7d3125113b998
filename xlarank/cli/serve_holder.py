"""The process that holds the tables of `xlarank serve --processes k`: ``python -m xlarank.cli.serve_holder
FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import logging

from xlarank.cli.log_levels import server_log, set_log_levels
from xlarank.cli.serve_processes import hold_and_serve

if __name__ == "__main__":
    # As in the command itself.
    logging.use_absl_handler()
    set_log_levels()
    with server_log():
        sys.exit(hold_and_serve(Path(sys.argv[1])))
