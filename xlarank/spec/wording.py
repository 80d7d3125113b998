"""Counts in messages: `counted`."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: ``1 row``, ``2 rows``, ``1,024 rows``.

    Args:
      count: how many.
      noun: of one.
      plural: of any other number; by default the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
