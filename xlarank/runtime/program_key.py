"""What of a bundle is compiled, told without JAX: `program_key`, `updatable_tables`."""

from __future__ import annotations

import hashlib
import json

from xlarank.bundle import Bundle
from xlarank.spec import Signature
from xlarank.spec.signature import DeviceTable

__all__ = ["program_key", "updatable_tables"]


def updatable_tables(bundle: Bundle) -> dict[str, tuple[DeviceTable, int]]:
    """Tables whose rows devices hold and that are updated while they serve: by name, the rows' array and its
    place among the prepared."""
    spec, manifest = bundle.spec, bundle.manifest
    signature = Signature.of_model(spec, manifest.unused_features, manifest.activations, manifest.placements)
    places = zip(signature.device_tables, manifest.placed_at, strict=True)
    return {t.name: (t, place) for t, place in places if spec.table_by_name[t.name].updatable}


def program_key(bundle: Bundle) -> str:
    """Equal for bundles of which one's compiled programs serve the other too, in one process."""
    manifest = bundle.manifest
    files = sorted(manifest.files[entry.file].sha256 for entry in manifest.programs)
    prepare = "" if manifest.prepare is None else manifest.files[manifest.prepare].sha256
    updates = [[name, *table.shape, table.dtype] for name, (table, _) in updatable_tables(bundle).items()]
    return hashlib.sha256(json.dumps([files, prepare, updates]).encode()).hexdigest()
