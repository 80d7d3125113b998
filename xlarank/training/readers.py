"""Data readers by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.models.loading import resolve
from xlarank.spec.config import DataConfig
from xlarank.training.data import Splits

__all__ = ["READERS", "data_from_provenance", "data_to_provenance", "read_data"]

READERS = {
    "movielens": "xlarank.training.movielens:read",
    "random": "xlarank.training.random_data:read",
    "synthetic_feed": "xlarank.training.feed:read",
}
"""Readers that come with xlarank, as ``module:function``."""

_READER_KEY, _OPTIONS_KEY = "data_reader", "data_options"


def read_data(data: DataConfig, path: Path | str, *, folders: Sequence[Path] = ()) -> Splits:
    """Reads data with the reader that a config names.

    Args:
      data: reader and options.
      path: folder of the data, ``--data``.
      folders: where a reader of the form ``module:function`` is looked for first.

    Raises:
      ConfigError: when there is no such reader, it doesn't take the options, or it refuses what lies in the
        folder.
    """
    if ":" not in data.reader and data.reader not in READERS:
        raise ConfigError(
            f"data: expected a reader of {sorted(READERS)} or 'module:function', got {data.reader!r}"
        )
    read: Callable[..., Splits] = resolve(READERS.get(data.reader, data.reader), folders=folders)
    try:
        inspect.signature(read).bind(Path(path), **data.options)
    except TypeError as error:
        raise ConfigError(f"data: options of reader {data.reader!r}: {error}") from error
    splits = read(Path(path), **data.options)
    if not isinstance(splits, Splits):
        raise ConfigError(
            f"reader {data.reader!r}: expected it to return Splits, got {type(splits).__name__}"
        )
    return splits


def data_to_provenance(data: DataConfig | None) -> dict[str, str]:
    """What a bundle's manifest keeps of a model's data, so that `xlarank evaluate BUNDLE` can read them.

    Options that JSON can't hold, such as dates, are kept as text.
    """
    if data is None:
        return {}
    return {_READER_KEY: data.reader, _OPTIONS_KEY: json.dumps(dict(data.options), default=str)}


def data_from_provenance(provenance: Mapping[str, str]) -> DataConfig:
    """Inverse of `data_to_provenance`, for readers that come with xlarank.

    Raises:
      ConfigError: when there is none, or it is code of the author's: a bundle must not choose what code
        runs, so it has to be named on the command line.
    """
    reader = provenance.get(_READER_KEY)
    if reader is None:
        raise ConfigError("the bundle doesn't say how its data are read; name its config with --config")
    if reader not in READERS:
        raise ConfigError(
            f"the bundle's data are read by {reader!r}; name the config beside it with --config"
        )
    try:
        options = json.loads(provenance.get(_OPTIONS_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"the bundle's {_OPTIONS_KEY}: expected JSON: {error}") from error
    return DataConfig(reader=reader, options=options)
