"""Weights-only refresh: what programs depend on, and earlier versions that have the same:
`architecture_of`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlarank import device
from xlarank.bundle import Bundle, Verify, open_bundle, versions_in
from xlarank.compiler.options import BuildOptions
from xlarank.compiler.program import Traces
from xlarank.compiler.result import Tuning
from xlarank.compiler.table_formats import Formats
from xlarank.compiler.tracing import constant_bytes, structural_text
from xlarank.errors import BundleError
from xlarank.host import DeviceRows
from xlarank.spec import Bucket, LatencyProfile, ModelSpec, Signature

__all__ = ["TUNING_FILE", "KnownTimes", "Reusable", "architecture_of", "find_reusable", "latest_profile"]

_log = logging.getLogger(__name__)

TUNING_FILE = "tuning.json"

_TRACED_ROWS = (2, 32)  # traced anyway: for unused features, for the analysis


@dataclasses.dataclass(frozen=True)
class Reusable:
    """What an earlier version leaves to its successors."""

    version: int
    prepare: bytes
    programs: Mapping[Bucket, tuple[bytes, tuple[int, ...]]]
    """By bucket: the exported program and the prepared arrays that it takes."""

    num_prepared: int
    tuning: Tuning
    seconds: Mapping[Bucket, float]
    """Measured then, on a device of this kind."""

    cache_files: tuple[Path, ...]
    table_formats: Formats
    device_rows: tuple[DeviceRows, ...]
    placed_at: tuple[int, ...]
    """See `Manifest.placed_at`."""

    def copy_cache(self, folder: Path) -> None:
        """Puts the compiled code where JAX looks for it."""
        for file in self.cache_files:
            shutil.copyfile(file, folder / file.name)


def architecture_of(
    traces: Traces, signature: Signature, options: BuildOptions, labelled: Collection[str]
) -> str:
    """Digest of all that programs and forms depend on; weights, tables and fitted statistics don't count.

    That is: the model's operations at a few row counts with the constants in them, the
    shapes and dtypes of its weights, the layout of its leaves, the ladder, the precision asked for, this
    machine's fingerprint, the tasks with labels, and the source of compiler, device and spec.
    """
    traffic = options.traffic
    largest = max(options.bucket_rows) if traffic is None else min(traffic.sizes.largest, traffic.max_rows)
    digest = hashlib.sha256()
    for num_rows in sorted({*_TRACED_ROWS, largest}):
        closed = traces.at(num_rows).closed
        digest.update(structural_text(closed.jaxpr).encode())
        for const in closed.consts:
            digest.update(constant_bytes(const))
    facts = {
        "leaves": [repr(leaf) for leaf in signature.leaves],
        "features": [
            (f.name, f.scope.value, repr(signature.slots.get(f.name))) for f in traces.spec.features
        ],
        "labelled": sorted(labelled),
        "tasks": [(task.name, task.kind.value) for task in traces.spec.tasks],
        "ladder": repr(traffic) if traffic is not None else sorted(set(options.bucket_rows)),
        "policy": repr(options.policy),
        "placement": repr(options.placement),
        "fingerprint": device.fingerprint(),
        "source": _own_source(),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def find_reusable(out: Path, spec: ModelSpec, architecture: str, options: BuildOptions) -> Reusable | None:
    """The newest version in a repository with the same architecture that was tuned for at least as long.

    A damaged version is passed over with a warning.
    """
    folder = out / spec.name
    for version in reversed(versions_in(folder)):
        try:
            bundle = open_bundle(folder / str(version), verify=Verify.SIZES)
            if bundle.manifest.architecture != architecture or bundle.manifest.refusal:
                continue
            open_bundle(folder / str(version))
            found = _reusable(bundle)
        except (BundleError, KeyError, TypeError, ValueError) as error:
            _log.warning("version %s of %s can't be reused: %s", version, spec.name, error)
            continue
        if found.tuning.seconds >= options.tune_seconds:
            return found
    return None


@dataclasses.dataclass(frozen=True)
class KnownTimes:
    """Times that an earlier version was measured at."""

    version: int
    profile: LatencyProfile
    is_same_architecture: bool
    """Else its weights have the same names and shapes, and its operations may be others."""


def latest_profile(
    out: Path, spec: ModelSpec, kind: str, architecture: str, params: Mapping[str, np.ndarray]
) -> KnownTimes | None:
    """Times of an earlier version in a repository to plan by.

    Args:
      out: the repository.
      spec: of the model.
      kind: of device.
      architecture: see `architecture_of`; the ladder counts in it, so another traffic is another one.
      params: the model's weights by name.

    Returns:
      The newest version's of the same architecture, else the newest's of weights of the same shapes; None
      where there is neither, as times of another model may suggest any ladder.
    """
    alike: KnownTimes | None = None
    for version in reversed(versions_in(out / spec.name)):
        try:
            bundle = open_bundle(out / spec.name / str(version), verify=Verify.SIZES)
            profile = bundle.manifest.latency[kind]
            if bundle.manifest.architecture == architecture:
                return KnownTimes(version, profile, True)
            if alike is None and _shapes(bundle.params()) == _shapes(params):
                alike = KnownTimes(version, profile, False)
        except (BundleError, KeyError) as error:
            _log.warning("version %s of %s has no times to plan by: %s", version, spec.name, error)
    return alike


def _shapes(params: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    return {name: (array.shape, array.dtype) for name, array in params.items()}


def _reusable(bundle: Bundle) -> Reusable:
    manifest = bundle.manifest
    prepare = bundle.prepare()
    if prepare is None:
        raise BundleError(f"{bundle.path}: expected a prepare program")
    kind = device.device_kind(device.devices()[0])
    return Reusable(
        version=manifest.version,
        prepare=prepare,
        programs={entry.bucket: (bundle.program(entry), entry.prepared) for entry in manifest.programs},
        num_prepared=manifest.num_prepared,
        tuning=Tuning.from_dict(json.loads(bundle.text(TUNING_FILE))),
        seconds=manifest.latency[kind].seconds,
        cache_files=tuple(bundle.cache_files()),
        table_formats={table.name: table.dtype for table in bundle.spec.tables},
        device_rows=DeviceRows.of_bundle(manifest.placements, bundle.device_rows()),
        placed_at=manifest.placed_at,
    )


@functools.cache
def _own_source() -> str:
    """Digest of the files that make, lay out and run programs: others may choose other forms."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("compiler", "device", "spec"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
