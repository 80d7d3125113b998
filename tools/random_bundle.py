"""Compiles a config with fresh random weights into a bundle: for benchmarks, which need no trained model.

    python tools/random_bundle.py configs/dcn_v2.toml --out build/models --devices 2

The last line of the output is a JSON object with the bundle's path and what the compiler found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlarank import device  # first: it sets the environment that JAX reads at import

# isort: split
import numpy as np
from flax import nnx
from quick_compiles import quickly_compiled

from xlarank.compiler import BuildOptions, BuildResult, build, random_requests
from xlarank.models import build_model
from xlarank.models.embedding import INIT_STD
from xlarank.spec.config import load_config

__all__ = ["random_bundle"]


def random_bundle(
    config_file: Path,
    out: Path,
    *,
    num_devices: int,
    bucket_rows: tuple[int, ...] | None = None,
    model_options: Mapping[str, Any] | None = None,
    num_golden: int = 64,
    updatable: str | None = None,
) -> BuildResult:
    """Builds a bundle; call it before anything else of the process touches a device.

    Args:
      config_file: a model whose spec needs no fitting, as `configs/dcn_v2.toml`.
      out: the repository folder.
      num_devices: devices to leave compiled code for.
      bucket_rows: of the ladder; the config's by default.
      model_options: take the place of those of the config.
      num_golden: requests to prove each bucket with, here and at every load.
      updatable: a table whose rows may be written while it is served.

    Raises:
      ConfigError: for a config that can't be compiled without training.
    """
    device.configure(num_devices=num_devices)
    config = load_config(config_file)
    spec = config.spec
    if updatable is not None:
        tables = [dataclasses.replace(t, updatable=t.updatable or t.name == updatable) for t in spec.tables]
        spec = dataclasses.replace(spec, tables=tuple(tables))
    # Any weights will do. JAX would compile its random numbers anew for each table's shape, which takes as
    # long as all else here: tables are NumPy's.
    draw = np.random.default_rng(0)
    arrays = {
        t.name: INIT_STD * draw.standard_normal((t.num_rows, t.dim), dtype=np.float32) for t in spec.tables
    }
    chosen = {**config.options, **(model_options or {})}
    with quickly_compiled():
        model = build_model(config.model, spec, chosen, nnx.Rngs(0), folders=[config.folder])
    options = BuildOptions(
        bucket_rows=bucket_rows or config.bucket_rows,
        num_devices=num_devices,
        tune_seconds=0,  # every bucket in one form: servers and executables run the same program
        provenance={"config": config_file.name, "weights": "random"},
    )
    golden = random_requests(spec, num_golden)
    return build(model, spec, arrays, out=out, options=options, golden=golden)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a model's TOML file")
    parser.add_argument("--out", type=Path, required=True, help="repository folder")
    parser.add_argument("--devices", type=int, default=1, help="devices to leave compiled code for")
    parser.add_argument("--buckets", help="row counts such as 8,128,512; the config's by default")
    parser.add_argument("--options", type=json.loads, help="JSON object, in place of the model_options")
    parser.add_argument("--golden", type=int, default=64, help="golden requests (%(default)s)")
    parser.add_argument("--updatable", metavar="TABLE", help="rows of it may be written while it is served")
    args = parser.parse_args()
    rows = tuple(int(text) for text in args.buckets.split(",")) if args.buckets else None
    result = random_bundle(
        args.config,
        args.out,
        num_devices=args.devices,
        bucket_rows=rows,
        model_options=args.options,
        num_golden=args.golden,
        updatable=args.updatable,
    )
    print(
        json.dumps(
            {
                "path": str(result.path),
                "flops_per_row": result.analysis.flops_per_row,
                "num_buckets": len(result.manifest.programs),
            }
        )
    )


if __name__ == "__main__":
    main()
