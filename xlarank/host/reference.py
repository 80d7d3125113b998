"""Gather in plain NumPy, a bag at a time: clear, not fast. What the native kernel must equal, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from xlarank.host.device_rows import DeviceRows
from xlarank.host.preprocessing import to_dense, to_rows, truncate
from xlarank.host.row_codec import decode_rows
from xlarank.host.tables import HostTable
from xlarank.spec import (
    MASK_SUFFIX,
    REQUEST_OF_ROW,
    Combiner,
    FeatureKind,
    FeatureSpec,
    ModelSpec,
    Ragged,
    RankRequest,
    Scope,
    Signature,
    take,
)

__all__ = ["gather_numpy", "pool"]


def gather_numpy(
    spec: ModelSpec,
    signature: Signature,
    tables: Mapping[str, HostTable],
    segments: Sequence[tuple[RankRequest, int, int]],
    out: Mapping[str, np.ndarray],
    device_rows: Mapping[str, DeviceRows] = MappingProxyType({}),
) -> None:
    """Fills the leaves of one batch; see `Gatherer.gather`, whose meaning this defines.

    Args:
      spec: the model, fitted.
      signature: of the model; a feature without a slot isn't gathered.
      tables: by name.
      segments: (request, begin, end), at least one, none empty.
      out: one array a leaf of `signature`, of the bucket's shapes. Everything is done in float32; storing it
        in a bfloat16 array rounds to the nearest, ties to even.
      device_rows: of the signature's device tables, by name.
    """
    for index, feature in enumerate(spec.features):
        slot = signature.slots.get(feature.name)
        if slot is None:
            continue
        row = 0
        for request, begin, end in segments:
            column = request.columns[index]
            if feature.scope is Scope.CANDIDATE:
                column = take(column, np.arange(begin, end))
            batch_rows = slice(row, row + len(column))
            row += len(column)
            written = {name: array[batch_rows] for name, array in out.items()}
            if feature.kind is FeatureKind.DENSE:
                assert isinstance(column, np.ndarray)
                written[slot.leaf][:, slot.begin : slot.end] = to_dense(feature, column)
                continue
            if isinstance(column, Ragged):
                column = truncate(feature, column)
                rows, lengths = to_rows(spec, feature, column.values), column.lengths
            else:
                rows, lengths = to_rows(spec, feature, column), np.ones(len(column), np.int32)
            lookup = signature.lookups.get(feature.name)
            if lookup is not None:
                held = device_rows[feature.table or ""]
                rows = _send_to_device(feature, held, rows, lengths, written[lookup.places])
                if lookup.divisor is not None:
                    ids = np.maximum(lengths, 1).astype(np.float32)
                    divisor = ids if feature.combiner is Combiner.MEAN else np.sqrt(ids)
                    written[lookup.divisor][:, 0] = divisor
            vectors = _look_up(tables[feature.table or ""], rows)
            if feature.kind is FeatureKind.SEQUENCE:
                mask = written[slot.leaf + MASK_SUFFIX]
                mask[...] = np.arange(mask.shape[1]) < lengths[:, None]
                written[slot.leaf][...] = 0
                written[slot.leaf][mask] = vectors
            elif feature.kind is FeatureKind.ID_LIST:
                written[slot.leaf][:, slot.begin : slot.end] = _pool_bags(feature, vectors, lengths)
            else:
                written[slot.leaf][:, slot.begin : slot.end] = vectors
    sizes = [end - begin for _, begin, end in segments]
    out[REQUEST_OF_ROW][: sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    for leaf in signature.leaves:
        valid = len(segments) if leaf.scope is Scope.CONTEXT else sum(sizes)
        out[leaf.name][valid:] = out[leaf.name][valid - 1]


def pool(vectors: np.ndarray, combiner: Combiner) -> np.ndarray:
    """Pools the rows of one bag, adding them in order in float32.

    Args:
      vectors: [ids of the bag, D] float32.
      combiner: sum, mean or sqrtn.

    Returns:
      [D] float32; zeros for an empty bag.
    """
    total = np.zeros(vectors.shape[1], np.float32)
    for vector in vectors:
        total += vector
    if combiner is Combiner.SUM or not len(vectors):
        return total
    count = np.float32(len(vectors))
    return total / (count if combiner is Combiner.MEAN else np.sqrt(count))


def _pool_bags(feature: FeatureSpec, vectors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[n, D] float32: the vectors of each bag, back to back, pooled."""
    pooled = np.zeros((len(lengths), vectors.shape[1]), np.float32)
    begin = 0
    for row, length in enumerate(lengths.tolist()):
        pooled[row] = pool(vectors[begin : begin + length], feature.combiner or Combiner.SUM)
        begin += length
    return pooled


def _send_to_device(
    feature: FeatureSpec, held: DeviceRows, rows: np.ndarray, lengths: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Writes the places of rows that the device looks up: the first of each bag, as many as fit.

    Args:
      feature: whose rows they are.
      held: rows of its table on the device.
      rows: [V] row numbers, -1 for zeros.
      lengths: [n] rows of each bag.
      places: [n, C] int32, written; K where there is none.

    Returns:
      [V]: `rows` with -1 for those that the device looks up.
    """
    places[...] = held.placement.num_rows
    left, found = rows.copy(), held.places_of(rows)
    begin = 0
    for bag, length in enumerate(lengths.tolist()):
        at = begin + np.flatnonzero(found[begin : begin + length] >= 0)[: places.shape[1]]
        columns = at - begin if feature.kind is FeatureKind.SEQUENCE else np.arange(len(at))
        places[bag, columns] = found[at]
        left[at] = -1
        begin += length
    return left


def _look_up(table: HostTable, rows: np.ndarray) -> np.ndarray:
    """Rows [V, D] float32 of a table; -1 reads as zeros."""
    vectors = decode_rows(table.take(np.maximum(rows, 0)))
    vectors[rows < 0] = 0
    return vectors
