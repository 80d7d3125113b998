"""Feature values to the inputs of a ModelInfer message: what a client does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xlarank.spec import (
    CANDIDATE_IDS,
    Column,
    FeatureSpec,
    ModelSpec,
    Ragged,
    RankRequest,
    Scope,
    StringColumn,
)
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import LENGTHS_SUFFIX, float_features, id_features

__all__ = ["add_inputs", "bytes_tensor"]

_DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64"}


def add_inputs(
    message: messages.ModelInferRequest,
    model: ModelSpec,
    request: RankRequest,
    *,
    packed: bool = False,
    candidate_ids: np.ndarray | None = None,
) -> None:
    """Appends the features of a request to a message, raw.

    Args:
      message: gets inputs and raw_input_contents.
      model: all features of the model.
      request: its spec holds the features to send, all of the model or some; what the model doesn't have
        isn't sent.
      packed: float32 and int64 features travel together, a scope's in one tensor each, if none of them is
        left out; strings by name.
      candidate_ids: [N] int64, for a server with a feature store; None for none.
    """
    features = request.spec.features
    columns = dict(zip([feature.name for feature in features], request.columns, strict=True))
    columns = {name: column for name, column in columns.items() if name in model.feature_by_name}
    if candidate_ids is not None:
        _add(message, CANDIDATE_IDS, candidate_ids)
    if packed:
        for name, array in _packed(model, columns):
            _add(message, name, array)
    for feature in features:
        if feature.name in columns:
            for name, values in _by_name(feature, columns[feature.name]):
                _add(message, name, values)


def bytes_tensor(column: StringColumn) -> bytes:
    """Raw contents of a BYTES tensor: each string after its length, 4 bytes little-endian."""
    sizes = np.diff(column.offsets)
    out = np.empty(len(column.blob) + 4 * len(sizes), np.uint8)
    starts = column.offsets[:-1] + 4 * np.arange(len(sizes))
    heads = starts[:, None] + np.arange(4)  # [n, 4]
    out[heads] = sizes.astype("<u4").view(np.uint8).reshape(-1, 4)
    is_blob = np.ones(len(out), bool)
    is_blob[heads] = False
    out[is_blob] = column.blob
    return out.tobytes()


def _add(message: messages.ModelInferRequest, name: str, values: np.ndarray | StringColumn) -> None:
    if isinstance(values, StringColumn):
        message.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
        message.raw_input_contents.append(bytes_tensor(values))
    else:
        message.inputs.add(name=name, datatype=_DATATYPES[values.dtype], shape=values.shape)
        message.raw_input_contents.append(values.tobytes())


def _by_name(feature: FeatureSpec, column: Column) -> Iterator[tuple[str, np.ndarray | StringColumn]]:
    if isinstance(column, Ragged):
        yield feature.name, column.values
        yield feature.name + LENGTHS_SUFFIX, column.lengths
    elif isinstance(column, np.ndarray) and column.ndim == 2 and feature.width == 1:
        yield feature.name, column[:, 0]
    else:
        yield feature.name, column


def _packed(model: ModelSpec, columns: dict[str, Column]) -> Iterator[tuple[str, np.ndarray]]:
    """Takes from `columns` what travels packed."""
    for scope in Scope:
        floats, ids = float_features(model, scope), id_features(model, scope)
        if floats and all(feature.name in columns for feature in floats):
            dense = [_array(columns.pop(feature.name)) for feature in floats]
            dense = [part.reshape(len(part), f.width) for part, f in zip(dense, floats, strict=True)]
            yield f"{scope.value}.dense", np.concatenate(dense, axis=1)  # [n, K]
        if ids and all(feature.name in columns for feature in ids):
            taken = [columns.pop(feature.name) for feature in ids]
            yield f"{scope.value}.values", np.concatenate([_array(_values(column)) for column in taken])
            yield scope.value + LENGTHS_SUFFIX, np.stack([_lengths(column) for column in taken])  # [F, n]


def _values(column: Column) -> np.ndarray | StringColumn:
    return column.values if isinstance(column, Ragged) else column


def _lengths(column: Column) -> np.ndarray:
    return column.lengths if isinstance(column, Ragged) else np.ones(len(column), np.int32)


def _array(values: Column) -> np.ndarray:
    assert isinstance(values, np.ndarray)
    return values
