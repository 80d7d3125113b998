"""Gather in plain NumPy, a bag at a time: clear, not fast. What the native kernel must equal, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from xlarank.host.preprocessing import to_dense, to_rows, truncate
from xlarank.host.row_codec import decode_rows
from xlarank.host.tables import HostTable
from xlarank.spec import (
    MASK_SUFFIX,
    REQUEST_OF_ROW,
    Column,
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
) -> None:
    """Fills the leaves of one batch; see `Gatherer.gather`, whose meaning this defines.

    Args:
      spec: the model, fitted.
      signature: of the model; a feature without a slot isn't gathered.
      tables: by name.
      segments: (request, begin, end), at least one, none empty.
      out: one array a leaf of `signature`, of the bucket's shapes. Everything is done in float32; storing it
        in a bfloat16 array rounds to the nearest, ties to even.
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
            count = len(column)
            if feature.kind is FeatureKind.SEQUENCE:
                assert isinstance(column, Ragged)
                rows = slice(row, row + count)
                _sequence(
                    spec, feature, tables, column, out[slot.leaf][rows], out[slot.leaf + MASK_SUFFIX][rows]
                )
            else:
                out[slot.leaf][row : row + count, slot.begin : slot.end] = _vectors(
                    spec, feature, tables, column
                )
            row += count
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


def _vectors(
    spec: ModelSpec, feature: FeatureSpec, tables: Mapping[str, HostTable], column: Column
) -> np.ndarray:
    """Activations [n, width] float32 of a dense, id or id_list feature."""
    if isinstance(column, Ragged):
        bags = truncate(feature, column)
        looked_up = _look_up(tables[feature.table or ""], to_rows(spec, feature, bags.values))
        pooled = np.zeros((len(bags), looked_up.shape[1]), np.float32)
        begin = 0
        for row, length in enumerate(bags.lengths.tolist()):
            pooled[row] = pool(looked_up[begin : begin + length], feature.combiner or Combiner.SUM)
            begin += length
        return pooled
    if feature.kind is FeatureKind.DENSE:
        assert isinstance(column, np.ndarray)
        return to_dense(feature, column)
    return _look_up(tables[feature.table or ""], to_rows(spec, feature, column))


def _sequence(
    spec: ModelSpec,
    feature: FeatureSpec,
    tables: Mapping[str, HostTable],
    column: Ragged,
    values: np.ndarray,
    mask: np.ndarray,
) -> None:
    """Writes a sequence's [n, L, D] values and [n, L] mask."""
    bags = truncate(feature, column)
    mask[...] = np.arange(mask.shape[1]) < bags.lengths[:, None]
    values[...] = 0
    values[mask] = _look_up(tables[feature.table or ""], to_rows(spec, feature, bags.values))


def _look_up(table: HostTable, rows: np.ndarray) -> np.ndarray:
    """Rows [V, D] float32 of a table; -1 reads as zeros."""
    vectors = decode_rows(table.take(np.maximum(rows, 0)))
    vectors[rows < 0] = 0
    return vectors
