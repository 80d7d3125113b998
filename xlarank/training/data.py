"""Labelled ranking requests in columns: `RankingData` and `Splits`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from xlarank.errors import ConfigError
from xlarank.spec import (
    Column,
    ModelSpec,
    RankRequest,
    Scope,
    StringColumn,
    ValueType,
    check_contents,
    join_columns,
    take,
)

__all__ = ["RankingData", "Splits", "concatenate"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RankingData:
    """Requests back to back: a context each, and its candidates with a label a task.

    May hold more features and labels than a model reads; a ModelSpec picks by name.
    """

    contexts: Mapping[str, Column]
    """Raw context features by name, [num_requests] rows each."""

    candidates: Mapping[str, Column]
    """Raw candidate features by name, [num_rows] rows each."""

    request_of_row: np.ndarray
    """[num_rows] int64, non-decreasing, in [0, num_requests)."""

    labels: Mapping[str, np.ndarray]
    """[num_rows] float32 by task, finite; 0 or 1 for a binary task."""

    groups: np.ndarray
    """[num_requests] int64: the user of each request, for metrics within a user and the baseline."""

    items: np.ndarray | None = None
    """[num_rows] int64: the item of each row, for the baseline; None when there is no such thing."""

    truth: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """[num_rows] float32 by task: expected labels, where made-up data know them."""

    def __post_init__(self) -> None:
        rows, owner = len(self.request_of_row), self.request_of_row
        for name, column in self.contexts.items():
            if len(column) != self.num_requests:
                raise ConfigError(
                    f"context {name!r}: expected {self.num_requests} rows, one a request, got {len(column)}"
                )
        rows_of_items = {} if self.items is None else {"items": self.items}
        for kind, columns in (
            ("candidate", self.candidates),
            ("label", self.labels),
            ("truth", self.truth),
            ("column", rows_of_items),
        ):
            for name, column in columns.items():
                if len(column) != rows:
                    raise ConfigError(f"{kind} {name!r}: expected {rows} rows, got {len(column)}")
        if rows and (owner[0] < 0 or owner[-1] >= self.num_requests or (np.diff(owner) < 0).any()):
            raise ConfigError(
                f"request_of_row: expected non-decreasing numbers in [0, {self.num_requests}), got "
                f"{owner[0]} to {owner[-1]}"
            )
        for name, label in self.labels.items():
            if not np.isfinite(label).all():
                raise ConfigError(f"label {name!r}: expected finite values, got NaN or infinity")

    @property
    def num_requests(self) -> int:
        """Contexts, those without candidates included."""
        return len(self.groups)

    @property
    def num_rows(self) -> int:
        """Candidates of all requests."""
        return len(self.request_of_row)

    def columns(self, spec: ModelSpec) -> tuple[Column, ...]:
        """The columns that a model reads, in the order of ``spec.features``, valid for a fitted spec.

        Args:
          spec: the model; its values are checked only if it is fitted.

        Returns:
          [num_requests] rows for scope context, [num_rows] for scope candidate.

        Raises:
          ConfigError: when a feature isn't in the data or is of another dtype.
          FeatureError: for a value that the spec refuses.
        """
        columns = []
        for feature in spec.features:
            context = feature.scope is Scope.CONTEXT
            source = self.contexts if context else self.candidates
            if feature.name not in source:
                raise ConfigError(
                    f"the data has no {feature.scope.value} feature {feature.name!r}; it has {sorted(source)}"
                )
            column = source[feature.name]
            if not feature.is_lookup and isinstance(column, np.ndarray) and column.ndim == 1:
                column = column[:, None]
            values = column if isinstance(column, (np.ndarray, StringColumn)) else column.values
            dtype = ValueType.STRING.value if isinstance(values, StringColumn) else str(values.dtype)
            if dtype != feature.dtype.value:
                raise ConfigError(
                    f"feature {feature.name!r}: the config says {feature.dtype.value}, the data has {dtype}"
                )
            columns.append(column)
        if spec.is_fitted:
            check_contents(spec, columns)
        return tuple(columns)

    def labels_of(self, spec: ModelSpec) -> dict[str, np.ndarray]:
        """Labels of a model's tasks, [num_rows] float32 each.

        Raises:
          ConfigError: when a task has none.
        """
        for task in spec.tasks:
            if task.name not in self.labels:
                raise ConfigError(f"the data has no label {task.name!r}; it has {sorted(self.labels)}")
        return {task.name: np.asarray(self.labels[task.name], np.float32) for task in spec.tasks}

    def rows_of(self, request: int) -> slice:
        """Rows of a request's candidates."""
        begin, end = np.searchsorted(self.request_of_row, [request, request + 1])
        return slice(int(begin), int(end))

    def features_of(self, request: int) -> dict[str, Column]:
        """Raw features of one request by name, as `RankRequest` takes them (once cut to a model's)."""
        rows = self.rows_of(request)
        numbers = np.arange(rows.start, rows.stop)
        return {
            **{name: take(column, np.array([request])) for name, column in self.contexts.items()},
            **{name: take(column, numbers) for name, column in self.candidates.items()},
        }

    def requests(self, spec: ModelSpec) -> Iterator[RankRequest]:
        """Each request as the model's, in order; those without candidates too."""
        self.columns(spec)
        for request in range(self.num_requests):
            features = self.features_of(request)
            yield RankRequest(spec, {f.name: features[f.name] for f in spec.features})

    def sample(self, num_requests: int) -> RankingData:
        """The data of at most so many requests with rows, evenly spread."""
        requests = np.unique(self.request_of_row)
        at = np.linspace(0, len(requests) - 1, min(num_requests, len(requests))).round().astype(np.int64)
        return self.take(requests[at])

    def take(self, requests: np.ndarray) -> RankingData:
        """The data of some requests.

        Args:
          requests: [m] distinct ascending request numbers.
        """
        requests = np.asarray(requests, np.int64)
        begins = np.searchsorted(self.request_of_row, requests)
        ends = np.searchsorted(self.request_of_row, requests, side="right")
        sizes = ends - begins
        rows = np.repeat(begins - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(
            sizes.sum()
        )
        return RankingData(
            contexts={name: take(column, requests) for name, column in self.contexts.items()},
            candidates={name: take(column, rows) for name, column in self.candidates.items()},
            request_of_row=np.repeat(np.arange(len(requests)), sizes),
            labels={name: label[rows] for name, label in self.labels.items()},
            groups=self.groups[requests],
            items=None if self.items is None else self.items[rows],
            truth={name: values[rows] for name, values in self.truth.items()},
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What a reader returns."""

    train: RankingData
    """Parameters, vocabularies and statistics are fitted to it."""

    validation: RankingData
    """Decides when training stops; some of it lies beside the checkpoint as golden requests."""

    test: RankingData
    """Seen by `xlarank evaluate` only."""


def concatenate(parts: Sequence[RankingData]) -> RankingData:
    """The requests of several data sets with the same features and labels, one after the other."""
    starts = np.cumsum([0, *(part.num_requests for part in parts)])
    items = [part.items for part in parts]
    return RankingData(
        contexts={name: join_columns([p.contexts[name] for p in parts]) for name in parts[0].contexts},
        candidates={name: join_columns([p.candidates[name] for p in parts]) for name in parts[0].candidates},
        request_of_row=np.concatenate(
            [part.request_of_row + start for part, start in zip(parts, starts[:-1], strict=True)]
        ),
        labels={name: np.concatenate([p.labels[name] for p in parts]) for name in parts[0].labels},
        groups=np.concatenate([part.groups for part in parts]),
        items=None
        if any(part is None for part in items)
        else np.concatenate([p for p in items if p is not None]),
        truth={name: np.concatenate([p.truth[name] for p in parts]) for name in parts[0].truth},
    )
