"""`xlarank inspect`: what a bundle holds, for a person or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xlarank.bundle import FORMAT_VERSION, Bundle, Manifest, Verify, open_bundle, resolve_bundle
from xlarank.cli.console import output_console
from xlarank.spec import FeatureSpec, Vocabulary, operation_to_dict
from xlarank.spec.wording import counted

__all__ = ["add_parser", "run"]

_EXAMPLE = """example:
  xlarank inspect models/movielens       the highest version
  xlarank inspect models/movielens/3     this one
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand to those of `argparse`."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle holds",
        description="Shows the features, tables, buckets, precision, sizes, fingerprint, measured latency "
        "and errors of a bundle, after checking that every file is whole.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a version, or of a model")
    parser.add_argument(
        "--no-verify", action="store_true", help="look at sizes only; don't read every file for its sha256"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints tables; returns the same as JSON values.

    Raises:
      BundleError: if the bundle isn't whole.
    """
    bundle = open_bundle(
        resolve_bundle(args.bundle), verify=Verify.SIZES if args.no_verify else Verify.EVERYTHING
    )
    facts = _facts(bundle, is_verified=not args.no_verify)
    _show(facts, output_console())
    return facts


def _facts(bundle: Bundle, *, is_verified: bool) -> dict[str, Any]:
    manifest, spec = bundle.manifest, bundle.spec
    requests, _ = bundle.golden()
    return {
        "path": str(bundle.path),
        "model": spec.name,
        "version": manifest.version,
        "format_version": FORMAT_VERSION,
        "verified": is_verified,
        "features": [_feature_facts(feature) for feature in spec.features],
        "tables": _table_facts(manifest),
        "tasks": [{"name": t.name, "kind": t.kind.value, "output": t.output} for t in spec.tasks],
        "buckets": [
            {
                "rows": program.bucket.rows,
                "requests": program.bucket.requests,
                "form": program.form,
                "precision": program.precision.value,
                "program_bytes": manifest.files[program.file].bytes,
                "max_error": dict(program.max_error),
                "p99_error": dict(program.p99_error),
                "seconds": dict(program.seconds),
            }
            for program in manifest.programs
        ],
        "prepared_arrays": manifest.num_prepared,
        "unused_features": list(manifest.unused_features),
        "activations": manifest.activations,
        "architecture": manifest.architecture,
        "tolerance": {
            "probability": manifest.tolerance.probability,
            "regression": manifest.tolerance.regression,
        },
        "budget": {
            "max_score_error": manifest.budget.max_score_error,
            "max_auc_loss": manifest.budget.max_auc_loss,
        },
        "table_errors": {task: dataclasses.asdict(e) for task, e in manifest.table_errors.items()},
        "params": {
            "arrays": len(manifest.params),
            "values": sum(array.size for array in bundle.params().values()),
        },
        "golden": {"requests": len(requests), "rows": sum(request.num_candidates for request in requests)},
        "bytes": _sizes(bundle),
        "cache": {
            "listed_files": len(manifest.cache_files),
            "whole_files": len(bundle.cache_files()),
        },
        "fingerprint": dict(manifest.fingerprint),
        "provenance": dict(manifest.provenance),
    }


def _feature_facts(feature: FeatureSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": feature.name,
        "scope": feature.scope.value,
        "kind": feature.kind.value,
        "dtype": feature.dtype.value,
        "table": feature.table,
        "combiner": None if feature.combiner is None else feature.combiner.value,
        "max_length": feature.max_length,
        "preprocessing": [_operation_text(operation) for operation in feature.preprocessing],
        "default": feature.default,
    }
    if not feature.is_lookup:
        facts["width"] = feature.width
    return facts


def _operation_text(operation: Any) -> str:
    """An operation in a few words; its long lists as their number of values."""
    values = operation_to_dict(operation)
    name = values.pop("op")
    if isinstance(operation, Vocabulary):
        return f"{name} of {len(values['values'])}"
    texts = [
        f"{key}={f'[{len(value)} values]' if isinstance(value, list) and len(value) > 4 else value}"
        for key, value in values.items()
    ]
    return f"{name} {' '.join(texts)}".strip()


def _table_facts(manifest: Manifest) -> list[dict[str, Any]]:
    spec, placements = manifest.spec, {placement.table: placement for placement in manifest.placements}
    return [
        {
            "name": table.name,
            "rows": table.num_rows,
            "dim": table.dim,
            "dtype": table.dtype.value,
            "out_of_range": table.out_of_range.value,
            "bytes": table.num_bytes,
            "updatable": table.updatable,
            "device_rows": placements[table.name].num_rows if table.name in placements else 0,
            "device_bytes": placements[table.name].num_bytes(spec) if table.name in placements else 0,
            "device_capacities": dict(placements[table.name].capacities) if table.name in placements else {},
            "features": [feature.name for feature in spec.features if feature.table == table.name],
        }
        for table in spec.tables
    ]


def _sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes on the disk by part of the bundle, and in all."""
    sizes: dict[str, int] = {}
    for files in (bundle.manifest.files, bundle.manifest.cache_files):
        for path, digest in files.items():
            part = path.split("/")[0]
            sizes[part] = sizes.get(part, 0) + digest.bytes
    return {**sizes, "total": sum(sizes.values())}


def _show(facts: Mapping[str, Any], console: Console) -> None:
    state = "every file is whole" if facts["verified"] else "sizes checked, contents not"
    console.print(f"{facts['model']} version {facts['version']}: {state}", style="bold", highlight=False)
    console.print(facts["path"], soft_wrap=True, highlight=False, markup=False)
    _print_table(
        console,
        "features",
        ("feature", "scope", "kind", "type", "table", "pooling", "preprocessing", "default"),
        [
            (
                feature["name"],
                feature["scope"],
                feature["kind"],
                feature["dtype"] + (f" x {feature['width']}" if feature.get("width", 1) > 1 else ""),
                feature["table"],
                " ".join(str(v) for v in (feature["combiner"], feature["max_length"]) if v is not None),
                ", ".join(feature["preprocessing"]),
                feature["default"],
            )
            for feature in facts["features"]
        ],
    )
    _print_table(
        console,
        "tables",
        ("table", "rows", "on devices", "dim", "type", "out of range", "size", "features"),
        [
            (t["name"], f"{t['rows']:,}", f"{t['device_rows']:,}", t["dim"], t["dtype"], t["out_of_range"],
             _size_text(t["bytes"]), ", ".join(t["features"]))
            for t in facts["tables"]
        ],
    )  # fmt: skip
    if any(table["dtype"] != "float32" for table in facts["tables"]):
        _print_table(
            console,
            "what the tables' types cost",
            ("task", "p99 error", "largest error", "AUC loss"),
            [
                (task, f"{e['p99']:.1e}", f"{e['max']:.1e}",
                 None if e["auc_loss"] is None else f"{e['auc_loss']:+.1e}")
                for task, e in facts["table_errors"].items()
            ],
        )  # fmt: skip
    _print_table(
        console,
        "tasks",
        ("task", "kind", "output"),
        [(task["name"], task["kind"], task["output"]) for task in facts["tasks"]],
    )
    _show_buckets(facts, console)
    sizes = {part: _size_text(num_bytes) for part, num_bytes in facts["bytes"].items()}
    _print_table(console, "sizes", ("part", "bytes"), sizes.items())
    weights, golden, cache = facts["params"], facts["golden"], facts["cache"]
    counts = {
        "dense weights": f"{weights['values']:,} in {counted(weights['arrays'], 'array')}",
        "golden requests": f"{golden['requests']:,} with {counted(golden['rows'], 'candidate')}",
        "files of compiled code": f"{cache['whole_files']} whole of {cache['listed_files']}",
    }
    counts["prepared arrays"] = str(facts["prepared_arrays"])
    counts["features not looked up"] = ", ".join(facts["unused_features"]) or "none"
    _print_table(console, "contents", ("what", "how much"), counts.items())
    for title in ("fingerprint", "provenance"):
        _print_table(console, title, ("key", "value"), sorted(facts[title].items()))


def _show_buckets(facts: Mapping[str, Any], console: Console) -> None:
    kinds = sorted({kind for bucket in facts["buckets"] for kind in bucket["seconds"]})
    tasks = [task["name"] for task in facts["tasks"]]
    tolerance = facts["tolerance"]
    _print_table(
        console,
        f"buckets (tolerance {tolerance['probability']:g} on probabilities, "
        f"{tolerance['regression']:g} x max(1, |score|) on regressions)",
        ("rows", "requests", "form", "precision", "program", *(f"ms on {k}" for k in kinds),
         *(f"error of {task}" for task in tasks)),
        [
            (
                bucket["rows"],
                bucket["requests"],
                bucket["form"],
                bucket["precision"],
                _size_text(bucket["program_bytes"]),
                *(f"{1000 * bucket['seconds'][kind]:.3f}" for kind in kinds),
                *(f"{bucket['max_error'][task]:.1e}" for task in tasks),
            )
            for bucket in facts["buckets"]
        ],
    )  # fmt: skip


def _print_table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]
) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text, for a default or a config may look like markup.
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(table)


def _size_text(num_bytes: int) -> str:
    """Bytes with a unit of 1024s, three digits."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
