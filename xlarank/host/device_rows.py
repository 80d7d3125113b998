"""Rows of tables that devices hold: `DeviceRows`. The host finds their places, the program looks them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xlarank.errors import ConfigError
from xlarank.host.tables import HostTable, aligned_empty
from xlarank.spec import DeviceTable, ModelSpec, TablePlacement

__all__ = ["DeviceRows"]


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceRows:
    """What a table's `TablePlacement` says, with the numbers of the rows."""

    placement: TablePlacement
    """How many rows, and of how many ids a bag."""

    numbers: np.ndarray | None = None
    """[K] int32, ascending: rows of the table on the device, place by place; None: all rows, in order."""

    @classmethod
    def of_bundle(
        cls, placements: Sequence[TablePlacement], numbers: Mapping[str, np.ndarray]
    ) -> tuple[DeviceRows, ...]:
        """What a bundle says: its placements, and the numbers of rows by split table."""
        return tuple(cls(placement, numbers.get(placement.table)) for placement in placements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceRows) or self.placement != other.placement:
            return False
        if self.numbers is None or other.numbers is None:
            return self.numbers is other.numbers
        return np.array_equal(self.numbers, other.numbers)

    def check(self, spec: ModelSpec) -> None:
        """Raises ConfigError unless the numbers are K rows of the table, ascending."""
        num_rows, expected = spec.table_by_name[self.placement.table].num_rows, self.placement.num_rows
        at = f"model {spec.name!r}: rows of table {self.placement.table!r} on the device"
        if self.numbers is None:
            if expected != num_rows:
                raise ConfigError(f"{at}: expected the numbers of {expected} of {num_rows} rows, got none")
            return
        numbers = self.numbers
        if numbers.dtype != np.int32 or numbers.shape != (expected,):
            raise ConfigError(
                f"{at}: expected int32 of shape [{expected}], got {numbers.dtype} of shape "
                f"{list(numbers.shape)}"
            )
        if numbers[0] < 0 or numbers[-1] >= num_rows or (np.diff(numbers) <= 0).any():
            raise ConfigError(f"{at}: expected ascending numbers in [0, {num_rows}), each once")

    def places(self, num_rows: int) -> np.ndarray | None:
        """[num_rows] int32: the place of each row of the table, -1 for one that the host alone has; None
        where place and number are the same."""
        if self.numbers is None:
            return None
        places = np.full(num_rows, -1, np.int32)
        places[self.numbers] = np.arange(len(self.numbers), dtype=np.int32)
        return places

    def array(self, table: HostTable) -> np.ndarray:
        """The rows as the program takes them, and after them the row of zeros; see `DeviceTable.format`.

        A copy, the only one made, 64-byte aligned: CPU devices take such memory as it is, all of them the
        same.
        """
        num_rows, row_bytes = self.placement.num_rows, table.rows.shape[1]
        array = aligned_empty((num_rows + 1, row_bytes), np.uint8)
        if self.numbers is None:
            array[:num_rows] = table.rows
        else:
            np.take(table.rows, self.numbers, axis=0, out=array[:num_rows], mode="clip")  # unbuffered
        array[num_rows] = 0  # decodes as zeros in every format
        form = DeviceTable(self.placement.table, num_rows, table.dim, table.format)
        return array.view(np.dtype(form.dtype))

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """[n] int32: places of row numbers [n], -1 for those that aren't on the device."""
        if self.numbers is None:
            return rows.astype(np.int32)
        at = np.searchsorted(self.numbers, rows)
        found = self.numbers[np.minimum(at, len(self.numbers) - 1)] == rows
        return np.where(found, at, -1).astype(np.int32)
