"""Rows of tables on the device, looked up inside the program: `look_up`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xlarank.spec import DeviceTable, RowFormat

__all__ = ["look_up"]

_AFFINE_BYTES = 8
"""Scale and bias, float32 each, before the values of an int8 or int4 row; see xlarank/host/row_codec.py."""


def look_up(array: Any, places: Any, table: DeviceTable) -> Any:
    """Rows by place, decoded after they are read: nothing is made of the table as a whole.

    Args:
      array: of `DeviceTable.shape` and dtype.
      places: [n, C] int32 in [0, K].
      table: what the array holds.

    Returns:
      [n, C, D] float32.
    """
    rows = array.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)
    if table.format not in (RowFormat.INT8, RowFormat.INT4):
        return rows.astype(jnp.float32)
    scale, bias = (
        jax.lax.bitcast_convert_type(rows[..., at : at + 4], jnp.float32)[..., None] for at in (0, 4)
    )
    values = rows[..., _AFFINE_BYTES:]
    if table.format is RowFormat.INT4:  # the first of two in the lower bits
        both = jnp.stack([values & 15, values >> 4], axis=-1)
        values = both.reshape(*values.shape[:-1], -1)
    return values[..., : table.dim].astype(jnp.float32) * scale + bias  # rows end in padding
