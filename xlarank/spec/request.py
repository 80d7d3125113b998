"""One ranking request: `RankRequest`."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import FeatureError
from xlarank.spec.columns import Column, Ragged, StringColumn
from xlarank.spec.features import CANDIDATE_IDS, FeatureSpec, OutOfRange, ValueType
from xlarank.spec.model import ModelSpec

__all__ = [
    "ContentCheck",
    "RankRequest",
    "check_by_name",
    "check_candidate_ids",
    "check_contents",
    "default_column",
]


class RankRequest:
    """One context and its N candidates, checked against a `ModelSpec`; it can't exist half valid.

    Immutable: its arrays are read until the scores are answered and must not be changed by the caller.

    Attributes:
      spec: the model that it was checked against.
      columns: one a feature, in the order of ``spec.features``; [1] row for scope context, [N] rows for
        scope candidate. Dense features are float32 [n, K_f]; ids int64 [n], float32 [n] (bucketised) or
        StringColumn; lists and sequences Ragged.
      num_candidates: N; may be 0.
    """

    __slots__ = ("columns", "num_candidates", "spec")

    def __init__(
        self,
        spec: ModelSpec,
        features: Mapping[str, Any],
        *,
        num_candidates: int | None = None,
        check: ContentCheck | None = None,
    ) -> None:
        """Checks and holds a request.

        Args:
          spec: the model.
          features: a value for each feature by name; one with a `default` may be left out, or None. A dense
            feature takes floats [n] or [n, K_f]; an id takes ints [n], strings [n] or a StringColumn; a
            list or sequence takes a Ragged or a list of n lists. n is 1 for scope context (a bare number
            or string will do) and N for scope candidate. Arrays of the right dtype are not copied.
          num_candidates: N where candidate ids say it; by default the candidate features do.
          check: looks at the values of columns whose form is right; `check_contents` by default. The
            server passes the native one, which accepts and refuses the same.

        Raises:
          FeatureError: names the feature, what was expected and what came.
        """
        check_by_name(spec, features)
        if not features.keys() <= spec.feature_by_name.keys():
            unknown = next(name for name in features if name not in spec.feature_by_name)
            raise FeatureError(
                f"model {spec.name!r} has no feature {unknown!r}; it has {[f.name for f in spec.features]}"
            )
        columns = [
            None if (value := features.get(feature.name)) is None else _as_column(feature, value)
            for feature in spec.features
        ]
        self._hold(spec, columns, num_candidates, check)

    @classmethod
    def of_columns(
        cls, spec: ModelSpec, columns: Sequence[Column | None], *, check: ContentCheck | None = None
    ) -> RankRequest:
        """A request of columns whose dtypes, ranks and strides are as stated above: what a server has read.

        Args:
          spec: the model.
          columns: one a feature, in the order of ``spec.features``; None for one that is left out.
          check: as above.

        Raises:
          FeatureError: as above, but for a column's form.
        """
        request = cls.__new__(cls)
        request._hold(spec, columns, None, check)
        return request

    def _hold(
        self,
        spec: ModelSpec,
        columns: Sequence[Column | None],
        num_candidates: int | None,
        check: ContentCheck | None,
    ) -> None:
        self.spec = spec
        self.num_candidates = _num_candidates(spec, columns, num_candidates)
        self.columns: tuple[Column, ...] = tuple(
            [
                default_column(feature, 1 if feature.is_context else self.num_candidates)
                if column is None
                else column
                for feature, column in zip(spec.features, columns, strict=True)
            ]
        )
        (check or check_contents)(spec, self.columns)

    def column(self, name: str) -> Column:
        """The column of a feature by name."""
        for feature, column in zip(self.spec.features, self.columns, strict=True):
            if feature.name == name:
                return column
        raise FeatureError(f"model {self.spec.name!r} has no feature {name!r}")

    def __repr__(self) -> str:
        return f"RankRequest(model={self.spec.name!r}, num_candidates={self.num_candidates})"


def check_by_name(spec: ModelSpec, features: Any) -> None:
    """Raises FeatureError for features of a request that aren't values by name."""
    if not isinstance(features, Mapping):
        raise FeatureError(
            f"model {spec.name!r}: expected values by feature name, got {_described(features)}"
        )


