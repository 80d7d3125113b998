"""States a ModelSpec to the native kernel: `native_plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from xlarank.host._extension import native
from xlarank.host.device_rows import DeviceRows
from xlarank.host.shared_rows import SharedRows
from xlarank.host.tables import HostTable
from xlarank.host.vocabulary import index_of
from xlarank.spec import Clip, FeatureKind, FeatureSpec, Log1p, ModelSpec, OutOfRange, Signature, ValueType

__all__ = ["native_plan", "native_table"]


def native_plan(
    spec: ModelSpec,
    signature: Signature,
    tables: Mapping[str, HostTable],
    lines_ahead: Mapping[str, int],
    num_threads: int,
    *,
    device_rows: Mapping[str, DeviceRows] = MappingProxyType({}),
    shared_rows: Mapping[str, SharedRows] = MappingProxyType({}),
    isa: str = "auto",
) -> Any:
    """Prepares the kernel for a model.

    Args:
      spec: the model, fitted.
      signature: of the model; a feature without a slot isn't gathered.
      tables: by name; kept alive by the kernel.
      lines_ahead: distance of the prefetch by table, in cache lines; 0 = none.
      num_threads: threads that gather, the caller among them.
      device_rows: of the signature's device tables, by name.
      shared_rows: of the tables that other processes update too, by name.
      isa: instruction set of pooling: "avx512", "avx2", "baseline", or "auto", the best that the CPU runs.

    Returns:
      A ``_native.Kernel``.

    Raises:
      ValueError: if the CPU doesn't run `isa`.
    """
    assert native is not None
    table_names = [table.name for table in spec.tables]
    leaf_names = [leaf.name for leaf in signature.leaves]
    features = []
    for feature in spec.features:
        slot = signature.slots.get(feature.name)
        fields = _feature(feature, is_gathered=slot is not None)
        fields["table"] = table_names.index(feature.table) if feature.table is not None else -1
        fields["leaf"], fields["begin"] = (leaf_names.index(slot.leaf), slot.begin) if slot else (-1, 0)
        lookup = signature.lookups.get(feature.name)
        fields["places_leaf"] = leaf_names.index(lookup.places) if lookup else -1
        fields["divisor_leaf"] = leaf_names.index(lookup.divisor) if lookup and lookup.divisor else -1
        features.append(fields)
    return native.Kernel(
        tables=[
            native_table(
                tables[t.name],
                lines_ahead[t.name],
                t.out_of_range,
                is_updatable=t.updatable and tables[t.name].rows.flags.writeable,
            )
            | _on_device(device_rows.get(t.name), t.num_rows)
            | _stamps(shared_rows.get(t.name))
            for t in spec.tables
        ],
        features=features,
        leaves=[(leaf.scope.value, leaf.dtype, math.prod(leaf.tail)) for leaf in signature.leaves],
        num_threads=num_threads,
        isa=isa,
    )


def native_table(
    table: HostTable,
    lines_ahead: int,
    out_of_range: OutOfRange = OutOfRange.ERROR,
    *,
    is_updatable: bool = False,
) -> dict[str, Any]:
    """A table as the kernel takes it."""
    return {
        "rows": table.rows,
        "format": table.format.value,
        "dim": table.dim,
        "lines_ahead": lines_ahead,
        "out_of_range": out_of_range.value,
        "is_updatable": is_updatable,
    }


def _stamps(shared: SharedRows | None) -> dict[str, Any]:
    if shared is None:
        return {"stamps": None, "journal": None}
    return {"stamps": shared.stamps, "journal": shared.journal}


def _on_device(rows: DeviceRows | None, num_rows: int) -> dict[str, Any]:
    if rows is None:
        return {"num_device_rows": 0, "device_places": None}
    return {"num_device_rows": rows.placement.num_rows, "device_places": rows.places(num_rows)}


def _feature(feature: FeatureSpec, *, is_gathered: bool) -> dict[str, Any]:
    floats = feature.dtype is ValueType.FLOAT32
    has_default = floats and feature.default is not None
    vocabulary = None
    if is_gathered and feature.vocabulary is not None and feature.vocabulary.values:
        vocabulary = index_of(feature.vocabulary).native
    boundaries = feature.bucketise.boundaries if feature.bucketise is not None else ()
    return {
        "kind": feature.kind.value,
        "scope": feature.scope.value,
        "dtype": feature.dtype.value,
        "width": feature.width if feature.kind is FeatureKind.DENSE else 1,
        "combiner": feature.combiner.value if feature.combiner is not None else "sum",
        "max_length": feature.max_length or 0,
        "has_default": has_default,
        "default_value": _float32(feature.default)[0] if has_default else 0.0,
        "operations": _operations(feature),
        "checks_log1p": feature.log1p_needs_check,
        "rows_from": _rows_from(feature),
        "hash_seed": feature.hash.seed if feature.hash is not None else 0,
        "vocabulary": vocabulary,
        "boundaries": _float32(boundaries),
    }


def _rows_from(feature: FeatureSpec) -> str:
    for name in ("hash", "vocabulary", "bucketise"):
        if getattr(feature, name) is not None:
            return name
    return "id"


def _operations(feature: FeatureSpec) -> list[tuple[str, list[float], list[float]]]:
    operations: list[tuple[str, list[float], list[float]]] = []
    for operation in feature.dense_operations:
        if isinstance(operation, Log1p):
            operations.append(("log1p", [], []))
        elif isinstance(operation, Clip):
            operations.append(("clip", _float32(operation.low), _float32(operation.high)))
        else:
            operations.append(("standardise", _float32(operation.mean), _float32(operation.std)))
    return operations


def _float32(values: Any) -> list[float]:
    """Rounded to float32, infinite where beyond it, as `xlarank.host.preprocessing` has them."""
    with np.errstate(over="ignore"):
        return np.atleast_1d(np.array(values, np.float64)).astype(np.float32).tolist()
