"""Candidate features by id, joined to requests as they are admitted: `FeatureStore`."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import reprlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError, FeatureError, UnavailableError, XlarankError
from xlarank.host.feature_columns import FeatureTable, check_joined_bytes, row_bytes
from xlarank.host.feature_fetch import FeatureFetcher, FetchedRows
from xlarank.host.feature_file import FeatureFile
from xlarank.host.feature_schema import FeatureSchema, checked_columns, select_features, shortened
from xlarank.host.feature_source import FeatureRows, FeatureSource, FileSource, UpdatableSource
from xlarank.host.memory import available_memory
from xlarank.spec import (
    Column,
    ModelSpec,
    check_by_name,
    check_candidate_ids,
    default_column,
    join_columns,
    take,
)
from xlarank.spec.fields import check_wait, to_integer, to_number

__all__ = [
    "DEFAULT_FETCH_TIMEOUT_MS",
    "FeatureStore",
    "FeatureStoreStats",
    "MissPolicy",
    "check_cache_bounds",
]

DEFAULT_FETCH_TIMEOUT_MS = 100.0
"""Most that a request waits for a source, unless told otherwise."""

_MIN_MEMORY_BYTES = 2**16

_TICKS_A_SECOND = 16
"""Times of rows are counted in these since the store began: 32 bits of them last eight years."""


class MissPolicy(enum.StrEnum):
    """What becomes of a candidate that the store doesn't have."""

    ERROR = "error"
    """The request is refused; the message names the ids."""

    DEFAULT = "default"
    """Its features are their defaults; every stored feature must have one."""

    FETCH = "fetch"
    """The source is asked and the answer kept; the request is refused if the source hasn't got it either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureStoreStats:
    """What a store holds and did, of one moment."""

    rows: int
    """Candidates that a lookup finds, in memory or in the file."""

    bytes: int
    """Memory of what was put in, over the file of a `FileSource` too; the file's pages are not counted."""

    hits: int
    """Candidates looked up and found."""

    misses: int
    """Candidates looked up and not found, whatever became of them."""

    evictions: int
    """Rows that made room for others, or didn't fit."""

    version: int
    """Updates so far."""

    fetches: int
    """Times that the source was asked and the answer, or failure, has come."""

    fetch_seconds: float
    """Time that it took, summed."""

    fetch_failures: int
    """Requests refused because the source failed, answered wrong or took too long."""

    age_seconds: float
    """Time since the newest update; since the start without one. What a source was asked is no update."""

    oldest_seconds: float
    """Time since the oldest row in memory was put in or asked of the source; 0 without one. Rows of more than
    `max_age_seconds` are no longer found and count until others take their room."""


