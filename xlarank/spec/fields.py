"""What the fields of the nouns may hold: checks that name the field and the value."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from xlarank.errors import ConfigError

__all__ = [
    "check_keys",
    "check_name",
    "check_strings",
    "check_wait",
    "from_mapping",
    "from_words",
    "set_enum",
    "to_integer",
    "to_number",
    "to_numbers",
    "to_tuple",
]

_Enum = TypeVar("_Enum", bound=enum.StrEnum)
_Noun = TypeVar("_Noun")

# Names become file and folder names, which hold 255 bytes at most.
_MAX_NAME = 128
_NAME = re.compile(r"[a-z][a-z0-9_]*")

_MAX_SECONDS = 1e8
"""Three years; threads can't wait for ever so long."""


def check_name(kind: str, name: Any) -> None:
    """Refuses what isn't a name of [a-z][a-z0-9_]*, at most 128 characters."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ConfigError(
            f"{kind}: expected a name of [a-z][a-z0-9_]*, at most {_MAX_NAME} characters, got {name!r}"
        )


def check_strings(where: str, values: Iterable[str]) -> None:
    """Refuses strings that have no UTF-8, which is how strings are hashed and looked up."""
    for value in values:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: expected valid Unicode, got {value!r}: {error.reason}") from None


def check_wait(where: str, field: str, value: float, *, unit_seconds: float = 1.0) -> None:
    """Refuses a time for which threads can't wait."""
    if value > _MAX_SECONDS / unit_seconds:
        raise ConfigError(f"{where}: {field} must be <= {_MAX_SECONDS / unit_seconds:g}; was {value!r}")


def set_enum(instance: Any, field: str, enumeration: type[_Enum], where: str) -> None:
    """Turns a frozen dataclass's field into a member of an enumeration; its value will do."""
    value = getattr(instance, field)
    try:
        object.__setattr__(instance, field, enumeration(value))
    except ValueError:
        allowed = [member.value for member in enumeration]
        raise ConfigError(f"{where}: {field} must be one of {allowed}; was {value!r}") from None


def from_words(
    kind: str, text: str, head: str, readers: Mapping[str, Callable[[str], Any]]
) -> tuple[str, dict[str, Any]]:
    """What a text such as ``feed.features,misses=fetch`` says: what comes first, and fields behind it.

    Args:
      kind: what the text is of, for messages.
      text: of the command line or of a file.
      head: stands for what comes first, in messages.
      readers: by name, what makes a field's value; ValueError for none.

    Raises:
      ConfigError: for a field that there isn't, or that is no such value.
    """
    first, *pairs = text.split(",")
    given = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    if unknown := [name for name in given if name not in readers]:
        raise ConfigError(
            f"{kind} {text}: expected {head},FIELD=VALUE,... of {sorted(readers)}, got {unknown}"
        )
    fields: dict[str, Any] = {}
    for name, value in given.items():
        try:
            fields[name] = readers[name](value)
        except ValueError as error:
            raise ConfigError(f"{kind} {text}: {name}: {error}") from None
    return first, fields


def to_integer(where: str, field: str, value: Any, *, least: int, below: int | None = None) -> int:
    """An int in [least, below) from an int or a NumPy integer; large bounds are powers of two."""
    valid = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if valid and value >= least and (below is None or value < below):
        return int(value)
    low = least if least >= 0 else f"-2**{least.bit_length() - 1}"
    bounds = f">= {low}" if below is None else f"in [{low}, 2**{below.bit_length() - 1})"
    raise ConfigError(f"{where}: {field} must be an integer {bounds}; was {value!r}")


def to_number(where: str, field: str, value: Any) -> float:
    """A finite number from an int, a float or a NumPy scalar of either; ints stay as they are written."""
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if finite:
            return value
    raise ConfigError(f"{where}: {field} must be a finite number; was {value!r}")


def to_numbers(where: str, field: str, value: Any) -> tuple[float, ...]:
    """Finite floats from a list, a tuple or a [n] array of numbers."""
    return tuple(to_number(where, field, item) for item in to_tuple(where, field, value))


def to_tuple(where: str, field: str, value: Any) -> tuple[Any, ...]:
    """A tuple from a list, a tuple or a [n] array."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return tuple(value.tolist())
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: {field} must be a list; was {value!r}")
    return tuple(value)


def check_keys(value: Any, known: Iterable[str], where: str, *, required: Iterable[str] = ()) -> None:
    """Refuses what isn't a mapping, and one with unknown or missing keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a table of keys and values, got {value!r}")
    known = list(known)
    if unknown := [key for key in value if key not in known]:
        raise ConfigError(f"{where}: unknown keys {sorted(unknown, key=str)}; expected of {known}")
    if missing := [key for key in required if key not in value]:
        raise ConfigError(f"{where}: missing keys {missing}")


def from_mapping(cls: type[_Noun], value: Any, kind: str) -> _Noun:
    """Builds a dataclass from TOML or JSON values; unknown and missing keys are named."""
    where = f"{kind} {value['name']!r}" if isinstance(value, Mapping) and "name" in value else kind
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    check_keys(value, [field.name for field in fields], where, required=required)
    return cls(**value)
