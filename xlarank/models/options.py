"""From the options of a config file to a model's frozen config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from xlarank.errors import ConfigError

__all__ = ["check_attention", "check_dropout", "check_positive", "check_widths", "from_options"]

T = TypeVar("T")


def from_options(cls: type[T], options: Mapping[str, Any], where: str) -> T:
    """Builds a config dataclass; lists become tuples.

    Args:
      cls: a frozen keyword-only dataclass.
      options: values by field name.
      where: the model's name for messages.

    Raises:
      ConfigError: for an unknown option, or a value that the dataclass refuses.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"{where}: unknown options {unknown}; it has {known}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return cls(**values)


def check_widths(where: str, name: str, widths: Sequence[int], *, min_layers: int = 0) -> None:
    """Raises ConfigError unless `widths` is a tuple of at least `min_layers` ints >= 1."""
    valid = (
        isinstance(widths, tuple) and len(widths) >= min_layers and all(_is_int(w) and w >= 1 for w in widths)
    )
    if not valid:
        some = f"at least {min_layers} widths" if min_layers else "widths"
        raise ConfigError(f"{where}: {name} must be a list of {some} >= 1; was {widths!r}")


def check_positive(where: str, name: str, value: int | None, *, least: int = 1) -> None:
    """Raises ConfigError unless `value` is an int >= `least`."""
    if not _is_int(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{where}: {name} must be an integer >= {least}; was {value!r}")


def check_dropout(where: str, name: str, value: float) -> None:
    """Raises ConfigError unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{where}: {name} must be in [0, 1); was {value!r}")


def check_attention(where: str, attention: Mapping[str, str]) -> None:
    """Raises ConfigError unless `attention` maps names to names."""
    if not isinstance(attention, Mapping) or not all(isinstance(query, str) for query in attention.values()):
        raise ConfigError(
            f"{where}: attention must map a sequence feature to a feature, such as "
            f'{{history = "item_id"}}; was {attention!r}'
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
