"""Traces by hotness: how unevenly the rows of a table are read.

The presets are shaped after two single-table extracts of production-like traces (500K rows; from the artifact
of Jain et al., ISCA 2023, doi 10.1145/3579371.3589112): a lognormal body over the rows in use, and a small
head of hot ones. A Zipf law with as many distinct rows would give the ten hottest up to 30 times the accesses
that they really have.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from xlarank.errors import ConfigError

__all__ = ["Hotness", "Popularity", "lognormal_lengths", "popularity", "trace"]

_MEAN_LENGTH = 13.6
"""Mean ids a bag of the public dlrm_datasets of 2022."""


class Hotness(enum.Enum):
    """A preset, from all accesses on one row to all rows alike."""

    ONE_ITEM = "one_item"
    HIGH = "high"
    """About 3% of 400K accesses to 500K rows are of distinct rows; a guess, its source could not be read."""
    MED = "med"
    """About 24% are."""
    LOW = "low"
    """About 60% are."""
    RANDOM = "random"
    """Every row is as likely as every other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Preset:
    """Shape of one preset."""

    active_share: float
    """Of all rows: those that are read at all; at least one."""

    sigma: float = 0
    """Of the logarithm of a row's popularity."""

    head_rows: int = 0
    """Rows that get `head_share` on top; at most half of the active ones."""

    head_share: float = 0
    """Of all accesses."""

    head_exponent: float = 0
    """The k-th row of the head, from 1, gets a part proportional to (k + head_shift) ** -head_exponent."""

    head_shift: float = 0
    """Flattens the first rows of the head."""


# Fitted to the shares of the top 10, 100, 1K, 10K and 60K rows and of distinct rows: within 10% each.
_PRESETS = {
    Hotness.ONE_ITEM: _Preset(active_share=0),
    Hotness.HIGH: _Preset(active_share=0.024, sigma=1.2, head_rows=50, head_share=0.05, head_exponent=0.6),
    Hotness.MED: _Preset(active_share=0.28, sigma=1.05, head_rows=50, head_share=0.015, head_exponent=0.7),
    Hotness.LOW: _Preset(
        active_share=1, sigma=0.65, head_rows=3000, head_share=0.06, head_exponent=0.9, head_shift=20
    ),
    Hotness.RANDOM: _Preset(active_share=1),
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Popularity:
    """How likely each row in use is to be read."""

    rows: np.ndarray
    """[A] int64, distinct row numbers, scattered over the table as hashing scatters them."""

    shares: np.ndarray
    """[A] float64, > 0, of all accesses; they sum to 1."""


def popularity(num_rows: int, hotness: Hotness | str, rng: np.random.Generator) -> Popularity:
    """Draws which rows of a table are in use and how popular each is.

    Args:
      num_rows: R, >= 1. The rows in use are a fixed share of them; the head has its size whatever R is.
      hotness: the preset, or its name.
      rng: drawn from.

    Raises:
      ConfigError: if num_rows < 1, or for a name that is no preset's.
    """
    if num_rows < 1:
        raise ConfigError(f"popularity: num_rows must be >= 1; was {num_rows}")
    try:
        preset = _PRESETS[Hotness(hotness)]
    except ValueError:
        raise ConfigError(
            f"popularity: hotness must be one of {[preset.value for preset in Hotness]}; was {hotness!r}"
        ) from None
    num_active = max(1, round(preset.active_share * num_rows))
    shares = np.exp(preset.sigma * rng.standard_normal(num_active))
    num_head = min(preset.head_rows, num_active // 2)
    if num_head:
        head = (np.arange(1, num_head + 1) + preset.head_shift) ** -preset.head_exponent
        shares *= (1 - preset.head_share) / shares.sum()
        shares[:num_head] += head * (preset.head_share / head.sum())
    shares /= shares.sum()
    return Popularity(rows=rng.permutation(num_rows)[:num_active], shares=shares)


def trace(num_rows: int, num_accesses: int, hotness: Hotness | str, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of independent accesses to one table.

    Independent: a row read just now is no likelier to come again than its popularity says. Cut it into
    batches as you like; all of them have one popularity.

    Args:
      num_rows: R, >= 1.
      num_accesses: V, >= 0.
      hotness: the preset, or its name.
      rng: drawn from.

    Returns:
      [V] int64, each in [0, R).

    Raises:
      ConfigError: for sizes out of these ranges, or a name that is no preset's.
    """
    if num_accesses < 0:
        raise ConfigError(f"trace: num_accesses must be >= 0; was {num_accesses}")
    drawn = popularity(num_rows, hotness, rng)
    # How often each row comes, then the order: distributed as a draw an access, and faster.
    ids = np.repeat(drawn.rows, rng.multinomial(num_accesses, drawn.shares))
    rng.shuffle(ids)
    return ids


def lognormal_lengths(
    num_bags: int, rng: np.random.Generator, *, mean: float = _MEAN_LENGTH, sigma: float = 1.0
) -> np.ndarray:
    """Lengths of bags that differ widely, as in the public dlrm_datasets.

    Args:
      num_bags: B, >= 0.
      rng: drawn from.
      mean: of the lengths, > 0.
      sigma: of their logarithm, >= 0; published is the mean alone.

    Returns:
      [B] int32, >= 0.

    Raises:
      ConfigError: for arguments out of these ranges, or so large that a length is 2**31 or more.
    """
    if num_bags < 0 or not mean > 0 or not sigma >= 0:
        raise ConfigError(
            f"lognormal_lengths: expected num_bags >= 0, mean > 0 and sigma >= 0, got {num_bags}, {mean} and "
            f"{sigma}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = mean * np.exp(sigma * rng.standard_normal(num_bags) - sigma**2 / 2)
    if not (lengths < 2**31 - 1).all():
        raise ConfigError(
            f"lognormal_lengths: expected lengths below 2**31, got {lengths.max():g} of mean {mean} and "
            f"sigma {sigma}"
        )
    return np.floor(lengths + rng.random(num_bags)).astype(np.int32)  # rounded at random: keeps the mean
