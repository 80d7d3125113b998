"""MovieLens in GroupLens' own files: u.data, u.user and u.item of the 100K set.

Harper and Konstan, ACM TiiS 2015, https://doi.org/10.1145/2827872; the data may not be redistributed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec import Column, Ragged, StringColumn, take
from xlarank.training.data import RankingData, Splits

__all__ = ["NUM_GENRES", "read"]

NUM_GENRES = 19
"""Genre flags a film in u.item has; genre ids are 0..18 in their order."""

_LIKED = 4
_LOVED = 5
_USER_FIELDS = 5
_ITEM_FIELDS = 5 + NUM_GENRES


def read(
    path: Path, *, test_share: float = 0.1, validation_share: float = 0.1, max_history: int = 50
) -> Splits:
    """Reads ratings as ranking requests.

    Each user's last ratings by time are the test set, those before them the validation set. A request is
    one moment of a user: in training each distinct timestamp (ratings given at the same second share it);
    in validation and test one moment a user, the end of what came before, so that no label of the split
    reaches a feature and a request ranks many films, as a served one does.

    Features: context ``user_id`` int64, ``age`` float32, ``gender`` and ``occupation`` strings, ``history``
    int64 ids of films rated 4 or 5 strictly before the moment, oldest first; candidate ``item_id`` int64,
    ``genres`` int64 bag, ``year`` float32 (NaN when unknown). Labels: ``like`` (rating of 4 or 5) and
    ``love`` (5).

    Args:
      path: folder that holds u.data, u.user and u.item.
      test_share: share of a user's ratings in the test set, rounded up.
      validation_share: share of a user's ratings in the validation set, rounded up.
      max_history: most films in a history; the latest stay.

    Raises:
      ConfigError: when a file is missing or a line of it isn't what GroupLens writes, or shares don't fit.
    """
    if not (test_share > 0 and validation_share > 0 and test_share + validation_share < 1):
        raise ConfigError(
            f"movielens: expected shares > 0 with a sum < 1, got test_share {test_share} and "
            f"validation_share {validation_share}"
        )
    if max_history < 1:
        raise ConfigError(f"movielens: max_history must be >= 1; was {max_history}")
    users, user_columns = _read_users(path / "u.user")
    items, item_columns = _read_items(path / "u.item")
    ratings = _read_ratings(path / "u.data")
    user, item, rating, time = ratings[np.lexsort((ratings[:, 3], ratings[:, 0]))].T
    user_row = _position(users, user, path / "u.data", "user")
    item_row = _position(items, item, path / "u.data", "item")

    begins = np.flatnonzero(np.diff(user, prepend=user[0] - 1))  # of each user's ratings
    sizes = np.diff(begins, append=len(user))
    num_test = np.ceil(sizes * test_share).astype(np.int64)
    num_validation = np.ceil(sizes * validation_share).astype(np.int64)
    from_end = np.repeat(begins + sizes, sizes) - np.arange(len(user))  # 1 for the last rating of a user
    is_test = from_end <= np.repeat(num_test, sizes)
    is_validation = ~is_test & (from_end <= np.repeat(num_test + num_validation, sizes))

    new_moment = np.diff(user, prepend=user[0] - 1).astype(bool) | np.diff(time, prepend=time[0]).astype(bool)
    splits = {}
    for name, chosen in (
        ("train", ~is_test & ~is_validation),
        ("validation", is_validation),
        ("test", is_test),
    ):
        rows = np.flatnonzero(chosen)
        by_moment = name == "train"
        # The first row of the request that each row belongs to: of its moment, or of its user's split.
        starts = new_moment[rows] if by_moment else np.diff(user[rows], prepend=user[rows[0]] - 1) != 0
        request_of_row = np.cumsum(starts) - 1
        first = rows[np.flatnonzero(starts)]
        if not by_moment:
            # Ratings of the same second as the split's first are not before it.
            first = _first_of_moment(new_moment, first)
        splits[name] = RankingData(
            contexts={
                **{key: take(column, user_row[first]) for key, column in user_columns.items()},
                "history": _history(item, rating >= _LIKED, np.repeat(begins, sizes), first, max_history),
            },
            candidates={key: take(column, item_row[rows]) for key, column in item_columns.items()},
            request_of_row=request_of_row,
            labels={
                "like": (rating[rows] >= _LIKED).astype(np.float32),
                "love": (rating[rows] >= _LOVED).astype(np.float32),
            },
            groups=user[first],
            items=item[rows],
        )
    return Splits(**splits)


def _first_of_moment(new_moment: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first rating of the moment that each row belongs to."""
    firsts = np.flatnonzero(new_moment)
    return firsts[np.searchsorted(firsts, rows, side="right") - 1]


