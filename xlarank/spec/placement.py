"""Where rows of a table are looked up: `Placement`, `TablePlacement`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence

from xlarank.errors import ConfigError
from xlarank.spec.features import FeatureKind, FeatureSpec
from xlarank.spec.model import ModelSpec

__all__ = ["Placement", "TablePlacement", "check_placements", "fixed_capacity"]


class Placement(enum.StrEnum):
    """What of a table devices hold. The host keeps every row of every table whatever it is."""

    HOST = "host"
    """Nothing: rows are looked up and pooled on the host."""

    DEVICE = "device"
    """All rows."""

    SPLIT = "split"
    """The rows that a trace reads most."""


@dataclasses.dataclass(frozen=True)
class TablePlacement:
    """Rows of one table that every device holds, looked up inside the program. Static.

    A table without one is `Placement.HOST`.
    """

    table: str
    """Its name."""

    num_rows: int
    """K, rows on the device; >= 1."""

    capacities: Mapping[str, int]
    """By feature that reads the table: C, ids of a bag that the device looks up at most, so C times its rows
    in a bucket. The host pools the others. 1 for an id, the length of a sequence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacities", dict(self.capacities))

    def __hash__(self) -> int:
        return hash((self.table, self.num_rows, tuple(self.capacities.items())))

    def kind(self, spec: ModelSpec) -> Placement:
        """DEVICE or SPLIT."""
        is_whole = self.num_rows == spec.table_by_name[self.table].num_rows
        return Placement.DEVICE if is_whole else Placement.SPLIT

    def num_bytes(self, spec: ModelSpec) -> int:
        """Of the rows on each device, and the row of zeros behind them."""
        table = spec.table_by_name[self.table]
        return (self.num_rows + 1) * table.dtype.row_bytes(table.dim)


def check_placements(spec: ModelSpec, unused: Collection[str], placements: Sequence[TablePlacement]) -> None:
    """Raises ConfigError unless each table is there once and every feature of it that is read has a capacity.

    Args:
      spec: the model.
      unused: features that the program doesn't read.
      placements: of its tables.
    """
    where = f"model {spec.name!r}: placement"
    tables = [placement.table for placement in placements]
    if len(set(tables)) != len(tables):
        raise ConfigError(f"{where}: expected each table once, got {tables}")
    for placement in placements:
        at = f"{where} of table {placement.table!r}"
        if placement.table not in spec.table_by_name:
            raise ConfigError(f"{at}: the model has no such table; it has {sorted(spec.table_by_name)}")
        num_rows = spec.table_by_name[placement.table].num_rows
        if not 1 <= placement.num_rows <= num_rows:
            raise ConfigError(f"{at}: expected 1 to {num_rows} rows on the device, got {placement.num_rows}")
        readers = {f.name: f for f in spec.features if f.table == placement.table and f.name not in unused}
        if not readers or readers.keys() != placement.capacities.keys():
            raise ConfigError(
                f"{at}: expected a capacity of each feature that reads it, {sorted(readers)}, got "
                f"{dict(placement.capacities)}"
            )
        for name, feature in readers.items():
            if not _suits(feature, placement.capacities[name]):
                raise ConfigError(
                    f"{at}: feature {name!r}: expected capacity {fixed_capacity(feature) or '>= 1'}, got "
                    f"{placement.capacities[name]}"
                )


def fixed_capacity(feature: FeatureSpec) -> int | None:
    """The only capacity that a feature can have: of an id or a sequence; None for an id_list."""
    if feature.kind is FeatureKind.ID:
        return 1
    return feature.max_length if feature.kind is FeatureKind.SEQUENCE else None


def _suits(feature: FeatureSpec, capacity: int) -> bool:
    fixed = fixed_capacity(feature)
    return capacity >= 1 if fixed is None else capacity == fixed
