"""A model with every kind of candidate feature, rows of it, and a store that is a dict of rows."""

from __future__ import annotations

import numpy as np

from xlarank.spec import FeatureSpec, ModelSpec, Ragged, StringColumn, TableSpec, TaskSpec, default_column


def candidate(name, kind, **fields):
    return FeatureSpec(name=name, kind=kind, scope="candidate", **fields)


SPEC = ModelSpec(
    name="stored",
    features=(
        FeatureSpec(name="age", kind="dense", scope="context"),
        candidate("price", "dense", default=1.5),
        candidate("vector", "dense", width=3, default=0.25),
        candidate("item", "id", table="items", default=7),
        candidate(
            "hour", "id", table="hours", preprocessing=[{"op": "bucketise", "boundaries": [6.0]}], default=2.0
        ),
        candidate("brand", "id", table="words", dtype="string", preprocessing=["hash"], default="none"),
        candidate("topics", "id_list", table="items", combiner="sum", default=(1, 2)),
        candidate("path", "sequence", table="items", max_length=3, default=()),
        candidate(
            "tags",
            "id_list",
            table="words",
            combiner="mean",
            dtype="string",
            preprocessing=["hash"],
            default=("a", "", "bc"),
        ),
    ),
    tables=(
        TableSpec(name="items", rows=100, dim=4),
        TableSpec(name="hours", rows=2, dim=4),
        TableSpec(name="words", rows=50, dim=4),
    ),
    tasks=(TaskSpec(name="click"),),
)

STORED = SPEC.candidate_features

PATIENT_MS = 3.6e6
"""For a source that answers, on a machine that may be slow."""


def random_row(rng):
    """One candidate: plain Python values by feature name."""
    words = ["", "x", "grün", "a longer word than most"]
    return {
        "price": float(np.float32(rng.random())),
        "vector": [float(v) for v in rng.random(3).astype(np.float32)],
        "item": int(rng.integers(100)),
        "hour": float(rng.integers(24)),
        "brand": words[rng.integers(4)],
        "topics": [int(v) for v in rng.integers(0, 100, rng.integers(5))],
        "path": [int(v) for v in rng.integers(0, 100, rng.integers(4))],
        "tags": [words[i] for i in rng.integers(0, 4, rng.integers(4))],
    }


DEFAULT_ROW = {
    "price": 1.5,
    "vector": [0.25] * 3,
    "item": 7,
    "hour": 2.0,
    "brand": "none",
    "topics": [1, 2],
    "path": [],
    "tags": ["a", "", "bc"],
}


def columns_of(rows):
    """Values by feature name for a store, from rows as `random_row` makes them."""
    values = {feature.name: [row[feature.name] for row in rows] for feature in STORED}
    values["vector"] = np.array(values["vector"], np.float32).reshape(-1, 3)
    if not rows:
        empty = {feature.name: default_column(feature, 0) for feature in STORED}
        return values | {
            name: empty[name] for name in ("price", "hour", "item", "topics", "path", "tags", "brand")
        }
    return values


def rows_of(columns):
    """Rows of columns by name: the inverse of `columns_of`, of what a store gives."""
    plain = {name: _plain(column) for name, column in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def _plain(column):
    if isinstance(column, Ragged):
        flat, ends = _plain(column.values), np.cumsum(column.lengths)
        return [flat[end - n : end] for end, n in zip(ends, column.lengths, strict=True)]
    if isinstance(column, StringColumn):
        return [text.decode() for text in column.to_bytes()]
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    return column.tolist()
