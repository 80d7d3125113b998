"""A made-up video feed whose true probabilities are known: `write_feed` makes it, `read` reads it back.

A user has a taste, 4 numbers that come from their country, their age and chance; a video has 4 numbers
that come from its topics and its creator. Their dot product is the affinity a, and with the creator's
quality c, the duration d, the popularity p, the sharing appeal s of the topics, each scaled to about 1:

    logit finish = -0.7 + 1.5 a + 0.6 c - 0.5 d
    logit share  = -3.2 + 1.2 a + 0.7 s + 0.4 p

Taste is never shown. A watch history, drawn in favour of affinity, stands in for it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xlarank.errors import ConfigError
from xlarank.spec import Column, Ragged, StringColumn
from xlarank.training.data import RankingData, Splits

__all__ = ["TASKS", "FeedSize", "read", "write_feed"]

TASKS = ("finish", "share")
"""Label columns; ``true_<task>`` holds the probability that each was drawn with."""

_NUM_TASTES = 4
_NUM_TOPICS = 40
_COUNTRIES = ("BR", "CA", "DE", "FR", "GB", "IN", "JP", "MX", "NO", "PL", "SE", "US")
_MAX_WATCHED = 60
_MAX_HISTORY = 30
_SPLITS = ("train", "validation", "test")
_CONTEXTS, _CANDIDATES = "contexts.parquet", "candidates.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedSize:
    """How much of a feed to make."""

    users: int = 3000
    """Users; each split draws from all of them."""

    videos: int = 2000
    """Videos."""

    creators: int = 200
    """Creators of the videos."""

    train: tuple[int, int] = (10_000, 12)
    """Requests and candidates a request."""

    validation: tuple[int, int] = (1_000, 12)
    """Likewise."""

    test: tuple[int, int] = (100, 500)
    """Likewise; as many candidates as a ranking request in production has."""

    def __post_init__(self) -> None:
        for name in ("users", "videos", "creators"):
            if getattr(self, name) < 1:
                raise ConfigError(f"feed: {name} must be >= 1; was {getattr(self, name)}")
        for name in _SPLITS:
            requests, candidates = getattr(self, name)
            if requests < 1 or not 1 <= candidates <= self.videos:
                raise ConfigError(
                    f"feed: {name} must be requests >= 1 and candidates in [1, {self.videos}], one a video; "
                    f"was {(requests, candidates)}"
                )


@dataclasses.dataclass(frozen=True)
class _World:
    """Users and videos, columns of equal length each, and what only the ground truth knows."""

    users: dict[str, Any]
    videos: dict[str, Any]
    taste: np.ndarray  # [users, 4]
    style: np.ndarray  # [videos, 4]
    watched: np.ndarray  # [users, 60] video ids, oldest first


def write_feed(path: Path | str, *, seed: int = 0, size: FeedSize | None = None) -> None:
    """Makes a feed and writes it as Parquet; the same for the same seed and size.

    Args:
      path: folder; gets ``train``, ``validation`` and ``test``, each with contexts.parquet and
        candidates.parquet.
      seed: of everything that is drawn.
      size: how much.
    """
    size = size or FeedSize()
    rng = np.random.default_rng(seed)
    world = _make_world(rng, size)
    for split in _SPLITS:
        folder = Path(path) / split
        folder.mkdir(parents=True, exist_ok=True)
        contexts, candidates = _draw_requests(rng, world, *getattr(size, split))
        pq.write_table(pa.table(contexts), folder / _CONTEXTS)
        pq.write_table(pa.table(candidates), folder / _CANDIDATES)


def read(path: Path) -> Splits:
    """Reads what `write_feed` wrote.

    Features: context ``age`` float32, ``country`` string, ``hour`` int64 in [0, 24), ``history`` int64 ids
    of the videos watched last, oldest first; candidate ``video_id`` int64, ``creator`` string, ``topics``
    int64 bag in [0, 40), ``duration`` (seconds), ``plays`` and ``comments`` float32. Labels: ``finish`` and
    ``share``.

    Args:
      path: the folder.

    Raises:
      ConfigError: when a file is missing or lacks a column.
    """
    return Splits(**{split: _read_split(path / split) for split in _SPLITS})


def _make_world(rng: np.random.Generator, size: FeedSize) -> _World:
    age = np.clip(rng.gamma(6.0, 5.0, size.users) + 13, 13, 90).astype(np.float32)
    country = rng.integers(0, len(_COUNTRIES), size.users)
    taste = 0.6 * rng.normal(size=(len(_COUNTRIES), _NUM_TASTES))[country]
    taste += 0.6 * rng.normal(size=_NUM_TASTES) * _scaled(age)[:, None]
    taste += 0.6 * rng.normal(size=(size.users, _NUM_TASTES))

    creator = (size.creators * rng.random(size.videos) ** 2).astype(np.int64)  # some make most videos
    num_topics = rng.integers(1, 5, size.videos)
    topics = [rng.choice(_NUM_TOPICS, count, replace=False) for count in num_topics]
    topic_style = rng.normal(size=(_NUM_TOPICS, _NUM_TASTES))
    style = np.stack([topic_style[chosen].mean(axis=0) for chosen in topics])
    style += 0.5 * rng.normal(size=(size.creators, _NUM_TASTES))[creator]
    quality = rng.normal(size=size.creators)[creator]
    appeal = rng.normal(size=_NUM_TOPICS)
    duration = np.exp(rng.normal(3.3, 0.7, size.videos)).astype(np.float32)
    plays = np.floor(np.exp(6 + 0.8 * quality + rng.normal(size=size.videos))).astype(np.float32)
    comments = np.floor(plays * rng.beta(2, 60, size.videos)).astype(np.float32)

    # Watched: the highest affinities after Gumbel noise, which draws in favour of affinity without repeats.
    noisy = 3 * _affinity(taste, style) + rng.gumbel(size=(size.users, size.videos))
    num_watched = min(_MAX_WATCHED, size.videos)
    watched = np.argpartition(-noisy, num_watched - 1, axis=1)[:, :num_watched]
    return _World(
        users={"age": age, "country": np.array(_COUNTRIES)[country]},
        videos={
            "creator": np.char.add("creator_", creator.astype(str)),
            "topics": topics,
            "duration": duration,
            "plays": plays,
            "comments": comments,
            "quality": quality,
            "appeal": np.array([appeal[chosen].mean() for chosen in topics]),
        },
        taste=taste,
        style=style,
        watched=rng.permuted(watched, axis=1),
    )


def _draw_requests(
    rng: np.random.Generator, world: _World, num_requests: int, num_candidates: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of contexts and candidates."""
    users, videos = world.users, world.videos
    user = rng.integers(0, len(world.taste), num_requests)
    ends = rng.integers(0, world.watched.shape[1] + 1, num_requests)  # a user without history is possible
    history = [world.watched[u, max(0, end - _MAX_HISTORY) : end] for u, end in zip(user, ends, strict=True)]
    contexts = {
        "user": user,
        "age": users["age"][user],
        "country": users["country"][user],
        "hour": rng.integers(0, 24, num_requests),
        "history": pa.array(history, pa.list_(pa.int64())),
    }
    draws = [rng.choice(len(world.style), num_candidates, replace=False) for _ in range(num_requests)]
    video = np.concatenate(draws)
    request = np.repeat(np.arange(num_requests), num_candidates)
    affinity = np.einsum("nk,nk->n", world.taste[user[request]], world.style[video]) / np.sqrt(_NUM_TASTES)
    popularity, length = _scaled(np.log1p(videos["plays"])), _scaled(np.log(videos["duration"]))
    logits = {
        "finish": -0.7 + 1.5 * affinity + 0.6 * videos["quality"][video] - 0.5 * length[video],
        "share": -3.2 + 1.2 * affinity + 0.7 * videos["appeal"][video] + 0.4 * popularity[video],
    }
    candidates: dict[str, Any] = {
        "request": request,
        "video_id": video,
        "topics": pa.array([videos["topics"][v] for v in video], pa.list_(pa.int64())),
        **{name: videos[name][video] for name in ("creator", "duration", "plays", "comments")},
    }
    for task in TASKS:
        truth = 1 / (1 + np.exp(-logits[task]))
        candidates[task] = (rng.random(len(truth)) < truth).astype(np.float32)
        candidates[f"true_{task}"] = truth.astype(np.float32)
    return contexts, candidates


