"""Row updates of tables that devices hold: `TableWriter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from xlarank.device.programs import compile_lowered
from xlarank.device.replica import Replica

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["TableWriter", "compile_update"]

_ROWS_A_STEP = 1024
"""The one size that is compiled: larger updates take several steps, smaller ones repeat their last row."""


class TableWriter:
    """Writes rows of the replicas' tables without compiling anything when it does.

    An array on a device is never written: the replica gets another one with the new rows, so that a batch
    that runs reads one state throughout. That takes the table's bytes once more for as long."""

    def __init__(self, replicas: Sequence[Replica], tables: Mapping[str, int]) -> None:
        """Compiles.

        Args:
          replicas: of the same tables.
          tables: by name, the place of its array among the prepared of every replica.
        """
        self._replicas = replicas
        self._tables = dict(tables)
        self._programs: dict[tuple[int, str], jax.stages.Compiled] = {}
        for index, replica in enumerate(replicas):
            for name, place in self._tables.items():
                array = replica.prepared[place]
                self._programs[index, name] = compile_update(replica.device, array.shape, array.dtype)

    def write(self, table: str, places: np.ndarray, rows: np.ndarray) -> None:
        """Every batch that starts after this returns reads the new rows. One thread at a time.

        Args:
          table: its name.
          places: [n] int32 in the table's array; of a place that is there twice the rows are equal.
          rows: [n, ...] as the array has them.
        """
        if not len(places):
            return
        for index, replica in enumerate(self._replicas):
            array = replica.prepared[self._tables[table]]
            for begin in range(0, len(places), _ROWS_A_STEP):
                step = np.minimum(np.arange(begin, begin + _ROWS_A_STEP), len(places) - 1)
                array = self._programs[index, table](array, places[step], rows[step])
            replica.replace(self._tables[table], array)


def compile_update(device: Device, shape: Sequence[int], dtype: np.dtype) -> jax.stages.Compiled:
    """The program that writes rows of an array on a device, compiled or found in the compilation cache.

    Args:
      device: where the array is.
      shape: [K, ...], of it.
      dtype: of it.
    """

    def xlarank_update(array, places, rows):
        return array.at[places].set(rows, mode="promise_in_bounds")

    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = (
        jax.ShapeDtypeStruct(tuple(shape), dtype),
        jax.ShapeDtypeStruct((_ROWS_A_STEP,), np.dtype(np.int32)),
        jax.ShapeDtypeStruct((_ROWS_A_STEP, *shape[1:]), dtype),
    )
    lowered = jax.jit(xlarank_update, in_shardings=sharding, out_shardings=sharding).lower(*shapes)
    return compile_lowered(lowered, device)