class FeatureStore:
    """Raw candidate features by int64 id. Any thread may call any method.

    A store is one of three: over a file, mapped, with updates in memory in front of it; a cache of bounded
    memory in front of a source; or in memory alone. A lookup takes no lock and sees each candidate as one
    update left it, never half of one; an update is seen by every `join` that begins after it returns.

    What is put in is checked as a request's features are, so that a bad row is refused where it comes from; a
    joined request is checked again, against its own model.

    Attributes:
      spec: the model that requests are for.
      rows_spec: the model with the stored features alone: what a row is checked against.
      names: of the stored features; a request brings those that aren't.
      misses: what becomes of a candidate that isn't there.
      file: what it reads rows from, itself or by its source; None if from no file.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        file: FeatureFile | None = None,
        source: FeatureSource | None = None,
        without: Collection[str] = (),
        misses: MissPolicy | str = MissPolicy.ERROR,
        memory_bytes: int | None = None,
        max_age_seconds: float | None = None,
        fetch_timeout_ms: float = DEFAULT_FETCH_TIMEOUT_MS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          spec: the model.
          file: rows to begin with.
          source: asked for what isn't there, under policy `fetch`, and written through to if it is an
            `UpdatableSource`.
          without: names of candidate features that requests bring; a file says it itself.
          misses: error, default or fetch.
          memory_bytes: most bytes of rows and their index in memory, for stores without a file; the row that
            was looked up least lately makes room (SIEVE). What a `FileSource` keeps comes on top.
          max_age_seconds: a row in memory is a miss once it was put in, or asked of the source, so long ago
            (a sixteenth of a second less at most); then the policy says what becomes of it, and `fetch` asks
            the source again. None: rows stay until they make room. For stores without a file, whose rows
            have no time.
          fetch_timeout_ms: most that a request waits for the source; see `FeatureFetcher`.
          clock: seconds, monotonic.

        Raises:
          ConfigError: for arguments that don't go together, a file of other features than the model's, policy
            `default` with a feature that has none, or a `memory_bytes` that the machine hasn't got now.
        """
        try:
            self.misses = MissPolicy(misses)
        except ValueError:
            allowed = [policy.value for policy in MissPolicy]
            raise ConfigError(f"feature store: misses must be one of {allowed}; was {misses!r}") from None
        _check_arguments(self.misses, file, source, without, memory_bytes, max_age_seconds)
        check_cache_bounds("feature store", memory_bytes, max_age_seconds, fetch_timeout_ms)
        if memory_bytes is not None:
            _check_memory(memory_bytes)
        self.spec = spec
        schema = file.schema if file is not None else FeatureSchema.of(select_features(spec, without))
        self.rows_spec = schema.rows_spec(spec)
        self.names = schema.names
        if self.misses is MissPolicy.DEFAULT:
            self._check_defaults()
        self._source = source
        self.file = source.file if isinstance(source, FileSource) else file
        max_lengths = schema.max_lengths(spec)
        if file is not None:
            self._table = file.table(max_lengths)
        else:
            self._table = FeatureTable(schema, max_lengths=max_lengths, limit=int(memory_bytes or 0))
        self._where = f"feature source {type(source).__name__} of model {spec.name!r}"
        self._fetcher = FeatureFetcher(self._where, timeout_ms=fetch_timeout_ms, clock=clock)
        self._max_age = None if max_age_seconds is None else int(max_age_seconds * _TICKS_A_SECOND)
        self._clock = clock
        self._started_at = clock()
        self._writing = threading.Lock()  # source and cache see updates in one order
        self._updated_at = self._started_at  # replaced whole, under _writing

    def join(self, ids: Any, features: Mapping[str, Any], *, max_bytes: int | None = None) -> dict[str, Any]:
        """Adds the stored features of candidates to those that a request brings.

        Of a list it adds the last `max_length` ids, which are all that the model reads.

        Args:
          ids: [N] int64; an id may come twice. They are looked up if a stored feature isn't brought.
          features: by name; a stored one that is brought, and isn't None, stays as it is.
          max_bytes: of what is added, counted as raw contents of tensors; None for any number.

        Returns:
          Values by name to make a `RankRequest` of, with `num_candidates` N.

        Raises:
          FeatureError: for features that aren't values by name, and ids that aren't there, under policies
            `error` and `fetch`.
          RequestError: for more bytes, before they are allocated.
          UnavailableError: if the source can't be asked, or doesn't answer in time.
          XlarankError: if it fails, or answers what it wasn't asked, or rows that a request could not have.
        """
        ids = check_candidate_ids(ids)
        check_by_name(self.spec, features)
        wanted = [features.get(name) is None for name in self.names]
        if not any(wanted):
            return dict(features)
        columns, missing = self._table.lookup(ids, wanted, oldest=self._oldest(), max_bytes=max_bytes)
        if len(missing):
            columns = self._completed(ids, wanted, columns, missing, max_bytes)
        names = [name for name, is_wanted in zip(self.names, wanted, strict=True) if is_wanted]
        return {**features, **dict(zip(names, columns, strict=True))}

    def update(self, ids: Any, features: Mapping[str, Any]) -> None:
        """Puts whole rows in, over those of the same ids; every `join` after this returns sees them.

        They go to an `UpdatableSource` first, which then has them for good. Of another source the cache alone
        takes them, until they make room or are too old: update such a source first, then the store.

        Args:
          ids: [n] int64; of an id that comes twice the last row stays.
          features: a value for each stored feature by name, n rows, as `RankRequest` takes them; one with a
            default may be left out, and gets it.

        Raises:
          FeatureError: for anything that a request could not have; nothing is put in then.
        """
        ids = check_candidate_ids(ids)
        columns = checked_columns(self.rows_spec, ids, features)
        with self._writing, self._writing_through():
            if isinstance(self._source, UpdatableSource):
                self._source.update(FeatureRows(ids, dict(zip(self.names, columns, strict=True))))
            self._table.put(ids, shortened(self.rows_spec, columns), time=self._ticks())
            self._fetcher.forget(ids)
            self._updated_at = self._clock()

    def remove(self, ids: Any) -> int:
        """Takes rows out: from then on they are misses, those of a file or an `UpdatableSource` too.

        What another source has is asked of it again: remove it there first.

        Returns:
          How many there were.
        """
        ids = check_candidate_ids(ids)
        with self._writing, self._writing_through():
            in_source = self._source.remove(ids) if isinstance(self._source, UpdatableSource) else None
            in_memory = self._table.remove(ids, time=self._ticks())
            self._fetcher.forget(ids)
            self._updated_at = self._clock()
        return in_memory if in_source is None else in_source

    def stats(self) -> FeatureStoreStats:
        """What it holds and did."""
        fields = self._table.stats()
        del fields["rows_in_memory"]
        oldest = fields.pop("oldest")
        now = self._clock()
        if isinstance(self._source, FileSource):
            fields["bytes"] += self._source.num_bytes
        fetches, fetch_seconds, fetch_failures = self._fetcher.stats()
        return FeatureStoreStats(
            **fields,
            fetches=fetches,
            fetch_seconds=fetch_seconds,
            fetch_failures=fetch_failures,
            age_seconds=now - self._updated_at,
            oldest_seconds=0.0 if oldest < 0 else now - self._started_at - oldest / _TICKS_A_SECOND,
        )

    @contextlib.contextmanager
    def _writing_through(self) -> Iterator[None]:
        """An OSError is the source's, of its connection."""
        try:
            yield
        except OSError as error:
            raise UnavailableError(f"{self._where}: {type(error).__name__}: {error}") from error

    def _ticks(self) -> int:
        """The time of a row put in now."""
        return int((self._clock() - self._started_at) * _TICKS_A_SECOND)

    def _oldest(self) -> int:
        """The earliest time of a row that is still found."""
        return 0 if self._max_age is None else max(0, self._ticks() - self._max_age + 1)

    def _completed(
        self,
        ids: np.ndarray,
        wanted: Sequence[bool],
        found: list[Column],
        missing: np.ndarray,
        max_bytes: int | None,
    ) -> list[Column]:
        """Columns of all N rows: those found, and by the policy those missing."""
        if self.misses is MissPolicy.ERROR:
            raise self._not_found(ids[missing], len(ids))
        order = np.empty(len(ids), np.int64)  # row of the joined columns that is row i
        is_found = np.ones(len(ids), bool)
        is_found[missing] = False
        num_found = len(ids) - len(missing)
        order[is_found] = np.arange(num_found)
        if self.misses is MissPolicy.DEFAULT:
            order[missing] = num_found
            rest = [default_column(feature, 1) for feature in self.rows_spec.features]
        else:
            rest, rows = self._fetched(ids[missing], len(ids))
            order[missing] = num_found + rows
        rest = [column for column, is_wanted in zip(rest, wanted, strict=True) if is_wanted]
        columns = [join_columns(pair) for pair in zip(found, rest, strict=True)]
        num_bytes = sum(int(row_bytes(column)[order].sum()) for column in columns)
        check_joined_bytes(len(ids), num_bytes, max_bytes)
        return [take(column, order) for column in columns]

    def _fetched(self, missing: np.ndarray, num_ids: int) -> tuple[list[Column], np.ndarray]:
        """Columns of the source's rows, and for each missing id its row of them."""
        ids, columns = self._fetcher.rows(np.unique(missing), self._fetch)
        by_id = np.argsort(ids)
        rows = np.minimum(np.searchsorted(ids, missing, sorter=by_id), max(0, len(ids) - 1))
        absent = ids[by_id[rows]] != missing if len(ids) else np.ones(len(missing), bool)
        if absent.any():
            raise self._not_found(missing[absent], num_ids)
        return columns, by_id[rows]

    def _fetch(self, asked: np.ndarray) -> FetchedRows:
        """The source's rows of ids, checked and kept; in a thread of the fetcher."""
        assert self._source is not None
        stamps, asked_at = self._table.stamps(asked), self._ticks()
        answer = self._source.fetch(asked)
        if not isinstance(answer, FeatureRows):
            raise XlarankError(f"expected FeatureRows, got {type(answer).__name__} {reprlib.repr(answer)}")
        ids = check_candidate_ids(answer.ids)
        columns = shortened(self.rows_spec, checked_columns(self.rows_spec, ids, answer.features))
        if not np.isin(ids, asked).all() or len(np.unique(ids)) < len(ids):
            raise XlarankError(
                f"expected distinct ids of the {len(asked)} asked for, got {reprlib.repr(ids.tolist())}"
            )
        stamps = stamps[np.searchsorted(asked, ids)]
        self._table.put(ids, columns, stamps, time=asked_at, oldest=self._oldest())
        return FetchedRows(ids, columns)

    def _not_found(self, missing: np.ndarray, num_ids: int) -> FeatureError:
        where = "the feature store or its source" if self._source is not None else "the feature store"
        return FeatureError(
            f"candidate_ids: expected ids of {where} of model {self.spec.name!r}, got {len(missing)} of "
            f"{num_ids} that aren't there: {reprlib.repr(missing.tolist())}"
        )

    def _check_defaults(self) -> None:
        lacking = [feature.name for feature in self.rows_spec.features if feature.default is None]
        if lacking:
            raise ConfigError(
                f"feature store of model {self.spec.name!r}: misses 'default' needs a default of every "
                f"stored feature; {lacking} have none"
            )