def _affinity(taste: np.ndarray, style: np.ndarray) -> np.ndarray:
    """[users, videos]."""
    return taste @ style.T / np.sqrt(_NUM_TASTES)


def _scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _read_split(folder: Path) -> RankingData:
    contexts = _read_table(folder / _CONTEXTS, ("user", "age", "country", "hour", "history"))
    columns = ("video_id", "creator", "topics", "duration", "plays", "comments")
    truths = tuple(f"true_{task}" for task in TASKS)
    candidates = _read_table(folder / _CANDIDATES, ("request", *columns, *TASKS, *truths))
    return RankingData(
        contexts={name: contexts[name] for name in ("age", "country", "hour", "history")},
        candidates={name: candidates[name] for name in columns},
        request_of_row=candidates["request"],
        labels={task: candidates[task] for task in TASKS},
        groups=contexts["user"],
        items=candidates["video_id"],
        truth={task: candidates[f"true_{task}"] for task in TASKS},
    )


def _read_table(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Columns of a Parquet file by name."""
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; expected a feed that xlarank.training.feed.write_feed wrote"
        )
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path}: expected a Parquet file: {error}") from error
    if missing := sorted(set(names) - set(table.column_names)):
        raise ConfigError(f"{path}: columns {missing} are missing; it has {table.column_names}")
    return {name: _column(table.column(name).combine_chunks()) for name in names}


def _column(array: pa.Array) -> Column:
    if pa.types.is_list(array.type):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
        return Ragged(array.flatten().to_numpy(zero_copy_only=False).astype(np.int64), lengths)
    if pa.types.is_string(array.type):
        return StringColumn.from_strings(array.to_pylist())
    return array.to_numpy(zero_copy_only=False)
