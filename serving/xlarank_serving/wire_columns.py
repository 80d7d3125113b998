"""The columns of a request straight from its message, for requests in the usual form: `WireColumns`."""

from __future__ import annotations

from typing import Any

import numpy as np

from xlarank.host import InferForms, RawMessage, split_bytes_tensor
from xlarank.spec import Column, ModelSpec, Ragged
from xlarank_serving.layout import CANDIDATE_IDS_INPUT, LENGTHS_SUFFIX, Role, feature_inputs
from xlarank_serving.tensors import DTYPES

__all__ = ["WireColumns"]

_FIELDS = 3
"""Of an input that was located: offset, bytes, rows."""


class WireColumns:
    """Reads the inputs of one model: raw contents by feature, each of the datatype that ModelMetadata states.

    Immutable; any thread.
    """

    def __init__(self, spec: ModelSpec, *, takes_ids: bool = False) -> None:
        """
        Args:
          spec: the model.
          takes_ids: whether requests may bring candidate ids.
        """
        inputs = [*feature_inputs(spec), *([CANDIDATE_IDS_INPUT] if takes_ids else [])]
        self._ids_at = _FIELDS * (len(inputs) - 1) if takes_ids else -1
        width_of = {feature.name: feature.width for feature in spec.features}
        is_dense = {
            feature.name: not feature.is_lookup and not feature.is_ragged for feature in spec.features
        }
        self._forms = InferForms(
            (
                wire.name,
                wire.datatype,
                0 if wire.datatype == "BYTES" else DTYPES[wire.datatype].itemsize,
                width_of[wire.name] if wire.role is Role.VALUES else 1,
                wire.role is Role.VALUES and is_dense[wire.name],
            )
            for wire in inputs
        )
        places = {wire.name: _FIELDS * place for place, wire in enumerate(inputs)}
        # By feature: where its values and its lengths are located (-1 for none), the dtype, the width of a
        # dense one (0 for others), and whether it has one row.
        self._readers = [
            (
                places[feature.name],
                places.get(feature.name + LENGTHS_SUFFIX, -1) if feature.is_ragged else -1,
                feature.array_dtype,
                feature.width if is_dense[feature.name] else 0,
                feature.is_context,
            )
            for feature in spec.features
        ]

    def read(self, message: RawMessage) -> tuple[list[Column | None], np.ndarray | None] | None:
        """What a message brings, as views of its bytes.

        Returns:
          A column for each feature, None for one that wasn't sent, and [N] int64 candidate ids, None if there
          are none. None if the message isn't in the usual form, or something is wrong with it: parse it.
        """
        located = self._forms.locate(message)
        if located is None:
            return None
        data = message.data
        columns: list[Column | None] = []
        for values_at, lengths_at, dtype, width, has_one_row in self._readers:
            offset, size, rows = located[values_at : values_at + _FIELDS]
            if lengths_at >= 0 and (offset < 0) != (located[lengths_at] < 0):
                return None
            if offset < 0:
                columns.append(None)
                continue
            if has_one_row and (rows if lengths_at < 0 else located[lengths_at + _FIELDS - 1]) != 1:
                return None
            values: Any
            if dtype is None:
                values = _strings(data, offset, size, rows)
                if values is None:
                    return None
            elif width:
                values = np.frombuffer(data, dtype, rows * width, offset).reshape(rows, width)
            else:
                values = np.frombuffer(data, dtype, rows, offset)
            if lengths_at >= 0:
                offset, _, rows = located[lengths_at : lengths_at + _FIELDS]
                values = Ragged(values, np.frombuffer(data, np.int32, rows, offset))
            columns.append(values)
        ids = None
        if self._ids_at >= 0 and (offset := located[self._ids_at]) >= 0:
            ids = np.frombuffer(data, np.int64, located[self._ids_at + _FIELDS - 1], offset)
        return columns, ids


def _strings(data: bytes, offset: int, size: int, rows: int) -> Any:
    try:
        column = split_bytes_tensor(memoryview(data)[offset : offset + size])
    except ValueError:
        return None
    return column if len(column) == rows else None
