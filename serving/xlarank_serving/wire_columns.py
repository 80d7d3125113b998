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

    def __init__(
        self, spec: ModelSpec, *, takes_ids: bool = False, max_candidates: int | None = None
    ) -> None:
        """
        Args:
          spec: the model.
          takes_ids: whether requests may bring candidate ids.
          max_candidates: that a request may have; None for any number.
        """
        self._max_candidates = max_candidates
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
        wires = {wire.name: wire for wire in inputs}
        # By feature: where its values and its lengths are located (-1 for none), the dtype, the width of a
        # dense one (0 for others), and the input that has as many rows as there are candidates, if any has.
        self._readers = [
            (
                places[feature.name],
                places.get(feature.name + LENGTHS_SUFFIX, -1) if feature.is_ragged else -1,
                feature.array_dtype,
                feature.width if is_dense[feature.name] else 0,
                None if feature.is_context else wires[feature.name + LENGTHS_SUFFIX * feature.is_ragged],
            )
            for feature in spec.features
        ]

    def read(self, message: RawMessage) -> tuple[list[Column | None], np.ndarray | None] | None:
        """What a message brings, as views of its bytes.

        Returns:
          A column for each feature, None for one that wasn't sent, and [N] int64 candidate ids, None if there
          are none. None if the message isn't in the usual form, or something is wrong with it: parse it.

        Raises:
          FeatureError: for too many candidates.
        """
        located = self._forms.locate(message)
        if located is None:
            return None
        data = message.data
        columns: list[Column | None] = []
        for values_at, lengths_at, dtype, width, candidates in self._readers:
            offset, size, rows = located[values_at : values_at + _FIELDS]
            if lengths_at >= 0 and (offset < 0) != (located[lengths_at] < 0):
                return None
            if offset < 0:
                columns.append(None)
                continue
            count = rows if lengths_at < 0 else located[lengths_at + _FIELDS - 1]
            if candidates is None:
                if count != 1:
                    return None
            elif self._max_candidates is not None:
                candidates.check_rows((count,), self._max_candidates)
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
            rows = located[self._ids_at + _FIELDS - 1]
            if self._max_candidates is not None:
                CANDIDATE_IDS_INPUT.check_rows((rows,), self._max_candidates)
            ids = np.frombuffer(data, np.int64, rows, offset)
        return columns, ids


def _strings(data: bytes, offset: int, size: int, rows: int) -> Any:
    try:
        column = split_bytes_tensor(memoryview(data)[offset : offset + size])
    except ValueError:
        return None
    return column if len(column) == rows else None
