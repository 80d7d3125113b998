"""Which rows of which tables devices hold: `PlacementPolicy`, `plan_placement`."""

from __future__ import annotations

import collections
import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import ConfigError
from xlarank.host import DeviceRows, model_inputs
from xlarank.spec import (
    FeatureKind,
    FeatureSpec,
    ModelSpec,
    Placement,
    Ragged,
    RankRequest,
    TablePlacement,
    join_columns,
)
from xlarank.spec.placement import fixed_capacity

__all__ = ["PlacementPolicy", "plan_placement"]

_CAPACITY_SHARE = 0.99
"""Of the bags that the trace reads: those whose device rows a feature's capacity holds whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementPolicy:
    """What may be put on devices."""

    kind: Placement | None = None
    """HOST; DEVICE: all tables; SPLIT: the hottest rows of all; None: on accelerators DEVICE if that fits,
    else SPLIT, and HOST on CPUs, whose device memory is the host's."""

    device_bytes: int | None = None
    """Most bytes of rows on a device; None: half of what it says that it has."""

    trace: Sequence[RankRequest] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Requests that say which rows are hot, and how many a bag; None: the golden requests."""

    row_reads: Mapping[str, np.ndarray | Ragged] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    """By table: how often each row is read, [R] integers; or bags of the row numbers that are read, as
    `xlarank.host.traces.read_trace` gives them. They say which rows are hot in place of the requests, which
    still say how many a bag."""

    @property
    def has_trace(self) -> bool:
        """Whether something else than the golden requests says which rows are hot."""
        return self.trace is not None or bool(self.row_reads)

    def __post_init__(self) -> None:
        if self.kind is not None and not isinstance(self.kind, Placement):
            raise ConfigError(f"table placement: expected a Placement or None, got {self.kind!r}")
        if self.trace is not None and not _are_requests(self.trace):
            raise ConfigError(
                f"placement trace: expected requests of the model, one or more, or reads of rows by table, "
                f"got {reprlib.repr(self.trace)}"
            )
        if self.device_bytes is not None and self.device_bytes < 0:
            raise ConfigError(f"table placement: device_bytes must be >= 0; was {self.device_bytes}")

    @classmethod
    def named(
        cls,
        name: str,
        device_bytes: int | None = None,
        trace: Sequence[RankRequest] | Mapping[str, np.ndarray | Ragged] | None = None,
    ) -> PlacementPolicy:
        """The policy "auto", "host", "device" or "split"; ConfigError for another.

        Args:
          name: of `kind`.
          device_bytes: see there.
          trace: requests, or reads of rows by table, see `row_reads`.
        """
        names = ["auto", *Placement]
        if name not in names:
            raise ConfigError(f"table placement must be one of {', '.join(names)}; was {name!r}")
        kind = None if name == "auto" else Placement(name)
        if isinstance(trace, Mapping):
            return cls(kind=kind, device_bytes=device_bytes, row_reads=trace)
        return cls(kind=kind, device_bytes=device_bytes, trace=trace)


def _are_requests(trace: Any) -> bool:
    return (
        isinstance(trace, Sequence)
        and len(trace) > 0
        and all(isinstance(request, RankRequest) for request in trace)
    )


def plan_placement(
    spec: ModelSpec,
    unused: Sequence[str],
    requests: Sequence[RankRequest],
    policy: PlacementPolicy,
    *,
    device_memory: int | None,
) -> tuple[DeviceRows, ...]:
    """Chooses the rows that devices hold, those that are read most for their bytes first.

    Args:
      spec: the model, its tables in the formats that they are served in.
      unused: features that the program doesn't read.
      requests: golden ones, the trace where the policy has none.
      policy: what is allowed.
      device_memory: bytes that a device has; None on a CPU.

    Raises:
      ConfigError: if all tables are asked onto a device that doesn't hold them, or the policy's trace isn't
        of this model.
    """
    counted = {name: _counted(spec, name, reads) for name, reads in policy.row_reads.items()}
    reads = _reads(spec, unused, policy.trace if policy.trace is not None else requests)
    if policy.kind is Placement.HOST or not reads or (policy.kind is None and device_memory is None):
        return ()
    budget = policy.device_bytes
    if budget is None:
        budget = math.inf if device_memory is None else device_memory // 2
    # With the row of zeros that each has there.
    whole = sum(spec.table_by_name[name].num_bytes + _row_bytes(spec, name) for name in reads)
    if policy.kind is Placement.DEVICE and whole > budget:
        raise ConfigError(
            f"model {spec.name!r}: its tables take {whole} bytes on a device, of which {int(budget)} are "
            f"allowed; place them as 'split' or 'host', or in a smaller row format"
        )
    if policy.kind is Placement.DEVICE or (policy.kind is None and whole <= budget):
        chosen: dict[str, np.ndarray | None] = dict.fromkeys(reads)
    else:
        chosen = dict(_hottest(spec, reads, counted, budget))
    return tuple(_device_rows(spec, name, numbers, reads[name]) for name, numbers in chosen.items())


@dataclasses.dataclass(frozen=True)
class _Bags:
    """What one feature of the trace reads."""

    feature: FeatureSpec
    rows: np.ndarray
    """[V] int64, -1 for zeros."""

    bag_of_row: np.ndarray
    """[V] int64."""

    num_bags: int


def _reads(spec: ModelSpec, unused: Sequence[str], trace: Sequence[RankRequest]) -> dict[str, list[_Bags]]:
    """By table that some feature reads: the bags of the trace."""
    if any(request.spec.features != spec.features for request in trace):
        raise ConfigError(f"model {spec.name!r}: expected a trace of requests with its features")
    columns = [join_columns([r.columns[place] for r in trace]) for place in range(len(spec.features))]
    inputs = model_inputs(spec, columns)
    found: dict[str, list[_Bags]] = collections.defaultdict(list)
    for feature in spec.features:
        if feature.table is None or feature.name in unused:
            continue
        rows = inputs[feature.name].reshape(len(inputs[feature.name]), -1)  # [bags, ids], -1 behind them
        bags = np.repeat(np.arange(len(rows)), rows.shape[1])
        found[feature.table].append(_Bags(feature, rows.ravel(), bags, len(rows)))
    return dict(found)


def _counted(spec: ModelSpec, name: str, reads: np.ndarray | Ragged) -> np.ndarray:
    """[R] int64: how often each row is read."""
    where = f"model {spec.name!r}: placement trace of table {name!r}"
    if name not in spec.table_by_name:
        raise ConfigError(f"{where}: the model has no such table; it has {sorted(spec.table_by_name)}")
    num_rows = spec.table_by_name[name].num_rows
    values = reads.values if isinstance(reads, Ragged) else reads
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iu":
        got = (
            f"{values.dtype} {list(values.shape)}"
            if isinstance(values, np.ndarray)
            else type(values).__name__
        )
        raise ConfigError(
            f"{where}: expected integers [{num_rows}] of reads, or bags of row numbers, got {got}"
        )
    if isinstance(reads, Ragged):
        outside = (values < 0) | (values >= num_rows)
        if outside.any():
            raise ConfigError(
                f"{where}: expected row numbers in [0, {num_rows}), got {values[np.argmax(outside)]}"
            )
        return np.bincount(values.astype(np.int64), minlength=num_rows)
    if len(values) != num_rows:
        raise ConfigError(f"{where}: expected {num_rows} counts >= 0, one a row, got {len(values)}")
    if (values < 0).any():
        row = int(np.argmax(values < 0))
        raise ConfigError(f"{where}: expected counts >= 0, got {values[row]} for row {row}")
    return values.astype(np.int64)


def _hottest(
    spec: ModelSpec,
    reads: Mapping[str, list[_Bags]],
    counted: Mapping[str, np.ndarray],
    budget: float,
) -> list[tuple[str, np.ndarray | None]]:
    """Numbers of the rows on the device by table, None for all of them, without tables that have none
    there."""
    names, rows, counts, sizes = [], [], [], []
    for index, (name, bags) in enumerate(reads.items()):
        if name in counted:
            numbers = np.flatnonzero(counted[name])
            read = counted[name][numbers]
        else:
            numbers, read = np.unique(np.concatenate([b.rows for b in bags]), return_counts=True)
            numbers, read = numbers[numbers >= 0], read[numbers >= 0]
        names.append(np.full(len(numbers), index))
        rows.append(numbers)
        counts.append(read)
        sizes.append(np.full(len(numbers), _row_bytes(spec, name)))
    table, number, size = np.concatenate(names), np.concatenate(rows), np.concatenate(sizes)
    order = np.argsort(-np.concatenate(counts) / size, kind="stable")
    # A row of zeros for each table comes with the first of its rows.
    zeros = sum(int(each[0]) for each in sizes if len(each))
    fitting = order[np.cumsum(size[order]) + zeros <= budget]
    hottest: list[tuple[str, np.ndarray | None]] = []
    for index, name in enumerate(reads):
        numbers = np.sort(number[fitting[table[fitting] == index]]).astype(np.int32)
        if len(numbers):
            is_whole = len(numbers) == spec.table_by_name[name].num_rows
            hottest.append((name, None if is_whole else numbers))
    return hottest


def _device_rows(
    spec: ModelSpec, name: str, numbers: np.ndarray | None, reads: Sequence[_Bags]
) -> DeviceRows:
    num_rows = spec.table_by_name[name].num_rows if numbers is None else len(numbers)
    capacities = {bags.feature.name: _capacity(bags, numbers) for bags in reads}
    return DeviceRows(TablePlacement(name, num_rows, capacities), numbers)


def _capacity(bags: _Bags, numbers: np.ndarray | None) -> int:
    """How many ids of a bag the device looks up: what nearly all bags of the trace have."""
    fixed = fixed_capacity(bags.feature)
    if fixed is not None:
        return fixed
    assert bags.feature.kind is FeatureKind.ID_LIST
    held = bags.rows >= 0 if numbers is None else np.isin(bags.rows, numbers)
    a_bag = np.bincount(bags.bag_of_row[held], minlength=bags.num_bags)
    return max(1, int(np.quantile(a_bag, _CAPACITY_SHARE, method="higher")))


def _row_bytes(spec: ModelSpec, name: str) -> int:
    table = spec.table_by_name[name]
    return table.dtype.row_bytes(table.dim)