def check_candidate_ids(ids: Any) -> np.ndarray:
    """Candidate ids as [N] int64, C-contiguous; not copied if they are.

    Raises:
      FeatureError: for anything but integers of one dimension that int64 holds.
    """
    array = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise FeatureError(
            f"{CANDIDATE_IDS}: expected int64 ids of shape [N], got {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    return np.ascontiguousarray(array, np.int64)


ContentCheck = Callable[[ModelSpec, Sequence[Column]], None]
"""Raises FeatureError for a value that its FeatureSpec refuses."""


def check_contents(spec: ModelSpec, columns: Sequence[Column]) -> None:
    """Refuses values that a FeatureSpec doesn't allow: the one definition of what is valid.

    Args:
      spec: the model.
      columns: one a feature, of the right dtype and number of rows.

    Raises:
      FeatureError: for lengths that are negative or don't add up, string offsets likewise, ids out of
        range under policy `error`, floats that aren't finite (NaN passes where a default stands in),
        log1p of x <= -1.
    """
    for feature, column in zip(spec.features, columns, strict=True):
        values = column
        if isinstance(column, Ragged):
            _check_lengths(feature, column)
            values = column.values
        if isinstance(values, StringColumn):
            _check_offsets(feature, values)
            continue
        assert isinstance(values, np.ndarray)
        if not values.size:
            continue
        if feature.dtype is ValueType.FLOAT32:
            _check_floats(feature, values)
        elif feature.hash is None and feature.vocabulary is None:
            _check_range(spec, feature, values)


def _as_column(feature: FeatureSpec, value: Any) -> Column:
    """The column of what came, of the right dtype, rank and strides; rows and values are checked later."""
    if type(value) is np.ndarray and value.dtype == feature.array_dtype and value.flags.c_contiguous:
        # What the server sends: told apart first, because it is most of a request.
        if feature.is_lookup:
            if value.ndim == 1 and not feature.is_ragged:
                return value
        elif value.ndim == 2 and value.shape[1] == feature.width:
            return value
    if feature.is_ragged:
        return _as_ragged(feature, value)
    if feature.dtype is ValueType.STRING:
        return _as_strings(feature, value, scalar_ok=feature.is_context)
    array: Any = _as_array(feature, value, _shape_text(feature))
    if array.ndim == 0 and feature.is_context:
        array = array.reshape(1)
    if not feature.is_lookup:
        if array.ndim == 1 and feature.width == 1:
            array = array[:, None]
        elif array.shape == (0,) and not isinstance(value, np.ndarray):
            array = array.reshape(0, feature.width)
        if array.ndim != 2 or array.shape[1] != feature.width:
            raise _unexpected(feature, _expected_text(feature), value)
    elif array.ndim != 1:
        raise _unexpected(feature, _expected_text(feature), value)
    return array


def _as_ragged(feature: FeatureSpec, value: Any) -> Ragged:
    if not isinstance(value, Ragged):
        value = _pack_bags(feature, value)
    if feature.dtype is ValueType.STRING:
        values: Any = _as_strings(feature, value.values, scalar_ok=False)
    else:
        values = _as_array(feature, value.values, "[V]")
        if values.ndim != 1:
            raise _unexpected(feature, "int64 values of shape [V]", value.values)
    lengths = _integers(value.lengths)
    if lengths is None:
        raise _unexpected(feature, "int32 lengths of shape [n]", value.lengths)
    if lengths.dtype != np.int32 and lengths.size and (lengths.max() >= 2**31 or lengths.min() < 0):
        raise FeatureError(
            f"feature {feature.name!r}: expected lengths in [0, 2**31), "
            f"got {lengths.min()} to {lengths.max()}"
        )
    lengths = np.ascontiguousarray(lengths, np.int32)
    return value if values is value.values and lengths is value.lengths else Ragged(values, lengths)


def _pack_bags(feature: FeatureSpec, value: Any) -> Ragged:
    """Lists of ids, one a row, back to back; the ids are still to be checked."""
    expected = "a Ragged or a list of lists, one list a row"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _unexpected(feature, expected, value)
    flat: list[Any] = []
    for bag in value:
        is_array = isinstance(bag, np.ndarray) and bag.ndim == 1 and not isinstance(bag, np.ma.MaskedArray)
        if not is_array and (isinstance(bag, (str, bytes)) or not isinstance(bag, Sequence)):
            raise _unexpected(feature, expected, value)
        flat.extend(bag)
    return Ragged(flat, np.array([len(bag) for bag in value], np.int32))  # type: ignore[arg-type]


def _as_strings(feature: FeatureSpec, value: Any, *, scalar_ok: bool) -> StringColumn:
    expected = f"strings of shape {_shape_text(feature)}"
    if isinstance(value, StringColumn):
        return _plain_strings(feature, value)
    items = value
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        items = value.tolist()
    if scalar_ok and isinstance(items, (str, bytes)):
        items = [items]
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, bytes)) for item in items):
        raise _unexpected(feature, expected, value)
    try:
        return StringColumn.from_strings(items)
    except UnicodeEncodeError as error:
        raise FeatureError(
            f"feature {feature.name!r}: expected {expected}, got {reprlib.repr(error.object)}, which has no "
            f"UTF-8: {error.reason}"
        ) from None


