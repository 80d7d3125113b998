"""A bundle of one dense task over tables of any size, published without a compiler: for tests of loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xlarank.bundle import BundleWriter, Manifest, ProgramEntry
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, RankRequest, Tolerance

__all__ = ["publish", "spec_of"]


def spec_of(tables: dict[str, np.ndarray]) -> ModelSpec:
    """A candidate id by table."""
    return ModelSpec.from_dict(
        {
            "name": "bare",
            "features": [
                {"name": f"{name}_id", "kind": "id", "scope": "candidate", "table": name} for name in tables
            ],
            "tables": [{"name": n, "rows": len(t), "dim": t.shape[1]} for n, t in tables.items()],
            "tasks": [{"name": "like"}],
        }
    )


def publish(repository: Path, tables: dict[str, np.ndarray]) -> Path:
    """Publishes them; the program is no program."""
    spec = spec_of(tables)
    with BundleWriter(repository, "bare") as writer:
        for name, table in tables.items():
            writer.add_table(name, table)
        writer.add_params({})
        request = RankRequest(spec, {f"{name}_id": [0] for name in tables})
        writer.add_golden([request], {"scores": {"like": np.full(1, 0.5, np.float32)}})
        program = ProgramEntry(
            bucket=Bucket(1, 1),
            form="plain",
            prepared=(),
            file=writer.add_program("1x1.bin", b"none"),
            precision="float32",  # type: ignore[arg-type]
            max_error={"like": 0.0},
            p99_error={"like": 0.0},
            seconds={},
        )
        manifest = Manifest(
            spec=spec,
            programs=(program,),
            params=(),
            num_prepared=0,
            tolerance=Tolerance(),
            budget=ErrorBudget(),
            architecture="",
            provenance={},
            fingerprint={},
        )
        return writer.publish(manifest)
