"""A bundle for fuzzing: a model with every kind of feature, whose scores stay finite whatever it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlarank import device  # first: it sets the environment that JAX reads at import

# isort: split
import jax.numpy as jnp

from xlarank.compiler import build_bundle
from xlarank.spec import Clip, FeatureSpec, Hash, ModelSpec, OutOfRange, TableSpec, TaskSpec

__all__ = ["SPEC", "make_bundle"]

_DIM = 4
_CLIP = (Clip(low=-100.0, high=100.0),)


def _feature(name: str, kind: str, scope: str, **fields: Any) -> FeatureSpec:
    return FeatureSpec(name=name, kind=kind, scope=scope, **fields)  # type: ignore[arg-type]


SPEC = ModelSpec(
    name="fuzz",
    features=(
        _feature("age", "dense", "context", preprocessing=_CLIP),
        _feature("country", "id", "context", table="hashed", dtype="string", preprocessing=(Hash(),)),
        _feature("watched", "sequence", "context", table="videos", max_length=5),
        _feature("mood", "dense", "context", width=2, default=0.5, preprocessing=_CLIP),
        _feature("video", "id", "candidate", table="videos"),
        _feature("topics", "id_list", "candidate", table="hashed", combiner="mean", preprocessing=(Hash(),)),
        _feature(
            *("tags", "id_list", "candidate"),
            table="hashed",
            combiner="sum",
            dtype="string",
            preprocessing=(Hash(),),
            default=(),
        ),
        _feature("likes", "dense", "candidate", preprocessing=_CLIP),
        _feature("vector", "dense", "candidate", width=3, preprocessing=_CLIP),
        _feature("fresh", "id", "candidate", table="open", default=1),
    ),
    tables=(
        TableSpec(name="videos", rows=100, dim=_DIM),
        TableSpec(name="hashed", rows=50, dim=_DIM),
        TableSpec(name="open", rows=10, dim=_DIM, out_of_range=OutOfRange.ZERO),
    ),
    tasks=(TaskSpec(name="finish"), TaskSpec(name="share", output="share.score")),
)
"""Of the fuzzed model."""


def make_bundle(out: Path) -> Path:
    """Compiles it with random weights into a repository; returns the version's folder."""
    device.configure(num_devices=2)
    rng = np.random.default_rng(0)
    tables = {t.name: rng.normal(size=(t.num_rows, t.dim)).astype(np.float32) for t in SPEC.tables}
    widths = [feature.width if not feature.is_lookup else _DIM for feature in SPEC.features]
    params = {"w": rng.normal(size=(sum(widths), len(SPEC.tasks))).astype(np.float32) / sum(widths)}
    return build_bundle(_apply, SPEC, tables, params=params, out=out, buckets=[4, 16], tune_seconds=0)


def _apply(params: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    columns = []
    for feature in SPEC.features:
        values = features[feature.name]
        if values.ndim == 3:  # a sequence
            values = (values * features[f"{feature.name}.mask"][..., None]).sum(axis=1)
        columns.append(jnp.tanh(values))  # bags of strings may be of any length
    logits = jnp.concatenate(columns, axis=1) @ params["w"]  # [B, T]
    return {task.name: logits[:, i] for i, task in enumerate(SPEC.tasks)}