def _plain_strings(feature: FeatureSpec, column: StringColumn) -> StringColumn:
    """A string column of the dtypes and strides that its class states: the kernel reads it by pointer."""
    blob, offsets = column.blob, _integers(column.offsets)
    if type(blob) is not np.ndarray or blob.ndim != 1 or blob.dtype != np.uint8:
        raise _unexpected(feature, "a StringColumn with a blob of uint8 of shape [bytes]", blob)
    if offsets is None or not offsets.size or (offsets.dtype == np.uint64 and offsets.max() >= 2**63):
        raise _unexpected(feature, "a StringColumn with int64 offsets of shape [n + 1]", column.offsets)
    blob, offsets = np.ascontiguousarray(blob), np.ascontiguousarray(offsets, np.int64)
    if blob is column.blob and offsets is column.offsets:
        return column
    return StringColumn(blob, offsets)


def _integers(value: Any) -> np.ndarray | None:
    """A [n] array of integers of any width; None for anything else."""
    if isinstance(value, np.ma.MaskedArray):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(value, (list, tuple)) and not value:
        array = array.astype(np.int32)
    return array if array.ndim == 1 and array.dtype.kind in "iu" else None


def _as_array(feature: FeatureSpec, value: Any, shape: str) -> np.ndarray:
    """A C-contiguous array of the feature's dtype; only casts that keep the meaning are made."""
    expected = f"{feature.dtype.value} of shape {shape}"
    dtype = feature.array_dtype
    assert dtype is not None
    if isinstance(value, np.ma.MaskedArray):
        raise _unexpected(feature, expected, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise _unexpected(feature, expected, value) from None
    if array.dtype == dtype:
        return np.ascontiguousarray(array) if array.ndim else array
    from_python = not isinstance(value, np.ndarray)
    if feature.dtype is ValueType.FLOAT32:
        allowed = array.dtype.kind == "f" or (from_python and array.dtype.kind in "iu")
    else:
        allowed = array.dtype.kind in "iu" and array.dtype != np.uint64
    if not (allowed or (from_python and array.size == 0)):
        raise _unexpected(feature, expected, value)
    # Floats beyond float32 become infinite, which the check of contents refuses.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=dtype) if array.ndim else array.astype(dtype)


def _num_candidates(spec: ModelSpec, columns: Sequence[Column | None], num_candidates: int | None) -> int:
    """N, after every column was seen to have it; None when only the columns say it."""
    first = CANDIDATE_IDS
    for feature, column in zip(spec.features, columns, strict=True):
        if column is None:
            if feature.default is None:
                raise FeatureError(
                    f"feature {feature.name!r} is missing: expected {_expected_text(feature)}; "
                    f"it has no default"
                )
            continue
        rows = len(column)
        if feature.is_context:
            if rows != 1:
                raise FeatureError(
                    f"feature {feature.name!r}: expected 1 row, got {rows}; its scope is context, "
                    f"so it is sent once a request"
                )
        elif num_candidates is None:
            num_candidates, first = rows, f"feature {feature.name!r}"
        elif rows != num_candidates:
            raise FeatureError(
                f"feature {feature.name!r}: expected {num_candidates} rows, as {first} has, got {rows}"
            )
    if num_candidates is None:
        names = [feature.name for feature in spec.candidate_features]
        raise FeatureError(
            f"model {spec.name!r}: expected at least one of the candidate features {names}, got none; "
            f"the number of candidates is unknown"
        )
    return num_candidates


def default_column(feature: FeatureSpec, num_rows: int) -> Column:
    """The column of a feature that was left out: its default in every row; it has one."""
    default: Any = feature.default
    if feature.is_ragged:
        lengths = np.full(num_rows, len(default), np.int32)
        if feature.dtype is ValueType.STRING:
            return Ragged(StringColumn.from_strings(list(default) * num_rows), lengths)
        return Ragged(np.tile(np.array(default, np.int64), num_rows), lengths)
    if feature.dtype is ValueType.STRING:
        return StringColumn.from_strings([default] * num_rows)
    shape = (num_rows,) if feature.is_lookup else (num_rows, feature.width)
    return np.full(shape, default, feature.array_dtype)


def _check_lengths(feature: FeatureSpec, column: Ragged) -> None:
    lengths, num_values = column.lengths, len(column.values)
    if lengths.size and lengths.min() < 0:
        row = int(np.argmax(lengths < 0))
        raise FeatureError(
            f"feature {feature.name!r}: expected lengths >= 0, got {lengths[row]} in row {row}"
        )
    total = int(lengths.sum(dtype=np.int64))
    if total != num_values:
        raise FeatureError(
            f"feature {feature.name!r}: expected lengths that add up to its {num_values} values, "
            f"got a sum of {total}"
        )


def _check_offsets(feature: FeatureSpec, strings: StringColumn) -> None:
    offsets, num_bytes = strings.offsets, len(strings.blob)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != num_bytes or (np.diff(offsets) < 0).any():
        raise FeatureError(
            f"feature {feature.name!r}: expected string offsets that rise from 0 to its {num_bytes} bytes, "
            f"got {len(offsets)} offsets from {offsets[:1].tolist()} to {offsets[-1:].tolist()}"
        )


def _check_floats(feature: FeatureSpec, values: np.ndarray) -> None:
    valid = np.isfinite(values)
    if feature.default is not None:
        valid |= np.isnan(values)
    if not valid.all():
        row = np.argwhere(~valid)[0]
        hint = "; it has no default to stand in for NaN" if np.isnan(values[tuple(row)]) else ""
        raise FeatureError(
            f"feature {feature.name!r}: expected finite floats, got {values[tuple(row)]} in row "
            f"{row[0]}{hint}"
        )
    if feature.log1p_needs_check:
        invalid = values <= -1
        if invalid.any():
            row = np.argwhere(invalid)[0]
            raise FeatureError(
                f"feature {feature.name!r}: expected values > -1, which log1p needs, got "
                f"{values[tuple(row)]} in row {row[0]}"
            )


def _check_range(spec: ModelSpec, feature: FeatureSpec, values: np.ndarray) -> None:
    table = spec.table_of(feature)
    if table.out_of_range is not OutOfRange.ERROR:
        return
    if values.min() < 0 or values.max() >= table.num_rows:
        position = int(np.argmax((values < 0) | (values >= table.num_rows)))
        raise FeatureError(
            f"feature {feature.name!r}: expected ids in [0, {table.num_rows}) of table {table.name!r}, "
            f"got {values[position]} at position {position}"
        )


def _shape_text(feature: FeatureSpec) -> str:
    rows = "1" if feature.is_context else "N"
    if feature.is_ragged:
        return f"[V] with lengths [{rows}]"
    return f"[{rows}, {feature.width}]" if feature.width > 1 else f"[{rows}]"


def _expected_text(feature: FeatureSpec) -> str:
    return f"{feature.dtype.value} of shape {_shape_text(feature)}"


def _unexpected(feature: FeatureSpec, expected: str, got: Any) -> FeatureError:
    return FeatureError(f"feature {feature.name!r}: expected {expected}, got {_described(got)}")


def _described(got: Any) -> str:
    """What came, in few words however large it is."""
    if isinstance(got, np.ma.MaskedArray):
        return f"a masked array of {got.dtype} of shape {list(got.shape)}; fill it first"
    if isinstance(got, np.ndarray):
        return f"{got.dtype} of shape {list(got.shape)}"
    if isinstance(got, (StringColumn, Ragged)):
        return f"a {type(got).__name__}"
    return f"{type(got).__name__} {reprlib.repr(got)}"
