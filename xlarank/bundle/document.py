"""Strict JSON with a digest of itself: `render`, `parse`, `Fields`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from xlarank.errors import BundleError, ConfigError

__all__ = ["DIGEST_KEY", "FORMAT_VERSION", "Fields", "parse", "render"]

FORMAT_VERSION = 5
"""Of the bundles that this code writes and reads."""

DIGEST_KEY = "digest"
"""Last key of a document: sha256 of the text that the other keys render to."""

_T = TypeVar("_T")


def render(document: Mapping[str, Any]) -> str:
    """The one text of a document, its digest added.

    Args:
      document: JSON values; `FORMAT_VERSION` under ``format_version``.

    Raises:
      ConfigError: for a value that JSON can't hold, such as an infinite number.
    """
    plain = {key: value for key, value in document.items() if key != DIGEST_KEY}
    try:
        digest = hashlib.sha256(_text(plain).encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"manifest: not a JSON value: {error}") from error
    return _text({**plain, DIGEST_KEY: digest})


def parse(data: bytes, file: str) -> dict[str, Any]:
    """Reads what `render` wrote; any changed byte is found.

    Args:
      data: the file's content.
      file: name of the file, for messages.

    Returns:
      The document without its digest.

    Raises:
      BundleError: if it isn't JSON, is of another format version (which is looked at before anything
        else), or differs from what was written.
    """
    try:
        document = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(
            f"{file}: not whole: {len(data)} bytes that are no JSON document: {error}"
        ) from error
    if not isinstance(document, dict):
        raise BundleError(f"{file}: expected a JSON object, got {type(document).__name__}")
    found = document.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise BundleError(
            f"{file}: format version {_short(found)}; this xlarank reads version {FORMAT_VERSION}; "
            f"compile the model again, or install the xlarank that wrote it"
        )
    written = document.pop(DIGEST_KEY, None)
    try:
        text = _text(document)
        rendered = _text({**document, DIGEST_KEY: written}).encode()
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity, which is never written
        raise BundleError(f"{file}: damaged or edited: {error}") from error
    expected = hashlib.sha256(text.encode()).hexdigest()
    if written != expected:
        raise BundleError(
            f"{file}: damaged or edited: its digest says {_short(written)}, its content has {expected}"
        )
    # The digest is of values; this finds what doesn't change them, such as a space or a repeated key.
    if data != rendered:
        raise BundleError(
            f"{file}: damaged or edited: expected the {len(rendered)} bytes that its values are written as, "
            f"got {len(data)} bytes that differ"
        )
    return document


class Fields:
    """Takes typed values out of a JSON object; what is missing, ill-typed or left over is an error."""

    def __init__(self, value: Any, where: str) -> None:
        """Raises BundleError if `value` is no JSON object. `where` begins every message."""
        self._where = where
        if not isinstance(value, dict):
            self._refuse(f"expected an object, got {_short(value)}")
        self._values = dict(value)

    def take(self, key: str, kind: type[_T]) -> _T:
        """A value whose type is `kind` exactly: a bool is no int."""
        value = self._pop(key)
        if type(value) is not kind:
            self._refuse(f"{key!r}: expected {kind.__name__}, got {_short(value)}")
        return value

    def take_optional(self, key: str, kind: type[_T]) -> _T | None:
        """A value of this type, or null."""
        if key in self._values and self._values[key] is None:
            return self._values.pop(key)
        return self.take(key, kind)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._pop(key)
        # Compared, not converted: an int may be too large for a float.
        if type(value) not in (int, float) or not -1.7e308 < value < 1.7e308:
            self._refuse(f"{key!r}: expected a finite number, got {_short(value)}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or null."""
        if key in self._values and self._values[key] is None:
            return self._values.pop(key)
        return self.number(key)

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.take(key, list)
        for value in values:
            if type(value) is not str:
                self._refuse(f"{key!r}: expected strings, got {_short(value)}")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers."""
        values = self.take(key, list)
        for value in values:
            if type(value) is not int:
                self._refuse(f"{key!r}: expected integers, got {_short(value)}")
        return tuple(values)

    def texts(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        fields = self.fields(key)
        return {name: fields.take(name, str) for name in list(fields._values)}

    def numbers(self, key: str) -> dict[str, float]:
        """An object whose values are finite numbers."""
        fields = self.fields(key)
        return {name: fields.number(name) for name in list(fields._values)}

    def fields(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self.take(key, dict), f"{self._where}: {key}")

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        values = self.take(key, list)
        return [Fields(value, f"{self._where}: {key}[{i}]") for i, value in enumerate(values)]

    def named_objects(self, key: str) -> dict[str, Fields]:
        """An object whose values are objects."""
        return {
            name: Fields(v, f"{self._where}: {key}[{name!r}]") for name, v in self.take(key, dict).items()
        }

    def finish(self) -> None:
        """Raises BundleError if a key was not taken."""
        if self._values:
            self._refuse(f"unknown keys {sorted(self._values)}")

    def _pop(self, key: str) -> Any:
        if key not in self._values:
            self._refuse(f"{key!r} is missing")
        return self._values.pop(key)

    def _refuse(self, message: str) -> NoReturn:
        raise BundleError(f"{self._where}: {message}")


def _text(document: Mapping[str, Any]) -> str:
    """One line a value of the first two levels: a person can read it, the C encoder writes it.

    (`json.dumps(indent=…)` runs in Python: a second for a vocabulary of a million.)
    """
    lines = ",\n".join(f"  {_dump(key)}: {_value_text(value)}" for key, value in document.items())
    return f"{{\n{lines}\n}}\n"


def _value_text(value: Any) -> str:
    if isinstance(value, dict) and value:
        lines = ",\n".join(f"    {_dump(key)}: {_dump(item)}" for key, item in value.items())
        return f"{{\n{lines}\n  }}"
    if isinstance(value, list) and value:
        lines = ",\n".join(f"    {_dump(item)}" for item in value)
        return f"[\n{lines}\n  ]"
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