def _check_arguments(
    misses: MissPolicy,
    file: FeatureFile | None,
    source: FeatureSource | None,
    without: Collection[str],
    memory_bytes: int | None,
    max_age_seconds: float | None,
) -> None:
    if (misses is MissPolicy.FETCH) != (source is not None):
        raise ConfigError("feature store: expected a source with misses 'fetch' and with no other policy")
    if file is not None and source is not None:
        raise ConfigError("feature store: expected a file or a source, got both; a FileSource is made of one")
    if file is not None and memory_bytes is not None:
        raise ConfigError(
            "feature store: memory_bytes bounds a cache, and updates over a file must stay; misses 'fetch' "
            "makes the file the source of a cache"
        )
    if file is not None and without:
        raise ConfigError("feature store: a file says itself which features it is without")
    if source is not None and memory_bytes is None:
        raise ConfigError("feature store: a source needs memory_bytes, the most that the cache may take")
    if file is not None and max_age_seconds is not None:
        raise ConfigError(
            "feature store: max_age_seconds is of rows in memory, and those of a file have no time; misses "
            "'fetch' makes the file the source of a cache"
        )


def check_cache_bounds(
    where: str, memory_bytes: int | None, max_age_seconds: float | None, fetch_timeout_ms: float | None
) -> None:
    """Raises ConfigError, whose text begins with `where`, for a cache that is too small, ages too fast or
    never waits."""
    if memory_bytes is not None:
        to_integer(where, "memory_bytes", memory_bytes, least=_MIN_MEMORY_BYTES, below=2**63)
    if max_age_seconds is not None and to_number(where, "max_age_seconds", max_age_seconds) < 1:
        raise ConfigError(f"{where}: max_age_seconds must be >= 1; was {max_age_seconds}")
    if fetch_timeout_ms is not None:
        if to_number(where, "fetch_timeout_ms", fetch_timeout_ms) <= 0:
            raise ConfigError(f"{where}: fetch_timeout_ms must be > 0; was {fetch_timeout_ms}")
        check_wait(where, "fetch_timeout_ms", fetch_timeout_ms, unit_seconds=1e-3)


def _check_memory(memory_bytes: int) -> None:
    available = available_memory()
    if memory_bytes > available.bytes:
        raise ConfigError(
            f"feature store: memory_bytes of {memory_bytes / 2**30:.2f} GiB, which the cache may come to "
            f"take, is more than the {available.bytes / 2**30:.2f} GiB that are available ({available}); "
            f"state a smaller memory_bytes"
        )