def _history(
    item: np.ndarray, liked: np.ndarray, user_begin: np.ndarray, moments: np.ndarray, limit: int
) -> Ragged:
    """Liked items of the same user before each moment's first row, oldest first, at most `limit`."""
    liked_rows = np.flatnonzero(liked)
    ends = np.searchsorted(liked_rows, moments)
    begins = np.maximum(np.searchsorted(liked_rows, user_begin[moments]), ends - limit)
    lengths = ends - begins
    flat = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    return Ragged(item[liked_rows[flat]], lengths.astype(np.int32))


def _read_ratings(path: Path) -> np.ndarray:
    """[n, 4] int64: user, item, rating, time."""
    rows = []
    for number, fields in _lines(path, "\t", 4):
        rows.append([_int(value, path, number) for value in fields])
        if not 1 <= rows[-1][2] <= 5:
            raise ConfigError(f"{path}, line {number}: expected a rating of 1 to 5, got {rows[-1][2]}")
    return np.array(rows, np.int64)


def _read_users(path: Path) -> tuple[np.ndarray, dict[str, Column]]:
    ids, ages, genders, occupations = [], [], [], []
    for number, fields in _lines(path, "|", _USER_FIELDS):
        ids.append(_int(fields[0], path, number))
        ages.append(_int(fields[1], path, number))
        genders.append(fields[2])
        occupations.append(fields[3])
    return np.array(ids, np.int64), {
        "user_id": np.array(ids, np.int64),
        "age": np.array(ages, np.float32),
        "gender": StringColumn.from_strings(genders),
        "occupation": StringColumn.from_strings(occupations),
    }


def _read_items(path: Path) -> tuple[np.ndarray, dict[str, Column]]:
    ids, years, genres = [], [], []
    for number, fields in _lines(path, "|", _ITEM_FIELDS):
        ids.append(_int(fields[0], path, number))
        # "01-Jan-1995"; empty for the few films without a date.
        years.append(float(_int(fields[2][-4:], path, number)) if fields[2] else math.nan)
        flags = [_int(value, path, number) for value in fields[-NUM_GENRES:]]
        genres.append([genre for genre, flag in enumerate(flags) if flag])
    return np.array(ids, np.int64), {
        "item_id": np.array(ids, np.int64),
        "year": np.array(years, np.float32),
        "genres": Ragged.from_bags(genres),
    }


def _lines(path: Path, separator: str, num_fields: int) -> list[tuple[int, list[str]]]:
    """Line numbers from 1 and fields of the lines that aren't empty."""
    try:
        text = path.read_text(encoding="latin-1")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; expected a folder with u.data, u.user and u.item of MovieLens 100K "
            f"(`make movielens` brings them)"
        ) from None
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split(separator)
        if len(fields) != num_fields:
            raise ConfigError(f"{path}, line {number}: expected {num_fields} fields, got {len(fields)}")
        lines.append((number, fields))
    if not lines:
        raise ConfigError(f"{path}: expected at least one line, got an empty file")
    return lines


def _int(text: str, path: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{path}, line {line}: expected an integer, got {text!r}") from None


def _position(ids: np.ndarray, values: np.ndarray, path: Path, kind: str) -> np.ndarray:
    """Index in `ids` of each value."""
    order = np.argsort(ids)
    at = np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)
    rows = order[at]
    if (unknown := ids[rows] != values).any():
        raise ConfigError(f"{path}: {kind} {values[np.argmax(unknown)]} is not in u.{kind}")
    return rows
