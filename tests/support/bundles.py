"""A bundle over tables of any size and format, published without a compiler: for tests of loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from xlarank.bundle import BundleWriter, Manifest, ProgramEntry, TableError, stored_form
from xlarank.host import HostTable
from xlarank.spec import (
    Bucket,
    ErrorBudget,
    FeatureSpec,
    ModelSpec,
    RankRequest,
    TablePlacement,
    TableSpec,
    TaskSpec,
    Tolerance,
)

__all__ = ["fill", "publish"]


def publish(
    repository: Path,
    tables: Mapping[str, HostTable | np.ndarray],
    *,
    updatable: Collection[str] = (),
    on_devices: Collection[str] = (),
) -> Path:
    """Publishes tables, encoded or [R, D] float32, each read by a candidate id; the program is no program.

    Those `on_devices` are there with all their rows.
    """
    specs, arrays = {}, {}
    for name, table in tables.items():
        if isinstance(table, HostTable):
            specs[name] = TableSpec(name=name, rows=table.num_rows, dim=table.dim, dtype=table.format)
            arrays[name] = table.rows.view(stored_form(specs[name])[0])
        else:
            specs[name] = TableSpec(name=name, rows=len(table), dim=table.shape[1])
            arrays[name] = table
        specs[name] = dataclasses.replace(specs[name], updatable=name in updatable)
    with BundleWriter(repository, "bare") as writer:
        return fill(writer, specs, arrays, on_devices)


def fill(
    writer: BundleWriter,
    tables: Mapping[str, TableSpec],
    arrays: Mapping[str, np.ndarray],
    on_devices: Collection[str] = (),
) -> Path:
    """Adds all that a bundle needs and publishes it."""
    spec = ModelSpec(
        name="bare",
        features=tuple(FeatureSpec(name=f"{n}_id", kind="id", scope="candidate", table=n) for n in tables),  # type: ignore[arg-type]
        tables=tuple(tables.values()),
        tasks=(TaskSpec(name="like"),),
    )
    for name, array in arrays.items():
        writer.add_table(name, array)
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
        num_prepared=len(on_devices),
        placements=tuple(TablePlacement(n, tables[n].num_rows, {f"{n}_id": 1}) for n in on_devices),
        placed_at=tuple(range(len(on_devices))),
        tolerance=Tolerance(),
        budget=ErrorBudget(),
        table_errors={"like": TableError(0.0, 0.0, None)},
        architecture="",
        provenance={},
        fingerprint={},
    )
    return writer.publish(manifest)
