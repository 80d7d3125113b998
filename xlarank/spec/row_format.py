"""How a row of an embedding table is encoded: `RowFormat`."""

from __future__ import annotations

import enum

__all__ = ["RowFormat"]

_WORD = 4


class RowFormat(enum.StrEnum):
    """Encoding of one table row [D]. A lookup decodes to float32 whatever the format.

    int8 and int4 are affine by row: a row holds its scale and bias, float32 each, then unsigned q, and a
    value is ``q * scale + bias``, rounded to float32 after the product and after the sum.
    """

    FLOAT32 = "float32"

    FLOAT16 = "float16"

    BFLOAT16 = "bfloat16"

    INT8 = "int8"
    """q in [0, 255], a byte each."""

    INT4 = "int4"
    """q in [0, 15], two a byte, the low half first."""

    @property
    def is_affine(self) -> bool:
        """Whether a row holds a scale and a bias."""
        return self in (RowFormat.INT8, RowFormat.INT4)

    def row_bytes(self, dim: int) -> int:
        """Bytes from one row of D = `dim` values to the next; int8 and int4 rows are whole float32 words."""
        if self is RowFormat.FLOAT32:
            return 4 * dim
        if not self.is_affine:
            return 2 * dim
        values = dim if self is RowFormat.INT8 else -(-dim // 2)
        return 2 * _WORD + -(-values // _WORD) * _WORD
