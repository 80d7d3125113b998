"""A tiny bundle, in each test's own folder."""

import shutil

import numpy as np
import pytest

from xlarank.bundle import BundleWriter, Manifest, ProgramEntry
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, RankRequest, Tolerance

BUCKETS = (Bucket(4, 1), Bucket(4, 4), Bucket(8, 8))
PARAMS = {
    "mlp.kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "bias": np.zeros((), np.float32),
    "a.last": np.full(5, -0.0, np.float32),
}
TABLES = {
    "users": np.arange(33, dtype=np.float32).reshape(11, 3),
    "items": np.linspace(-1, 1, 5, dtype=np.float32).reshape(5, 1),
}


@pytest.fixture(scope="session")
def tiny_spec():
    return ModelSpec.from_dict(
        {
            "name": "tiny",
            "features": [
                {"name": "user", "kind": "id", "scope": "context", "table": "users"},
                {"name": "age", "kind": "dense", "scope": "context"},
                {
                    "name": "item",
                    "kind": "id",
                    "scope": "candidate",
                    "table": "items",
                    "dtype": "string",
                    "preprocessing": [{"op": "vocabulary", "values": ["a", "bö", "c"]}],
                },
            ],
            "tables": [{"name": "users", "dim": 3, "rows": 11}, {"name": "items", "dim": 1, "rows": 5}],
            "tasks": [{"name": "like"}, {"name": "stay", "kind": "regression"}],
        }
    )


@pytest.fixture(scope="session")
def tiny_golden(tiny_spec):
    """Two requests of 2 and 3 candidates, and the scores of their 5 rows."""
    requests = [
        RankRequest(tiny_spec, {"user": 3, "age": 1.5, "item": ["a", "c"]}),
        RankRequest(tiny_spec, {"user": 10, "age": -2.0, "item": ["bö", "", "zz"]}),
    ]
    rows = np.arange(5, dtype=np.float32)
    return requests, {"scores": {"like": rows / 5, "stay": rows - 2}}


@pytest.fixture(scope="session")
def tiny_manifest(tiny_spec):
    return Manifest(
        spec=tiny_spec,
        programs=tuple(
            ProgramEntry(
                bucket=bucket,
                form="hoisted, wide" if bucket.requests == 1 else "plain",
                prepared=(2, 0) if bucket.requests == 1 else (1,),
                file=f"programs/{bucket}.bin",
                precision="float32",
                max_error={"like": 1e-7, "stay": 2e-6},
                p99_error={"like": 1e-8, "stay": 1e-6},
                seconds={"cpu": bucket.rows / 1000, "gpu": 1e-4},
            )
            for bucket in BUCKETS
        ),
        params=tuple(PARAMS),
        prepare="programs/prepare.bin",
        num_prepared=3,
        budget=ErrorBudget(1e-3, 1e-4),
        architecture="a1b2",
        tolerance=Tolerance(1e-5, 2e-5),
        provenance={"created": "2026-01-02T03:04:05Z", "xlarank": "0.1.0", "config": 'name = "tïny"\n'},
        fingerprint={"jax": "0.12.0", "device": "cpu"},
    )


@pytest.fixture(scope="session")
def fill(tiny_golden, tiny_manifest):
    """Adds everything that `tiny_manifest` names to an open writer."""

    def add(writer: BundleWriter) -> None:
        for bucket in BUCKETS:
            assert (
                writer.add_program(f"{bucket}.bin", f"program {bucket}".encode()) == f"programs/{bucket}.bin"
            )
        writer.add_program("prepare.bin", b"\x00\xff")
        writer.add_params(PARAMS)
        for name, table in TABLES.items():
            writer.add_table(name, table)
        writer.add_golden(*tiny_golden)
        writer.add_text("report.html", "<p>größer</p>")
        (writer.cache_dir / "jit_f-0123-cache").write_bytes(b"machine code")
        (writer.cache_dir / "more").mkdir()
        (writer.cache_dir / "more" / "x").write_bytes(b"")

    return add


@pytest.fixture
def publish(tmp_path, fill, tiny_manifest):
    """Publishes a version of the tiny model under `tmp_path`; returns its folder."""

    def run(version=None, repository=tmp_path):
        with BundleWriter(repository, "tiny", version) as writer:
            fill(writer)
            return writer.publish(tiny_manifest)

    return run


@pytest.fixture(scope="session")
def template(tmp_path_factory, fill, tiny_manifest):
    """A published version that tests may read."""
    with BundleWriter(tmp_path_factory.mktemp("template"), "tiny") as writer:
        fill(writer)
        return writer.publish(tiny_manifest)


@pytest.fixture
def bundle_path(template, tmp_path):
    """A copy of `template` that a test may damage; publishing waits for the disk, copying doesn't."""
    return shutil.copytree(template, tmp_path / "tiny" / "1")
