"""A bundle of made-up times: as far as its manifest says, for what reads no more of it."""

import numpy as np

from xlarank.bundle import BundleWriter, Manifest, ProgramEntry
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, Precision, RankRequest, Tolerance

SPEC = ModelSpec.from_dict(
    {
        "name": "feed",
        "features": [{"name": "price", "kind": "dense", "scope": "candidate"}],
        "tasks": [{"name": "like"}],
    }
)


def write_bundle(folder, seconds, rows=(8, 128)):
    """A bundle whose buckets took so many seconds by device kind, as far as its manifest says."""
    request = RankRequest(SPEC, {"price": np.ones(2, np.float32)})
    with BundleWriter(folder, "feed", 7) as writer:
        programs = tuple(
            ProgramEntry(
                bucket=bucket,
                form="plain",
                prepared=(0,),
                file=writer.add_program(f"{bucket}.bin", b"program"),
                precision=Precision.FLOAT32,
                max_error={"like": 0.0},
                p99_error={"like": 0.0},
                seconds=seconds(bucket),
            )
            for bucket in (Bucket(b, q) for b in rows for q in (1, b))
        )
        writer.add_params({"w": np.zeros(1, np.float32)})
        writer.add_golden([request], {"scores": {"like": np.zeros(2, np.float32)}})
        return writer.publish(
            Manifest(
                spec=SPEC,
                programs=programs,
                params=("w",),
                num_prepared=1,
                tolerance=Tolerance(),
                budget=ErrorBudget(),
                architecture="",
                provenance={},
                fingerprint={},
            )
        )
