"""Data readers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.spec.config import ModelConfig
from xlarank.spec.references import resolve
from xlarank.training.data import Splits

__all__ = ["READERS", "read_data"]

READERS = {
    "movielens": "xlarank.training.movielens:read",
    "random": "xlarank.training.random_data:read",
    "synthetic_feed": "xlarank.training.feed:read",
}
"""Readers that come with xlarank, as ``module:function``."""


def read_data(config: ModelConfig, path: Path | str) -> Splits:
    """Reads a model's data with the reader that its config names.

    Args:
      config: the model's; a reader of the form ``module:function`` is looked for in its folder first.
      path: folder of the data, ``--data``.

    Raises:
      ConfigError: when there is no such reader, it doesn't take the config's options, or it refuses what lies
        in the folder.
    """
    data = config.data_or_raise()
    if ":" not in data.reader and data.reader not in READERS:
        raise ConfigError(
            f"{config.path}: expected a reader of {sorted(READERS)} or 'module:function', got {data.reader!r}"
        )
    read: Callable[..., Splits] = resolve(READERS.get(data.reader, data.reader), folders=[config.folder])
    try:
        inspect.signature(read).bind(Path(path), **data.options)
    except TypeError as error:
        raise ConfigError(f"{config.path}: [data] options of reader {data.reader!r}: {error}") from error
    splits = read(Path(path), **data.options)
    if not isinstance(splits, Splits):
        raise ConfigError(
            f"reader {data.reader!r}: expected it to return Splits, got {type(splits).__name__}"
        )
    return splits
