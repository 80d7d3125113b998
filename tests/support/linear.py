"""A model whose scores are arithmetic, and new versions of its bundle without a compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
from flax import nnx

from xlarank.bundle import BundleWriter, open_bundle
from xlarank.compiler import build_bundle
from xlarank.spec import FeatureSpec, ModelSpec, TableSpec, TaskKind, TaskSpec

SPEC = ModelSpec(
    name="linear",
    features=(
        FeatureSpec(name="age", kind="dense", scope="context"),
        FeatureSpec(name="likes", kind="dense", scope="candidate", width=2),
        FeatureSpec(name="topics", kind="id_list", scope="candidate", table="topics", combiner="sum"),
    ),
    tables=(TableSpec(name="topics", rows=10, dim=3),),
    tasks=(TaskSpec(name="value", kind=TaskKind.REGRESSION),),
)


class Linear(nnx.Module):
    """value = age * 2 + likes[0] - likes[1] + sum of the topics' vectors."""

    def __init__(self):
        self.scale = nnx.Param(np.float32([2.0]))

    def __call__(self, features):
        value = features["age"][:, 0] * self.scale[...][0]
        return {"value": value + features["likes"] @ np.float32([1.0, -1.0]) + features["topics"].sum(axis=1)}


def build(out: Path) -> Path:
    """Compiles it; returns the folder of the version."""
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    return build_bundle(Linear(), SPEC, {"topics": table}, out=out, buckets=[4, 16], tune_seconds=0)


def features(num_candidates: int) -> dict[str, object]:
    """Of a request."""
    rows = np.arange(num_candidates)
    return {
        "age": 3.0,
        "likes": np.stack([rows % 7, rows % 5], 1).astype(np.float32),
        "topics": [[i % 10, 1] for i in range(num_candidates)],
    }


def expected(num_candidates: int, scale: float = 2.0) -> np.ndarray:
    """Its scores by hand, of a version whose weight is `scale`."""
    # Row t of the table sums to 9t + 3, row 1 to 12.
    rows = np.arange(num_candidates)
    return 3.0 * scale + rows % 7 - rows % 5 + (9 * (rows % 10) + 3) + 12.0


def publish(
    version: Path,
    repository: Path,
    number: int,
    *,
    scale: float | None = None,
    rows: Collection[int] = (4, 16),
    golden_error: float = 0.0,
    with_code: bool = True,
    spec: ModelSpec = SPEC,
) -> Path:
    """Publishes a version with other weights and the programs of another one.

    Args:
      version: folder of that one, of `build`.
      repository: where to.
      number: of the new version.
      scale: its weight; the number by default, so that every answer says whose it is.
      rows: buckets to take along.
      golden_error: added to the golden scores.
      with_code: take the compiled code along.
      spec: what of the tables differs, or the name; rows of a table past the model's ten are zeros.
    """
    bundle = open_bundle(version)
    manifest = dataclasses.replace(bundle.manifest, spec=spec)
    scale = float(number) if scale is None else scale
    requests, values = bundle.golden()
    (before,) = bundle.params()["scale"]
    ages = np.repeat(
        [request.columns[0][0] for request in requests], [request.num_candidates for request in requests]
    )
    scores = values["scores"]["value"] + np.float32(scale - before) * ages + np.float32(golden_error)
    kept = [entry for entry in manifest.programs if entry.bucket.rows in rows]
    with BundleWriter(repository, spec.name, number) as writer:
        for entry in kept:
            writer.add_program(Path(entry.file).name, bundle.program(entry))
        if manifest.prepare is not None:
            writer.add_program(Path(manifest.prepare).name, bundle.prepare() or b"")
        writer.add_params({"scale": np.float32([scale])})
        for name, table in bundle.tables().items():
            num_more = spec.table_by_name[name].num_rows - len(table)
            writer.add_table(name, np.pad(table, [(0, num_more), (0, 0)]))
        writer.add_golden(requests, {"scores": {"value": scores.astype(np.float32)}})
        for file in bundle.cache_files() if with_code else ():
            (writer.cache_dir / file.name).write_bytes(file.read_bytes())
        return writer.publish(dataclasses.replace(manifest, programs=tuple(kept), files={}, cache_files={}))
